"""Scale: hyperparameters tuned on a small model that hold on a large one."""

from sparing.scale.base_shapes import narrowed
from sparing.scale.decay import SteadyState, decay_convention
from sparing.scale.fast_hp_transfer import TrajectoryRecorder, analyze_transfer
from sparing.scale.gains import branch_gains
from sparing.scale.hyperp import HyperP, hyperp_param_groups, hyperp_plan
from sparing.scale.muon import Muon
from sparing.scale.muon_h import AdamH, MuonH
from sparing.scale.muon_mup import MuonPlusPlus, SpectralWarning
from sparing.scale.muon_mup_plan import exact_init, muon_mup_groups, muon_mup_plan
from sparing.scale.planning import Plan, PlannedParameter
from sparing.scale.spectra import (
    Spectra,
    WidthFit,
    compare_spectra,
    fit_width_exponent,
    measure_checkpoint,
    measure_spectra,
)
from sparing.scale.spectral_monitor import SpectralMonitor
from sparing.scale.sqrt_gate import install_sqrt_gate
from sparing.scale.wd_scaling import DecayRule, ScalingWarning, wd_scaled_groups, wd_scaled_plan
from sparing.scale.width_multipliers import WidthMultipliers

__all__ = [
    "AdamH",
    "DecayRule",
    "HyperP",
    "Muon",
    "MuonH",
    "MuonPlusPlus",
    "Plan",
    "PlannedParameter",
    "ScalingWarning",
    "Spectra",
    "SpectralMonitor",
    "SpectralWarning",
    "SteadyState",
    "TrajectoryRecorder",
    "WidthFit",
    "WidthMultipliers",
    "analyze_transfer",
    "branch_gains",
    "compare_spectra",
    "decay_convention",
    "exact_init",
    "fit_width_exponent",
    "hyperp_param_groups",
    "hyperp_plan",
    "install_sqrt_gate",
    "measure_checkpoint",
    "measure_spectra",
    "muon_mup_groups",
    "muon_mup_plan",
    "narrowed",
    "wd_scaled_groups",
    "wd_scaled_plan",
]
