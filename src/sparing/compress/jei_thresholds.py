"""Threshold gating, the baseline: exits by confidence, thresholds from validation data."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparing.compress.jei_gates import ConfidenceThresholds


def geometric_shares(exits: int, p: float) -> Tensor:
    """Shares (exits + 1,) of samples, ∝ p^k, that are to leave at exit k."""
    shares = p ** torch.arange(1, exits + 2, dtype=torch.float64)
    return shares / shares.sum()


def thresholds_for(logits: Tensor, shares: Tensor) -> ConfidenceThresholds:
    """Thresholds that let these shares of the validation data leave.

    Arguments:
        logits: (exits + 1, items, classes).
        shares: (exits + 1,), summing to 1.
    """
    confidence = logits.float().softmax(-1).amax(-1)
    here = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    found = []
    for exit in range(len(logits) - 1):
        wanted = round(float(shares[exit]) * logits.shape[1])
        left = confidence[exit][here].sort(descending=True).values
        found.append(_threshold(left, wanted))
        here &= confidence[exit] <= found[-1]
    return ConfidenceThresholds(found)


def _threshold(descending: Tensor, wanted: int) -> float:
    if wanted == 0:
        return 2.0
    return float(descending[wanted]) if wanted < len(descending) else 0.0


def threshold_sweep(logits: Tensor) -> Iterator[ConfidenceThresholds]:
    """The paper's baselines: geometric budgets p = i/20 for i = 1 to 39."""
    for i in range(1, 40):
        yield thresholds_for(logits, geometric_shares(len(logits) - 1, i / 20))
