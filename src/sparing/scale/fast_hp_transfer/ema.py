"""The smooth trajectory: a moving average of the weights, and how often a point of it is taken."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.errors import ConfigError


@dataclass(frozen=True)
class EmaSchedule:
    """Decay of the average and stride between records, which both grow while training settles.

    The window 1/(1 - decay) and the stride rise linearly over `steps`, then stay. The defaults are
    the paper's for Llama and for its MLP; for GPT-2 it has 0.995 to 0.996 and a stride of 1 to 2,
    over a period that is not given.

    Arguments:
        decay, last_decay: from 0 to below 1. 0 throughout records the raw weights.
        stride, last_stride: optimizer steps between records, 1 or more.
        steps: of the rise.

    Raises:
        ConfigError: a value out of range.
    """

    decay: float = 0.98
    last_decay: float = 0.9995
    stride: int = 2
    last_stride: int = 10
    steps: int = 2000

    def __post_init__(self) -> None:
        for name in ("decay", "last_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        for name in ("stride", "last_stride", "steps"):
            self._require(name, getattr(self, name) >= 1, "1 or more")

    @classmethod
    def constant(cls, decay: float, stride: int = 1) -> "EmaSchedule":
        """The same throughout."""
        return cls(decay, decay, stride, stride)

    def decay_at(self, step: int) -> float:
        """Decay of the update after a step, counted from 0."""
        first, last = 1 / (1 - self.decay), 1 / (1 - self.last_decay)
        return 1 - 1 / (first + (last - first) * self._share(step))

    def stride_at(self, step: int) -> int:
        """Steps from a record at a step to the next."""
        return round(self.stride + (self.last_stride - self.stride) * self._share(step))

    def _share(self, step: int) -> float:
        return min(1.0, step / self.steps)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(
                f"EmaSchedule.{name}", expected=expected, found=repr(getattr(self, name)),
                mend="The paper's values are the defaults.",
            )  # fmt: skip


@torch.no_grad()
def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Detached copies in float32, or in float64 where a parameter is."""
    return [
        p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters
    ]


@torch.no_grad()
def move_towards(average: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """average <- decay · average + (1 - decay) · parameters, in place; exact for a decay of 0."""
    for mean, parameter in zip(average, parameters, strict=True):
        mean.mul_(decay).add_(parameter.detach().to(mean.dtype), alpha=1 - decay)
