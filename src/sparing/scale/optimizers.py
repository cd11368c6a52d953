"""The optimizers by name, and which planners make groups for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparing.errors import ConfigError, near_matches
from sparing.scale.muon import Muon
from sparing.scale.muon_h import AdamH, MuonH
from sparing.scale.muon_mup import MuonPlusPlus
from sparing.scale.planners import PLANNERS
from sparing.scale.planning import Plan

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer.

    Arguments:
        make: from parameter groups.
        planners: that suit it, the usual one first.
        on_sphere: whether matrices keep their norm, so that they can have no decay.
    """

    make: Callable[[Groups], Optimizer]
    planners: tuple[str, ...]
    on_sphere: bool = False


def _adamw(groups: Groups) -> Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(_adamw, ("wd-scaling", "standard")),
    "muon": OptimizerEntry(Muon, ("standard", "muon-mup")),
    "muon++": OptimizerEntry(MuonPlusPlus, ("muon-mup", "standard")),
    "muonh": OptimizerEntry(MuonH, ("hyperp", "standard"), on_sphere=True),
    "adamh": OptimizerEntry(AdamH, ("hyperp", "standard"), on_sphere=True),
}


def optimizer_named(name: str) -> OptimizerEntry:
    """Look one up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(
            "optimizer",
            expected=f"one of {', '.join(OPTIMIZERS)}",
            found=repr(name),
            mend=near_matches(name, sorted(OPTIMIZERS)),
        )
    return OPTIMIZERS[name]


def planner_for(optimizer: str, planner: str | None = None) -> str:
    """The name of the planner asked for, or the optimizer's usual one that is there.

    Raises:
        ConfigError: no such planner, or one whose groups are for other optimizers.
    """
    suitable = [name for name in optimizer_named(optimizer).planners if name in PLANNERS]
    if planner is None:
        return suitable[0]
    if planner not in PLANNERS:
        raise ConfigError(
            "planner",
            expected=f"one of {', '.join(PLANNERS)}",
            found=repr(planner),
            mend=near_matches(planner, sorted(PLANNERS)),
        )
    if planner not in suitable:
        raise ConfigError(
            "planner",
            expected=f"one for {optimizer}: {', '.join(suitable)}",
            found=repr(planner),
            mend="Choose one of these, or another optimizer.",
        )
    return planner


def check_decay(optimizer: str, weight_decay: float) -> None:
    """Refuse decay where matrices stay on a sphere.

    Raises:
        ConfigError: there would be some.
    """
    if weight_decay and optimizer_named(optimizer).on_sphere:
        raise ConfigError(
            "weight_decay",
            expected=f"0 for {optimizer}, whose matrices keep their norm",
            found=repr(weight_decay),
            mend="Leave it out: on a sphere decay would only be another learning rate.",
        )


def make_optimizer(name: str, plan: Plan, model: nn.Module) -> Optimizer:
    """An optimizer with the groups of a plan.

    Arguments:
        name: a key of `OPTIMIZERS`.
        plan: of this model.
        model: initialised.
    """
    return optimizer_named(name).make(plan.param_groups(model))
