"""Weight decay of Adam: which convention an optimizer has, and the steady state that decay makes.

With W ← (1 - ηλ)W - ηu and directions u of unit scale, the entries of W settle at a root mean
square of √(η/2λ) after some 3/(ηλ) steps, wherever they started ("wd-scaling", eq. 8 and 13).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparing.errors import ConfigError, DataError

Decay = Literal["decoupled", "independent"]

SETTLED, UNSETTLED = 3.0, 2.0  # ηλ × steps: enough, and too little
_HALF_LOST = 2.0**-9  # relative change that rounding to bfloat16 swallows
_GROWTH = 0.1  # slope of log RMS over log step: ½ without decay, 0 in the steady state


@dataclass(frozen=True)
class SteadyState:
    """Whether decay and learning rate have time to balance.

    Arguments:
        lr: η at its peak.
        weight_decay: λ, times the learning rate in each step.
        steps: of training at the peak; with a schedule, the sum of the rates over the peak. None
            where not known.
    """

    lr: float
    weight_decay: float
    steps: float | None = None

    @property
    def rms(self) -> float:
        """√(η/2λ), where the entries' RMS settles; infinite without decay (eq. 8)."""
        return math.sqrt(self.lr / (2 * self.weight_decay)) if self.weight_decay else math.inf

    def noise_rms(self, beta: float = 0.9) -> float:
        """The same for gradients that are nothing but independent noise: lower, because momentum
        has Adam's steps agree for a while, and decay acts meanwhile.

        With a = 1 - ηλ it is √(η/2λ) √[(1-β)(1+aβ) / ((1-aβ)(1+β)(1-ηλ/2))], the variance of two
        averages in a row; for ηλ = 0.008 and β = 0.9 some 0.96 √(η/2λ), where 0.945 was measured
        (the specification's figure), as Adam's denominator takes another 2 %.
        """
        product = self.lr * self.weight_decay
        if not product:
            return math.inf
        a = 1 - product
        share = (1 - beta) * (1 + a * beta) / ((1 - a * beta) * (1 + beta) * (1 - product / 2))
        return self.rms * math.sqrt(share)

    @property
    def needed(self) -> float:
        """Steps to settle, 3/(ηλ); infinite without decay (eq. 13)."""
        product = self.lr * self.weight_decay
        return SETTLED / product if product else math.inf

    @property
    def reached(self) -> bool | None:
        """Whether ηλ × steps is at least 2; None where the steps are not known."""
        if not self.weight_decay:
            return False
        if self.steps is None:
            return None
        return self.lr * self.weight_decay * self.steps >= UNSETTLED

    def describe(self) -> str:
        """In words, with the mend where it is not reached."""
        if not self.weight_decay:
            return (
                "not stationary: without weight decay the norms grow as √steps, so there is"
                " nothing for the rule to scale"
            )
        text = f"the steady state needs about {self.needed:,.0f} steps at the peak rate"
        if self.steps is None:
            return text
        if self.reached:
            return f"{text}; there are {self.steps:,.0f}"
        return (
            f"not stationary: {text}, there are {self.steps:,.0f}, so norms still depend on the"
            " initialisation; train longer or tune with more decay"
        )


def is_stationary(rms: Sequence[float]) -> bool:
    """Whether norms recorded at even intervals have settled, by their growth over the second half.

    Arguments:
        rms: of one matrix, from the first steps to the last, at least 8, all above 0.

    Raises:
        DataError: too few, or not above 0.
    """
    if len(rms) < 8 or not all(math.isfinite(value) and value > 0 for value in rms):
        raise DataError(
            "recorded norms",
            expected="8 or more numbers above 0",
            found=f"{len(rms)} numbers, such as {list(rms)[:3]}",
            mend="Record the RMS of the matrix at even intervals.",
        )
    half = len(rms) // 2
    time = torch.arange(half + 1, len(rms) + 1, dtype=torch.float64).log()
    size = torch.tensor(rms[half:], dtype=torch.float64).log()
    time = time - time.mean()
    return abs(float((time * size).sum() / time.square().sum())) < _GROWTH


def lost_to_rounding(lr: float, weight_decay: float, dtype: torch.dtype) -> bool:
    """Whether weights of this type are too coarse for a decay of ηλ a step."""
    coarse = dtype in (torch.bfloat16, torch.float16)
    return coarse and 0 < lr * weight_decay < _HALF_LOST


def to_independent(lr: float, weight_decay: float) -> float:
    """λ_ind = ηλ: what an optimizer wants that does W ← (1 - λ_ind)W, untouched by the rate."""
    return lr * weight_decay


def to_decoupled(lr: float, independent: float) -> float:
    """λ = λ_ind/η: what `torch.optim.AdamW` wants, which does W ← (1 - ηλ)W."""
    return independent / lr


def decay_convention(optimizer: Callable[..., torch.optim.Optimizer]) -> Decay:
    """Which weight decay an optimizer has, found by letting it take one step without a gradient.

    Arguments:
        optimizer: a class or function called as optimizer(parameters, lr=…, weight_decay=…).

    Raises:
        ConfigError: it adds λW to the gradient (L2, as `torch.optim.Adam` does), has no decay, or
            something else.
    """
    lr, weight_decay = 0.01, 0.5
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    weight.grad = torch.zeros_like(weight)
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    optimizer([weight], **options).step()
    lost = 1 - float(weight.detach().mean())
    if math.isclose(lost, lr * weight_decay, rel_tol=1e-3):
        return "decoupled"
    if math.isclose(lost, weight_decay, rel_tol=1e-3):
        return "independent"
    l2 = math.isclose(lost, lr, rel_tol=1e-3)  # Adam makes any constant gradient a step of η
    name = getattr(optimizer, "__name__", type(optimizer).__name__)
    raise ConfigError(
        f"optimizer {name}",
        expected="decoupled weight decay, as in AdamW",
        found="λW added to the gradient (L2)" if l2 else f"a weight of 1 that became {1 - lost:g}",
        mend="Take AdamW: an L2 term is rescaled by Adam, so that its size says nothing.",
    )
