"""The largest singular value of a matrix from a few products with it, also where it is sharded.

Golub-Kahan bidiagonalisation needs the same two products a step as power iteration, which on a
matrix without a gap below σ₁ (noise, for one) is still some per cent short after 30 steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import normalize

from sparing.scale.parameters import ParameterInfo, matrices

STEPS = 30


class Largest(NamedTuple):
    """σ₁ of a stack of matrices.

    Arguments:
        values: (stack,) float32 or float64.
        directions: (stack, inputs) right singular vectors of length 1; a warm start for next time.
    """

    values: Tensor
    directions: Tensor


class _Products(NamedTuple):
    """How a stack of matrices acts: (stack, inputs) -> (stack, outputs), and its transpose."""

    shape: tuple[int, int, int]
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    like: Tensor


def largest_singular_values(
    weight: Tensor,
    *,
    transposed: bool = False,
    blocks: int = 1,
    start: Tensor | None = None,
    steps: int = STEPS,
) -> Largest:
    """σ₁ of every matrix in a weight, from below, by 2 · steps products with it.

    There is no stopping early: where σ₁ and σ₂ are a few thousandths apart, the estimate rests at
    σ₂ for some steps before it goes on.

    A weight sharded by FSDP2 stays where it is: every process multiplies its rows, and vectors
    alone are exchanged. Stacks of experts are read expert by expert as one batch.

    Arguments:
        weight: (outputs, inputs) or (experts, outputs, inputs), any floating type; computed in
            float32, or float64 where the weight is.
        transposed, blocks: how the matrices are stored; see `matrices`.
        start: (stack, inputs), such as the `directions` of the time before.
        steps: 30 leave less than 1e-4 of noise's σ₁; a warm start needs fewer.
    """
    products = _products(weight, transposed, blocks)
    if start is None:
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(products.shape[2], generator=generator, dtype=torch.float64)
        start = row.to(products.like).expand(products.shape[0], -1)
    _, outputs, inputs = products.shape
    # One more than the outputs: the last direction completes the rows of B.
    return _bidiagonal(products, start.to(products.like), min(steps, outputs + 1, inputs))


def of_parameter(weight: Tensor, info: ParameterInfo, start: Tensor | None = None) -> Largest:
    """σ₁ of the matrices of a classified parameter."""
    return largest_singular_values(
        weight, transposed=info.transposed, blocks=info.blocks, start=start
    )


def _bidiagonal(products: _Products, start: Tensor, steps: int) -> Largest:
    """A V = U B with B upper bidiagonal, kept orthogonal in full; σ₁(B) rises to σ₁(A)."""
    v = normalize(start, dim=-1)
    u = products.forward(v)
    diagonal = [u.norm(dim=-1)]
    above: list[Tensor] = []
    largest = diagonal[0]
    left, right = [_unit(u, diagonal[0], largest)], [v]
    for _ in range(1, steps):
        v = _orthogonal(products.backward(left[-1]), right)
        above.append(v.norm(dim=-1))
        right.append(_unit(v, above[-1], largest))
        u = _orthogonal(products.forward(right[-1]), left)
        diagonal.append(u.norm(dim=-1))
        largest = torch.maximum(largest, torch.maximum(diagonal[-1], above[-1]))
        left.append(_unit(u, diagonal[-1], largest))
    small = torch.diag_embed(torch.stack(diagonal, dim=-1))
    if above:
        small = small + torch.diag_embed(torch.stack(above, dim=-1), offset=1)
    _, values, vh = torch.linalg.svd(small)
    basis = torch.stack(right, dim=1)  # (stack, steps, inputs)
    return Largest(values[:, 0], normalize((vh[:, :1] @ basis).squeeze(1), dim=-1))


def _orthogonal(x: Tensor, basis: list[Tensor]) -> Tensor:
    whole = torch.stack(basis, dim=1)
    for _ in range(2):  # once is not enough in float32
        x = x - ((whole @ x.unsqueeze(-1)).mT @ whole).squeeze(1)
    return x


def _unit(x: Tensor, length: Tensor, scale: Tensor) -> Tensor:
    """x / length; zero where the rest is only rounding and would be a direction of its own."""
    kept = length > 10 * torch.finfo(x.dtype).eps * scale
    return torch.where(kept, 1 / length.clamp_min(torch.finfo(x.dtype).tiny), 0).unsqueeze(-1) * x


def _products(weight: Tensor, transposed: bool, blocks: int) -> _Products:
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if isinstance(exact, DTensor):
        return _sharded(exact, transposed, blocks)
    stack = matrices(exact, transposed=transposed, blocks=blocks)
    stack = stack.reshape(-1, *stack.shape[-2:])
    return _Products(
        tuple(stack.shape),  # type: ignore[arg-type]
        lambda v: (stack @ v.unsqueeze(-1)).squeeze(-1),
        lambda u: (stack.mT @ u.unsqueeze(-1)).squeeze(-1),
        stack.new_empty(0),
    )


def _sharded(weight: DTensor, transposed: bool, blocks: int) -> _Products:
    """Blocks are columns: W V has the product with every block's own vector in its rows."""
    whole = weight.mT if transposed else weight
    if whole.ndim < 3:
        whole = whole.unsqueeze(0)
    experts, rows, inputs = whole.shape
    outputs = rows // blocks

    def product(matrix: Tensor, vectors: Tensor) -> Tensor:
        spread = DTensor.from_local(
            vectors.contiguous(), weight.device_mesh, [Replicate()] * weight.device_mesh.ndim
        )
        found = matrix @ spread
        assert isinstance(found, DTensor)
        return found.full_tensor()

    def forward(v: Tensor) -> Tensor:
        mixed = product(whole, v.view(experts, blocks, inputs).mT)  # (experts, rows, blocks)
        own = mixed.view(experts, blocks, outputs, blocks).diagonal(dim1=1, dim2=3)
        return own.mT.reshape(-1, outputs)

    def backward(u: Tensor) -> Tensor:
        placed = torch.diag_embed(u.view(experts, blocks, outputs).mT, dim1=1, dim2=3)
        return product(whole.mT, placed.reshape(experts, rows, blocks)).mT.reshape(-1, inputs)

    like = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return _Products((experts * blocks, outputs, inputs), forward, backward, like)
