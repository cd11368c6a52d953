"""Multiplying by a patched weight without copying it, for training on a CPU.

At a few hundred tokens a copy of the weight costs as much as a tenth of the product, forward and
backward. So the entries are written into the weight itself, and taken back after the product.
Nothing else sees the change: a lock keeps other threads' products out, and inference, where one
base model may serve several threads, still multiplies by a copy.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_one_at_a_time = threading.Lock()


def suits(x: Tensor, weight: Tensor, bias: Tensor | None, entries: Tensor) -> bool:
    """Whether a product can be formed in place: in training, on a plain CPU weight of x's type."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        and (x.requires_grad or entries.requires_grad)
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype)
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and not weight.is_shared()
    )


@contextmanager
def _patched(weight: Tensor, offsets: Tensor, entries: Tensor, added: bool) -> Iterator[Tensor]:
    # `.data`, because the weight is the same again before autograd looks at it.
    flat = weight.data.as_strided((weight.numel(),), (1,))
    with _one_at_a_time:
        kept = flat.gather(0, offsets)
        values = kept + entries if added else entries
        flat.scatter_(0, offsets, values.to(weight.dtype))
        try:
            yield weight.data
        finally:
            flat.scatter_(0, offsets, kept)


class PatchedInPlace(torch.autograd.Function):
    """x Wᵀ + bias with some entries of W replaced or added to; W is frozen.

    Arguments of `apply`:
        x: (tokens, width).
        weight: (height, width), contiguous or the transpose of a contiguous matrix.
        bias: (height,) or None, frozen.
        entries: (entries,) float32 or float64.
        pattern: the `Pattern` of the entries.
        added: whether entries are added to those of the weight.
    """

    # The contexts are untyped because torch's own are.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        entries: Tensor,
        pattern: Any,
        added: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, entries)
        ctx.pattern, ctx.added = pattern, added
        with _patched(weight, pattern.offsets(weight), entries, added) as patched:
            return F.linear(x, patched, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, entries = ctx.saved_tensors
        pattern, exact = ctx.pattern, entries.dtype
        grad_x = grad_entries = None
        if ctx.needs_input_grad[0]:
            with _patched(weight, pattern.offsets(weight), entries, ctx.added) as patched:
                grad_x = grad @ patched
        if ctx.needs_input_grad[3]:
            grad_entries = pattern.gradients(grad.to(exact), x.to(exact))
        return grad_x, None, None, grad_entries, None, None
