"""Pictures of a sweep over widths: the curves with their optima, and the rates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparing.checkpoint import atomic_path
from sparing.report._extras import require
from sparing.report.canvas import DPI, INK, blank_figure, tidy
from sparing.report.figures import literal
from sparing.report.palette import COLOURS, DASHES, GREY, MARKERS
from sparing.scale.fast_hp_transfer.results import TransferAnalysis
from sparing.scale.fast_hp_transfer.table import Sweep, value_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALL, _NORMAL, _LARGE = 9.0, 10.0, 12.5


class Profile(NamedTuple):
    """Losses of one width along one hyperparameter, the least over the others.

    Arguments:
        width: of the model.
        values: of the hyperparameter, ascending.
        mean, low, high: over seeds; nan where a run diverged or is missing.
    """

    width: float
    values: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


class Gap(NamedTuple):
    """One of a_n, b_n, c_n: its name, its values by width, and its fit at the same widths."""

    name: str
    widths: list[float]
    values: list[float]
    fit: list[float]


def profiles(sweep: Sweep, hp: int) -> list[Profile]:
    """The curves of a hyperparameter, one for each width."""
    found = []
    others = tuple(d for d in range(len(sweep.hps)) if d != hp)
    for one in sweep.widths:
        mean = np.where(np.isfinite(one.mean), one.mean, np.inf)
        kept = mean.min(axis=others)
        at = mean == np.expand_dims(kept, others)
        seeds = np.where(np.isfinite(one.losses), one.losses, np.nan)
        ends = [np.full(len(kept), np.nan), np.full(len(kept), np.nan)]
        for place in range(len(kept)):
            if np.isfinite(kept[place]):
                chosen = np.argwhere(np.take(at, place, axis=hp))[0]
                runs = np.take(seeds, place, axis=hp + 1)[(slice(None), *chosen)]
                ends[0][place], ends[1][place] = np.nanmin(runs), np.nanmax(runs)
        values = [value_at(x, sweep.axis) for x in one.axes[hp]]
        mean_or_nan = np.where(np.isfinite(kept), kept, np.nan)
        found.append(
            Profile(one.width, values, mean_or_nan.tolist(), ends[0].tolist(), ends[1].tolist())
        )
    return found


def gaps(analysis: TransferAnalysis) -> list[Gap]:
    """a_n, b_n and c_n against the widest model, which is left out."""
    widths = np.array([row.width for row in analysis.widths])
    last = widths[-1]
    half = analysis.suboptimality_rate / 2
    found = []
    for name, values, rate, power in (
        ("a: loss gap", [r.loss_gap for r in analysis.widths], analysis.alpha.value, 1),
        ("b: distance of the optimum", [r.hp_gap for r in analysis.widths], analysis.beta.value, 1),
        ("c: cost of transfer", [r.suboptimality for r in analysis.widths], half, 2),
    ):
        gap = np.array(values)[:-1]
        shape = (widths[:-1] ** -rate - last**-rate) ** power
        known = np.isfinite(gap) & (gap > 0) & (shape > 0)
        scale = np.exp(np.log(gap[known] / shape[known]).mean()) if known.any() else np.nan
        found.append(Gap(name, widths[:-1].tolist(), gap.tolist(), (scale * shape).tolist()))
    return found


def loss_window(sweep: Sweep) -> tuple[float, float]:
    """Ends of the loss axis: what is far above every optimum is cut off."""
    least = [float(np.nanmin(np.where(np.isfinite(w.mean), w.mean, np.nan))) for w in sweep.widths]
    finite = np.concatenate([w.mean[np.isfinite(w.mean)] for w in sweep.widths])
    spread = max(least) - min(least)
    high = min(float(finite.max()), max(least) + max(spread, float(np.median(finite)) - min(least)))
    margin = 0.05 * (high - min(least)) or 0.05
    return min(least) - margin, high + margin


def write_transfer_figures(analysis: TransferAnalysis, sweep: Sweep, folder: Path) -> list[Path]:
    """Write `curves.png` and `rates.png`, atomically.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UnwritableError: the folder cannot be written.
    """
    require("matplotlib")
    drawn = {
        "curves.png": curves_figure(analysis, sweep),
        "rates.png": rates_figure(analysis),
    }
    for name, figure in drawn.items():
        with atomic_path(folder / name) as fresh:
            figure.savefig(fresh, dpi=DPI, format="png")
    return [folder / name for name in drawn]


def curves_figure(analysis: TransferAnalysis, sweep: Sweep) -> Figure:
    """Loss by hyperparameter, a panel for each; a line for each width, its optimum filled."""
    count = len(sweep.hps)
    figure = blank_figure((4.4 * count + 2.6, 4.4))
    figure.suptitle(title(analysis), fontsize=_LARGE, fontweight="bold", color=INK)
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for hp, axes in enumerate(panels):
        tidy(axes, fontsize=_SMALL)
        if sweep.axis != "linear":
            axes.set_xscale("log", base=2)
        for number, curve in enumerate(profiles(sweep, hp)):
            _draw_profile(axes, curve, number, analysis, hp)
        name = sweep.hps[hp] if sweep.axis != "window" else f"window 1/(1 − {sweep.hps[hp]})"
        axes.set_xlabel(literal(name), fontsize=_NORMAL, color=INK)
        axes.set_ylim(*loss_window(sweep))
    panels[0].set_ylabel("loss", fontsize=_NORMAL, color=INK)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right center", fontsize=_SMALL, frameon=False,
        title="width", title_fontsize=_SMALL, labelcolor=INK,
    )  # fmt: skip
    return figure


def rates_figure(analysis: TransferAnalysis) -> Figure:
    """The three gaps and their fits on log axes, and the optimum by width."""
    figure = blank_figure((9.6, 4.2))
    figure.suptitle(title(analysis), fontsize=_LARGE, fontweight="bold", color=INK)
    left, right = figure.subplots(1, 2)
    tidy(left, fontsize=_SMALL)
    left.set(xscale="log", yscale="log")
    left.set_xlabel("width", fontsize=_NORMAL, color=INK)
    left.set_ylabel("gap to the widest", fontsize=_NORMAL, color=INK)
    for number, gap in enumerate(gaps(analysis)):
        known = [(n, v) for n, v in zip(gap.widths, gap.values, strict=True) if v > 0]
        if known:
            left.plot(*zip(*known, strict=True), MARKERS[number].matplotlib,
                      color=COLOURS[number], markersize=6, label=gap.name)  # fmt: skip
            left.plot(gap.widths, gap.fit, DASHES[number].matplotlib, color=COLOURS[number])
    left.legend(fontsize=_SMALL, frameon=False, labelcolor=INK)
    tidy(right, fontsize=_SMALL)
    right.set_xscale("log")
    right.set_xlabel("width", fontsize=_NORMAL, color=INK)
    right.set_ylabel("best value, ν", fontsize=_NORMAL, color=INK)
    widths = [row.width for row in analysis.widths]
    for axes in (left, right):
        axes.set_xticks(widths, [f"{n:g}" for n in widths], rotation=0 if len(widths) < 8 else 45)
        axes.minorticks_off()
    for hp, name in enumerate(analysis.hps):
        best = [row.coordinates[hp] for row in analysis.widths]
        errors = np.abs([[e.value - e.low for e in best], [e.high - e.value for e in best]])
        right.errorbar(
            widths, [e.value for e in best], yerr=None if np.isnan(errors).any() else errors,
            marker=MARKERS[hp].matplotlib, color=COLOURS[hp], capsize=3, label=literal(name),
        )  # fmt: skip
    right.legend(fontsize=_SMALL, frameon=False, labelcolor=INK)
    return figure


def title(analysis: TransferAnalysis) -> str:
    """What the figures show, in one line."""
    return literal(f"Transfer of {' and '.join(analysis.hps)} over width: {analysis.verdict}")


def _draw_profile(
    axes: Axes, curve: Profile, number: int, analysis: TransferAnalysis, hp: int
) -> None:
    colour = COLOURS[number % len(COLOURS)] if number < len(COLOURS) else GREY
    shown = np.array(curve.values)
    if analysis.axis == "window":
        shown = 1 / (1 - shown)
    axes.plot(
        shown, curve.mean, color=colour, marker=MARKERS[number % len(MARKERS)].matplotlib,
        markersize=3.5, linewidth=1.3, label=f"{curve.width:g}",
    )  # fmt: skip
    axes.fill_between(shown, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    row = analysis.widths[number]
    best = 1 / (1 - row.values[hp]) if analysis.axis == "window" else row.values[hp]
    axes.plot(
        [best], [row.loss], "*", color=colour, markersize=12, markeredgecolor="white", zorder=4
    )
