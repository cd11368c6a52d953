"""Exact order statistics over more numbers than fit in memory.

Numbers are compared through their bit patterns, 16 bits a scan: a histogram of the highest bits
says in which of 65,536 bins the wanted number is, and once a bin holds few enough numbers they are
collected and sorted. One scan does for a small model, two for most; float32 never needs three.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
) -> list[float]:
    """The number of a given rank in each of several long rows.

    Arguments:
        view: of the models.
        values: from the task vectors of a block to one piece of every row, (size of the block,)
            float32 or float64, without NaN.
        ranks: for every row, the wanted place in ascending order, from 0.
        tensors: that the rows go over.
        stage: what it is for, shown to the user.

    Returns:
        One number a row, exact for float32 and float64.
    """
    size = view.size(tensors)
    rows = [_Row(rank, size) for rank in ranks]
    while any(row.found is None for row in rows):
        open_rows = [index for index, row in enumerate(rows) if row.found is None]

        def look(
            deltas: list[Tensor], block: Block, ahead: list[int] = open_rows
        ) -> tuple[torch.dtype, list[Tensor]]:
            pieces = values(deltas, block)
            return pieces[0].dtype, [_look(rows[index], pieces[index]) for index in ahead]

        sums: list[Any] = [0 if not rows[index].small() else [] for index in open_rows]
        dtype = torch.float64
        for kind, found in view.scan(look, tensors, stage):
            dtype = kind
            for place, piece in enumerate(found):
                if isinstance(sums[place], list):
                    sums[place].append(piece)
                else:
                    sums[place] = sums[place] + piece
        for index, total in zip(open_rows, sums, strict=True):
            _narrow(rows[index], total, dtype)
    return [row.found for row in rows if row.found is not None]


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


def _narrow(row: _Row, total: Any, dtype: torch.dtype) -> None:
    if isinstance(total, list):
        row.found = _value(int(torch.cat(total).sort().values[row.rank]), dtype)
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
