"""The two levels of JEI-DNN's training: what gates learn, and what classifiers learn.

Equation numbers are those of our specification of arXiv 2310.09163; see `jei_dnn`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TargetLoss = Literal["ce", "error", "probability"]
ClassWeights = Literal["none", "share", "cumulative"]
ClassifierLoss = Literal["weighted", "single"]
Rescale = Literal["none", "released", "detached"]


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """CE (exits, batch) of logits (exits, batch, classes) and labels (batch,) int64."""
    exits, batch, classes = logits.shape
    repeated = labels.expand(exits, batch).reshape(-1)
    return F.cross_entropy(logits.reshape(-1, classes), repeated, reduction="none").view(
        exits, batch
    )


def expected_loss(P: Tensor, ce: Tensor, costs: Tensor, lam: float) -> Tensor:
    """E[Σ_l P_l (CE_l + λ IC_l)] (eq. 8); P and ce (exits + 1, batch), costs (exits + 1,)."""
    return (P * (ce + lam * costs[:, None])).sum(0).mean()


@torch.no_grad()
def best_exits(
    logits: Tensor, labels: Tensor, costs: Tensor, lam: float, kind: TargetLoss = "ce"
) -> Tensor:
    """t (batch,), the exit with the least loss + λ cost, the first of several (eq. 9).

    Arguments:
        logits: (exits + 1, batch, classes).
        labels: (batch,) int64.
        costs: (exits + 1,), relative to the final exit.
        lam: λ ≥ 0.
        kind: cross-entropy; 0/1 error; or minus the largest probability where it is right.
    """
    exact = logits.double()
    if kind == "ce":
        losses = cross_entropies(exact, labels)
    else:
        confidence, predicted = exact.softmax(-1).max(-1)
        right = predicted == labels
        losses = (~right).double() if kind == "error" else -confidence * right
    return (losses + lam * costs.double()[:, None]).argmin(0)


def gate_targets(best: Tensor, exits: int) -> Tensor:
    """1[t ≤ l], (exits, batch) float32: this exit or an earlier one was best."""
    return (best <= torch.arange(exits, device=best.device)[:, None]).float()


def gate_loss(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """BCE of gates, mean over exits and rows, positives times ω (exits,) (eq. 9)."""
    weighting = torch.where(targets == 1, weights[:, None], torch.ones_like(targets))
    return F.binary_cross_entropy_with_logits(scores, targets, weight=weighting)


def class_weights(best: Tensor, exits: int, kind: ClassWeights) -> Tensor:
    """ω (exits,) float32, of t on validation data (eq. 10).

    "share" is the paper's: min((n - n_l) / max(n_l, 0.1), 5) of n_l = #(t = l), though gate l's
    positives are t ≤ l. "cumulative" counts those, and stays from 0.2 to 5. "none" is 1.
    """
    if kind == "none":
        return torch.ones(exits, device=best.device)
    counts = torch.bincount(best, minlength=exits + 1)[:exits].float()
    if kind == "cumulative":
        counts = counts.cumsum(0)
    ratio = (len(best) - counts) / counts.clamp_min(0.1)
    return ratio.clamp(0.2 if kind == "cumulative" else None, 5)


def classifier_loss(
    logits: Tensor,
    labels: Tensor,
    P: Tensor,
    kind: ClassifierLoss = "weighted",
    rescale: Rescale = "none",
) -> Tensor:
    """Σ_{l<G} P_l CE_l, mean over rows; P is constant (eq. 11).

    Arguments:
        logits: (exits, batch, classes), without the final exit.
        labels: (batch,) int64.
        P: (exits + 1, batch).
        kind: "single" trains only the exit that inference takes; then P is 0 or 1.
        rescale: times ρ = Σ CE / Σ P CE. "released" is the paper's code, where ρ has a gradient:
            value and gradient are then those of the unweighted sum. "detached" weighs most where
            the exit taken is good already, and loses what the weights gain.
    """
    ce, weights = cross_entropies(logits, labels), P[:-1].detach()
    if kind == "single":
        weights = hard_probabilities(weights)
    loss = (weights * ce).sum(0)
    if rescale != "none":
        rho = ce.sum(0) / loss.clamp_min(torch.finfo(loss.dtype).tiny)
        loss = loss * (rho if rescale == "released" else rho.detach())
    return loss.mean()


def hard_probabilities(P: Tensor) -> Tensor:
    """1 at the exit that inference takes (eq. 6), else 0; P (exits, batch) without the final."""
    mass = 1 - (P.cumsum(0) - P)
    leaves = (mass <= 2 * P) & (mass > 0)  # c ≥ ½
    return (leaves & (leaves.cumsum(0) == 1)).to(P.dtype)


def warm_up_loss(ce: Tensor, active: Tensor) -> Tensor:
    """Σ_l (G + 1 - l) CE_l over the exits (exits,) bool that still train; ce (exits, batch)."""
    exits = len(ce)
    factors = torch.arange(exits + 1, 1, -1, device=ce.device, dtype=ce.dtype)
    return (factors * ce.mean(1))[active].sum()
