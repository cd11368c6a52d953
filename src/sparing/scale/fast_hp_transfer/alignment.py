"""How a step of one matrix changes the loss, split into directions (eq. 9 to 11).

The symmetric alignment matrix S of a gradient G and a change δW has the trace ⟨G, δW⟩. Its
eigenvalues, sorted by magnitude, say in how few directions of the layer's inputs (or outputs) the
change of the loss lies.
"""

from typing import Literal

import torch
from torch import Tensor

from sparing.errors import ConfigError
from sparing.scale.fast_hp_transfer._scipy import scipy_part

Side = Literal["inputs", "outputs"]


def alignment_matrix(gradient: Tensor, change: Tensor, side: Side = "inputs") -> Tensor:
    """S = ½(GᵀδW + δWᵀG) on the inputs, or ½(GδWᵀ + δWGᵀ) on the outputs (eq. 9).

    Arguments:
        gradient, change: (..., outputs, inputs), any floating type.
        side: whose directions are told apart.

    Returns:
        (..., side, side) symmetric, float32 or float64; 16-bit inputs are widened first, since the
        tail of the spectrum cancels. TF32 is not used.
    """
    exact = torch.promote_types(gradient.dtype, torch.float32)
    g, w = gradient.to(exact), change.to(exact)
    if side == "outputs":
        g, w = g.mT, w.mT
    with _exact_products(g.device):
        product = g.mT @ w
    return 0.5 * (product + product.mT)


def spectrum(alignment: Tensor) -> Tensor:
    """(..., n, n) -> (..., n) eigenvalues, those of largest magnitude first (eq. 10)."""
    return by_magnitude(torch.linalg.eigvalsh(alignment))


def by_magnitude(eigenvalues: Tensor) -> Tensor:
    """Sorted along the last axis by |λ|, descending; signs are kept."""
    order = eigenvalues.abs().argsort(dim=-1, descending=True, stable=True)
    return eigenvalues.gather(-1, order)


def leading(
    gradient: Tensor, change: Tensor, top: int, side: Side = "inputs", seed: int = 0
) -> Tensor:
    """The eigenvalues of S of largest magnitude, by Lanczos and without forming S.

    Arguments:
        gradient, change: (outputs, inputs).
        top: how many; all are computed where that is half of them or more.
        side: see `alignment_matrix`.
        seed: of the first vector.

    Returns:
        (top,) or as many as there are; float64 on the CPU if all of S is too small for Lanczos,
        else of the type that it was computed in.

    Raises:
        ConfigError: `top` below 1.
        MissingExtraError: SciPy is not installed.
    """
    if top < 1:
        raise ConfigError(
            "leading.top",
            expected="1 or more",
            found=repr(top),
            mend="Give a number of directions.",
        )
    size = gradient.shape[-1 if side == "inputs" else -2]
    if 2 * top >= size or not bool(change.any()) or not bool(gradient.any()):
        return spectrum(alignment_matrix(gradient, change, side))[..., :top]
    exact = torch.promote_types(gradient.dtype, torch.float32)
    g, w = gradient.to(exact), change.to(exact)
    if side == "outputs":
        g, w = g.mT, w.mT
    scale = float(g.norm() * w.norm())

    def times(vector):  # type: ignore[no-untyped-def]
        v = torch.as_tensor(vector.reshape(-1), dtype=exact, device=g.device)
        with _exact_products(g.device):
            return (0.5 / scale * (g.mT @ (w @ v) + w.mT @ (g @ v))).cpu().numpy()

    linalg = scipy_part("sparse.linalg")
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=exact)
    dtype = start.numpy().dtype
    operator = linalg.LinearOperator((size, size), matvec=times, dtype=dtype)
    found = linalg.eigsh(operator, k=top, which="LM", v0=start.numpy(), return_eigenvectors=False)
    return by_magnitude(torch.as_tensor(scale * found, dtype=exact)).to(g.device)


def partial_sums(eigenvalues: Tensor) -> Tensor:
    """δφ^k for k = 0 ... n: (..., n) sorted -> (..., n + 1) float64 signed sums (eq. 10)."""
    sums = eigenvalues.double().cumsum(dim=-1)
    return torch.cat([torch.zeros_like(sums[..., :1]), sums], dim=-1)


class _exact_products:  # noqa: N801 - a context, named for what it does
    """Without TF32 on the GPU, whose ten bits would drown the tail of the spectrum."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def __enter__(self) -> None:
        if self.gpu:
            self.before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *error: object) -> None:
        if self.gpu:
            torch.backends.cuda.matmul.allow_tf32 = self.before
