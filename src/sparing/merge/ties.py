"""TIES: trim each task vector to its largest entries, elect a sign, average those that agree.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708 (NeurIPS
2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.merge.method import Method, Options, Scope, groups
from sparing.merge.selection import order_statistics
from sparing.merge.view import Block, View

_ROUNDING = 1e-6  # of (1 - density) · D, far below one entry


@dataclass(frozen=True)
class TiesOptions(Options):
    """Options of TIES.

    Arguments:
        density: share of its entries that every task vector keeps, above 0 to 1; 0.2 in the paper.
            Entries as large as the last one kept, in float32, are kept too.
        scale: λ of the merged task vector, one number, or a list that weighs the experts in the
            election and in the mean; 1 in the paper.
        scope: "model" trims over the whole task vector, as the paper does; "tensor" trims every
            tensor on its own, as mergekit does.
    """

    density: float = 0.2
    scale: float | Sequence[float] = 1.0
    scope: Scope = "model"

    def __post_init__(self) -> None:
        self.require_number("density", 0, 1, above=True, mend="The paper uses 0.2.")
        self.require_scales("scale")
        self.require_choice("scope", ("model", "tensor"))

    def check(self, experts: int) -> None:
        self.per_expert("scale", experts)


def rank_of_cut(keep: float, size: int) -> int:
    """Place in ascending order, from 0, of the smallest of `keep` · `size` entries: ⌊(1-r)D⌋."""
    return min(int((1 - keep) * size + _ROUNDING), size - 1)


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Entries whose size, in float32, is at least the threshold; the others become 0."""
    return torch.where(delta.abs().float() >= threshold, delta, 0)


def merge_agreeing(deltas: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """The mean, over the experts whose entry has the elected sign, of λ_i τ_i.

    The sign of the sum is elected; where the sum is 0 nobody is, and the result is 0.
    """
    pairs = zip(deltas, scales, strict=True)
    scaled = [delta if scale == 1 else delta * scale for delta, scale in pairs]
    elected = scaled[0].clone()
    for vector in scaled[1:]:
        elected += vector
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector in scaled:
        agrees = vector * elected > 0
        total += torch.where(agrees, vector, 0)
        count += agrees
    return total / count.clamp_(min=1)


def survey(view: View, options: TiesOptions) -> dict[str, list[float]]:
    """For every tensor, each expert's threshold."""
    if options.density == 1:
        return {name: [0.0] * view.experts for name in view.sizes}
    found = {}
    for tensors in groups(view, options.scope):
        rank = rank_of_cut(options.density, view.size(tensors))
        thresholds = order_statistics(
            view,
            _sizes,
            [rank] * view.experts,
            tensors,
            "finding thresholds",
            dtype=torch.float32,
        )
        found.update(dict.fromkeys(tensors, thresholds))
    return found


def _sizes(deltas: list[Tensor], _: Block) -> list[Tensor]:
    return [delta.abs().float() for delta in deltas]


def _update(
    deltas: Sequence[Tensor],
    options: TiesOptions,
    thresholds: dict[str, list[float]],
    block: Block,
) -> Tensor:
    kept = [trim(*pair) for pair in zip(deltas, thresholds[block.tensor], strict=True)]
    return merge_agreeing(kept, options.per_expert("scale", len(deltas)))


METHOD = Method("ties", "arXiv 2306.01708", TiesOptions, _update, survey)
