"""Modes of TauGate: their numbers, their kind of gate, what hardening changes, calibration."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparing.adapt.dopamine import GatedActivation, NeuronGate
from sparing.errors import ConfigError, DataError, near_matches

Gate = Literal["hard", "soft"]


class Place(NamedTuple):
    """One gate: the name of the activation in the base model, its wrapper, and the gate."""

    name: str
    wrapper: GatedActivation
    gate: NeuronGate


def gates(model: nn.Module, mode: str) -> list[Place]:
    """The gates of one mode in the model's order.

    Raises:
        ConfigError: the model has no such mode.
    """
    wrappers = [m for m in model.modules() if isinstance(m, GatedActivation)]
    known = sorted({name for wrapper in wrappers for name in wrapper.adapters})
    found = [
        Place(w.adapters[mode].name, w, w.adapters[mode]) for w in wrappers if mode in w.adapters
    ]
    if not found:
        raise ConfigError(
            "mode",
            expected="a mode of the model",
            found=repr(mode),
            mend=near_matches(mode, known) if known else "Add one: get_peft_model(model, config).",
        )
    return found


def mode_vectors(model: nn.Module, mode: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """τ and γ of a mode by activation, copies of (neurons,) float32 each; τ in units of z.

    Raises:
        ConfigError: the model has no such mode.
    """
    return {
        place.name: (place.gate.tau.detach().clone(), place.gate.gain.detach().clone())
        for place in gates(model, mode)
    }


def set_gate(model: nn.Module, kind: Gate, mode: str = "default") -> None:
    """Choose hard or soft gates for evaluation, in the model and in the config that is saved.

    Arguments:
        model: with the mode.
        kind: "hard" or "soft".
        mode: name of the adapter.

    Raises:
        ConfigError: unknown mode or kind; or hard gates for a model in training that is not
            trained straight-through, as they have no gradient.
    """
    places = gates(model, mode)
    if kind not in ("hard", "soft"):
        raise ConfigError(
            "kind", expected="'hard' or 'soft'", found=repr(kind), mend="Choose one of these."
        )
    if kind == "hard" and any(p.gate.training and p.gate.train_gate != "ste" for p in places):
        raise ConfigError(
            f"mode {mode!r}",
            expected="a model in evaluation, as hard gates have no gradient",
            found="one in training with soft gates",
            mend="Call model.eval() first, or train with DopamineConfig(train_gate='ste').",
        )
    for place in places:
        place.gate.eval_gate = kind
    configs: Any = getattr(model, "peft_config", {})
    if mode in configs:
        configs[mode].eval_gate = kind


@torch.no_grad()
def hardening_gap(model: nn.Module, batches: Iterable[Any], mode: str = "default") -> float:
    """How far hard gates move the outputs: ‖y_hard - y_soft‖ / ‖y_soft‖ over all batches.

    Arguments:
        model: with the mode, which is made active meanwhile; its outputs are tensors or have
            `logits`.
        batches: dicts of the model's arguments, or input tensors.
        mode: name of the adapter.

    Raises:
        ConfigError: unknown mode.
        DataError: there are no batches, or of another kind.
    """
    places = gates(model, mode)
    before = [place.gate.eval_gate for place in places]
    moved = norm = 0.0
    try:
        with as_evaluated(model, mode):
            for batch in read(batches):
                outputs = []
                for kind in ("soft", "hard"):
                    for place in places:
                        place.gate.eval_gate = kind
                    output = call(model, batch)
                    outputs.append(getattr(output, "logits", output).double())
                moved += float((outputs[1] - outputs[0]).square().sum())
                norm += float(outputs[0].square().sum())
    finally:
        for place, kind in zip(places, before, strict=True):
            place.gate.eval_gate = kind
    return math.sqrt(moved / norm) if norm else 0.0


@torch.no_grad()
def calibrate_thresholds(
    model: nn.Module, batches: Iterable[Any], mode: str = "default", samples: int = 512
) -> None:
    """Measure the standard deviation of every neuron's z in the base network, for
    tau_scale="std"; thresholds are then in its units [rec].

    A neuron that never changes keeps raw units.

    Arguments:
        model: with the mode.
        batches: dicts of the model's arguments, or input tensors.
        mode: name of the adapter.
        samples: to read, tokens or rows, at least 2; 512 in the specification.

    Raises:
        ConfigError: unknown mode, or one in raw units.
        DataError: there are not two samples.
    """
    places = gates(model, mode)
    if any(place.gate.unit is None for place in places):
        raise ConfigError(
            f"mode {mode!r}",
            expected="tau_scale='std'",
            found="'raw'",
            mend="Give tau_scale='std' to DopamineConfig.",
        )
    sums = {place.name: _Moments() for place in places}
    with as_evaluated(model, None), watching(places, lambda place, z, a: sums[place.name].add(z)):
        for batch in read(batches):
            call(model, batch)
            if min(moments.count for moments in sums.values()) >= samples:
                break
    for place in places:
        deviation = sums[place.name].deviation()
        assert place.gate.unit is not None
        place.gate.unit.copy_(torch.where(deviation > 0, deviation, 1.0))


class _Moments:
    """Sums of z and z² by neuron, in float64 around the first sample."""

    def __init__(self) -> None:
        self.count = 0
        self.origin: Tensor | None = None
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def add(self, z: Tensor) -> None:
        flat = z.double().flatten(0, -2)
        if self.origin is None:
            self.origin = flat[0]
        flat = flat - self.origin
        self.first = self.first + flat.sum(dim=0)
        self.second = self.second + flat.square().sum(dim=0)
        self.count += len(flat)

    def deviation(self) -> Tensor:
        if self.count < 2:
            raise DataError(
                "batches",
                expected="at least two samples",
                found=str(self.count),
                mend="Give some hundred tokens or rows.",
            )
        first = torch.as_tensor(self.first) / self.count
        return (torch.as_tensor(self.second) / self.count - first.square()).clamp_min(0).sqrt()


# What reading a model on data needs, here and for the attribution.


def read(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, one by one.

    Raises:
        DataError: there is none, or one is neither a dict nor a tensor.
    """
    some = False
    for batch in batches:
        if not isinstance(batch, Mapping | Tensor):
            raise DataError(
                "batches",
                expected="dicts of the model's arguments, or input tensors",
                found=type(batch).__name__,
                mend="For pairs of inputs and labels: (x for x, y in loader).",
            )
        some = True
        yield batch
    if not some:
        raise DataError(
            "batches", expected="at least one", found="none", mend="Give a list or a data loader."
        )


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, on the model's device."""
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return model(**moved)


@contextmanager
def as_evaluated(model: nn.Module, mode: str | None) -> Iterator[None]:
    """Inside, the model is in evaluation and runs in one mode, or with None without any."""
    wrappers = [m for m in model.modules() if isinstance(m, GatedActivation)]
    training = [(module, module.training) for module in model.modules()]
    states = [(w, w._disable_adapters, w._active_adapter) for w in wrappers]
    model.eval()
    for wrapper in wrappers:
        wrapper._disable_adapters = mode is None
        wrapper._active_adapter = [] if mode is None else [mode]
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
        for wrapper, disabled, active in states:
            wrapper._disable_adapters, wrapper._active_adapter = disabled, active


@contextmanager
def watching(places: list[Place], see: Callable[[Place, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `see(place, z, a)` is called with every input and output of the activations."""

    def hook(place: Place) -> Callable[..., None]:
        return lambda module, inputs, output: see(place, inputs[0], output)

    handles = [place.wrapper.register_forward_hook(hook(place)) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
