"""Does the best hyperparameter of a small model converge faster than it has to?

With a_n the loss gap to infinite width, b_n the distance of the best hyperparameters and c_n the
loss that transfer costs, b_n = O(√a_n) always. Transfer is fast if b_n = o(√a_n): then searching on
a small model and running once is cheaper than searching at the width that is used (eq. 1 to 6).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparing.errors import ConfigError, DataError
from sparing.scale.fast_hp_transfer.budget import TransferCost
from sparing.scale.fast_hp_transfer.curves import Noise, Optimum, locate, loss_at, noise
from sparing.scale.fast_hp_transfer.rates import PowerLaws, fit_power_laws, fit_suboptimality
from sparing.scale.fast_hp_transfer.results import (
    Estimate,
    TransferAnalysis,
    Verdict,
    WidthResult,
)
from sparing.scale.fast_hp_transfer.table import (
    Axis,
    Columns,
    Sweep,
    WidthSweep,
    mean_over_seeds,
    read_sweep,
    value_at,
)

_MOST_LOST = 0.05  # share of replicates without a rate, above which an interval means nothing


def analyze_transfer(
    table: Any,
    hp: str | Sequence[str] = "lr",
    *,
    axis: Axis = "log",
    columns: Columns | None = None,
    where: Mapping[str, Any] | None = None,
    window: int = 1,
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    cost_exponent: float = 2.0,
    on_replicate: Callable[[int], None] = lambda done: None,
) -> TransferAnalysis:
    """Rates of a sweep over widths, with a verdict (eq. 1 to 6).

    Runs of one point are resampled with replacement, seeds as a whole, and spread by √(k/(k-1)) to
    undo what k seeds underestimate; where there is one seed, noise of the size of the curve's own
    roughness is drawn instead. Both are divided by √(χ²/d) with d degrees of freedom, so that the
    intervals are as wide as Student's for so few seeds.

    Arguments:
        table, hp, axis, columns, where: see `read_sweep`; `table` may be a `Sweep`. The learning
            rate must be the one that is the same for all widths, not that of a layer.
        window: grid steps to each side of the best point that a quadratic in ν is fitted to.
        replicates: of the bootstrap; 0 for none, which leaves every verdict undetermined.
        confidence: of the intervals, such as 0.95.
        seed: of the bootstrap.
        cost_exponent: r; a run of width n costs n^r.
        on_replicate: called with the number done.

    Raises:
        DataError: see `read_sweep`; or an optimum on the edge of its grid, which is no optimum.
        ConfigError: an option out of range.
    """
    _check_options(window, replicates, confidence, cost_exponent)
    sweep = (
        table
        if isinstance(table, Sweep)
        else read_sweep(table, hp, axis=axis, columns=columns, where=where)
    )
    means = [one.mean for one in sweep.widths]
    optima = [locate(one.axes, mean, window) for one, mean in zip(sweep.widths, means, strict=True)]
    _refuse_edges(sweep, optima)
    ns = np.array([one.width for one in sweep.widths])
    found = _fit(ns, [optima])
    loss_gaps, hp_gaps = _gaps(optima)
    last = sweep.widths[-1]
    costs = np.array(
        [
            max(0.0, loss_at(last.axes, means[-1], o.at, window) - optima[-1].loss)
            if o is not optima[-1]
            else 0.0
            for o in optima
        ]
    )
    drawn = _replicates(sweep, window, replicates, seed, on_replicate)
    alpha, beta, margin, lost = _estimates(ns, found, drawn, confidence)
    reasons, verdict = _judge(sweep, optima, found, margin, lost, bool(drawn))
    cost = _cost(sweep, optima, found, cost_exponent)
    return TransferAnalysis(
        sweep.hps,
        sweep.axis,
        tuple(
            WidthResult(
                one.width,
                tuple(value_at(x, sweep.axis) for x in optimum.at),
                tuple(
                    _estimate(float(x), np.array([r[place].at[d] for r in drawn]), confidence)
                    for d, x in enumerate(optimum.at)
                ),
                optimum.loss,
                optimum.curvature,
                optimum.interpolated,
                len(one.losses),
                sweep.diverged.get(one.width, 0),
                float(loss_gaps[place]),
                float(hp_gaps[place]),
                float(costs[place]),
            )
            for place, (one, optimum) in enumerate(zip(sweep.widths, optima, strict=True))
        ),
        alpha,
        beta,
        fit_suboptimality(ns, costs),
        margin,
        verdict,
        tuple(reasons),
        tuple(_notes(sweep, optima, found, costs)),
        float(found.loss.limits[0, 0]),
        float(found.loss.amplitudes[0, 0]),
        tuple(value_at(x, sweep.axis) for x in found.hp.limits[0]),
        cost,
        sweep.unfinished,
        replicates,
        confidence,
    )


@dataclass(frozen=True)
class _Fits:
    loss: PowerLaws
    hp: PowerLaws


def _fit(ns: np.ndarray, replicates: Sequence[Sequence[Optimum]]) -> _Fits:
    losses = np.array([[[o.loss for o in one]] for one in replicates])
    places = np.array([np.array([o.at for o in one]).T for one in replicates])
    return _Fits(fit_power_laws(ns, losses), fit_power_laws(ns, places))


def _gaps(optima: Sequence[Optimum]) -> tuple[np.ndarray, np.ndarray]:
    """a_n and b_n against the widest model (eq. 1 and 2)."""
    return (
        np.array([abs(o.loss - optima[-1].loss) for o in optima]),
        np.array([np.linalg.norm(o.at - optima[-1].at) for o in optima]),
    )


def _replicates(
    sweep: Sweep, window: int, count: int, seed: int, on_replicate: Callable[[int], None]
) -> list[list[Optimum]]:
    """Optima of resampled sweeps; none if a width has neither seeds nor enough points."""
    draw = np.random.default_rng(seed)
    rough = [noise(one.axes, one.mean) for one in sweep.widths]
    if any(r.freedom == 0 and len(w.losses) == 1 for r, w in zip(rough, sweep.widths, strict=True)):
        return []
    found = []
    for number in range(count):
        found.append(
            [
                locate(one.axes, _resampled(one, roughness, draw), window)
                for one, roughness in zip(sweep.widths, rough, strict=True)
            ]
        )
        on_replicate(number + 1)
    return found


def _resampled(one: WidthSweep, rough: Noise, draw: np.random.Generator) -> np.ndarray:
    seeds = len(one.losses)
    freedom = rough.freedom if seeds == 1 else seeds - 1
    student = math.sqrt(freedom / draw.chisquare(freedom))
    if seeds == 1:
        noisy = student * rough.deviation * draw.standard_normal(one.losses[0].shape)
        return one.losses[0] + noisy
    mean = one.mean
    again = mean_over_seeds(one.losses[draw.integers(seeds, size=seeds)])
    # A point that lost all its runs keeps its mean; one that diverged in any run stays infinite,
    # or the replicates would know better than the data where the edge of stability is.
    usable = np.isfinite(again) & np.isfinite(mean)
    with np.errstate(invalid="ignore"):
        spread = student * math.sqrt(seeds / (seeds - 1)) * (again - mean)
    return np.where(usable, mean + np.where(usable, spread, 0.0), mean)


@dataclass(frozen=True)
class _Lost:
    """Shares of replicates: without a rate, and with an optimum on the edge."""

    rate: float
    edge: float


def _estimates(
    ns: np.ndarray, found: _Fits, drawn: list[list[Optimum]], confidence: float
) -> tuple[Estimate, Estimate, Estimate, _Lost]:
    alpha, beta = float(found.loss.rates[0]), float(found.hp.rates[0])
    if not drawn:
        unknown = np.array([])
        return (
            _estimate(alpha, unknown, confidence),
            _estimate(beta, unknown, confidence),
            _estimate(beta - alpha / 2, unknown, confidence),
            _Lost(1.0, 0.0),
        )
    fits = _fit(ns, drawn)
    margins = fits.hp.rates - fits.loss.rates / 2
    lost = _Lost(
        float(np.isnan(margins).mean()),
        float(np.mean([any(o.edges for o in one) for one in drawn])),
    )
    return (
        _estimate(alpha, fits.loss.rates, confidence),
        _estimate(beta, fits.hp.rates, confidence),
        _estimate(beta - alpha / 2, margins, confidence),
        lost,
    )


def _estimate(value: float, drawn: np.ndarray, confidence: float) -> Estimate:
    known = drawn[np.isfinite(drawn)]
    if len(known) < 2:
        return Estimate(value, math.nan, math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, below, above, high = np.quantile(known, [tail, 0.16, 0.84, 1 - tail])
    return Estimate(value, float(above - below) / 2, float(low), float(high))


def _judge(
    sweep: Sweep, optima: Sequence[Optimum], found: _Fits, margin: Estimate, lost: _Lost,
    bootstrapped: bool,
) -> tuple[list[str], Verdict]:  # fmt: skip
    """The verdict, and why."""
    reasons = []
    names = " and ".join(sweep.hps)
    drift, step = _drift_and_step(sweep, optima)
    if not found.loss.bounded[0]:
        reasons.append("the loss follows no power law of the width that can be told from a line")
    if (drift < step).all():
        reasons.append(
            f"the best {names} moves by {drift.max():.3g} in ν, less than a step of the grid "
            f"({step[drift.argmax()]:.3g}): refine the grid, or take it for constant"
        )
    elif not found.hp.bounded[0]:
        reasons.append(f"the best {names} follows no power law of the width")
    if not bootstrapped:
        reasons.append("there is no interval: add seeds, or at least four points a width")
    elif lost.rate > _MOST_LOST:
        reasons.append(f"{lost.rate:.0%} of the replicates have no rate: add seeds")
    elif lost.edge > _MOST_LOST:
        reasons.append(
            f"{lost.edge:.0%} of the replicates have an optimum on the edge: widen the grid"
        )
    if reasons:
        return reasons, "undetermined"
    interval = f"β − α/2 is between {margin.low:.3g} and {margin.high:.3g}"
    if margin.low > 0:
        return [f"{interval}: optima converge faster than the loss forces them to"], "fast"
    if margin.high < 0:
        return [f"{interval}: optima converge more slowly than fast transfer needs"], "slow"
    return [f"{interval}, on both sides of 0: add seeds, widths or grid points"], "undetermined"


def _drift_and_step(sweep: Sweep, optima: Sequence[Optimum]) -> tuple[np.ndarray, np.ndarray]:
    """For each hyperparameter, how far its optimum moves and the widest grid step beside one."""
    at = np.array([o.at for o in optima])
    steps = []
    for one, optimum in zip(sweep.widths, optima, strict=True):
        for d, (grid, x) in enumerate(zip(one.axes, optimum.at, strict=True)):
            place = int(np.clip(np.searchsorted(grid, x), 1, len(grid) - 1))
            steps.append((d, grid[place] - grid[place - 1]))
    widest = [max(s for dd, s in steps if dd == d) for d in range(len(sweep.hps))]
    return at.max(axis=0) - at.min(axis=0), np.array(widest)


def _cost(
    sweep: Sweep, optima: Sequence[Optimum], found: _Fits, cost_exponent: float
) -> TransferCost | None:
    drift, step = _drift_and_step(sweep, optima)
    amplitude = float(found.loss.amplitudes[0, 0])
    known = found.loss.bounded[0] and found.hp.bounded[0] and (drift >= step).any()
    if not known or amplitude <= 0 or not optima[-1].curvature > 0:
        return None
    return TransferCost(
        float(found.loss.rates[0]),
        amplitude,
        float(found.hp.rates[0]),
        float(np.linalg.norm(found.hp.amplitudes[0])),
        optima[-1].curvature,
        float(np.mean([grid[-1] - grid[0] for grid in sweep.widths[-1].axes])),
        len(sweep.hps),
        cost_exponent,
    )


def _notes(sweep: Sweep, optima: Sequence[Optimum], found: _Fits, costs: np.ndarray) -> list[str]:
    notes = []
    if len(sweep.widths) == 3:
        notes.append("three widths determine a rate without anything left to test it")
    if found.loss.amplitudes[0, 0] < 0:
        notes.append("the loss rises with width: its gap is to a limit above")
    rough = [
        f"{s.width:g}" for s, o in zip(sweep.widths, optima, strict=True) if not o.interpolated
    ]
    if rough:
        notes.append(
            f"at width {', '.join(rough)} the optimum has diverged or equal neighbours and is "
            "known to a grid step only"
        )
    beyond = [
        f"{s.width:g}" for s, c in zip(sweep.widths, costs, strict=True) if not np.isfinite(c)
    ]
    if beyond:
        notes.append(
            f"the optimum of width {', '.join(beyond)} is outside what was tried at the widest"
        )
    total = sum(sweep.diverged.values())
    if total:
        notes.append(f"{total} diverged runs count as infinite loss")
    if sweep.unfinished:
        notes.append(f"{sweep.unfinished} unfinished runs were left out")
    return notes


def _refuse_edges(sweep: Sweep, optima: Sequence[Optimum]) -> None:
    found, mend = [], []
    for one, optimum in zip(sweep.widths, optima, strict=True):
        for axis, side in optimum.edges:
            end = value_at(one.axes[axis][0 if side == "lower" else -1], sweep.axis)
            name = sweep.hps[axis]
            found.append(f"the best {name} of width {one.width:g} at the {side} end, {end:.4g}")
            mend.append(f"{'below' if side == 'lower' else 'above'} {name} {end:.4g}"
                        f" at width {one.width:g}")  # fmt: skip
    if found:
        raise DataError(
            "sweep", expected="every optimum inside its grid", found="; ".join(found),
            mend=f"Extend the grid {', and '.join(mend)}.",
        )  # fmt: skip


def _check_options(window: int, replicates: int, confidence: float, cost_exponent: float) -> None:
    for name, value, holds, expected in (
        ("window", window, window >= 1, "1 or more"),
        ("replicates", replicates, replicates >= 0, "0 or more"),
        ("confidence", confidence, 0 < confidence < 1, "between 0 and 1"),
        ("cost_exponent", cost_exponent, 0 < cost_exponent < math.inf, "above 0"),
    ):
        if not holds:
            raise ConfigError(
                f"analyze_transfer.{name}", expected=expected, found=repr(value),
                mend="The defaults are 1, 1000, 0.95 and 2.",
            )  # fmt: skip
