"""Output multipliers of a plan: applied by hooks while training, folded into the weights after."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparing.errors import ConfigError
from sparing.scale.planning import Plan


def install_multipliers(model: nn.Module, plan: Plan) -> list[RemovableHandle]:
    """Let every layer with a multiplier m give m times its output.

    Arguments:
        model: that was planned for; changed by hooks only.
        plan: with the multipliers.

    Returns:
        handles; `remove()` undoes it.

    Raises:
        ConfigError: a multiplier of something else than a layer's weight, or of a tied one.
    """
    return [
        model.get_submodule(layer).register_forward_hook(_scaled_by(factor))
        for layer, factor in _factors(plan).items()
    ]


def check_multipliers(plan: Plan) -> None:
    """Raise the error that `install_multipliers` would, before there is a model."""
    _factors(plan)


@torch.no_grad()
def fold_multipliers(weights: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The weights of a plain model with the same effect: m W and m b in place of W and b."""
    folded = dict(weights)
    for layer, factor in _factors(plan).items():
        for end in ("weight", "bias"):
            name = f"{layer}.{end}"
            if name in folded:
                folded[name] = folded[name] * factor
    return folded


def _factors(plan: Plan) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in plan.parameters:
        if row.multiplier == 1.0:
            continue
        layer, _, end = row.info.name.rpartition(".")
        if end != "weight" or row.info.role in ("vector", "expert") or row.info.tied:
            raise ConfigError(
                f"multiplier of {row.info.name}",
                expected="the weight of one linear layer or embedding, untied",
                found="a tied embedding" if row.info.tied else f"role {row.info.role}",
                mend="Untie embedding and head (without --tied), or use another planner.",
            )
        found[layer] = row.multiplier
    return found


def _scaled_by(factor: float) -> Any:
    return lambda module, args, output: output * factor
