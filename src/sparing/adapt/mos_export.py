"""A MoS adapter as the plain LoRA that it amounts to."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from transformers.pytorch_utils import Conv1D

from sparing.adapt.mos import MoSTuner, adapted_layers, shard_pools
from sparing.lora_files import CARRIED_OVER, write_lora


def export_lora(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Write a MoS adapter as a plain PEFT LoRA of rank r, which needs no sparing to load.

    The file is r / budget_rank times the size of the compact one that `save_pretrained` writes.
    Modules trained in full are written too. The folder is replaced as a whole, or left as it was.

    Arguments:
        model: with a MoS adapter.
        folder: to write `adapter_config.json` and `adapter_model.safetensors` to.
        adapter_name: of the adapter.

    Raises:
        ConfigError: the model has no MoS adapter of that name.
        CheckpointError: the folder cannot be written.
    """
    shard_pools(model, adapter_name)
    config: Any = model.peft_config[adapter_name]
    extra = {
        key: tensor
        for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
        if f".{MoSTuner.prefix}" not in key
    }
    factors, transposed = {}, False
    for name, layer, adapter in adapted_layers(model.get_base_model(), adapter_name):
        with torch.no_grad():
            a, b = adapter.factors(adapter.pool.a.dtype)
        factors[name] = a, b.t() / adapter.scaling
        transposed |= isinstance(layer.get_base_layer(), Conv1D)
    write_lora(
        folder,
        factors,
        transposed=transposed,
        extra=extra,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        **{option: getattr(config, option) for option in CARRIED_OVER},
    )
