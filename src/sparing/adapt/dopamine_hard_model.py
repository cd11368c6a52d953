"""A TauGate mode as a plain model: gains folded, closed neurons gone, hard thresholds left.

It needs no PEFT to run, and is kept as one safetensors file.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from sparing.adapt._dopamine_widths import resize
from sparing.adapt.dopamine import vanishes_below_zero
from sparing.adapt.dopamine_deploy import fold_gains, only_mode, prune_neurons
from sparing.adapt.dopamine_modes import gates
from sparing.checkpoint import atomic_path
from sparing.errors import CheckpointError
from sparing.surgery import LINEAR


class HardGate(nn.Module):
    """An activation with thresholds, φ(z) where z > τ and 0 elsewhere (TauGate, eq. 3).

    Arguments:
        activation: φ.
        tau: (neurons,) float32.
    """

    tau: Tensor

    def __init__(self, activation: nn.Module, tau: Tensor) -> None:
        super().__init__()
        self.base_layer = activation
        self.register_buffer("tau", tau)

    def forward(self, z: Tensor) -> Tensor:
        """(..., neurons) -> (..., neurons)."""
        return self.base_layer(z).masked_fill(z <= self.tau, 0.0)


@torch.no_grad()
def hard_model(model: PeftModel, into: Mapping[str, str] | None = None) -> nn.Module:
    """The plain base model that computes what the mode does with hard gates; `model` is used up.

    Closed neurons are pruned, gains folded, and where thresholds still matter the activation
    becomes a `HardGate`. They do not matter where φ vanishes below zero and no τ is above it.

    Arguments:
        model: with one mode only.
        into: as in `fold_gains`.

    Raises:
        ConfigError: as in `fold_gains`.
    """
    mode = only_mode(model)
    prune_neurons(model, into)
    fold_gains(model, into)
    places = [(p.name, p.wrapper.get_base_layer(), p.gate) for p in gates(model, mode)]
    plain: nn.Module = model.unload()
    for name, activation, gate in places:
        # A last neuron that is closed but had to stay keeps its threshold or gain.
        tau = torch.where(gate.gain == 0, torch.inf, gate.tau).detach()
        if not (vanishes_below_zero(activation) and bool((tau <= 0).all())):
            _put(plain, name, HardGate(activation, tau))
    return plain


def save_hard_model(model: nn.Module, path: Path) -> None:
    """Write what `hard_model` returned as one safetensors file, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with atomic_path(path) as fresh:
        save_model(model, str(fresh))


def load_hard_model(base: nn.Module, path: Path) -> nn.Module:
    """Read what `save_hard_model` wrote into a model of the base's architecture.

    Arguments:
        base: freshly made from the base's configuration; changed in place and returned.
        path: of the file.

    Raises:
        CheckpointError: the file is damaged or missing, or of another architecture.
    """
    try:
        tensors = load_file(path)
    except Exception as error:
        raise CheckpointError(
            str(path),
            expected="a safetensors file of save_hard_model",
            found=f"{type(error).__name__}: {error}",
            mend="Check the path, or save again.",
        ) from error
    modules = dict(base.named_modules())
    for key in tensors:
        name, _, last = key.rpartition(".")
        if last == "tau" and name in modules and f"{name}.weight" not in tensors:
            _put(base, name, HardGate(modules[name], tensors[key].clone()))
    for name, layer in base.named_modules():
        stored = tensors.get(f"{name}.weight")
        if isinstance(layer, LINEAR) and stored is not None and stored.shape != layer.weight.shape:
            resize(layer, stored)
    own = base.state_dict()
    missing = {key for key in own if key not in tensors} - _shared_with(own, tensors)
    strange = sorted({key for key in tensors if key not in own} | missing)
    wrong = [key for key in tensors if key in own and own[key].shape != tensors[key].shape]
    if strange or wrong:
        raise CheckpointError(
            str(path),
            expected=f"the tensors of {type(base).__name__}",
            found=f"a difference at {(strange or wrong)[0]!r}",
            mend="Make the base from the configuration that the mode was trained on.",
        )
    base.load_state_dict(tensors, strict=False)
    return base


def _shared_with(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> set[str]:
    """Names of tensors that lie in the memory of a stored one, such as tied embeddings."""
    places = {own[key].data_ptr() for key in stored if key in own}
    return {key for key, tensor in own.items() if tensor.data_ptr() in places}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
