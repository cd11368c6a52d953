"""The schedule of hyperparameters that a run leaves behind, and others to compare it with."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sparing.checkpoint import atomic_path
from sparing.errors import CheckpointError, ConfigError
from sparing.tune.stn.hparams import HParam
from sparing.tuners import generator_for

ScheduleFunction = Callable[[int], Mapping[str, float]]
"""From a training step, counted from 0, to values by name."""

_STEP, _TRAIN, _VALIDATION, _SCALE = "step", "train_loss", "validation_loss", "scale "


@dataclass(frozen=True)
class Record:
    """Values that hold from one training step on.

    Arguments:
        step: the first training step, counted from 0, that they hold for.
        values: by name.
        scales: σ by name.
        train_loss: of the last step before, regularised; NaN at the start.
        validation_loss: of the last validation step before; NaN at the start.
    """

    step: int
    values: dict[str, float]
    scales: dict[str, float]
    train_loss: float = math.nan
    validation_loss: float = math.nan


@dataclass
class Schedule:
    """Records in the order of their steps; called with a step it returns the values."""

    records: list[Record] = field(default_factory=list)

    def __call__(self, step: int) -> Mapping[str, float]:
        """The values that hold for a training step, counted from 0; the last ones after the end.

        Raises:
            ConfigError: the schedule is empty.
        """
        if not self.records:
            raise ConfigError(
                "schedule", expected="at least one record", found="none", mend="Record a run first."
            )
        low, high = 0, len(self.records)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.records[middle].step <= step else (low, middle)
        return self.records[low].values

    @property
    def names(self) -> list[str]:
        """Of the hyperparameters."""
        return list(self.records[0].values) if self.records else []

    def save(self, path: str | Path) -> None:
        """Write it as CSV, atomically; numbers are exact."""
        names = self.names
        with atomic_path(Path(path)) as fresh, fresh.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            scales = [f"{_SCALE}{name}" for name in names]
            writer.writerow([_STEP, _TRAIN, _VALIDATION, *names, *scales])
            for record in self.records:
                losses = [record.train_loss, record.validation_loss]
                values = [record.values[name] for name in names]
                spread = [record.scales.get(name, math.nan) for name in names]
                writer.writerow([record.step, *map(repr, [*losses, *values, *spread])])

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or no schedule.
        """
        try:
            with Path(path).open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            names = [n for n in rows[0] if n not in (_STEP, _TRAIN, _VALIDATION)]
            names = [name for name in names if not name.startswith(_SCALE)]
            records = [
                Record(
                    int(row[_STEP]),
                    {name: float(row[name]) for name in names},
                    {name: float(row[f"{_SCALE}{name}"]) for name in names},
                    float(row[_TRAIN]),
                    float(row[_VALIDATION]),
                )
                for row in rows
            ]
        except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(
                str(path),
                expected="a schedule, as Schedule.save writes it",
                found=f"{type(error).__name__}: {error}",
                mend="Record it again.",
            ) from error
        return cls(records)


def constant(values: Mapping[str, float]) -> ScheduleFunction:
    """The same values at all steps."""
    fixed = dict(values)
    return lambda step: fixed


def gaussian(
    hparams: Sequence[HParam], values: Mapping[str, float], *, std: float = 0.05, seed: int = 0
) -> ScheduleFunction:
    """Values with noise that is drawn anew at every step, cut to the ranges; 0.05 in the paper."""

    def at(step: int) -> Mapping[str, float]:
        noise = torch.randn(len(hparams), generator=generator_for(seed, f"schedule {step}"))
        shifts = (std * noise).tolist()
        return {
            p.name: _within(p, values[p.name] + s) for p, s in zip(hparams, shifts, strict=True)
        }

    return at


def sinusoid(
    hparams: Sequence[HParam],
    values: Mapping[str, float],
    *,
    amplitude: float = 0.1,
    period: float = 1200,
) -> ScheduleFunction:
    """Values that swing by an amplitude, cut to the ranges; 0.1 every 1200 steps in the paper."""

    def at(step: int) -> Mapping[str, float]:
        shift = amplitude * math.sin(2 * math.pi * step / period)
        return {p.name: _within(p, values[p.name] + shift) for p in hparams}

    return at


def _within(hparam: HParam, value: float) -> float:
    low, high = hparam.range
    value = value if low is None else max(low, value)
    value = value if high is None else min(high, value)
    return math.floor(value) if hparam.discrete else value
