"""Which neurons a mode uses: participation and strength of every neuron, as table and heat map."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparing.adapt._dopamine_gate import soft_gate
from sparing.adapt.dopamine import BASE
from sparing.adapt.dopamine_modes import (
    Place,
    as_evaluated,
    call,
    gates,
    read,
    watching,
)
from sparing.checkpoint import atomic_path, write_json
from sparing.errors import ConfigError, near_matches


class Usage(NamedTuple):
    """How a mode uses the neurons of one layer, (neurons,) float64 each (TauGate, eq. 7).

    Attributes:
        participation: share of samples whose gate is above the threshold; at 0.5 that is the hard
            gate, 1[z > τ].
        strength: mean |γ ĝ φ(z)|, what the neuron hands on.
        gate: mean of the soft gate.
        tau: thresholds, in units of z.
        gain: gains.
    """

    participation: Tensor
    strength: Tensor
    gate: Tensor
    tau: Tensor
    gain: Tensor


class Difference(NamedTuple):
    """One neuron in two modes; `change` is its participation in the second minus the first."""

    layer: str
    neuron: int
    change: float


@dataclass(frozen=True)
class NeuronAttribution:
    """The neurons of a model in several modes, on one data set.

    Arguments:
        usage: by mode and by name of the activation.
        samples: tokens or rows that were read, without padding.
        threshold: above which a soft gate counts as open.
    """

    usage: dict[str, dict[str, Usage]]
    samples: int
    threshold: float

    def of(self, mode: str) -> dict[str, Usage]:
        """One mode, by layer.

        Raises:
            ConfigError: the mode was not looked at.
        """
        if mode not in self.usage:
            raise ConfigError(
                "mode",
                expected="a mode of the attribution",
                found=repr(mode),
                mend=near_matches(mode, list(self.usage)),
            )
        return self.usage[mode]

    def open_share(self, mode: str) -> float:
        """Mean participation over all neurons; 1 minus it is the measured sparsity."""
        return float(torch.cat([u.participation for u in self.of(mode).values()]).mean())

    def change(self, mode: str, before: str = BASE) -> dict[str, Tensor]:
        """Participation in `mode` minus that in `before`, by layer, (neurons,) float64; layers that
        only one of them gates are left out."""
        first, second = self.of(before), self.of(mode)
        return {
            layer: second[layer].participation - first[layer].participation
            for layer in second
            if layer in first
        }

    def differences(self, mode: str, before: str = BASE, most: int = 20) -> list[Difference]:
        """The neurons whose participation differs most between two modes, largest first."""
        found = [
            Difference(layer, neuron, change)
            for layer, changes in self.change(mode, before).items()
            for neuron, change in enumerate(changes.tolist())
        ]
        return sorted(found, key=lambda one: -abs(one.change))[:most]

    def rows(self) -> Iterable[dict[str, Any]]:
        """One dict for each mode, layer and neuron."""
        for mode, layers in self.usage.items():
            for layer, usage in layers.items():
                columns = [column.tolist() for column in usage]
                for neuron, values in enumerate(zip(*columns, strict=True)):
                    yield {"mode": mode, "layer": layer, "neuron": neuron} | dict(
                        zip(Usage._fields, values, strict=True)
                    )

    def write_csv(self, path: Path) -> None:
        """Write the table, one line a neuron, atomically.

        Raises:
            CheckpointError: the file cannot be written.
        """
        with (
            atomic_path(path) as fresh,
            fresh.open("w", newline="", encoding="utf-8") as file,
        ):
            names = ["mode", "layer", "neuron", *Usage._fields]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows())

    def write_json(self, path: Path) -> None:
        """Write the table with its threshold and number of samples, atomically; infinite thresholds
        become the words "inf" and "-inf".

        Raises:
            CheckpointError: the file cannot be written.
        """
        neurons = [
            {k: str(v) if v in (float("inf"), -float("inf")) else v for k, v in row.items()}
            for row in self.rows()
        ]
        content = {"threshold": self.threshold, "samples": self.samples, "neurons": neurons}
        write_json(path, content)

    def write_heat_map(self, path: Path, mode: str, before: str | None = None) -> None:
        """Draw layers by neurons as a PNG: the participation in a mode, or its change.

        Arguments:
            path: of the picture.
            mode: to draw.
            before: a mode to subtract, "__base__" for the base network; None draws the
                participation itself. Neurons are in the order of their value, layer by layer.

        Raises:
            ConfigError: the mode was not looked at.
            MissingExtraError: matplotlib is not installed.
            CheckpointError: the file cannot be written.
        """
        from sparing.report.heat_map import write_heat_map

        if before is None:
            values = {layer: usage.participation for layer, usage in self.of(mode).items()}
            title = f"Share of {self.samples:,} samples that open the gate, mode {mode}"
        else:
            values = self.change(mode, before)
            title = f"Change of participation from {before} to {mode}, {self.samples:,} samples"
        write_heat_map(path, values, title, signed=before is not None)


@torch.no_grad()
def neuron_attribution(
    model: nn.Module,
    batches: Sequence[Any],
    modes: Sequence[str] = ("default",),
    *,
    hard: bool = True,
    threshold: float = 0.5,
) -> NeuronAttribution:
    """Measure how modes use the neurons, and the base network beside them.

    The base network, "__base__", is counted with the thresholds that the first mode started from;
    it runs without any gate. Padding is left out where the batches have an attention mask.

    Arguments:
        model: with the modes.
        batches: dicts of the model's arguments, or input tensors; read once for every mode.
        modes: names of adapters.
        hard: run the network with hard gates, as (7) is defined, or with soft ones.
        threshold: between 0 and 1, of the soft gate to count as open.

    Raises:
        ConfigError: unknown mode; threshold out of range.
        DataError: there are no batches, or of another kind.
    """
    if not 0 < threshold < 1:
        raise ConfigError(
            "threshold", expected="between 0 and 1", found=str(threshold), mend="Use 0.5."
        )
    found = {mode: gates(model, mode) for mode in modes}
    usage = {}
    samples = 0
    first = found[modes[0]]
    for mode, places in {BASE: first, **found}.items():
        kinds = [place.gate.eval_gate for place in places]
        counters = {place.name: _Counter(place, threshold, mode == BASE) for place in places}
        try:
            for place in places:
                place.gate.eval_gate = "hard" if hard else "soft"
            active = None if mode == BASE else mode
            with (
                as_evaluated(model, active),
                watching(places, _counting(counters)),
            ):
                for batch in read(batches):
                    call(model, batch)
        finally:
            for place, kind in zip(places, kinds, strict=True):
                place.gate.eval_gate = kind
        usage[mode] = {name: counter.usage() for name, counter in counters.items()}
        samples = round(max(counter.count for counter in counters.values()))
    return NeuronAttribution(usage, samples, threshold)


def _counting(counters: dict[str, "_Counter"]) -> Callable[[Place, Tensor, Tensor], None]:
    return lambda place, z, a: counters[place.name].add(z, a)


class _Counter:
    """Sums over the samples of one layer, in float64."""

    def __init__(self, place: Place, threshold: float, base: bool) -> None:
        gate = place.gate
        self.place = place
        unit = 1.0 if gate.unit is None else gate.unit
        self.tau = (gate.start * unit if base else gate.tau).detach().clone()
        self.gain = (gate.one if base else gate.gain).detach().clone()
        self.steepness = gate.steepness.clone()
        self.threshold = threshold
        self.count = 0.0
        self.sums: list[Tensor] | None = None

    def add(self, z: Tensor, a: Tensor) -> None:
        soft = soft_gate(z, self.tau, self.steepness)
        # At one half the soft gate opens where the hard one does, but for rounding.
        is_open = z > self.tau if self.threshold == 0.5 else soft > self.threshold
        weights = self.place.gate.token_weights(z)
        if weights is None:
            kept = torch.ones(z.shape[:-1], dtype=torch.float64, device=z.device)
        else:
            kept = (weights > 0).double()
        dims = tuple(range(z.dim() - 1))
        new = [
            (column.double() * kept.unsqueeze(-1)).sum(dim=dims)
            for column in (is_open, a.abs(), soft)
        ]
        self.sums = (
            new if self.sums is None else [s + n for s, n in zip(self.sums, new, strict=True)]
        )
        self.count += float(kept.sum())

    def usage(self) -> Usage:
        assert self.sums is not None
        participation, strength, gate = (total.cpu() / self.count for total in self.sums)
        return Usage(
            participation, strength, gate, self.tau.double().cpu(), self.gain.double().cpu()
        )
