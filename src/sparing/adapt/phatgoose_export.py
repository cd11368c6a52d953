"""What a collection of experts amounts to when nothing is routed, as a plain LoRA."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.adapt.phatgoose import PhatgooseAdapter, expert_layers
from sparing.errors import ConfigError
from sparing.lora_files import Factors, exact_targets, write_lora
from sparing.tuners import TunerLayer


def export_unrouted(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter in mode "single" or "merged" as a LoRA that needs no sparing to load.

    "single" gives back the expert's own factors. "merged" is the mean of the experts' products,
    which needs a rank of up to the sum of theirs; it is not the mean of their factors, which is
    another and worse model. The folder is replaced as a whole.

    Arguments:
        model: with a PHATGOOSE adapter; choose the mode with `set_mode`.
        folder: to write to.
        adapter_name: of the adapter.

    Raises:
        ConfigError: the adapter routes, so that no fixed matrix is equal to it.
        CheckpointError: the folder cannot be written.
    """
    layers = expert_layers(model, adapter_name)
    config = next(iter(layers.values())).config
    if config.mode not in ("single", "merged"):
        raise ConfigError(
            f"PHATGOOSE adapter in mode {config.mode!r}",
            expected="mode 'single' or 'merged'",
            found="experts that are chosen for each token, which no LoRA can do",
            mend="Call set_mode(model, 'merged') first, or save it with save_pretrained.",
        )
    found = {name: _factors(adapter) for name, adapter in layers.items()}
    found = {name: factors for name, factors in found.items() if len(factors.a)}
    ranks = {name: len(factors.a) for name, factors in found.items()}
    base = model.get_base_model()
    write_lora(
        folder,
        {name: (factors.a, factors.b) for name, factors in found.items()},
        transposed=any(_is_transposed(base, name) for name in found),
        r=max(ranks.values()),
        lora_alpha=1,
        rank_pattern=ranks,
        alpha_pattern={name: factors.scale * ranks[name] for name, factors in found.items()},
        target_modules=exact_targets(found, base),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )


@torch.no_grad()
def _factors(adapter: PhatgooseAdapter) -> Factors:
    config = adapter.config
    if config.mode == "single":
        expert = config.index(config.expert)
        a, b = adapter.stack.only(expert)
        return Factors(a, b.t(), float(adapter.scales[expert]))
    share: Tensor = adapter.scales[adapter.owner] / len(adapter.ranks)
    return Factors(adapter.a, (adapter.b * share[:, None]).t(), 1.0)


def _is_transposed(base: nn.Module, name: str) -> bool:
    layer = base.get_submodule(name)
    assert isinstance(layer, TunerLayer)
    return isinstance(layer.get_base_layer(), Conv1D)
