"""Exact order statistics over more numbers than fit in memory.

Numbers are compared through their bit patterns, 16 bits a scan: a histogram of the highest bits
says in which of 65,536 bins the wanted number is, and once a bin holds few enough numbers they are
collected and sorted. One scan does for a small model, two for most; float32 never needs three.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.merge.view import Block, View

COLLECTED = 1 << 18  # numbers a row; 2 MiB, and twice as much again while they are sorted
_BITS = 16
_BINS = 1 << _BITS
_PATTERNS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass
class _Row:
    rank: int  # of the wanted number among those with this prefix, from 0
    count: int  # of numbers with this prefix
    prefix: int | None = None  # bits above `shift`, of the wanted number
    shift: int = 0
    found: float | None = None

    def small(self) -> bool:
        return self.count <= COLLECTED


def order_statistics(
    view: View,
    values: Callable[[list[Tensor], Block], Sequence[Tensor]],
    ranks: Sequence[int],
    tensors: Sequence[str],
    stage: str,
    *,
    dtype: torch.dtype = torch.float64,
) -> list[float]:
    """The number of a given rank in each of several long rows.

    Arguments:
        view: of the models.
        values: from the task vectors of a block to one piece of every row, (size of the block,)
            of the same `dtype`, without NaN.
        ranks: for every row, the wanted place in ascending order, from 0.
        tensors: that the rows go over.
        stage: what it is for, shown to the user.
        dtype: float32 or float64.

    Returns:
        One number a row, exact.
    """
    size = view.size(tensors)
    rows = [_Row(rank, size) for rank in ranks]
    while any(row.found is None for row in rows):
        open_rows = [index for index, row in enumerate(rows) if row.found is None]

        def look(deltas: list[Tensor], block: Block, ahead: list[int] = open_rows) -> list[Tensor]:
            pieces = values(deltas, block)
            return [_look(rows[index], pieces[index]) for index in ahead]

        gathered = [_Gathered(rows[index], dtype) for index in open_rows]
        for pieces in view.scan(look, tensors, stage):
            for whole, piece in zip(gathered, pieces, strict=True):
                whole.add(piece)
        for index, whole in zip(open_rows, gathered, strict=True):
            _narrow(rows[index], whole.total, dtype)
    return [row.found for row in rows if row.found is not None]


class _Gathered:
    """The sum of one row's histograms, or all its keys in one tensor.

    Keys are copied at once: small tensors that outlive their block would leave holes in the heap
    that the next block does not fit in.
    """

    def __init__(self, row: _Row, dtype: torch.dtype) -> None:
        self._filled: int | None = 0 if row.small() else None
        self.total = (
            torch.empty(row.count, dtype=_PATTERNS[dtype])
            if row.small()
            else torch.zeros(_BINS, dtype=torch.int64)
        )

    def add(self, piece: Tensor) -> None:
        """Take what `_look` found in the next block."""
        if self._filled is None:
            self.total += piece.cpu()
        else:
            self.total[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)


def _look(row: _Row, values: Tensor) -> Tensor:
    """A histogram of the next bits of the numbers that are in question, or their keys."""
    keys = order_keys(values)
    if row.prefix is not None:
        keys = keys[(keys >> row.shift) == row.prefix]
    if row.small():
        return keys
    if row.prefix is None:
        return torch.bincount(
            (keys >> (_width(values.dtype) - _BITS)) + _BINS // 2, minlength=_BINS
        )
    return torch.bincount((keys >> (row.shift - _BITS)) - (row.prefix << _BITS), minlength=_BINS)


def _narrow(row: _Row, total: Tensor, dtype: torch.dtype) -> None:
    if row.small():
        row.found = _value(int(total.sort().values[row.rank]), dtype)
        return
    below = total.cumsum(0)
    chosen = int(torch.searchsorted(below, row.rank, right=True))
    row.rank -= int(below[chosen] - total[chosen])
    row.count = int(total[chosen])
    if row.prefix is None:
        row.prefix, row.shift = chosen - _BINS // 2, _width(dtype)
    else:
        row.prefix = (row.prefix << _BITS) + chosen
    row.shift -= _BITS
    if row.shift == 0:
        row.found = _value(row.prefix, dtype)


def order_keys(values: Tensor) -> Tensor:
    """(m,) whole numbers, as wide as the (m,) float32 or float64 numbers and in their order; -0
    and 0 are one."""
    bits = (values + 0.0).view(_PATTERNS[values.dtype])
    magnitude = torch.iinfo(bits.dtype).max
    return bits ^ ((bits >> (_width(values.dtype) - 1)) & magnitude)  # flips those below 0


def _width(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize


def _value(key: int, dtype: torch.dtype) -> float:
    pattern = _PATTERNS[dtype]
    bits = torch.tensor([key if key >= 0 else key ^ torch.iinfo(pattern).max], dtype=pattern)
    return float(bits.view(dtype))
