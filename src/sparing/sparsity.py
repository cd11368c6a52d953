"""Compact sparse parameters: choose entries of a matrix, train only those, never a dense delta.

A sparse matrix here is a vector of values plus a fixed `Pattern` of positions. Two products use it:

* `patched_linear` multiplies by a dense weight in which the entries have been replaced. The patched
  copy lives inside the product and is rebuilt, not kept, for the backward.
* `Pattern.linear` multiplies by the sparse matrix alone, for base layers whose weight is packed.

In both, the gradient of an entry is one dot product over the tokens; the dense gradient of the
weight is never formed unless so many entries are chosen that one dense product is faster, and
then only inside its layer's backward.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Above this share of chosen entries one dense GEMM beats that many separate dot products
# (measured on CPU: 0.07 ms for 0.7 % of a 576x576 weight against 1.2 ms for the GEMM).
DENSE_GRADIENT_SHARE = 0.1

Scope = Literal["row", "matrix"]


def top_entries(score: Tensor, count: int, *, scope: Scope) -> Tensor:
    """A mask of the `count` highest scores, per row or over the whole matrix.

    Ties go to the lowest column (then row), so the choice is the same on every device.

    Arguments:
        score: (rows, columns), floating point.
        count: entries per row, or in all; cut to what there is.
        scope: where the entries compete.

    Returns:
        bool mask shaped like `score`.
    """
    pool = score if scope == "row" else score.reshape(1, -1)
    order = torch.argsort(pool, dim=1, descending=True, stable=True)[:, :count]
    mask = torch.zeros_like(pool, dtype=torch.bool).scatter_(1, order, True)
    return mask.reshape(score.shape)


class Pattern(nn.Module):
    """The fixed positions of a sparse (height, width) matrix, row by row, columns ascending.

    Saved with the adapter, in the smallest integers that hold them, and never cast by `.to(dtype)`:
        stored_columns: (entries,) uint16 or int32.
        stored_counts: (height,) uint16 or int32, entries per row; absent if all rows have as many.

    Arguments:
        mask: (height, width) bool; on the meta device use `uniform` instead.
    """

    rows: Tensor
    columns: Tensor
    row_starts: Tensor
    stored_columns: Tensor
    stored_counts: Tensor | None

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        columns = mask.nonzero()[:, 1].to(torch.int32)
        self._build((mask.shape[0], mask.shape[1]), columns, mask.sum(dim=1))

    @classmethod
    def uniform(cls, columns: Tensor, width: int) -> "Pattern":
        """The pattern with the same number of entries in every row.

        Arguments:
            columns: (height, entries per row) integers, ascending and distinct within a row.
            width: of the matrix.
        """
        pattern = cls.__new__(cls)
        nn.Module.__init__(pattern)
        height, count = columns.shape
        counts = torch.full((height,), count, device=columns.device)
        pattern._build((height, width), columns.reshape(-1).to(torch.int32), counts, uniform=True)
        return pattern

    def _build(
        self, shape: tuple[int, int], columns: Tensor, counts: Tensor, uniform: bool | None = None
    ) -> None:
        self.shape = shape
        if uniform is None:
            uniform = bool((counts == counts[0]).all())
        small = torch.uint16 if shape[1] < 2**16 else torch.int32
        self.register_buffer("stored_columns", columns.to(small))
        self.register_buffer("stored_counts", None if uniform else counts.to(small))
        self._entries_per_row = len(columns) // shape[0] if uniform else None
        for name, tensor in zip(("rows", "columns", "row_starts"), self._expand(), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _expand(self) -> tuple[Tensor, Tensor, Tensor]:
        height = self.shape[0]
        columns = self.stored_columns.to(torch.int32)
        if self.stored_counts is None:
            counts = torch.full((height,), self._entries_per_row, device=columns.device)
        else:
            counts = self.stored_counts.long()
        row_starts = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        numbers = torch.arange(height, device=columns.device, dtype=torch.int32)
        rows = numbers.repeat_interleave(counts, output_size=len(columns))
        return rows, columns, row_starts

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.stored_columns.is_meta:
            self.rows, self.columns, self.row_starts = self._expand()

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
        self, x: Tensor, weight: Tensor, bias: Tensor | None, entries: Tensor
    ) -> Tensor:
        """x Wᵀ + bias for W with its chosen entries replaced; differentiable in x and entries.

        Arguments:
            x: (..., width), of the type of `weight`.
            weight: (height, width), frozen; any strides, so a transposed view will do.
            bias: (height,) or None, frozen.
            entries: (entries,) float32 or float64, cast once to the type of `weight`.

        Returns:
            (..., height), of the type of `weight`.
        """
        flat = x.reshape(-1, self.shape[1])
        y = _patched_linear(flat, weight, bias, entries, self.rows, self.columns, self.row_starts)
        return y.view(*x.shape[:-1], self.shape[0])


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
) -> Tensor:
    patched = weight.index_put((rows, columns), entries.to(weight.dtype))
    return F.linear(x, patched, bias)


@_patched_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_starts: Tensor,
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
) -> tuple[Tensor, Tensor]:
    patched = weight.index_put((rows, columns), entries.to(weight.dtype))
    exact = entries.dtype
    grad_entries = _entry_gradients(grad.to(exact), x.to(exact), rows, columns, row_starts)
    return grad @ patched, grad_entries


@_patched_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    entries: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_starts: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(entries)


# The autograd contexts below are untyped because torch's own are.
def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _keep_all_but_bias(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, *rest = inputs
    ctx.save_for_backward(x, weight, *rest)


def _sparse_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_entries = _sparse_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_entries, None, None, None


def _patched_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_entries = _patched_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, None, None, grad_entries, None, None, None


_sparse_linear.register_autograd(_sparse_grads, setup_context=_keep_all)
_patched_linear.register_autograd(_patched_grads, setup_context=_keep_all_but_bias)
