"""What a bank of experts remembers of the tasks that arrived, and how it decides on the next.

The ledger holds no weights. All affinities ever seen are in it, so that the threshold, which is a
statistic of them, is the same after a reload as without one.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from sparing.checkpoint import read_json, write_json
from sparing.errors import CheckpointError

LEDGER = "bank.json"
VERSION = 1
_NAMED = 3  # modules in a note
Pool = Literal["global", "module"]


@dataclass(frozen=True)
class Adaptive:
    """The distribution-aware threshold τ = clip(mean(P) + κ sd(P), τ_min, τ_max) (eq. 4).

    Arguments:
        kappa: κ.
        tau_min: also τ while P has fewer than two values.
        tau_max: equal to `tau_min` it is a fixed threshold; with both 0 every task is merged, with
            both above 1 none is.
        pool: "global": P is over all modules; "module": each module has its own.
    """

    kappa: float = 2.0
    tau_min: float = 0.5
    tau_max: float = 0.98
    pool: Pool = "global"

    def threshold(self, seen: Sequence[float]) -> float:
        """τ for a pool of affinities."""
        if len(seen) < 2:
            return self.tau_min
        mean = math.fsum(seen) / len(seen)
        level = mean + self.kappa * statistics.pstdev(seen, mean)
        return min(max(level, self.tau_min), self.tau_max)


@dataclass(frozen=True)
class Task:
    """A fine-tune that arrived.

    Arguments:
        name: of the task.
        digest: of its weights; the same again is recognised.
    """

    name: str
    digest: str


@dataclass(frozen=True)
class Arrival:
    """What became of one task in one module.

    Arguments:
        task: its number.
        affinities: to the experts that were there.
        threshold: τ.
        expert: number of the expert that it joined or became.
    """

    task: int
    affinities: list[float]
    threshold: float
    expert: int


@dataclass
class ModuleLedger:
    """One module's experts.

    Arguments:
        inputs: i of the layer.
        outputs: o of the layer.
        bias: whether the layer has one.
        arrivals: the tasks that changed it, in order.
        ranks: k of every expert.
        router_ranks: r of every expert.
    """

    inputs: int
    outputs: int
    bias: bool
    arrivals: list[Arrival] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    router_ranks: list[int] = field(default_factory=list)

    @property
    def experts(self) -> int:
        """E, how many there are."""
        return 1 + max((arrival.expert for arrival in self.arrivals), default=-1)

    @property
    def members(self) -> list[list[int]]:
        """For every expert, the numbers of its tasks."""
        found: list[list[int]] = [[] for _ in range(self.experts)]
        for arrival in self.arrivals:
            found[arrival.expert].append(arrival.task)
        return found

    @property
    def seen(self) -> list[float]:
        """All affinities so far."""
        return [value for arrival in self.arrivals for value in arrival.affinities]

    @property
    def numbers(self) -> int:
        """Numbers that its experts store."""
        inputs = sum(max(k, r) for k, r in zip(self.ranks, self.router_ranks, strict=True))
        return (
            inputs * self.inputs
            + sum(self.ranks) * self.outputs
            + self.bias * self.experts * self.outputs
        )


@dataclass
class Ledger:
    """A bank's memory.

    Arguments:
        modules: by name, in the model's order.
        tasks: in the order of their arrival.
        notes: what a user should know, one sentence each.
    """

    modules: dict[str, ModuleLedger]
    tasks: list[Task] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def knows(self, digest: str) -> str | None:
        """The name of the task with these very weights, or None."""
        return next((task.name for task in self.tasks if task.digest == digest), None)

    def note_reduced(self, task: str, router_ranks: Mapping[str, int]) -> None:
        """Tell of modules that a task changes in fewer directions than the routing basis has.

        Arguments:
            task: its name.
            router_ranks: r of its expert there, by module.
        """
        if router_ranks:
            low, high = min(router_ranks.values()), max(router_ranks.values())
            level = str(low) if low == high else f"{low} to {high}"
            where = _some(list(router_ranks))
            self.notes.append(f"{task} changes in {level} directions, which is r there, {where}")

    def arrive(
        self, task: Task, affinities: Mapping[str, list[float] | None], rule: Adaptive
    ) -> dict[str, int | None]:
        """Decide for every module: merge if the largest affinity reaches τ, else spawn (eq. 5).

        The affinities of all modules enter the pool first and one τ holds for all of them, so that
        the order of the modules does not matter.

        Arguments:
            task: the newcomer.
            affinities: for every module, to its experts; None if the task does not change it.
            rule: the threshold.

        Returns:
            For every module, the number of the expert to merge into, which is E for a new one, or
            None if nothing happens there.
        """
        number = len(self.tasks)
        self.tasks.append(task)
        unchanged = [name for name, values in affinities.items() if values is None]
        if unchanged:
            self.notes.append(f"{task.name} leaves as they are {_some(unchanged)}")
        pool = [value for module in self.modules.values() for value in module.seen]
        pool += [value for values in affinities.values() for value in values or ()]
        common = rule.threshold(pool)
        decisions: dict[str, int | None] = {}
        for name, values in affinities.items():
            module = self.modules[name]
            if values is None:
                decisions[name] = None
                continue
            own = rule.pool == "module"
            level = rule.threshold([*module.seen, *values]) if own else common
            best = max(range(len(values)), key=values.__getitem__, default=0)
            chosen = best if values and values[best] >= level else len(values)
            module.arrivals.append(Arrival(number, values, level, chosen))
            decisions[name] = chosen
        return decisions

    def save(self, folder: Path) -> None:
        """Write `bank.json`."""
        write_json(folder / LEDGER, {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `bank.json`.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        content: dict[str, Any] = read_json(folder / LEDGER)
        try:
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            modules = {
                name: ModuleLedger(
                    **{**values, "arrivals": [Arrival(**each) for each in values["arrivals"]]}
                )
                for name, values in content["modules"].items()
            }
            tasks = [Task(**task) for task in content["tasks"]]
            return cls(modules, tasks, list(content["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                str(folder / LEDGER),
                expected=f"the ledger of a bank, version {VERSION}",
                found=f"{type(error).__name__}: {error}",
                mend="The file is damaged or of another version; merge again.",
            ) from error


def _some(modules: list[str]) -> str:
    more = ", …" if len(modules) > _NAMED else ""
    return f"{len(modules)} modules: {', '.join(modules[:_NAMED])}{more}"
