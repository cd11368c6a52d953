"""Fine-tune few parameters: PEFT methods that work with `peft.get_peft_model`."""

from typing import TYPE_CHECKING

from sparing.adapt._unified_attention import gated_attention, record_gates
from sparing.adapt._unified_config import Slot, UnifiedPeftConfig
from sparing.adapt.bi_adapter import BiAdapterConfig
from sparing.adapt.bi_adapter_files import (
    compact_bytes,
    export_compact,
    export_peft,
    import_compact,
)
from sparing.adapt.bi_adapter_probes import relative_noise, round_weights
from sparing.adapt.dopamine import DopamineConfig
from sparing.adapt.dopamine_attribution import NeuronAttribution, neuron_attribution
from sparing.adapt.dopamine_deploy import close_neurons, fold_gains, prune_neurons
from sparing.adapt.dopamine_hard_model import hard_model, load_hard_model, save_hard_model
from sparing.adapt.dopamine_modes import (
    calibrate_thresholds,
    hardening_gap,
    mode_vectors,
    set_gate,
)
from sparing.adapt.dopamine_skipping import skip_closed_neurons
from sparing.adapt.ept import EPTConfig
from sparing.adapt.ept_batches import TaskBatches
from sparing.adapt.ept_training import TaskBlocks, evaluate_tasks, train_tasks
from sparing.adapt.hut import HUTConfig
from sparing.adapt.mos import MoSConfig, selection_histogram
from sparing.adapt.mos_export import export_lora
from sparing.adapt.neuroada import NeuroAdaConfig, lost_to_rounding, select_by_gradient
from sparing.adapt.neuroada_gradients import gradient_scores
from sparing.adapt.phatgoose import PhatgooseConfig, expert_layers, set_mode
from sparing.adapt.phatgoose_assembly import adapters_in, assemble
from sparing.adapt.phatgoose_export import export_unrouted
from sparing.adapt.phatgoose_gates import (
    gate_model,
    has_keys,
    save_average_inputs,
    save_gates,
    train_gates,
)
from sparing.adapt.phatgoose_statistics import RoutingStatistics, routing_statistics
from sparing.adapt.queryable_lora import QueryableLoRAConfig
from sparing.adapt.queryable_routing import freeze_routing, prompt_routing, routing_report
from sparing.adapt.sara import (
    DIFFUSERS_UNET_TARGETS,
    SaRAConfig,
    default_learning_rate,
    probe,
    set_scale,
    theta_for,
)
from sparing.adapt.unified_peft import (
    ParameterCounts,
    budget_match,
    fold_prefix,
    parameter_counts,
)

if TYPE_CHECKING:
    from sparing.adapt.callback import TunerCallback

__all__ = [
    "DIFFUSERS_UNET_TARGETS",
    "BiAdapterConfig",
    "DopamineConfig",
    "EPTConfig",
    "HUTConfig",
    "MoSConfig",
    "NeuroAdaConfig",
    "NeuronAttribution",
    "ParameterCounts",
    "PhatgooseConfig",
    "QueryableLoRAConfig",
    "RoutingStatistics",
    "SaRAConfig",
    "Slot",
    "TaskBatches",
    "TaskBlocks",
    "TunerCallback",
    "UnifiedPeftConfig",
    "adapters_in",
    "assemble",
    "budget_match",
    "calibrate_thresholds",
    "close_neurons",
    "compact_bytes",
    "default_learning_rate",
    "evaluate_tasks",
    "expert_layers",
    "export_compact",
    "export_lora",
    "export_peft",
    "export_unrouted",
    "fold_gains",
    "fold_prefix",
    "freeze_routing",
    "gate_model",
    "gated_attention",
    "gradient_scores",
    "hard_model",
    "hardening_gap",
    "has_keys",
    "import_compact",
    "load_hard_model",
    "lost_to_rounding",
    "mode_vectors",
    "neuron_attribution",
    "parameter_counts",
    "probe",
    "prompt_routing",
    "prune_neurons",
    "record_gates",
    "relative_noise",
    "round_weights",
    "routing_report",
    "routing_statistics",
    "save_average_inputs",
    "save_gates",
    "save_hard_model",
    "select_by_gradient",
    "selection_histogram",
    "set_gate",
    "set_mode",
    "set_scale",
    "skip_closed_neurons",
    "theta_for",
    "train_gates",
    "train_tasks",
]


def __getattr__(name: str) -> object:
    # Late, because transformers imports PEFT, and PEFT this room, in the middle of its Trainer.
    if name == "TunerCallback":
        from sparing.adapt.callback import TunerCallback

        return TunerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
