"""The trained entries of one frozen tensor, and what SaRA does with them.

Their place in a convolution, their re-selection half-way and the gradient of the nuclear norm.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sparing.adapt._sara_selection import level_of, magnitude_bits
from sparing.errors import CheckpointError
from sparing.sparsity import Pattern
from sparing.tuners import matrix_view

POLAR_ITERATIONS = 15

Solver = Literal["svd", "newton-schulz"]


class MaskedTensor(nn.Module):
    """The trained entries of one frozen weight or bias (SaRA, eqs. 1-3 and 6).

    The leaf holds the entries' own values, not their change, so that weight decay pulls them to
    zero (eq. 4). Entries frozen half-way leave the optimiser's reach: the leaf keeps its length, so
    that optimiser state, DDP buckets and FSDP shards keep theirs, but their values come from a
    buffer and their gradients are zero.

    Saved: `values`, (entries,) float32 (float64 on a float64 base), the frozen ones included;
    `grown`, bool, empty in stage 1 and (entries,) in stage 2; the pattern of stage 1.

    Arguments:
        pattern: the mask M of stage 1.
        layer: the base layer.
        name: of the layer's tensor, "weight" or "bias".
    """

    values: nn.Parameter
    start: Tensor
    grown: Tensor
    kept: Tensor | None

    def __init__(self, pattern: Pattern, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        self._owner = (layer,)  # in a tuple, so as not to register the base layer again
        self.pattern = pattern
        self.scale = 1.0
        start = self._base_entries()
        self.register_buffer("start", start, persistent=False)
        exact = torch.promote_types(start.dtype, torch.float32)
        self.values = nn.Parameter(start.to(exact, copy=True))
        self.register_buffer("grown", torch.empty(0, dtype=torch.bool, device=start.device))
        self.register_buffer("kept", None, persistent=False)

    def _base_entries(self) -> Tensor:
        matrix = tensor_view(self._owner[0], self.name).detach()
        if matrix.is_meta:
            return torch.empty(len(self.pattern), dtype=matrix.dtype, device="meta")
        return self.pattern.gather(matrix.to(self.pattern.rows.device))

    def trained(self) -> Tensor:
        """(entries,): where training has brought the entries, free and frozen ones."""
        values = _whole(self.values)
        return values if self.kept is None else torch.where(self.grown, self.kept, values)

    def entries(self) -> Tensor:
        """(entries,): P⁰ + s (P − P⁰) for the scale s; exactly P⁰ at 0 and P at 1."""
        if self.scale == 1:
            return self.trained()
        return torch.lerp(self.start.to(self.values.dtype), self.trained(), self.scale)

    def replace(self, matrix: Tensor) -> Tensor:
        """The matrix with its entries at M replaced; entries that another adapter has changed
        before get this adapter's change added instead."""
        now, entries = self.pattern.gather(matrix), self.entries()
        moved = now.to(entries.dtype) + (entries - self.start.to(entries.dtype))
        return self.pattern.scatter(matrix, torch.where(now == self.start, entries, moved))

    @torch.no_grad()
    def freeze_grown(self, theta: float) -> None:
        """Freeze the entries with |p| ≥ θ where they are: M' = M ∧ 1[|P| < θ] (SaRA, eq. 6)."""
        now = self.trained().clone()
        grown = magnitude_bits(now) >= level_of(theta)
        self.grown = grown | self.grown if self.grown.numel() else grown
        self.kept = now

    def free(self) -> int:
        """How many entries are still being trained."""
        return len(self.pattern) - int(self.grown.sum())

    @torch.no_grad()
    def add_rank_gradient(self, strength: float, of: str, solver: Solver) -> None:
        """Add λ (U Vᵀ)[M] to the gradient, for A = P ⊙ M = U Σ Vᵀ (SaRA, eq. 5).

        Frozen entries are no part of the current mask.
        """
        if self.values.grad is None:
            return
        current = self.trained()
        if of == "delta":
            current = current - self.start.to(current.dtype)
        if self.kept is not None:
            current = current.masked_fill(self.grown, 0)
        gradient = self.pattern.gather(polar_factor(self.pattern.dense(current), solver))
        if self.kept is not None:
            gradient = gradient.masked_fill(self.grown, 0)
        gradient = _spread_like(gradient.to(self.values.grad.dtype), self.values.grad)
        self.values.grad.add_(gradient, alpha=strength)

    def fit(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Take the mask and the sizes of a saved state.

        On a base in lower precision than the one trained on, rounding moves entries across θ; the
        saved mask is the right one.
        """
        saved = state_dict.get(f"{prefix}pattern.stored_columns")
        if saved is None or saved.is_meta:
            return
        columns = saved.to(torch.int32).to(self.pattern.rows.device)
        counts = state_dict.get(f"{prefix}pattern.stored_counts")
        height, width = self.pattern.shape
        whole = len(columns) % height == 0 if counts is None else len(counts) == height
        if not whole or (len(columns) and int(columns.max()) >= width):
            raise CheckpointError(
                f"adapter tensor {prefix}pattern",
                expected=f"positions in a {height} x {width} matrix",
                found="positions that do not fit into it",
                mend="The adapter belongs to another base architecture; load it there.",
            )
        if counts is not None:
            counts = counts.long().to(columns.device)
        self.pattern = Pattern.stored(columns, counts, (height, width))
        self.start = self._base_entries()
        if len(self.values) != len(columns):
            self.values.data = self.values.data.new_empty(len(columns))
        frozen = state_dict.get(f"{prefix}grown")
        if frozen is not None:
            self.grown = torch.zeros(frozen.shape, dtype=torch.bool, device=columns.device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.fit(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}values" in state_dict:
            whole = _whole(self.values.detach())
            self.kept = whole.clone() if self.grown.numel() else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kept is not None:
            destination[f"{prefix}values"] = _spread_like(self.trained().detach(), self.values)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor itself; outside of a forward under FSDP2, all of what is spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _spread_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor, spread over the processes if the other one is."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor, other.device_mesh, other.placements)
    return tensor


def tensor_view(layer: nn.Module, name: str) -> Tensor:
    """A layer's "weight" or "bias" as a matrix: (outputs, inputs), or (1, outputs)."""
    tensor = getattr(layer, name)
    return matrix_view(layer, tensor) if name == "weight" else tensor[None]


class _PatchedConv2d(torch.autograd.Function):
    """A convolution with replaced kernel entries.

    Kept for the backward: the input, the frozen kernel and the entries, but no patched kernel. The
    dense gradient of the kernel exists only inside this layer's backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        entries: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        options: tuple[Any, Any, Any, int],
    ) -> Tensor:
        ctx.save_for_backward(x, entries, kernel)
        ctx.pattern, ctx.options = pattern, options
        return F.conv2d(x, _patched(kernel, pattern, entries), bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, entries, kernel = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            _patched(kernel, ctx.pattern, entries),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        grad_entries = None
        if grad_kernel is not None:
            grad_entries = ctx.pattern.gather(grad_kernel.flatten(1)).to(entries.dtype)
        return grad_x, grad_entries, None, None, None, None


def _patched(kernel: Tensor, pattern: Pattern, entries: Tensor) -> Tensor:
    return pattern.scatter(kernel.flatten(1), entries).view_as(kernel)


def patched_conv2d(
    layer: nn.Conv2d, x: Tensor, kernel: Tensor, bias: Tensor | None, part: MaskedTensor
) -> Tensor:
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    padding = (top, left)
    if layer.padding_mode != "zeros" or (left, top) != (right, bottom):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, [left, right, top, bottom], mode=mode), (0, 0)
    options = (layer.stride, padding, layer.dilation, layer.groups)
    return _PatchedConv2d.apply(x, part.entries(), kernel, bias, part.pattern, options)


def polar_factor(matrix: Tensor, solver: Solver = "svd") -> Tensor:
    """U Vᵀ of A = U Σ Vᵀ over the non-zero singular values: the subgradient of ‖A‖_* (SaRA, eq. 5).

    Arguments:
        matrix: (height, width) float32 or float64.
        solver: "svd", or "newton-schulz": fifteen steps of matrix products, which raise singular
            values above 1e-4 of the Frobenius norm to one and leave smaller ones in between.
    """
    if solver == "svd":
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        present = max(matrix.shape) * torch.finfo(S.dtype).eps * S[0] < S
        return (U * present) @ Vh
    norm = torch.linalg.matrix_norm(matrix)
    X = matrix / norm if norm > 0 else matrix
    tall = X.shape[0] > X.shape[1]
    X = X.t() if tall else X
    for _ in range(POLAR_ITERATIONS):
        gram = X @ X.t()
        X = 1.875 * X + (-1.25 * gram + 0.375 * gram @ gram) @ X
    return X.t() if tall else X
