"""A sweep over widths and hyperparameters, read from a table of runs."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sparing.errors import ConfigError, DataError, near_matches
from sparing.scale.fast_hp_transfer.records import Row, read_rows

Axis = Literal["log", "linear", "window"]

_UNFINISHED = {
    *("running", "crashed", "failed", "killed", "pending", "preempting", "preempted"),
    *("error", "interrupted", "queued"),
}


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table.

    Arguments:
        width: of the model; any number that grows with it.
        loss: that decides; smaller is better.
        seed: of the run; may be missing if no two runs differ only in it.
        status: "diverged", or a state that tells that a run did not finish; may be missing.
    """

    width: str = "width"
    loss: str = "loss"
    seed: str = "seed"
    status: str = "status"


@dataclass(frozen=True)
class WidthSweep:
    """All runs of one width.

    Arguments:
        width: of the model.
        axes: the grid of each hyperparameter, ascending, in coordinates ν (see `Sweep.axis`).
        losses: (seeds, points of the first axis, ...); +inf for a diverged run, nan for none.
    """

    width: float
    axes: tuple[np.ndarray, ...]
    losses: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean over seeds: +inf where one diverged, nan where there is no run."""
        return mean_over_seeds(self.losses)


@dataclass(frozen=True)
class Sweep:
    """A sweep, by width.

    Arguments:
        hps: names of the hyperparameters.
        axis: their coordinates ν: "log" is log2 of the value, "window" log2 of 1/(1 - value), for
            the β of a moving average, and "linear" the value itself.
        widths: ascending, at least three.
        diverged: runs that did, by width; their loss counts as infinite.
        unfinished: runs that were left out because they did not end.
    """

    hps: tuple[str, ...]
    axis: Axis
    widths: tuple[WidthSweep, ...]
    diverged: Mapping[float, int]
    unfinished: int = 0


def mean_over_seeds(losses: np.ndarray) -> np.ndarray:
    """(seeds, ...) -> (...), without the missing ones; infinite values stay so."""
    present = ~np.isnan(losses)
    total = np.where(present, losses, 0.0).sum(axis=0)
    count = present.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def coordinate(value: float, axis: Axis) -> float:
    """ν of a value of a hyperparameter; nan where there is none."""
    if axis == "linear":
        return value
    inner = 1 - value if axis == "window" else value
    if not 0 < inner < math.inf or (axis == "window" and inner > 1):
        return math.nan
    return -math.log2(inner) if axis == "window" else math.log2(inner)


def value_at(coordinate: float, axis: Axis) -> float:
    """The value of a hyperparameter at ν."""
    if axis == "linear":
        return float(coordinate)
    return float(1 - 2.0**-coordinate if axis == "window" else 2.0**coordinate)


def read_sweep(
    source: Any,
    hp: str | Sequence[str] = "lr",
    *,
    axis: Axis = "log",
    columns: Columns | None = None,
    where: Mapping[str, Any] | None = None,
) -> Sweep:
    """Read a table with one row a run.

    Arguments:
        source: path of a CSV, JSON or JSONL file, a CSV that Weights & Biases wrote (of runs, or of
            its API with columns `config` and `summary`), a data frame, or rows as dictionaries.
        hp: column of the hyperparameter, or of several that span a grid.
        axis: in which coordinates its optimum is looked for; see `Sweep.axis`.
        columns: names of the others. All names are also found in another case, and at the end of
            one with points or slashes, such as `optimizer.lr`.
        where: only rows that have these values.

    Returns:
        the sweep. Runs whose loss is missing or not finite, or that say so in their status, are
        diverged; those that say that they did not finish are left out and counted.

    Raises:
        DataError: a column is missing, a value is no number, a run is there twice, fewer than
            three widths, or a width without a finite loss.
        ConfigError: another axis.
    """
    if axis not in ("log", "linear", "window"):
        raise ConfigError(
            "axis", expected="log, linear or window", found=repr(axis),
            mend="Learning rates are tuned on a log axis.",
        )  # fmt: skip
    columns = columns or Columns()
    where_from, rows = read_rows(source)
    hps = (hp,) if isinstance(hp, str) else tuple(hp)
    names = list(dict.fromkeys(name for row in rows for name in row))
    find = _finder(names, where_from)
    for wanted, value in (where or {}).items():
        name = find(wanted)
        rows = [row for row in rows if _same(row.get(name), value)]
    if not rows:
        raise DataError(
            where_from, expected="rows of runs", found=f"none where {where}" if where else "none",
            mend="Check the file and the condition.",
        )  # fmt: skip
    width, loss = find(columns.width), find(columns.loss)
    points = [find(name) for name in hps]
    seed = find(columns.seed, optional=True)
    status = find(columns.status, optional=True) or find("state", optional=True)
    runs: dict[tuple[Any, ...], float] = {}
    kept: dict[tuple[Any, ...], Row] = {}
    diverged: Counter[float] = Counter()
    unfinished = 0
    for number, row in enumerate(rows, start=1):
        place = f"{where_from}, row {number}"
        n = _number(row.get(width), place, width)
        at = tuple(_coordinate(row.get(name), axis, place, name) for name in points)
        if not n > 0:
            raise DataError(
                place, expected=f"a {width!r} above 0", found=repr(row.get(width)),
                mend="Mend or remove the row.",
            )  # fmt: skip
        state = str(row.get(status, "") if status else "").strip().lower()
        result = _number(row.get(loss), place, loss, missing=math.nan)
        if state in _UNFINISHED and not math.isinf(result):
            unfinished += 1
            continue
        if state == "diverged" or not math.isfinite(result):
            diverged[n] += 1
            result = math.inf
        key = (n, at, str(row.get(seed)) if seed else "")
        if key in runs:
            raise _twice(place, row, kept[key], (loss, status))
        runs[key], kept[key] = result, row
    swept = _by_width(runs, len(hps))
    _check(swept, where_from, hps)
    return Sweep(hps, axis, swept, dict(diverged), unfinished)


def _by_width(runs: Mapping[tuple[Any, ...], float], dimensions: int) -> tuple[WidthSweep, ...]:
    found = []
    for n in sorted({key[0] for key in runs}):
        mine = {key[1:]: loss for key, loss in runs.items() if key[0] == n}
        seeds = sorted({seed for _, seed in mine})
        axes = tuple(np.array(sorted({at[d] for at, _ in mine})) for d in range(dimensions))
        losses = np.full((len(seeds), *(len(axis) for axis in axes)), np.nan)
        for (at, seed), loss in mine.items():
            places = tuple(int(np.searchsorted(axes[d], at[d])) for d in range(dimensions))
            losses[(seeds.index(seed), *places)] = loss
        found.append(WidthSweep(n, axes, losses))
    return tuple(found)


def _check(swept: Sequence[WidthSweep], where_from: str, hps: tuple[str, ...]) -> None:
    if len(swept) < 3:
        found = ", ".join(f"{one.width:g}" for one in swept) or "none"
        raise DataError(
            where_from, expected="runs of 3 widths or more", found=f"{len(swept)} ({found})",
            mend="A rate needs three points: add widths, best a factor 2 or 4 apart.",
        )  # fmt: skip
    for one in swept:
        for name, axis in zip(hps, one.axes, strict=True):
            if len(axis) < 3:
                raise DataError(
                    f"{where_from}, width {one.width:g}",
                    expected=f"3 values of {name} or more", found=str(len(axis)),
                    mend="An optimum lies between two others: widen the grid.",
                )  # fmt: skip
        if not np.isfinite(one.mean).any():
            raise DataError(
                f"{where_from}, width {one.width:g}", expected="a finite loss",
                found="only diverged ones", mend=f"Add smaller values of {' or '.join(hps)}.",
            )  # fmt: skip


def _finder(names: list[str], where_from: str) -> Callable[..., str]:
    def find(wanted: str, optional: bool = False) -> str:
        for known in (
            [name for name in names if name == wanted],
            [name for name in names if name.lower() == wanted.lower()],
            [name for name in names if _last(name) == wanted.lower()],
        ):
            if len(known) == 1:
                return known[0]
            if known:
                raise DataError(
                    where_from, expected=f"one column for {wanted!r}", found=" and ".join(known),
                    mend="Give its whole name.",
                )  # fmt: skip
        if optional:
            return ""
        raise DataError(
            where_from,
            expected=f"a column {wanted!r}",
            found=f"only {', '.join(map(repr, names))}" if names else "no columns",
            mend=f"Name the column that holds it. {near_matches(wanted, names)}",
        )

    return find


def _last(name: str) -> str:
    return name.lower().replace("/", ".").rpartition(".")[2]


def _number(value: Any, place: str, name: str, missing: float | None = None) -> float:
    if missing is not None and (value is None or str(value).strip() in ("", "null", "None")):
        return missing
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(
            place, expected=f"a number in column {name!r}", found=repr(value),
            mend="Mend or remove the row.",
        ) from None  # fmt: skip


def _coordinate(value: Any, axis: Axis, place: str, name: str) -> float:
    found = coordinate(_number(value, place, name), axis)
    if math.isfinite(found):
        return found
    room = {"log": "above 0", "window": "from 0 to below 1", "linear": "that is finite"}[axis]
    raise DataError(
        place, expected=f"a value of {name!r} {room}", found=repr(value),
        mend="Remove the row, or choose another axis.",
    )  # fmt: skip


def _same(value: Any, wanted: Any) -> bool:
    try:
        return float(value) == float(wanted)
    except (TypeError, ValueError):
        return str(value) == str(wanted)


def _twice(place: str, row: Row, other: Row, results: tuple[str, ...]) -> DataError:
    differ = [name for name in row if row[name] != other.get(name) and name not in results]
    mend = "Remove one of the two, or tell them apart by a seed column."
    if differ:
        mend = (
            f"They differ in {', '.join(differ)}: choose one value with `where`, or sweep it too."
        )
    return DataError(
        place, expected="one run for each width, hyperparameter and seed",
        found="a second one of the same", mend=mend,
    )  # fmt: skip
