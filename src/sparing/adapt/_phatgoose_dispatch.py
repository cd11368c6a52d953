"""Many low-rank experts on many tokens, with as few matrix products as possible."""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# Multiply-adds that must be spared to be worth the small products or copies that spare them. Found
# on one CPU core; for accelerators it is an estimate from the time of a launch.
_WORTH_ON_CPU = 4.5e6
_WORTH_ON_ACCELERATOR = 1e9


class Stack(NamedTuple):
    """The experts of one layer, their factors one after the other.

    Arguments:
        a: (Σ ranks, inputs), first factors.
        b: (Σ ranks, outputs), second factors, transposed.
        owner: (Σ ranks,) int64, the expert that each row belongs to.
        ranks: by expert; 0 for one that is absent.
    """

    a: Tensor
    b: Tensor
    owner: Tensor
    ranks: list[int]

    def only(self, expert: int) -> tuple[Tensor, Tensor]:
        """Views of one expert's factors, (rank, inputs) and (rank, outputs)."""
        start = sum(self.ranks[:expert])
        stop = start + self.ranks[expert]
        return self.a[start:stop], self.b[start:stop]


def mixture(x: Tensor, stack: Stack, weights: Tensor, most: int) -> Tensor:
    """Σ_z weights_z · B_z A_z x for every token, the cheaper way.

    Arguments:
        x: (tokens, inputs), of the type of the factors.
        stack: the experts.
        weights: (tokens, experts) floating; 0 where an expert takes no part.
        most: how many experts take part in a token, at most.

    Returns:
        (tokens, outputs) of the type of x.
    """
    return _cheapest(x, stack, most)(x, stack, weights)


def dense(x: Tensor, stack: Stack, weights: Tensor) -> Tensor:
    """All experts at once: two products, the weights in between. Arguments as in `mixture`."""
    each = weights.to(x.dtype).index_select(1, stack.owner)
    return (x @ stack.a.t() * each) @ stack.b


def narrowed(x: Tensor, stack: Stack, weights: Tensor) -> Tensor:
    """`dense` on the experts in use only, which are copied together: for a few tokens, as in
    decoding, and many experts. Arguments as in `mixture`."""
    rows = weights.detach().ne(0).any(dim=0).index_select(0, stack.owner).nonzero().squeeze(1)
    a, b, owner = (tensor.index_select(0, rows) for tensor in (stack.a, stack.b, stack.owner))
    return dense(x, Stack(a, b, owner, stack.ranks), weights)


def grouped(x: Tensor, stack: Stack, weights: Tensor) -> Tensor:
    """Tokens sorted by expert, two small products an expert in use. Arguments as in `mixture`.

    Costs what the chosen experts cost, however many there are. Waits for the device once, to learn
    which are in use.
    """
    experts, tokens = weights.detach().t().ne(0).nonzero(as_tuple=True)
    counts = torch.bincount(experts, minlength=len(stack.ranks)).tolist()
    y = x.new_zeros(len(x), stack.b.shape[1])
    segments = zip(counts, accumulate(counts), stack.ranks, accumulate(stack.ranks), strict=True)
    for expert, (count, end, rank, last_row) in enumerate(segments):
        if count == 0 or rank == 0:
            continue
        mine, rows = tokens[end - count : end], slice(last_row - rank, last_row)
        share = weights[:, expert].index_select(0, mine).to(x.dtype)
        hidden = x.index_select(0, mine) @ stack.a[rows].t() * share[:, None]
        y.index_add_(0, mine, hidden @ stack.b[rows])
    return y


def _cheapest(x: Tensor, stack: Stack, most: int) -> Callable[[Tensor, Stack, Tensor], Tensor]:
    if torch.compiler.is_compiling():
        return dense  # which experts are in use is not known to the compiler
    (tokens, inputs), outputs = x.shape, stack.b.shape[1]
    pairs, widest = tokens * most, max(stack.ranks)
    worth = _WORTH_ON_CPU if x.device.type == "cpu" else _WORTH_ON_ACCELERATOR
    if 4 * pairs * widest <= len(stack.a) and len(stack.a) * (inputs + outputs) > worth / 10:
        return narrowed
    used = min(sum(rank > 0 for rank in stack.ranks), pairs)
    spared = tokens * (len(stack.a) - most * widest) * (inputs + outputs)
    return grouped if spared > used * worth else dense
