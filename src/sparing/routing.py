"""Gates: from scores to a few weights that say which experts take part, and how much.

Everything is computed in float32 (or float64 where the scores are), whatever the type of the
model: a softmax over large scores loses experts in 16 bits.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce


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


def sqrt_gate(weights: Tensor) -> Tensor:
    """√g instead of g, so that the squares of the weights sum to 1 (SqrtGate, HyperP, eq. 15).

    Uncorrelated experts of RMS r then give an output of RMS r for every number of experts a token,
    where weights that sum to 1 give r/√k.

    Arguments:
        weights: (..., experts) of the chosen experts, summing to 1; 0 for others.

    Returns:
        the same shape and type; the gradient is finite where a weight underflows to 0.
    """
    return torch.where(weights > 0, (weights + 1e-30).sqrt(), torch.zeros_like(weights))


Balance = Literal["switch", "entropy", "sequence"]


def balance_loss(logits: Tensor, k: int, style: Balance = "switch") -> Tensor:
    """How unevenly a router uses its experts; to be multiplied by γ (HyperP, eq. 17).

    "switch" is E Σ_e f_e P_e: 1 when all experts are used alike, E when one takes everything.
    "sequence" is the mean of that over sequences. "entropy" is log E minus the entropy of P: 0
    when all are used alike. f is the share of the assignments, P the mean probability; under
    `torch.distributed` both are means over all processes, and P carries the gradient.

    Arguments:
        logits: (..., tokens, experts), any floating type.
        k: experts a token is sent to.
        style: see above.

    Returns:
        a scalar, float32 or float64.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    experts = exact.shape[-1]
    probabilities = exact.softmax(dim=-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, top_experts(exact.detach(), k), 1 / k)
    if style == "sequence":
        return experts * (chosen.mean(-2) * probabilities.mean(-2)).sum(-1).mean()
    used, mean = chosen.flatten(0, -2).mean(0), probabilities.flatten(0, -2).mean(0)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        everyone = torch.distributed.distributed_c10d._get_default_group()
        mean = all_reduce(mean, "sum", everyone) / world
        torch.distributed.all_reduce(used)
        used = used / world
    if style == "entropy":
        return math.log(experts) - entropy(mean)
    return experts * (used * mean).sum()
