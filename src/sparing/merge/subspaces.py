"""Low-rank changes of linear layers, and how alike the subspaces are that they read.

A change Δ of a layer's weight is a sum of outer products (gradient at the output)(input)ᵀ. Its
right singular vectors therefore span the directions of the *inputs* that its task excites, which is
why they can say which task a feature belongs to. Left ones cannot.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LARGE = 1024  # inputs and outputs from which on the SVD is randomised
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Truncation:
    """How much of a change is kept.

    Arguments:
        rank: k, at most; None for no limit.
        energy: k is the least rank with this share of ‖Δ‖_F², above 0, to 1.
        router_rank: r, at most.
        seed: of the sketch, where the SVD is randomised.
    """

    rank: int | None = 64
    energy: float = 0.9
    router_rank: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Factors:
    """A change Δ = outputsᵀ inputs[:k] of a layer of i inputs and o outputs.

    Arguments:
        outputs: Bᵀ, (k, o); singular values included.
        inputs: A, (max(k, r), i) with orthonormal rows, the strongest direction first.
        router_rank: r; the first r rows of `inputs` are the routing basis Vᵀ.
    """

    outputs: Tensor
    inputs: Tensor
    router_rank: int

    @property
    def rank(self) -> int:
        """k."""
        return len(self.outputs)

    @property
    def basis(self) -> Tensor:
        """Vᵀ, (r, i)."""
        return self.inputs[: self.router_rank]

    def matrix(self) -> Tensor:
        """Δ, (o, i)."""
        return self.outputs.mT @ self.inputs[: self.rank]

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same in another type."""
        return replace(self, outputs=self.outputs.to(dtype), inputs=self.inputs.to(dtype))


def factorize(delta: Tensor, cut: Truncation, name: str = "") -> Factors | None:
    """Thin SVD of a dense change (specification, eq. 1).

    Arguments:
        delta: (o, i), float32 or float64.
        cut: how much to keep.
        name: of the module; the sketch of a large matrix depends on it and on the seed.

    Returns:
        Its factors, or None if it is 0.
    """
    if not delta.any():
        return None
    sketch = max(cut.rank or min(delta.shape), cut.router_rank) + _OVERSAMPLING
    if min(delta.shape) >= _LARGE and sketch < min(delta.shape):
        left, values, right = _randomized_svd(delta, sketch, f"{cut.seed} {name}")
    else:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return _truncated(left, values, right, float(delta.square().sum()), cut)


def factorize_product(left: Tensor, right: Tensor, cut: Truncation) -> Factors | None:
    """The same for Δ = left · right, never formed: two QR and the SVD of a small core.

    Arguments:
        left: (o, m).
        right: (m, i).
        cut: how much to keep.
    """
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right.mT)
    core = left_core @ right_core.mT
    if not core.any():
        return None
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    return _truncated(left_basis @ u, values, v @ right_basis.mT, float(values @ values), cut)


def merged(expert: Factors, members: int, newcomer: Factors, cut: Truncation) -> Factors:
    """Running mean (n Δ_e + Δ_t) / (n + 1) in factored form (eq. 6).

    Arguments:
        expert: Δ_e, the mean of `members` changes.
        members: n.
        newcomer: Δ_t.
        cut: how much of the result to keep.
    """
    share = 1 / (members + 1)
    left = torch.cat((expert.outputs * (members * share), newcomer.outputs * share)).mT
    right = torch.cat((expert.inputs[: expert.rank], newcomer.inputs[: newcomer.rank]))
    mean = factorize_product(left, right, cut)
    noise = torch.finfo(left.dtype).eps * max(len(left), right.shape[1]) * left.norm()
    if mean is None or mean.outputs.norm() < noise:
        # Opposites leave nothing but rounding; the expert keeps its place and its basis.
        return replace(expert, outputs=torch.zeros_like(expert.outputs))
    return mean


def affinity(first: Factors, second: Factors) -> float:
    """Projection metric ‖V_eᵀ V_t‖_F² / min(r_e, r_t): the mean squared cosine of the principal
    angles between the routing bases, 0 to 1 (eq. 2)."""
    overlap = (first.basis @ second.basis.mT).square().sum()
    return float(overlap) / min(first.router_rank, second.router_rank)


def cosine(first: Factors, second: Factors) -> float:
    """Cosine of two changes as vectors, negative ones counted as 0; the ablation of `affinity`."""
    inputs = first.inputs[: first.rank] @ second.inputs[: second.rank].mT
    product = float((inputs * (first.outputs @ second.outputs.mT)).sum())
    size = float(first.outputs.norm() * second.outputs.norm())
    return max(0.0, product / size) if size else 0.0


def null_affinity(inputs: int, rank: int) -> tuple[float, float]:
    """Mean and standard deviation of the affinity of two independent random subspaces (eq. 3).

    Arguments:
        inputs: i, at least 2.
        rank: r of both.
    """
    rest = inputs - rank
    variance = 2 * rest**2 / ((inputs - 1) * inputs**2 * (inputs + 2))
    return rank / inputs, math.sqrt(variance)


def _truncated(
    left: Tensor, values: Tensor, right: Tensor, energy: float, cut: Truncation
) -> Factors:
    """The leading part of an SVD: left (o, m), values (m,), right (m, i)."""
    noise = torch.finfo(values.dtype).eps * max(len(left), right.shape[1])
    significant = max(1, int((values > noise * values[0]).sum()))
    enough = values.square().cumsum(0) >= cut.energy * energy * (1 - 1e-12)
    needed = int(enough.int().argmax()) + 1 if enough.any() else significant
    rank = min(needed if cut.energy < 1 else significant, significant, cut.rank or significant)
    router_rank = min(cut.router_rank, significant)
    return Factors(
        (left[:, :rank] * values[:rank]).mT.contiguous(),
        right[: max(rank, router_rank)].contiguous(),
        router_rank,
    )


def _randomized_svd(matrix: Tensor, sketch: int, seed: str) -> tuple[Tensor, Tensor, Tensor]:
    """Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1; seeded, unlike
    `torch.svd_lowrank`."""
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    probe = torch.randn(matrix.shape[1], sketch, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ probe.to(matrix.device)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ left, values, right
