"""What of a TauGate mode can go into the weights: gains are folded, closed neurons are taken out.

Thresholds depend on the input and stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from sparing.adapt._dopamine_widths import keep, with_values
from sparing.adapt.dopamine import GatedActivation, NeuronGate, networks
from sparing.adapt.dopamine_attribution import NeuronAttribution
from sparing.adapt.dopamine_modes import gates
from sparing.errors import ConfigError
from sparing.surgery import LINEAR
from sparing.tuners import matrix_view

TRANSPARENT = (nn.Dropout, nn.Identity)  # act on each neuron alone, so that a gain passes through


@dataclass(frozen=True)
class Neighbours:
    """The layers around an activation: those whose outputs are its neurons, and the one that reads
    them."""

    first: tuple[nn.Module, ...]
    last: nn.Module


@torch.no_grad()
def fold_gains(model: PeftModel, into: Mapping[str, str] | None = None) -> None:
    """Move the gains into the layers that read the neurons, W ← W diag(γ), and set γ to 1.

    The outputs stay the same up to rounding; the base model alone does not. Gains of exactly 0
    stay, as they mark neurons that `prune_neurons` takes out.

    Arguments:
        model: with one mode only, as others would be changed too.
        into: the linear layer that reads an activation, by name of the activation, for networks
            where it cannot be told: it is known in blocks and in `nn.Sequential`.

    Raises:
        ConfigError: several modes; a layer that cannot be told, or is packed; something between
            that is not linear in each neuron; gains before an activation that does not commute.
    """
    mode = only_mode(model)
    places = gates(model, mode)
    around = {place.name: _neighbours(model, place.name, into or {}) for place in places}
    for place in places:
        _check_commutes(place.name, place.wrapper.get_base_layer(), place.gate)
        _check_plain(around[place.name].last)
    for place in places:
        if place.gate.gain_change is None:
            continue
        gain = place.gate.gain
        factor = torch.where(gain == 0, 1.0, gain)
        last: Any = around[place.name].last
        weight = matrix_view(last, last.weight.data)
        exact = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(exact) * factor)
        place.gate.gain_change.copy_(torch.where(gain == 0, -1.0, 0.0))


@torch.no_grad()
def close_neurons(
    model: nn.Module, found: NeuronAttribution, mode: str = "default", at_most: float = 0.0
) -> dict[str, int]:
    """Close for good the neurons whose participation was `at_most` this; with 0, the outputs of the
    hard network on the same data stay bit by bit.

    Their threshold becomes infinite, or their gain 0 in a mode without learned thresholds.

    Arguments:
        model: with the mode.
        found: of `neuron_attribution`, on data that stand for all that the mode will see.
        mode: name of the adapter.
        at_most: from 0 to below 1.

    Returns:
        how many neurons were closed, by activation.

    Raises:
        ConfigError: unknown mode, or one that was not looked at; a share out of range.
    """
    if not 0 <= at_most < 1:
        raise ConfigError(
            "at_most", expected="from 0 to below 1", found=str(at_most), mend="Use 0."
        )
    usage = found.of(mode)
    counts = {}
    for name, _, gate in gates(model, mode):
        idle = (usage[name].participation <= at_most).to(gate.start.device)
        if gate.tau_change is not None:
            gate.tau_change.masked_fill_(idle, torch.inf)
        elif gate.gain_change is not None:
            gate.gain_change.masked_fill_(idle, -1.0)
        counts[name] = int(idle.sum())
    return counts


@torch.no_grad()
def prune_neurons(model: PeftModel, into: Mapping[str, str] | None = None) -> dict[str, int]:
    """Take closed neurons (τ = ∞ or γ = 0) out of the weights around them.

    Outputs stay the same up to the order of summation. Layers get widths of their own, so that the
    model no longer matches its configuration; save it with `save_hard_model`. A layer keeps one
    neuron even if all are closed.

    Arguments:
        model: with one mode only.
        into: as in `fold_gains`.

    Returns:
        how many neurons are left, by activation.

    Raises:
        ConfigError: as in `fold_gains`.
    """
    mode = only_mode(model)
    places = gates(model, mode)
    around = {place.name: _neighbours(model, place.name, into or {}) for place in places}
    for neighbours in around.values():
        for layer in (*neighbours.first, neighbours.last):
            _check_plain(layer)
    left = {}
    for name, _, gate in places:
        kept = (gate.tau < torch.inf) & (gate.gain != 0)
        if not kept.any():
            kept[0] = True
        rows = kept.nonzero().squeeze(1)
        left[name] = len(rows)
        if len(rows) == gate.neurons:
            continue
        for layer in around[name].first:
            keep(layer, rows, outputs=True)
        keep(around[name].last, rows, outputs=False)
        _keep_gates(gate, rows)
    return left


def only_mode(model: PeftModel) -> str:
    """The name of the model's only mode.

    Raises:
        ConfigError: it has several.
    """
    modes = list(model.peft_config)
    if len(modes) != 1:
        raise ConfigError(
            "model",
            expected="one mode, as the weights that all modes share are changed",
            found=f"the modes {', '.join(modes)}",
            mend="Delete the others on a copy: model.delete_adapter(name).",
        )
    return modes[0]


def _neighbours(model: PeftModel, name: str, into: Mapping[str, str]) -> Neighbours:
    base: nn.Module = model.get_base_model()
    try:
        network = networks(base).get(name)
    except ConfigError:
        network = None
    if network is not None and name not in into:
        first = tuple(base.get_submodule(layer) for layer in network.first)
        return Neighbours(first, base.get_submodule(network.last))
    gate = base.get_submodule(name)
    assert isinstance(gate, GatedActivation)
    beside = next(iter(gate.adapters.values())).beside
    last = base.get_submodule(into[name]) if name in into else _next_linear(base, name)
    return Neighbours(() if beside is None else (beside,), last)


def _next_linear(base: nn.Module, name: str) -> nn.Module:
    parent_name, _, own = name.rpartition(".")
    parent = base.get_submodule(parent_name)
    found = "an activation outside of blocks and nn.Sequential"
    if isinstance(parent, nn.Sequential):
        members = dict(parent.named_children())
        names = list(members)
        for follower in names[names.index(own) + 1 :]:
            module = members[follower]
            if isinstance(module, LINEAR):
                return module
            if not isinstance(module, TRANSPARENT):
                found = f"{type(module).__name__}, through which a gain does not pass"
                break
        else:
            found = "nothing after the activation"
    raise ConfigError(
        f"activation {name!r}",
        expected="a linear layer that reads its neurons, with nothing but dropout between",
        found=found,
        mend=f"If there is one, name it: into={{{name!r}: ...}}. Else leave the gains outside.",
    )


def _check_commutes(name: str, activation: nn.Module, gate: NeuronGate) -> None:
    if gate.gain_position == "after":
        return
    homogeneous = isinstance(activation, nn.ReLU | nn.LeakyReLU | nn.Identity)
    if not homogeneous or bool((gate.gain < 0).any()):
        raise ConfigError(
            f"activation {name!r}",
            expected="gains after the activation, or positive ones before ReLU",
            found=f"gains before {type(activation).__name__}",
            mend="Train with DopamineConfig(gain_position='after').",
        )


def _check_plain(layer: nn.Module) -> None:
    weight = getattr(layer, "weight", None)
    if not (isinstance(layer, LINEAR) and weight is not None and weight.is_floating_point()):
        raise ConfigError(
            type(layer).__name__,
            expected="a linear layer with plain floating-point weights",
            found="another layer, or a quantised weight",
            mend="Load the base model unquantised.",
        )


def _keep_gates(gate: NeuronGate, rows: Tensor) -> None:
    for name in ("tau_change", "gain_change"):
        old = getattr(gate, name)
        if old is not None:
            setattr(gate, name, with_values(old, old.data[rows]))
    for name in ("start", "one", "unit"):
        old = getattr(gate, name)
        if old is not None:
            setattr(gate, name, old[rows])
    gate.neurons = len(rows)
