"""The planners by name, all called alike: a base model, a target model and one run of the base."""

from collections.abc import Callable

from torch import nn

from sparing.scale.hyperp import hyperp_planner
from sparing.scale.planning import Plan
from sparing.scale.settings import PlanSettings

Planner = Callable[[nn.Module, nn.Module, PlanSettings], Plan]

PLANNERS: dict[str, Planner] = {"hyperp": hyperp_planner}
