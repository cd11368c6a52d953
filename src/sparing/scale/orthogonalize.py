"""Newton–Schulz: from a matrix to the nearest orthogonal one, with matrix products only.

X ← aX + (bA + cA²)X with A = XXᵀ drives all singular values towards 1 and leaves the singular
vectors alone. Matrices of one shape are done together.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]
Orthogonalizer = Literal["ns5", "sharp", "hyperball", "polar", "svd"]

# Keller Jordan's quintic: singular values end in about [0.68, 1.21], whatever the number of steps.
_JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)
# A quintic that converges to 1, for values that are already near.
_CONVERGENT: Coefficients = (15 / 8, -10 / 8, 3 / 8)
NS5: tuple[Coefficients, ...] = (_JORDAN,) * 5
# As many products, but what three steps have brought into [0.68, 1.21] ends within 6e-4 of 1. The
# tighter scaling at the start (see `newton_schulz`) makes up for steps that raise less.
SHARP: tuple[Coefficients, ...] = (_JORDAN,) * 3 + (_CONVERGENT,) * 2
# Coefficients that change from step to step (HyperP, eq. 2): ends nearer to 1.
HYPERBALL: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Five steps of NS5 bring small singular values up, seven of the convergent quintic to 1.
POLAR: tuple[Coefficients, ...] = NS5 + (_CONVERGENT,) * 7
SCHEDULES = {"ns5": NS5, "sharp": SHARP, "hyperball": HYPERBALL, "polar": POLAR}
EPSILON = 1e-7


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[Coefficients] = NS5,
    dtype: torch.dtype | None = None,
    *,
    tight: bool = False,
) -> Tensor:
    """Orthogonalise a stack of matrices; zero matrices stay zero.

    Arguments:
        matrices: (…, rows, columns), any scale.
        coefficients: (a, b, c) of every step.
        dtype: of the products; by default bfloat16 on a GPU and that of `matrices` elsewhere.
        tight: scale by the Schatten 4-norm, (Σσ⁴)^¼, instead of Frobenius's. It bounds σ₁ as well,
            and costs nothing, as the first XXᵀ is needed anyhow.

    Returns:
        like `matrices`.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else matrices.dtype
    tall = matrices.shape[-2] > matrices.shape[-1]
    exact = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    norm = torch.linalg.matrix_norm(exact, keepdim=True).clamp_min(EPSILON)
    x = (exact / norm).to(dtype)
    wide = x.mT if tall else x
    batched = wide.reshape(-1, *wide.shape[-2:])
    for number, (a, b, c) in enumerate(coefficients):
        gram = batched @ batched.mT
        if tight and number == 0:
            size = torch.linalg.matrix_norm(gram, keepdim=True).sqrt().clamp_min(EPSILON)
            batched, gram = batched / size, gram / size.square()
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        batched = torch.baddbmm(batched, polynomial, batched, beta=a)
    x = batched.mT if tall else batched
    return x.reshape(matrices.shape).to(matrices.dtype)


def orthogonalize(
    matrices: Tensor, kind: Orthogonalizer = "ns5", dtype: torch.dtype | None = None
) -> Tensor:
    """The orthogonal factor of every matrix: (…, rows, columns) -> the same shape.

    Arguments:
        matrices: any scale.
        kind: "ns5" and "hyperball" are quick and rough; "sharp" is as quick and has the largest
            singular values at 1; "polar" has all of them there, "svd" exactly.
        dtype: of the products of all but the last.
    """
    if kind != "svd":
        return newton_schulz(matrices, SCHEDULES[kind], dtype, tight=kind == "sharp")
    exact = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    kept = (s > s[..., :1] * 1e-7).to(u.dtype)  # a zero matrix, or direction, stays zero
    return ((u * kept.unsqueeze(-2)) @ vh).to(matrices.dtype)


def spectral_norm(
    matrix: Tensor,
    start: Tensor | None = None,
    steps: int = 30,
    tolerance: float | None = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The largest singular value by power iteration, from below.

    Arguments:
        matrix: (…, rows, columns), any type; computed in float32 or float64.
        start: (…, columns), such as the vector returned before; by default the same for all.
        steps: two products with the matrix each.
        tolerance: relative rise below which it stops; None for no look at values, which on a GPU
            would wait for them.

    Returns:
        (…) values and (…, columns) right singular vectors of length 1.
    """
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if start is None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(exact.shape[-1], generator=generator, dtype=torch.float64)
        start = start.to(exact).expand(*exact.shape[:-2], -1)
    v = torch.nn.functional.normalize(start, dim=-1)
    value = torch.zeros(exact.shape[:-2], dtype=exact.dtype, device=exact.device)
    for _ in range(steps):
        u = torch.nn.functional.normalize((exact @ v.unsqueeze(-1)).squeeze(-1), dim=-1)
        pulled = (exact.mT @ u.unsqueeze(-1)).squeeze(-1)
        before, value = value, pulled.norm(dim=-1)
        # A zero matrix has no direction: the old one is kept, as zeros could never recover.
        found = (value > 0).unsqueeze(-1)
        v = torch.where(found, torch.nn.functional.normalize(pulled, dim=-1), v)
        if tolerance is not None and bool(((value - before) <= tolerance * value).all()):
            break
    return value, v
