"""MuonH and AdamH: every matrix keeps the Frobenius norm it started with.

(HyperP, arXiv 2603.28743, eqs. 1 to 4.) A step turns a matrix by the angle η, whatever its shape
or the size of its gradient, so weight decay would only be another learning rate and is refused.
"""

from typing import Any

import torch
from torch import Tensor

from sparing.errors import ConfigError
from sparing.scale.matrix_optimizer import MatrixOptimizer
from sparing.scale.orthogonalize import Orthogonalizer

EPSILON = 1e-8


def sphere_step(
    weight: Tensor, direction: Tensor, lr: float, radius: Tensor, dims: tuple[int, ...] = (-2, -1)
) -> None:
    """W̃ = W - η (R/‖U‖) U, then W ← W̃ R/‖W̃‖ (HyperP, eq. 3); a zero direction changes nothing.

    Arguments:
        weight: (…, outputs, inputs), changed in place.
        direction: U, of that shape and any size.
        lr: η.
        radius: R, broadcast over `dims`.
        dims: that a norm is taken over.
    """
    length = _norm(direction, dims).clamp_min(EPSILON)
    weight.sub_(direction * (lr * radius / length))
    weight.mul_(radius / _norm(weight, dims).clamp_min(EPSILON))


class MuonH(MatrixOptimizer):
    """Muon on the sphere: W̃ = W - η (R/‖U‖) U, then W ← W̃ R/‖W̃‖ (HyperP, eq. 3).

    Groups with algorithm "matrix" follow the orthogonalised momentum, those with "adam_sphere"
    Adam's direction on the same sphere (AdamH, eq. 4), those with "adamw" plain AdamW. The radius R
    is the norm at the start; it is part of the state, so that rounding cannot make it drift.
    Everything is computed in float32 (float64 for such parameters); 16-bit parameters have masters.

    Arguments:
        params: tensors or groups, see `MatrixOptimizer`; `hyperp_param_groups` makes them.
        lr: angle of a step in radians, for small ones.
        joint: one sphere for a whole stack of experts or blocks, as in the authors' code, instead
            of one for each matrix.
        options: of `MatrixOptimizer`; momentum 0.95 and Nesterov as in the paper.

    Raises:
        ConfigError: a matrix of norm 0, which no step could move, or weight decay on a sphere.
    """

    algorithms = ("matrix", "adam_sphere", "adamw")

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.01,
        joint: bool = False,
        orthogonalizer: Orthogonalizer = "hyperball",
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, joint=joint, orthogonalizer=orthogonalizer, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["algorithm"] == "adamw":
            return
        if group["weight_decay"]:
            raise ConfigError(
                f"{type(self).__name__} group, weight_decay",
                expected="0 for parameters on a sphere",
                found=repr(group["weight_decay"]),
                mend="Leave it out: decay would only change the learning rate to η/(1 - ηλ).",
            )
        for name, parameter in zip(self.names(group), group["params"], strict=True):
            if parameter.is_meta:
                continue
            # Not `whole`, which keeps a state: FSDP2 replaces the parameters afterwards.
            exact = self.gathered(parameter.detach()).float()
            if not bool((self._radius(exact, group) > 0).all()):
                raise ConfigError(
                    f"parameter {name}",
                    expected="a matrix that is not zero, as its norm never changes",
                    found="norm 0",
                    mend="Initialise it, or put it into an AdamW group (a LoRA factor B, say).",
                )

    def step_group(self, group: dict[str, Any]) -> None:
        if group["algorithm"] == "matrix":
            super().step_group(group)
            return
        for parameter in group["params"]:
            if parameter.grad is not None:
                direction = self.adam_direction(parameter, group)
                self.apply(parameter, self.views(self.gathered(direction), group), group)

    def apply(
        self, parameter: Tensor, orthogonal: Tensor, group: dict[str, Any], piece: int = 0
    ) -> None:
        state = self.state[parameter]
        if "radius" not in state:
            state["radius"] = self._radius(self.whole(parameter), group)
        super().apply(parameter, orthogonal, group, piece)

    def matrix_step(
        self, weight: Tensor, orthogonal: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        sphere_step(weight, orthogonal, group["lr"], state["radius"], self._dims(weight, group))

    def _radius(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        view = self.views(weight, group)
        return _norm(view, self._dims(view, group))

    @staticmethod
    def _dims(view: Tensor, group: dict[str, Any]) -> tuple[int, ...]:
        return tuple(range(view.ndim)) if group["joint"] else (-2, -1)


class AdamH(MuonH):
    """Adam on the sphere: as `MuonH`, with m̂/(√v̂ + ε) for the direction of every matrix."""

    def step_group(self, group: dict[str, Any]) -> None:
        super().step_group({**group, "algorithm": "adam_sphere"})


def _norm(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
