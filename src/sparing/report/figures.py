"""Static figures of a comparison, as PNG files for papers, slides and READMEs."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.checkpoint import atomic_path
from sparing.compare.results import Results, Row
from sparing.report._extras import require
from sparing.report._labels import Label, place_labels
from sparing.report.canvas import DPI, INK, blank_figure, tidy
from sparing.report.curves import curves, description, loss_range
from sparing.report.palette import GREY, REFERENCE, looks
from sparing.report.pareto import (
    COSTS,
    Cost,
    budget_limit,
    cost_window,
    front,
    loss_window,
    nearby_references,
    points,
    reference_lines,
    staircase,
)
from sparing.report.rows import competitors, is_lora
from sparing.report.table import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7.0, 4.8)  # inches: 1120 x 768 pixels, type still legible at 800
_SMALL, _NORMAL, _LARGE = 9.0, 10.0, 12.5
_MOST_NAMES = 7  # written beside points; more go into a legend


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Write a Pareto plot for each cost, the learning curves and an overview of all.

    Each file is written atomically: `pareto_parameters.png`, `pareto_memory.png`,
    `pareto_seconds.png`, `learning_curves.png` and `overview.png`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the folder cannot be written.
    """
    require("matplotlib")
    drawn = {f"pareto_{cost.slug}.png": pareto_figure(results, cost) for cost in COSTS}
    drawn["learning_curves.png"] = curves_figure(results)
    drawn["overview.png"] = overview_figure(results)
    for name, figure in drawn.items():
        with atomic_path(folder / name) as fresh:
            figure.savefig(fresh, dpi=DPI)
    return [folder / name for name in drawn]


def pareto_figure(results: Results, cost: Cost) -> Figure:
    """Validation loss against one cost."""
    figure = blank_figure(_SIZE)
    axes = figure.subplots()
    _head(figure, results, fontsize=_LARGE)
    labels = _draw_pareto(axes, results, cost)
    if len(labels) > _MOST_NAMES:
        _legend(figure, axes, columns=1)
    else:
        _settle(figure)
        place_labels(axes, labels, fontsize=_NORMAL)
    return figure


def curves_figure(results: Results) -> Figure:
    """Training loss by step."""
    figure = blank_figure(_SIZE)
    _head(figure, results, fontsize=_LARGE)
    axes = figure.subplots()
    if _draw_curves(axes, results) > _MOST_NAMES:
        _legend(figure, axes, columns=1)
    else:
        _legend_inside(axes)
    return figure


def overview_figure(results: Results) -> Figure:
    """The three Pareto plots and the learning curves on one page."""
    figure = blank_figure((10.0, 8.0))
    _head(figure, results, fontsize=_LARGE + 1.5)
    panels = list(figure.subplots(2, 2).flat)
    labels = [
        _draw_pareto(axes, results, cost) for axes, cost in zip(panels[:3], COSTS, strict=True)
    ]
    _draw_curves(panels[3], results)
    if max(len(of_panel) for of_panel in labels) > _MOST_NAMES:
        _legend(figure, panels[3], columns=4)
        return figure
    _legend_inside(panels[3])
    _settle(figure)
    for axes, of_panel in zip(panels[:3], labels, strict=True):
        place_labels(axes, of_panel, fontsize=_NORMAL)
    return figure


def _head(figure: Figure, results: Results, *, fontsize: float) -> None:
    """The title of the comparison, on as many lines as it needs."""
    letters = int(figure.get_figwidth() * 72 / (0.62 * fontsize))
    lines = textwrap.wrap(title(results), letters, max_lines=3, placeholder=" …")
    figure.suptitle(literal("\n".join(lines)), fontsize=fontsize, fontweight="bold", color=INK)


def literal(text: str) -> str:
    """`text` for matplotlib, which takes what is between two dollar signs for mathematics."""
    return text.replace("$", r"\$")


def _settle(figure: Figure) -> None:
    """Lay the figure out for good, so that labels can be placed by the pixel."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _draw_pareto(axes: Axes, results: Results, cost: Cost) -> list[Label]:
    """Everything but the names of the points, which need the final layout."""
    tidy(axes, fontsize=_SMALL)
    axes.set_xlabel(cost.title, fontsize=_NORMAL, color=INK)
    axes.set_ylabel("validation loss, nats a token", fontsize=_NORMAL, color=INK)
    measured = points(competitors(results), cost)
    references = nearby_references(results, cost)
    if not measured:
        _say(axes, "no method finished with this figure")
        return []
    limit = budget_limit(results, cost)
    left, right, logarithmic = cost_window(measured + references, limit)
    axes.set_xscale("log" if logarithmic else "linear")
    axes.set_xlim(left, right)
    axes.set_ylim(*loss_window(results))
    axes.xaxis.set_major_formatter(lambda value, _: cost.text(value))
    if not logarithmic:
        axes.locator_params(axis="x", nbins=5)
    _draw_reference_lines(axes, results, cost)
    if limit is not None:
        axes.axvline(limit, color=GREY, linewidth=1, linestyle=":", zorder=1)
        _beside(axes, "budget", limit)
    axes.plot(*staircase(front(measured), right), color="#9aa5b1", linewidth=1.6, zorder=2)
    style = looks(results)
    labels = []
    for point in measured + references:
        look = style[point.row.method]
        axes.errorbar(
            point.cost,
            point.loss,
            yerr=point.std or None,
            color=look.colour,
            marker=look.marker.matplotlib,
            markersize=12 if is_lora(point.row) else 7.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.3,
            capsize=3,
            label=_name(point.row),
            zorder=4,
        )
        labels.append(Label(_name(point.row), point.cost, point.loss, look.colour))
    return labels


def _name(row: Row) -> str:
    return literal(f"{row.method} (reference)" if is_lora(row) else row.method)


def _draw_reference_lines(axes: Axes, results: Results, cost: Cost) -> None:
    """A grey line at each reference, or a remark at the edge that it is beyond."""
    low, high = loss_window(results)
    for line in reference_lines(results):
        text = literal(line.text(cost))
        if low <= line.loss <= high:
            dash = "--" if line.name == "untouched" else REFERENCE.dash.matplotlib
            axes.axhline(line.loss, color=GREY, linewidth=1.1, linestyle=dash, zorder=1)
            height, above = line.loss, line.loss < (low + high) / 2
        elif line.loss > high:
            height, above, text = high, False, f"↑ {text}, beyond the axis"
        else:
            height, above, text = low, True, f"↓ {text}, beyond the axis"
        axes.annotate(
            text,
            (0.012, height),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3 if above else -3),
            textcoords="offset points",
            va="bottom" if above else "top",
            fontsize=_SMALL,
            color="#52606d",
        )


def _beside(axes: Axes, text: str, cost: float) -> None:
    axes.annotate(
        text,
        (cost, 0.74),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        rotation=90,
        va="center",
        fontsize=_SMALL,
        color="#52606d",
    )


def _draw_curves(axes: Axes, results: Results) -> int:
    """Draw one line for each method; returns how many there are."""
    tidy(axes, fontsize=_SMALL)
    axes.set_xlabel(f"step ({description(results)})", fontsize=_NORMAL, color=INK)
    axes.set_ylabel("training loss, nats a token", fontsize=_NORMAL, color=INK)
    drawn = curves(results)
    if not drawn:
        _say(axes, "no learning curve was recorded")
        return 0
    style = looks(results)
    for curve in drawn:
        look = style[curve.row.method]
        axes.plot(
            curve.steps,
            curve.losses,
            color=look.colour,
            linestyle=look.dash.matplotlib,
            linewidth=1.5,
            marker=look.marker.matplotlib,
            markevery=(0.06, 0.15),
            markersize=9 if is_lora(curve.row) else 5.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=_name(curve.row),
        )
    axes.set_ylim(*loss_range(drawn))
    return len(drawn)


def _legend_inside(axes: Axes) -> None:
    """The names in the upper right corner, which falling curves leave free."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, names, fontsize=_SMALL, frameon=False, loc="upper right", labelcolor=INK
        )


def _legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """The names of all that `axes` shows, at the right of the figure or in columns below it."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside right center" if columns == 1 else "outside lower center",
        ncols=columns,
        fontsize=_SMALL,
        frameon=False,
        labelcolor=INK,
    )


def _say(axes: Axes, text: str) -> None:
    """An empty plot that tells why."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
