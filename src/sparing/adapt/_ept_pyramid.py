"""EPT's experts: one small seed B A seen through kernels of several sizes.

An expert of size s takes the leading rows of B and columns of A and blows their product up s-fold.
Experts of one size that act together are one expert whose kernel is their weighted sum, so what is
passed around here is one mixed kernel for each size in use. No expert is ever built as a matrix of
the layer's size; `Projection.factors` and `Projection.apply` are two cheap ways to the same output.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Seed:
    """The factors that all experts of a layer share (EPT, eq. 1).

    Arguments:
        a: (r, ⌊inputs / s_min⌋).
        b: (⌊outputs / s_min⌋, r).
        inputs: width of the layer's input.
        outputs: width of its output.
    """

    a: Tensor
    b: Tensor
    inputs: int
    outputs: int

    def pruned(self, size: int) -> tuple[Tensor, Tensor]:
        """What an expert of this size sees: A[:, :m] and B[:n] (EPT, eq. 2)."""
        return self.a[:, : self.inputs // size], self.b[: self.outputs // size]


class Projection(ABC):
    """How a kernel blows the pruned seed up to the layer's size."""

    @abstractmethod
    def kernel_shape(self, size: int, outputs: int) -> tuple[int, int]:
        """Shape of the kernel of one expert."""

    @abstractmethod
    def rank(self, r: int, size: int) -> int:
        """How many rows the factors of one size have."""

    @abstractmethod
    def factors(self, seed: Seed, kernels: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The mixture as one low-rank product.

        Arguments:
            seed: of the layer.
            kernels: by size, the weighted sum of the chosen experts' kernels.

        Returns:
            down (rank, inputs) and up (outputs, rank), whose product up · down is Σ g_i W_i.
        """

    @abstractmethod
    def apply(self, x: Tensor, seed: Seed, kernels: Mapping[int, Tensor]) -> Tensor:
        """Σ g_i W_i x without any factor: (..., inputs) -> (..., outputs)."""

    @abstractmethod
    def apply_each(
        self, x: Tensor, seed: Seed, kernels: Mapping[int, Tensor], weights: Mapping[int, Tensor]
    ) -> Tensor:
        """Σ g_i(x) W_i x where every token has weights of its own.

        Arguments:
            x: (..., inputs).
            seed: of the layer.
            kernels: by size, (experts of that size, *kernel_shape).
            weights: by size, (..., experts of that size).

        Returns:
            (..., outputs).
        """


class KroneckerProjection(Projection):
    """Transposed convolution with stride s, which is the Kronecker product Z ⊗ K (EPT, eq. 3)."""

    def kernel_shape(self, size: int, outputs: int) -> tuple[int, int]:
        return size, size

    def rank(self, r: int, size: int) -> int:
        return r * size

    def factors(self, seed: Seed, kernels: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        downs, ups = [], []
        for size, kernel in kernels.items():
            a, b = seed.pruned(size)
            downs.append(_padded(torch.kron(a, kernel), seed.inputs))
            identity = torch.eye(size, dtype=b.dtype, device=b.device)
            ups.append(_padded(torch.kron(b, identity).mT, seed.outputs))
        return torch.cat(downs), torch.cat(ups).mT

    def apply(self, x: Tensor, seed: Seed, kernels: Mapping[int, Tensor]) -> Tensor:
        """EPT, eq. 5: r (inputs + outputs) + r s² multiply-adds a token and size."""
        tokens = x.reshape(-1, seed.inputs)
        parts = []
        for size, kernel in kernels.items():
            a, b = seed.pruned(size)
            hidden = kernel.expand(len(tokens), -1, -1).bmm(_down(tokens, a, size))
            parts.append(_up(hidden, b, seed.outputs))
        return sum(parts[1:], start=parts[0]).view(*x.shape[:-1], seed.outputs)

    def apply_each(
        self, x: Tensor, seed: Seed, kernels: Mapping[int, Tensor], weights: Mapping[int, Tensor]
    ) -> Tensor:
        tokens = x.reshape(-1, seed.inputs)
        parts = []
        for size, kernel in kernels.items():
            a, b = seed.pruned(size)
            mixed = weights[size].reshape(len(tokens), -1) @ kernel.flatten(1)
            hidden = mixed.view(-1, size, size).bmm(_down(tokens, a, size))
            parts.append(_up(hidden, b, seed.outputs))
        return sum(parts[1:], start=parts[0]).view(*x.shape[:-1], seed.outputs)


class ChannelProjection(Projection):
    """That of the released code: a kernel row for each output channel, (n, s), after Z.

    Only the first ⌊inputs / s⌋ input features are read, unlike in the paper's equation.
    """

    def kernel_shape(self, size: int, outputs: int) -> tuple[int, int]:
        return outputs // size, size

    def rank(self, r: int, size: int) -> int:
        return r

    def factors(self, seed: Seed, kernels: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        downs, ups = [], []
        for size, kernel in kernels.items():
            a, b = seed.pruned(size)
            downs.append(_padded(a, seed.inputs))
            ups.append(_padded((kernel[:, :, None] * b[:, None]).flatten(0, 1).mT, seed.outputs))
        return torch.cat(downs), torch.cat(ups).mT

    def apply(self, x: Tensor, seed: Seed, kernels: Mapping[int, Tensor]) -> Tensor:
        parts = []
        for size, kernel in kernels.items():
            a, b = seed.pruned(size)
            channels = F.linear(F.linear(x[..., : a.shape[1]], a), b)
            parts.append(_padded((channels[..., None] * kernel).flatten(-2), seed.outputs))
        return sum(parts[1:], start=parts[0])

    def apply_each(
        self, x: Tensor, seed: Seed, kernels: Mapping[int, Tensor], weights: Mapping[int, Tensor]
    ) -> Tensor:
        parts = []
        for size, kernel in kernels.items():
            a, b = seed.pruned(size)
            channels = F.linear(F.linear(x[..., : a.shape[1]], a), b)
            mixed = (weights[size] @ kernel.flatten(1)).unflatten(-1, (-1, size))
            parts.append(_padded((channels[..., None] * mixed).flatten(-2), seed.outputs))
        return sum(parts[1:], start=parts[0])


PROJECTIONS: dict[str, Projection] = {
    "kron": KroneckerProjection(),
    "channel": ChannelProjection(),
}


# Plain mm and bmm: torch.matmul would order its sums otherwise where gradients are recorded.


def _down(tokens: Tensor, a: Tensor, size: int) -> Tensor:
    """A X with features c·s + d of a token as X[c, d]: (tokens, inputs) -> (tokens, size, r).

    Trailing features that fill no column of X are left out.
    """
    columns = a.shape[1]
    folded = tokens[:, : columns * size].unflatten(1, (columns, size)).mT
    return (folded.reshape(-1, columns) @ a.mT).view(len(tokens), size, len(a))


def _up(hidden: Tensor, b: Tensor, outputs: int) -> Tensor:
    """B V, flattened row by row: (tokens, size, r) -> (tokens, outputs)."""
    rows, size = len(b), hidden.shape[1]
    expanded = (hidden.flatten(0, 1) @ b.mT).view(-1, size, rows)
    return _padded(expanded.mT.reshape(-1, rows * size), outputs)


def _padded(tensor: Tensor, width: int) -> Tensor:
    """Zeros at the end of the last axis, where the size does not divide the width."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor
