"""Muon: momentum, orthogonalised. The baseline that Muon++ and MuonH change.

(K. Jordan et al. 2024; the factors are compared in arXiv 2601.01306.)
"""

import math
from typing import Any, Literal

from torch import Tensor

from sparing.scale.matrix_optimizer import MatrixOptimizer

Rule = Literal["spectral", "jordan", "moonlight"]


def step_factor(rule: Rule, outputs: int, inputs: int) -> float:
    """What an orthogonal update of a W acting as W x is multiplied by.

    Arguments:
        rule: "spectral" √(out/in), the same effect at every width; "jordan" √max(1, out/in);
            "moonlight" 0.2 √max(out, in), entries as large as Adam's.
        outputs, inputs: sides of W.
    """
    if rule == "spectral":
        return math.sqrt(outputs / inputs)
    if rule == "jordan":
        return math.sqrt(max(1.0, outputs / inputs))
    return 0.2 * math.sqrt(max(outputs, inputs))


class Muon(MatrixOptimizer):
    """W ← (1 - ηλ) W - η · factor · orthogonalise(momentum).

    With rule="jordan" the same as `torch.optim.Muon(adjust_lr_fn="original")`, up to the scale of
    the momentum, which does not matter.

    Arguments:
        params, lr, weight_decay, options: see `MatrixOptimizer`.
        rule: see `step_factor`.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        rule: Rule = "jordan",
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, rule=rule, **options)

    def matrix_step(
        self, weight: Tensor, orthogonal: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        factor = step_factor(group["rule"], *weight.shape[-2:])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(orthogonal, alpha=-group["lr"] * factor)
