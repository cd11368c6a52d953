"""Weighted average of models, also known as model soup or linear merging.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time", arXiv 2203.05482 (ICML 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparing.merge.method import Method, Options
from sparing.merge.view import Block


@dataclass(frozen=True)
class AverageOptions(Options):
    """Options of the weighted average.

    Arguments:
        weights: of the experts: one number for all, or a list; divided by their sum, which must
            not be zero. The base counts only as what experts have in common.
    """

    weights: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        self.require_scales("weights")

    def check(self, experts: int) -> None:
        total = sum(self.per_expert("weights", experts))
        self.require("weights", abs(total) > 1e-12, "weights with a sum that is not 0", "Use 1.")


def weighted_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_i w_i τ_i / Σ_i w_i, elementwise."""
    return weighted_sum(deltas, [weight / sum(weights) for weight in weights])


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_i w_i τ_i, elementwise; a new tensor."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def _update(deltas: Sequence[Tensor], options: AverageOptions, _: None, __: Block) -> Tensor:
    return weighted_mean(deltas, options.per_expert("weights", len(deltas)))


METHOD = Method("average", "arXiv 2203.05482", AverageOptions, _update)
