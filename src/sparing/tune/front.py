"""What a search found: trials, those that no other beats, and ways to choose among them."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sparing.checkpoint import atomic_path, read_json, write_json
from sparing.errors import CheckpointError, ConfigError

Rule = Literal["knee", "quality", "memorization"]
State = Literal["complete", "failed", "pruned", "running"]


@dataclass(frozen=True)
class Trial:
    """One mask and learning rate, and what came of it.

    Arguments:
        number: of the trial, from 0.
        mask: a digit a group, 1 where it was trained.
        learning_rate: of the fine-tuning.
        values: of the rewards in their order, None if the trial did not finish.
        seconds: of training and rewards.
        trainable: parameters that were trained.
        state: how it ended.
        reason: why it failed.
    """

    number: int
    mask: str
    learning_rate: float
    values: tuple[float, ...] | None
    seconds: float
    trainable: int
    state: State = "complete"
    reason: str = ""


@dataclass(frozen=True)
class Front:
    """All trials of a search.

    Arguments:
        rewards: names; by convention the first is memorisation and the second quality.
        maximize: which of them are better when higher.
        groups: names of what the bits switch.
        trials: in order.
    """

    rewards: tuple[str, ...]
    maximize: tuple[bool, ...]
    groups: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def complete(self) -> tuple[Trial, ...]:
        """Trials that have all rewards."""
        return tuple(trial for trial in self.trials if trial.state == "complete")

    @property
    def members(self) -> tuple[Trial, ...]:
        """Trials that no other beats in one reward without being worse in another, by the first."""
        complete = self.complete
        best = pareto_set([self.costs(trial) for trial in complete])
        return tuple(sorted((complete[i] for i in best), key=lambda trial: self.costs(trial)))

    def costs(self, trial: Trial) -> tuple[float, ...]:
        """The rewards of a complete trial, signed so that lower is better."""
        assert trial.values is not None
        signs = [-1.0 if flipped else 1.0 for flipped in self.maximize]
        return tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))

    def pick(
        self, rule: Rule = "knee", *, budget: float | None = None, tolerance: float | None = None
    ) -> Trial:
        """One member of the front [rec: the paper leaves the choice to the user].

        "knee" is the member farthest below the line between the extremes, after each reward was
        scaled to 0...1 over the front. "quality" is the best second reward among those whose first
        is at most `budget`. "memorization" is the best first reward among those whose second is
        within `tolerance` of the best: at most (1 + tolerance) times it.

        Arguments:
            budget: a bound on memorisation, in its own units (at least, where higher is better).
            tolerance: τ >= 0.

        Raises:
            ConfigError: no trial has finished, none is within the budget, or an option is missing.
        """
        members = self.members
        if not members:
            raise ConfigError(
                "front",
                expected="at least one finished trial",
                found=f"{len(self.trials)} trials, none finished",
                mend="See the reasons in front.trials, and search on.",
            )
        if rule == "knee":
            return min(members, key=lambda trial: (sum(self._scaled(trial, members)), trial.number))
        if rule not in ("quality", "memorization") or len(self.rewards) < 2:
            raise ConfigError(
                "rule",
                expected="'knee', or with two rewards 'quality' or 'memorization'",
                found=f"{rule!r} with {len(self.rewards)} rewards",
                mend="Choose 'knee', or search with memorisation and quality.",
            )
        if rule == "quality":
            return self._best_quality(members, _given("budget", budget, -float("inf")))
        return self._least_memorization(members, _given("tolerance", tolerance, 0.0))

    def _best_quality(self, members: Sequence[Trial], budget: float) -> Trial:
        bound = -budget if self.maximize[0] else budget
        within = [trial for trial in members if self.costs(trial)[0] <= bound]
        if not within:
            assert members[0].values is not None
            raise ConfigError(
                "budget",
                expected=f"a bound on {self.rewards[0]} that some trial meets",
                found=f"{budget:g}; the best is {members[0].values[0]:g}",
                mend="Raise it, or search on.",
            )
        return min(within, key=lambda trial: self.costs(trial)[1])

    def _least_memorization(self, members: Sequence[Trial], tolerance: float) -> Trial:
        best = min(self.costs(trial)[1] for trial in members)
        bound = best + tolerance * abs(best)
        return min((t for t in members if self.costs(t)[1] <= bound), key=self.costs)

    def _scaled(self, trial: Trial, members: Sequence[Trial]) -> list[float]:
        columns = list(zip(*(self.costs(member) for member in members), strict=True))
        spans = [max(column) - min(column) or 1.0 for column in columns]
        costs = self.costs(trial)
        return [
            (cost - min(column)) / span
            for cost, column, span in zip(costs, columns, spans, strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write everything as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Front":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or something else.
        """
        content = read_json(path)
        try:
            trials = tuple(
                Trial(**{**t, "values": None if t["values"] is None else tuple(t["values"])})
                for t in content.pop("trials")
            )
            return cls(**{name: tuple(value) for name, value in content.items()}, trials=trials)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                str(path), expected="a front", found=str(error), mend="Search again."
            ) from error

    def write_csv(self, path: Path) -> None:
        """Write a row a trial, atomically: number, mask, rate, rewards, seconds, size, state."""
        head = ["number", "mask", "learning_rate", *self.rewards]
        head += ["seconds", "trainable", "on_front", "state", "reason"]
        members = {trial.number for trial in self.members}
        with atomic_path(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for trial in self.trials:
                values = trial.values or [""] * len(self.rewards)
                row = [trial.number, trial.mask, trial.learning_rate, *values, trial.seconds]
                on_front = int(trial.number in members)
                writer.writerow([*row, trial.trainable, on_front, trial.state, trial.reason])


def pareto_set(costs: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the points that no other dominates; lower is better in every coordinate.

    A point dominates another if it is nowhere worse and somewhere better, so that of equal points
    all stay.
    """
    return [i for i, point in enumerate(costs) if not any(dominates(c, point) for c in costs)]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether costs are nowhere higher and somewhere lower."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _given(option: str, value: float | None, least: float) -> float:
    if value is None or not value >= least:
        raise ConfigError(
            option,
            expected=f"a number of at least {least:g}" if least > -1 else "a number",
            found=repr(value),
            mend=f"Give {option}=... with this rule.",
        )
    return value
