"""Scale: hyperparameters tuned on a small model that hold on a large one."""

from sparing.scale.hyperp import HyperP, hyperp_param_groups, hyperp_plan
from sparing.scale.muon import Muon
from sparing.scale.muon_h import AdamH, MuonH
from sparing.scale.planning import Plan, PlannedParameter
from sparing.scale.sqrt_gate import install_sqrt_gate

__all__ = [
    "AdamH",
    "HyperP",
    "Muon",
    "MuonH",
    "Plan",
    "PlannedParameter",
    "hyperp_param_groups",
    "hyperp_plan",
    "install_sqrt_gate",
]
