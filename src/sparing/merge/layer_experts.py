"""One expert of one layer: a low-rank change of its weight and a change of its bias."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.merge.subspaces import Factors, Truncation, merged

PARTS = ("inputs", "outputs", "biases")  # in the order of `LayerExpert.part`


@dataclass(frozen=True)
class LayerExpert:
    """An expert.

    Arguments:
        factors: of the change of the weight.
        bias: δ, (o,), or None where the layer has none.
    """

    factors: Factors
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "LayerExpert":
        """The same in another type."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return LayerExpert(self.factors.to(dtype), bias)

    def part(self, name: str) -> Tensor:
        """Its rows in one of the stacked tensors of a layer."""
        if name != "biases":
            tensor: Tensor = getattr(self.factors, name)
            return tensor
        assert self.bias is not None
        return self.bias[None]

    def joined_by(
        self, newcomer: "LayerExpert", members: int, cut: Truncation, arithmetic: torch.dtype
    ) -> "LayerExpert":
        """The running mean with one more task, in this expert's type.

        Arguments:
            newcomer: the task's own expert.
            members: tasks whose mean this is so far.
            cut: how much of the result to keep.
            arithmetic: type to compute in.
        """
        storage = self.factors.inputs.dtype
        old, new = self.to(arithmetic), newcomer.to(arithmetic)
        bias = None
        if old.bias is not None and new.bias is not None:
            bias = (members * old.bias + new.bias) / (members + 1)
        return LayerExpert(merged(old.factors, members, new.factors, cut), bias).to(storage)


def unstacked(
    read: Callable[[str, int, int], Tensor],
    ranks: list[int],
    router_ranks: list[int],
    *,
    bias: bool,
) -> list[LayerExpert]:
    """The experts of one layer from its stacked tensors.

    Arguments:
        read: from the name of a tensor, first row and row after the last to these rows.
        ranks: k of every expert.
        router_ranks: r of every expert.
        bias: whether there are biases.
    """
    found = []
    top = left = 0
    for number, (rank, router_rank) in enumerate(zip(ranks, router_ranks, strict=True)):
        height = max(rank, router_rank)
        factors = Factors(
            read("outputs", left, left + rank), read("inputs", top, top + height), router_rank
        )
        found.append(LayerExpert(factors, read("biases", number, number + 1)[0] if bias else None))
        top, left = top + height, left + rank
    return found
