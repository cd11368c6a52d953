"""Gates: from scores to a few weights that say which experts take part, and how much.

Everything is computed in float32 (or float64 where the scores are), whatever the type of the
model: a softmax over large scores loses experts in 16 bits.
"""

import torch
from torch import Tensor


def standardized(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 over the last axis, without an affine; a constant vector becomes 0.

    Arguments:
        x: (..., width), any floating type.
        eps: added to the variance.

    Returns:
        (..., width) float32, or float64 if x is.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = exact - exact.mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)


def top_experts(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores, highest first; ties go to the lowest index.

    Arguments:
        scores: (..., experts), finite or minus infinity.
        k: 1 to experts.

    Returns:
        (..., k) int64.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def sparse_softmax(logits: Tensor, k: int | None = None) -> Tensor:
    """Softmax over the k highest logits, exactly 0 elsewhere; differentiable.

    Arguments:
        logits: (..., experts); minus infinity for an expert that is absent. At least one is finite.
        k: experts that take part; None for all.

    Returns:
        (..., experts) float32 or float64; sums to 1.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if k is None or k >= exact.shape[-1]:
        return exact.softmax(dim=-1)
    chosen = torch.zeros_like(exact, dtype=torch.bool)
    chosen.scatter_(-1, top_experts(exact.detach(), k), True)
    return exact.masked_fill(~chosen, -torch.inf).softmax(dim=-1)


def entropy(weights: Tensor) -> Tensor:
    """Entropy in nats over the last axis: (..., experts) -> (...)."""
    return -torch.special.xlogy(weights, weights).sum(dim=-1)
