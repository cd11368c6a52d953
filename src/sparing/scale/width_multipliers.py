"""Constants that keep logits and attention scores of one size as a model grows wider."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparing.errors import ConfigError
from sparing.scale.base_shapes import Shapes, pairs_with
from sparing.scale.parameters import Role
from sparing.surgery import attentions


class Installed:
    """Multipliers in a model, until `remove` is called."""

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Make the model what it was."""
        while self._undo:
            self._undo.pop()()


@dataclass(frozen=True)
class WidthMultipliers:
    """What a model has to multiply, compared with the base ("wd-scaling", eq. 5 and 6; both
    reconstructed after μP).

    Arguments:
        logits: width of the base over width.
        attention: of the scale 1/√head: √(head of the base / head), which is 1 where models grow by
            more heads instead of larger ones.
    """

    logits: float = 1.0
    attention: float = 1.0

    @classmethod
    def between(
        cls,
        base: nn.Module | Shapes | Path,
        model: nn.Module,
        overrides: dict[str, Role] | None = None,
    ) -> "WidthMultipliers":
        """Read them from two models.

        Arguments:
            base: see `pairs_with`; where it is shapes alone, heads are taken to be of one size.
            model: to be trained.
            overrides: roles of parameters that are not known.
        """
        found = [
            1 / pair.input_ratio
            for pair in pairs_with(base, model, overrides)
            if pair.target.role == "head" or pair.target.tied
        ]
        before, now = _head_dim(base), _head_dim(model)
        attention = math.sqrt(before / now) if before and now else 1.0
        return cls(found[0] if found else 1.0, attention)

    def describe(self) -> str:
        """In words, without what is 1."""
        parts = {"the logits": self.logits, "attention's scale, as heads grow,": self.attention}
        return " and ".join(f"{what} by {value:.4g}" for what, value in parts.items() if value != 1)

    def install(self, model: nn.Module) -> Installed:
        """Put them into a `transformers` model. They are not saved with it: install them again
        after loading.

        Raises:
            ConfigError: no output embedding, or attention without a `scaling`.
        """
        undo: list[Callable[[], None]] = []
        if self.logits != 1:
            undo.append(_scale_logits(model, self.logits))
        if self.attention != 1:
            for part in attentions(model):
                undo.append(_scale_attention(model.get_submodule(part.module), self.attention))
        return Installed(undo)


def _scale_logits(model: nn.Module, factor: float) -> Callable[[], None]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    head = getattr(model, "classifier", None) if head is None else head
    if not isinstance(head, nn.Module):
        raise ConfigError(
            type(model).__name__,
            expected="a layer that makes the logits",
            found="none",
            mend="Multiply the logits in the model's forward.",
        )

    def scaled(module: nn.Module, given: Any, logits: Tensor) -> Tensor:
        return logits * factor

    return head.register_forward_hook(scaled).remove


def _scale_attention(module: Any, factor: float) -> Callable[[], None]:
    before = getattr(module, "scaling", None)
    if not isinstance(before, float):
        raise ConfigError(
            type(module).__name__,
            expected="an attention with a number `scaling`",
            found=repr(before),
            mend="Grow the number of heads instead of their size.",
        )
    module.scaling = before * factor

    def undo() -> None:
        module.scaling = before

    return undo


def _head_dim(model: Any) -> int | None:
    try:
        return attentions(model)[0].head_dim if isinstance(model, nn.Module) else None
    except ConfigError:
        return None
