"""One task's mixture of an EPT adapter as the plain LoRA that it amounts to."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import get_peft_model_state_dict
from transformers.pytorch_utils import Conv1D

from sparing.lora_files import CARRIED_OVER, write_lora
from sparing.tuners import TunerLayer

if TYPE_CHECKING:
    from sparing.adapt.ept import EPTTuner


@torch.no_grad()
def write_task(tuner: "EPTTuner", adapter_name: str, task: int | None, folder: Path) -> None:
    """Write the LoRA; arguments and errors as for `EPTTuner.export_lora`.

    Ranks differ from layer to layer, and each layer's alpha is its rank: the scale is within B.
    """
    config: Any = tuner.peft_config[adapter_name]
    factors, transposed = {}, False
    for name, module in tuner.model.named_modules():
        if isinstance(module, TunerLayer) and adapter_name in module.adapters:
            factors[name] = module.adapters[adapter_name].factors(task)
            transposed |= isinstance(module.get_base_layer(), Conv1D)
    ranks = {name: len(down) for name, (down, _) in factors.items()}
    most = max(ranks.values())
    state = get_peft_model_state_dict(tuner, adapter_name=adapter_name)
    extra = {f"base_model.{k}": t for k, t in state.items() if f".{tuner.prefix}" not in f".{k}"}
    write_lora(
        folder,
        factors,
        transposed=transposed,
        extra=extra,
        r=most,
        lora_alpha=most,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        **{option: getattr(config, option) for option in CARRIED_OVER},
    )
