"""What is in a bank: experts of every layer, their tasks, and how the last ones were decided."""

from dataclasses import dataclass

from sparing.merge.ledger import Arrival, Ledger


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Arguments:
        module: its name.
        members: for every expert, the names of its tasks.
        ranks: k of every expert.
        arrivals: the tasks that changed it, with affinities and thresholds.
    """

    module: str
    members: tuple[tuple[str, ...], ...]
    ranks: tuple[int, ...]
    arrivals: tuple[Arrival, ...]

    @property
    def experts(self) -> int:
        """How many there are."""
        return len(self.members)


@dataclass(frozen=True)
class BankReport:
    """A whole bank.

    Arguments:
        tasks: names, in the order of arrival.
        layers: in the model's order.
        notes: what a user should know.
        numbers: that all experts store.
        dense: numbers of the changes of all tasks, if each were kept whole.
    """

    tasks: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]
    numbers: int
    dense: int

    @property
    def experts(self) -> int:
        """In all layers together."""
        return sum(layer.experts for layer in self.layers)

    @property
    def thresholds(self) -> tuple[tuple[str, float, float], ...]:
        """For every task, its name and the least and the largest τ over the layers."""
        found = []
        for number, name in enumerate(self.tasks):
            levels = [a.threshold for one in self.layers for a in one.arrivals if a.task == number]
            if levels:
                found.append((name, min(levels), max(levels)))
        return tuple(found)

    def __str__(self) -> str:
        """Text, a line for each layer."""
        share = f", {self.numbers / self.dense:.1%} of all changes whole" if self.dense else ""
        lines = [
            f"{len(self.tasks)} tasks, {self.experts} experts in {len(self.layers)} layers, "
            f"{self.numbers:,} numbers{share}"
        ]
        for name, low, high in self.thresholds:
            level = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
            lines.append(f"threshold when {name} arrived: {level}")
        for layer in self.layers:
            groups = " | ".join(", ".join(tasks) for tasks in layer.members)
            last = layer.arrivals[-1] if layer.arrivals else None
            values = " ".join(f"{value:.2f}" for value in last.affinities) if last else ""
            tail = f"; last affinities {values}" if values else ""
            lines.append(f"{layer.module}: {layer.experts} experts: {groups or 'none'}{tail}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def bank_report(ledger: Ledger) -> BankReport:
    """Look into a ledger."""
    names = tuple(task.name for task in ledger.tasks)
    layers = tuple(
        LayerReport(
            module,
            tuple(tuple(names[task] for task in tasks) for tasks in one.members),
            tuple(one.ranks),
            tuple(one.arrivals),
        )
        for module, one in ledger.modules.items()
    )
    return BankReport(
        names,
        layers,
        tuple(ledger.notes),
        sum(one.numbers for one in ledger.modules.values()),
        sum(len(one.arrivals) * one.inputs * one.outputs for one in ledger.modules.values()),
    )
