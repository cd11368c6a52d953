"""EPT's contrastive loss: a layer's input should resemble the embedding of its task."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["first", "mean"]


def pooled(x: Tensor, pooling: Pooling, real: Tensor | None) -> Tensor:
    """One vector for each row: that of its first token, or the mean over its tokens.

    Arguments:
        x: (rows, inputs), (rows, tokens, inputs), or with more axes of tokens.
        pooling: which.
        real: (rows, tokens) bool, which tokens are no padding; None for all.

    Returns:
        (rows, inputs) float32, or float64 if x is.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.dim() == 2:
        return x
    x = x.flatten(1, -2)
    if pooling == "first":
        if real is None:
            return x[:, 0]
        return x[torch.arange(len(x), device=x.device), real.int().argmax(1)]
    if real is None:
        return x.mean(1)
    share = real.to(x)[..., None]
    return (x * share).sum(1) / share.sum(1).clamp(min=1)


def similarities(rows: Tensor, embedding: Tensor, tau: float) -> Tensor:
    """cos(x̄_b, e_t) / τ (EPT, eq. 7): (rows, inputs), (tasks, inputs) -> (rows, tasks)."""
    exact = embedding.to(rows)
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows, dim=-1) @ F.normalize(exact, dim=-1).mT / tau


def contrastive_loss(rows: Tensor, embedding: Tensor, tasks: Sequence[int], tau: float) -> Tensor:
    """Mean cross-entropy of the rows' own tasks (EPT, eq. 7), a scalar."""
    own = torch.tensor(tasks, device=rows.device)
    return F.cross_entropy(similarities(rows, embedding, tau), own)
