"""How far probabilities can be trusted: calibration error, risk ranking, conformal sets.

Equation-free parts of our specification of arXiv 2310.09163, "Uncertainty outputs".
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Variant = Literal["exit", "general", "all", "strict"]
VARIANTS: tuple[Variant, ...] = ("exit", "general", "all", "strict")
ALPHAS = (0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05)
_ENOUGH = 20  # more samples than this must leave at an exit for a quantile of its own


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE with bins of equal mass; probabilities (items, classes), labels (items,)."""
    confidence, predicted = probabilities.max(-1)
    order = confidence.argsort()
    right = (predicted == labels).to(confidence.dtype)
    gaps = [
        len(part) * abs(float(confidence[part].mean() - right[part].mean()))
        for part in order.tensor_split(bins)
        if len(part)
    ]
    return sum(gaps) / len(labels)


def risk_coverage_area(probabilities: Tensor, labels: Tensor) -> float:
    """Mean error over the most confident 1, 2, … n items: how well confidence ranks risk."""
    confidence, predicted = probabilities.max(-1)
    wrong = (predicted != labels).double()[confidence.argsort(descending=True, stable=True)]
    kept = torch.arange(1, len(wrong) + 1, device=wrong.device)
    return float((wrong.cumsum(0) / kept).mean())


def conformal_level(n: int, alpha: float) -> Fraction:
    """⌈(n + 1)(1 - α)⌉ / n, at most 1, in exact arithmetic."""
    rank = math.ceil((n + 1) * (1 - Fraction(str(alpha))))
    return min(Fraction(rank, n), Fraction(1))


def conformal_quantile(scores: Tensor, alpha: float) -> float:
    """q̂ of scores 1 - q_y, (n,): the quantile of that level by NumPy's method "higher".

    That takes one rank above the textbook's, so it covers a little more. Without scores it is 1,
    which lets every class in.
    """
    if len(scores) == 0:
        return 1.0
    position = math.ceil(conformal_level(len(scores), alpha) * (len(scores) - 1))
    return float(scores.sort().values[position])


@dataclass(frozen=True)
class Conformal:
    """Quantiles of split conformal prediction.

    Arguments:
        quantiles: (variants, alphas, exits + 1) float32, in the order of `VARIANTS` and `ALPHAS`.
    """

    quantiles: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, exits: Tensor) -> "Conformal":
        """Quantiles from validation data.

        "exit" uses those that leave at an exit if more than 20 do, else all; "all" always all;
        "strict" only those that leave there; "general" pools everyone at its own exit. "strict"
        is reconstructed: the specification only names it.

        Arguments:
            logits: (exits + 1, items, classes).
            labels: (items,) int64.
            exits: (items,) int64, where each leaves.
        """
        everywhere = 1 - logits.float().softmax(-1)[:, torch.arange(len(labels)), labels]
        taken = everywhere.gather(0, exits[None])[0]
        samples: dict[Variant, list[Tensor]] = {variant: [] for variant in VARIANTS}
        for exit, scores in enumerate(everywhere):
            own = scores[exits == exit]
            samples["exit"].append(own if len(own) > _ENOUGH else scores)
            samples["general"].append(taken)
            samples["all"].append(scores)
            samples["strict"].append(own)
        rows = [
            [[conformal_quantile(scores, alpha) for scores in samples[variant]] for alpha in ALPHAS]
            for variant in VARIANTS
        ]
        return cls(torch.tensor(rows))

    def sets(
        self, logits: Tensor, exits: Tensor, alpha: float = 0.05, variant: Variant = "exit"
    ) -> Tensor:
        """{c: q_c ≥ 1 - q̂}, (items, classes) bool, of the logits (items, classes) at exits."""
        quantiles = self.quantiles[VARIANTS.index(variant), ALPHAS.index(alpha)].to(logits.device)
        return 1 - logits.float().softmax(-1) <= quantiles[exits][:, None]
