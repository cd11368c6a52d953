"""Compact sparse parameters: choose entries of a matrix, train only those, never a dense delta.

A sparse matrix here is a vector of values plus a fixed `Pattern` of positions. Two products use it:

* `patched_linear` multiplies by a dense weight in which the entries have been changed: for the
  time of the product only, in a copy or, training on a CPU, in the weight itself.
* `Pattern.linear` multiplies by the sparse matrix alone, for base layers whose weight is packed.

In both, the gradient of an entry is one dot product over the tokens; the dense gradient of the
weight is never formed unless so many entries are chosen that one dense product is faster, and
then only inside its layer's backward.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing import _patching

# Above this share of chosen entries one dense GEMM beats that many separate dot products
# (measured on CPU: 0.07 ms for 0.7 % of a 576x576 weight against 1.2 ms for the GEMM).
DENSE_GRADIENT_SHARE = 0.1

Scope = Literal["row", "matrix"]


def top_entries(score: Tensor, count: int, *, scope: Scope) -> Tensor:
    """A mask of the `count` highest scores, per row or over the whole matrix.

    Ties go to the lowest column (then row), so the choice is the same on every device.

    Arguments:
        score: (rows, columns), floating point without NaN.
        count: entries per row, or in all; cut to what there is.
        scope: where the entries compete.

    Returns:
        bool mask shaped like `score`.
    """
    pool = score if scope == "row" else score.reshape(1, -1)
    if count < 1:
        return torch.zeros_like(score, dtype=torch.bool)
    lowest = pool.topk(min(count, pool.shape[1]), dim=1).values[:, -1:]
    above, level = pool > lowest, pool == lowest
    room = count - above.sum(dim=1, keepdim=True)
    return (above | (level & (level.cumsum(dim=1) <= room))).reshape(score.shape)


class Pattern(nn.Module):
    """The fixed positions of a sparse (height, width) matrix, row by row, columns ascending.

    Saved with the adapter, in the smallest integers that hold them, and never cast by `.to(dtype)`:
        stored_columns: (entries,) uint16 or int32.
        stored_counts: (height,) uint16 or int32, entries per row; absent if all rows have as many.

    Arguments:
        mask: (height, width) bool; on the meta device use `unplaced` instead.
    """

    rows: Tensor
    columns: Tensor
    row_starts: Tensor
    stored_columns: Tensor
    stored_counts: Tensor | None

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        counts = mask.sum(dim=1)
        uniform = bool((counts == counts[0]).all())
        self._build(tuple(mask.shape), mask.nonzero()[:, 1], None if uniform else counts)

    @classmethod
    def at(cls, positions: Tensor, shape: tuple[int, int]) -> "Pattern":
        """The pattern of some positions of the flattened matrix.

        Arguments:
            positions: (entries,) int64, distinct, row * width + column; any order.
            shape: (height, width).
        """
        positions = positions.sort().values
        counts = torch.bincount(positions // shape[1], minlength=shape[0])
        uniform = bool((counts == counts[0]).all())
        return cls.stored(positions % shape[1], None if uniform else counts, shape)

    @classmethod
    def stored(cls, columns: Tensor, counts: Tensor | None, shape: tuple[int, int]) -> "Pattern":
        """The pattern that was saved as these two tensors.

        Arguments:
            columns: (entries,) integers, row by row, ascending and distinct within a row.
            counts: (height,) integers, entries per row; None if all rows have as many.
            shape: (height, width).
        """
        pattern = cls.__new__(cls)
        nn.Module.__init__(pattern)
        pattern._build(shape, columns, counts)
        return pattern

    @classmethod
    def unplaced(cls, entries: int, shape: tuple[int, int]) -> "Pattern":
        """A pattern on the meta device, which only says how many entries there are.

        Arguments:
            entries: in all.
            shape: (height, width).
        """
        meta = torch.device("meta")
        counts = None
        if entries % shape[0]:
            counts = torch.empty(shape[0], dtype=torch.int64, device=meta)
        return cls.stored(torch.empty(entries, dtype=torch.int32, device=meta), counts, shape)

    def _build(self, shape: tuple[int, ...], columns: Tensor, counts: Tensor | None) -> None:
        self.shape = (shape[0], shape[1])
        small = torch.uint16 if shape[1] < 2**16 else torch.int32
        self.register_buffer("stored_columns", columns.to(small))
        self.register_buffer("stored_counts", None if counts is None else counts.to(small))
        for name, tensor in zip(("rows", "columns", "row_starts"), self._expand(), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._offsets: tuple[tuple[int, ...], Tensor] | None = None

    def _expand(self) -> tuple[Tensor, Tensor, Tensor]:
        height = self.shape[0]
        columns = self.stored_columns.to(torch.int32)
        if self.stored_counts is None:
            counts = torch.full((height,), len(columns) // height, device=columns.device)
        else:
            counts = self.stored_counts.long()
        row_starts = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        numbers = torch.arange(height, device=columns.device, dtype=torch.int32)
        rows = numbers.repeat_interleave(counts, output_size=len(columns))
        return rows, columns, row_starts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Pattern":
        # PEFT moves each new module to its layer's device, also one whose positions come later.
        self._offsets = None
        return self if self.columns.is_meta else super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.stored_columns.is_meta:
            self.rows, self.columns, self.row_starts = self._expand()
            self._offsets = None

    def __len__(self) -> int:
        return self.columns.numel()

    def mask(self) -> Tensor:
        """(height, width) bool: True at the chosen positions."""
        return self.scatter(
            torch.zeros(self.shape, dtype=torch.bool, device=self.rows.device),
            torch.ones(len(self), dtype=torch.bool, device=self.rows.device),
        )

    def gather(self, matrix: Tensor) -> Tensor:
        """The entries of a dense (height, width) matrix, as a new (entries,) vector."""
        return matrix[self.rows, self.columns]

    def scatter(self, matrix: Tensor, entries: Tensor) -> Tensor:
        """A copy of a dense (height, width) matrix with its chosen entries replaced."""
        return matrix.index_put((self.rows, self.columns), entries.to(matrix.dtype))

    def dense(self, entries: Tensor) -> Tensor:
        """The dense (height, width) matrix that holds `entries` and zeros elsewhere."""
        return self.scatter(entries.new_zeros(self.shape), entries)

    def linear(self, x: Tensor, entries: Tensor) -> Tensor:
        """x Sᵀ for the sparse S with these entries; differentiable in both.

        Arguments:
            x: (..., width), any floating type; the product is formed in that of `entries`.
            entries: (entries,) float32 or float64.

        Returns:
            (..., height), of the type of `entries`.
        """
        flat = x.reshape(-1, self.shape[1]).to(entries.dtype)
        y = _sparse_linear(flat, entries, self.rows, self.columns, self.row_starts)
        return y.view(*x.shape[:-1], self.shape[0])

    def patched_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        entries: Tensor,
        *,
        added: bool = False,
    ) -> Tensor:
        """x Wᵀ + bias for W with its chosen entries changed; differentiable in x and entries.

        Arguments:
            x: (..., width), floating point; the product is formed in its type.
            weight: (height, width), frozen; any strides, so a transposed view will do.
            bias: (height,) or None, frozen.
            entries: (entries,) float32 or float64, cast once to the type of `x`.
            added: whether `entries` are added to those of `weight`, in the higher precision of
                the two, instead of replacing them.

        Returns:
            (..., height), of the type of `x`.
        """
        flat = x.reshape(-1, self.shape[1])
        if _patching.suits(flat, weight, bias, entries):
            y = _patching.PatchedInPlace.apply(flat, weight, bias, entries, self, added)
        else:
            positions = (self.rows, self.columns, self.row_starts)
            y = _patched_linear(flat, weight, bias, entries, *positions, added)
        return y.view(*x.shape[:-1], self.shape[0])

    def gradients(self, grad: Tensor, x: Tensor) -> Tensor:
        """The chosen entries of gradᵀ x: (tokens, height) and (tokens, width) -> (entries,)."""
        return _entry_gradients(grad, x, self.rows, self.columns, self.row_starts)

    def offsets(self, matrix: Tensor) -> Tensor:
        """Where the entries lie in the memory of a dense (height, width) matrix: (entries,) int64,
        kept until the matrix is laid out otherwise."""
        known = self._offsets
        if known is None or known[0] != matrix.stride():
            down, right = matrix.stride()
            known = (matrix.stride(), self.rows.long() * down + self.columns.long() * right)
            self._offsets = known
        return known[1]


def _csr(entries: Tensor, columns: Tensor, row_starts: Tensor, width: int) -> Tensor:
    size = (row_starts.shape[0] - 1, width)
    return torch.sparse_csr_tensor(row_starts, columns, entries, size=size, check_invariants=False)


def _entry_gradients(
    grad: Tensor, x: Tensor, rows: Tensor, columns: Tensor, row_starts: Tensor
) -> Tensor:
    """The chosen entries of gradᵀ x: grad (tokens, height), x (tokens, width) -> (entries,)."""
    height, width = grad.shape[1], x.shape[1]
    if len(columns) > DENSE_GRADIENT_SHARE * height * width:
        return (grad.t() @ x)[rows, columns]
    pattern = _csr(grad.new_zeros(len(columns)), columns, row_starts, width)
    # Both factors are laid out token-last, so that each dot product reads two contiguous runs.
    return torch.sparse.sampled_addmm(
        pattern, grad.t().contiguous(), x.t().contiguous().t()
    ).values()


def _patch(
    weight: Tensor,
    entries: Tensor,
    rows: Tensor,
    columns: Tensor,
    dtype: torch.dtype,
    added: bool,
) -> Tensor:
    values = weight[rows, columns] + entries if added else entries
    return weight.to(dtype, copy=True).index_put_((rows, columns), values.to(dtype))


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


@torch.library.custom_op("sparing::sparse_linear", mutates_args=())
def _sparse_linear(
    x: Tensor, entries: Tensor, rows: Tensor, columns: Tensor, row_starts: Tensor
) -> Tensor:
    return (_csr(entries, columns, row_starts, x.shape[1]) @ x.t()).t().contiguous()


@_sparse_linear.register_fake
def _(x: Tensor, entries: Tensor, rows: Tensor, columns: Tensor, row_starts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], row_starts.shape[0] - 1)


@torch.library.custom_op("sparing::sparse_linear_backward", mutates_args=())
def _sparse_linear_backward(
    grad: Tensor, x: Tensor, entries: Tensor, rows: Tensor, columns: Tensor, row_starts: Tensor
) -> tuple[Tensor, Tensor]:
    matrix = _csr(entries, columns, row_starts, x.shape[1])
    grad_x = (matrix.t() @ grad.t().contiguous()).t().contiguous()
    return grad_x, _entry_gradients(grad, x, rows, columns, row_starts)


@_sparse_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, entries: Tensor, rows: Tensor, columns: Tensor, row_starts: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(entries)


@torch.library.custom_op("sparing::patched_linear", mutates_args=())
def _patched_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    added: bool,
) -> Tensor:
    return F.linear(x, _patch(weight, entries, rows, columns, x.dtype, added), _cast(bias, x.dtype))


@_patched_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    added: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("sparing::patched_linear_backward", mutates_args=())
def _patched_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    entries: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    added: bool,
) -> tuple[Tensor, Tensor]:
    exact = entries.dtype
    grad_entries = _entry_gradients(grad.to(exact), x.to(exact), rows, columns, row_starts)
    return grad @ _patch(weight, entries, rows, columns, x.dtype, added), grad_entries


@_patched_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    entries: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    added: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(entries)


# The autograd contexts below are untyped because torch's own are.
def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _keep_all_but_bias(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, *rest, ctx.added = inputs
    ctx.save_for_backward(x, weight, *rest)


def _sparse_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_entries = _sparse_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_entries, None, None, None


def _patched_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_entries = _patched_linear_backward(grad, *ctx.saved_tensors, ctx.added)
    return grad_x, None, None, grad_entries, None, None, None, None


_sparse_linear.register_autograd(_sparse_grads, setup_context=_keep_all)
_patched_linear.register_autograd(_patched_grads, setup_context=_keep_all_but_bias)
