"""How a token and the key of an expert are compared."""

from typing import Literal

import torch
from torch import Tensor

from sparing.routing import standardized

Score = Literal["original", "dot", "cosine", "arrow"]
EPS = 1e-5  # of the layer norm in eq. 3


def prepared_keys(keys: Tensor, kind: Score) -> Tensor:
    """Everything about the score that does not depend on the token.

    Arguments:
        keys: (experts, inputs) float32 or float64.
        kind: of score.

    Returns:
        (experts, inputs) of the same type.
    """
    if kind == "arrow":
        return keys
    root = keys.shape[-1] ** 0.5
    if kind == "original":
        return standardized(keys, EPS) / root
    return (unit(keys) if kind == "cosine" else keys) / root


def score(x: Tensor, prepared: Tensor, kind: Score, temperature: float) -> Tensor:
    """Scores of every token for every expert (eqs. 3 and 4, and the variants of the code).

    Arguments:
        x: (..., inputs) float32 or float64.
        prepared: (experts, inputs), from `prepared_keys`.
        kind: of score.
        temperature: of the "arrow" score.

    Returns:
        (..., experts) of the type of x.
    """
    if kind == "original":
        x = standardized(x, EPS)
    elif kind == "cosine":
        x = unit(x)
    scores = x @ prepared.t()
    return scores.abs() / temperature if kind == "arrow" else scores


def unit(x: Tensor) -> Tensor:
    """Length 1 over the last axis; a zero vector stays one."""
    return torch.nn.functional.normalize(x, dim=-1)
