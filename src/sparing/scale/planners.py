"""The planners by name, all called alike: a base model, a target model and one run of the base."""

from collections.abc import Callable

from torch import nn

from sparing.scale.hyperp import hyperp_planner
from sparing.scale.muon_mup_plan import muon_mup_planner
from sparing.scale.planning import Plan
from sparing.scale.settings import PlanSettings
from sparing.scale.standard import standard_planner
from sparing.scale.wd_scaling import wd_scaling_planner

Planner = Callable[[nn.Module, nn.Module, PlanSettings], Plan]

PLANNERS: dict[str, Planner] = {
    "hyperp": hyperp_planner,
    "muon-mup": muon_mup_planner,
    "standard": standard_planner,
    "wd-scaling": wd_scaling_planner,
}
