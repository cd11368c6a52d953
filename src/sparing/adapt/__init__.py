"""Fine-tune few parameters: PEFT methods that work with `peft.get_peft_model`."""

from sparing.adapt.callback import TunerCallback
from sparing.adapt.hut import HUTConfig
from sparing.adapt.mos import MoSConfig, selection_histogram
from sparing.adapt.mos_export import export_lora
from sparing.adapt.neuroada import NeuroAdaConfig, lost_to_rounding, select_by_gradient
from sparing.adapt.neuroada_gradients import gradient_scores
from sparing.adapt.sara import (
    DIFFUSERS_UNET_TARGETS,
    SaRAConfig,
    default_learning_rate,
    probe,
    set_scale,
    theta_for,
)

__all__ = [
    "DIFFUSERS_UNET_TARGETS",
    "HUTConfig",
    "MoSConfig",
    "NeuroAdaConfig",
    "SaRAConfig",
    "TunerCallback",
    "default_learning_rate",
    "export_lora",
    "gradient_scores",
    "lost_to_rounding",
    "probe",
    "select_by_gradient",
    "selection_histogram",
    "set_scale",
    "theta_for",
]
