"""The gate of an expert, trained after it on the same data (PHATGOOSE, step 2)."""

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from sparing.adapt._phatgoose_experts import open_experts
from sparing.adapt._phatgoose_keys import (
    KEY_FILES,
    Batches,
    average_inputs,
    digest,
    load_keys,
    save_keys,
)
from sparing.adapt.phatgoose import expert_layers
from sparing.adapt.phatgoose_assembly import fill, place
from sparing.data.blocks import Blocks
from sparing.errors import ConfigError
from sparing.train import TrainPlan, train

WARMUP = 0.06  # share of the steps, as in the paper; then the rate is constant


def gate_model(base: nn.Module, adapter: str | Path, *, gate_noise: bool = False) -> PeftModel:
    """One expert, frozen, behind gates that start at 0 and so let half of it through (eq. 2).

    Train it on the expert's data with its own loss, by `Trainer` or any loop, and write the gates
    with `save_gates`. `train_gates` does both for causal language models. Padding tokens pass the
    gates too; they have gradients through attention only.

    Arguments:
        base: the plain base model; its parameters are frozen.
        adapter: folder of the expert, as for `assemble`.
        gate_noise: see `PhatgooseConfig`.

    Raises:
        CheckpointError: the expert is damaged, of another base or of another kind.
    """
    experts = open_experts(base, [adapter])
    model = place(base, experts, key="gate", mode="gate_train", gate_noise=gate_noise)
    for name, layer in expert_layers(model).items():
        fill(layer, name, experts)
    return model


def save_gates(model: nn.Module, adapter: str | Path, **notes: object) -> Path:
    """Write trained gates to `gates.safetensors` beside the expert, atomically.

    Arguments:
        model: from `gate_model`, trained.
        adapter: folder of the expert.
        notes: kept in the file's header.

    Returns:
        the file: one float32 vector (inputs,) for each module, by its name.

    Raises:
        ConfigError: the model does not train gates.
        CheckpointError: the folder cannot be written.
    """
    layers = expert_layers(model)
    kinds = {layer.config.trains for layer in layers.values()}
    if kinds != {"gate"}:
        raise ConfigError(
            "model",
            expected="one with gates, from gate_model",
            found=f"one that trains {kinds.pop()}",
            mend="Call gate_model(base, adapter) and train that.",
        )
    gates = {name: layer.keys[0] for name, layer in layers.items() if layer.keys is not None}
    return save_keys(adapter, "gate", gates, **notes)


def has_keys(adapter: str | Path, kind: str = "gate") -> bool:
    """Whether an expert has keys made for its present weights.

    Arguments:
        adapter: folder of the expert.
        kind: "gate" or "average".

    Raises:
        CheckpointError: the file of keys is damaged or belongs to other weights.
    """
    return load_keys(adapter, kind) is not None


def train_gates(
    base: nn.Module,
    adapter: str | Path,
    data: Blocks,
    *,
    steps: int = 100,
    learning_rate: float = 5e-3,
    batch_size: int = 16,
    seed: int = 0,
    gate_noise: bool = False,
    again: bool = False,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Train the gates of one expert and write them beside it.

    AdamW without decay, 6 % warm-up, then a constant rate, gradients clipped to norm 1, as in the
    paper, whose effective batch is 1,024. Longer or hotter training made gates worse in our
    experiments. An expert that has gates is left as it is; an interrupted training goes on where it
    stopped.

    Arguments:
        base: the plain base model, a causal language model; left without adapters, but frozen.
        adapter: folder of the expert.
        data: what the expert was trained on.
        steps: optimiser steps.
        learning_rate: after the warm-up.
        batch_size: rows a step.
        seed: of the data order.
        gate_noise: see `PhatgooseConfig`.
        again: train even if the expert has gates.
        accelerator: devices and processes.
        on_step: called with the step (from 1) and its loss.

    Returns:
        the file of gates.

    Raises:
        CheckpointError: the expert or its gates are damaged or do not belong together.
        DivergedError: the loss became NaN or infinite.
    """
    folder = Path(adapter)
    if not again and has_keys(folder):
        return folder / KEY_FILES["gate"]
    plan = TrainPlan(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=WARMUP,
        schedule="constant",
        seed=seed,
    )
    accelerator = accelerator or Accelerator()
    unfinished = folder / f".gates.{digest(folder)}.training"
    model = gate_model(base, folder, gate_noise=gate_noise)
    try:
        _, history = train(model, data, plan, accelerator, checkpoint=unfinished, on_step=on_step)
        if accelerator.is_main_process:
            loss = history.losses[-1]
            save_gates(model, folder, steps=steps, learning_rate=learning_rate, loss=loss)
            unfinished.unlink(missing_ok=True)
    finally:
        model.unload()
    return folder / KEY_FILES["gate"]


def save_average_inputs(
    base: nn.Module, adapter: str | Path, data: Batches, batch_size: int = 8
) -> Path:
    """Write the mean inputs of an expert's modules on its data beside it, for key="average".

    This is the paper's baseline of average activations.

    Arguments:
        base: the plain base model.
        adapter: folder of the expert.
        data: blocks, or batches of keyword arguments of the model; at most 1,000 examples are used.
        batch_size: rows at a time of blocks.

    Returns:
        the file: one float32 vector (inputs,) for each module, by its name.

    Raises:
        ConfigError: no data.
        CheckpointError: the expert is damaged, of another base or of another kind.
    """
    (expert,) = open_experts(base, [adapter])
    return save_keys(adapter, "average", average_inputs(base, data, expert.shapes, batch_size))
