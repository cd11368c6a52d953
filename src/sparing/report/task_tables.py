"""Pictures of merging: a table of task x method as a heat map, and what is left as tasks arrive."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.checkpoint import atomic_path
from sparing.report._extras import require
from sparing.report.canvas import DPI, INK, blank_figure, tidy
from sparing.report.figures import literal
from sparing.report.palette import ACCENT, COLOURS, DASHES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALL, _NORMAL, _LARGE = 8.0, 10.0, 12.5
_CELL = 0.62  # inches across
_ROW = 0.34


def write_task_table(
    path: Path,
    values: Mapping[str, Sequence[float]],
    tasks: Sequence[str],
    title: str,
    *,
    higher_is_better: bool,
    digits: int = 2,
) -> None:
    """Draw a row for each method and a column for each task, their means last, atomically.

    The darker a cell, the better it is among all cells; numbers are written into them.

    Arguments:
        path: PNG to write.
        values: by method, a number for each task; nan where there is none.
        tasks: their names.
        title: above the picture.
        higher_is_better: True for accuracies, False for losses.
        digits: after the point.

    Raises:
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    require("matplotlib")
    figure = task_table_figure(
        values, tasks, title, higher_is_better=higher_is_better, digits=digits
    )
    with atomic_path(path) as fresh:
        figure.savefig(fresh, dpi=DPI, format="png")


def task_table_figure(
    values: Mapping[str, Sequence[float]],
    tasks: Sequence[str],
    title: str,
    *,
    higher_is_better: bool,
    digits: int = 2,
) -> Figure:
    """The figure of `write_task_table`."""
    from matplotlib.colors import LinearSegmentedColormap

    rows = [[*row, math.fsum(row) / len(row)] for row in values.values()]
    finite = [value for row in rows for value in row if math.isfinite(value)]
    low, high = min(finite), max(finite)
    width = 2.6 + _CELL * (len(tasks) + 1)
    figure = blank_figure((width, 1.5 + _ROW * len(rows)))
    axes = figure.subplots()
    ends = ["white", ACCENT] if higher_is_better else [ACCENT, "white"]
    shades = LinearSegmentedColormap.from_list("better is darker", ends)
    axes.imshow(rows, aspect="auto", cmap=shades, vmin=low, vmax=high if high > low else low + 1)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            share = (value - low) / (high - low or 1)
            dark = (share if higher_is_better else 1 - share) > 0.55
            colour = "white" if dark else INK
            text = f"{value:.{digits}f}" if math.isfinite(value) else "–"
            axes.text(x, y, text, ha="center", va="center", fontsize=_SMALL, color=colour)
    names = [literal(task) for task in (*tasks, "mean")]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=_SMALL, color=INK)
    methods = [literal(method) for method in values]
    axes.set_yticks(range(len(rows)), methods, fontsize=_SMALL, color=INK)
    axes.axvline(len(tasks) - 0.5, color="white", linewidth=3)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.suptitle(literal(title), fontsize=_NORMAL, fontweight="bold", color=INK)
    return figure


@dataclass(frozen=True)
class Arrivals:
    """Tasks that arrived one after another.

    Arguments:
        tasks: names, in the order of arrival.
        curve: after the n-th arrival, the figures of the n tasks so far, in the same order.
    """

    tasks: Sequence[str]
    curve: Sequence[Sequence[float]]


def write_forgetting(path: Path, orders: Mapping[str, Arrivals], title: str, quantity: str) -> None:
    """Draw what the tasks that have arrived are worth after each arrival, atomically.

    One panel for each order: a line for each task from its arrival on, with the same look in all
    panels, and a thick one for their mean.

    Arguments:
        path: PNG to write.
        orders: by name.
        title: above the picture.
        quantity: name of the figures, for the vertical axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    require("matplotlib")
    figure = forgetting_figure(orders, title, quantity)
    with atomic_path(path) as fresh:
        figure.savefig(fresh, dpi=DPI, format="png")


def forgetting_figure(orders: Mapping[str, Arrivals], title: str, quantity: str) -> Figure:
    """The figure of `write_forgetting`."""
    figure = blank_figure((3.4 * len(orders) + 1.6, 3.6))
    panels = figure.subplots(1, len(orders), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(task for one in orders.values() for task in one.tasks))
    for axes, (name, one) in zip(panels, orders.items(), strict=True):
        _draw_order(axes, one, names)
        axes.set_title(literal(name), fontsize=_NORMAL, color=INK)
        axes.set_xlabel("tasks arrived", fontsize=_NORMAL, color=INK)
    panels[0].set_ylabel(quantity, fontsize=_NORMAL, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside right center",
        fontsize=_SMALL,
        frameon=False,
        labelcolor=INK,
    )
    figure.suptitle(literal(title), fontsize=_LARGE, fontweight="bold", color=INK)
    return figure


def _draw_order(axes: Axes, one: Arrivals, names: Sequence[str]) -> None:
    tidy(axes, fontsize=_SMALL)
    last = len(one.curve)
    for look, name in enumerate(names):
        if name in one.tasks:
            place = one.tasks.index(name)
            axes.plot(
                range(place + 1, last + 1),
                [row[place] for row in one.curve[place:]],
                color=COLOURS[look % len(COLOURS)],
                linestyle=DASHES[look // len(COLOURS) % len(DASHES)].matplotlib,
                marker=MARKERS[look % len(MARKERS)].matplotlib,
                linewidth=1.2,
                markersize=3.8,
                label=literal(name),
            )
    means = [math.fsum(row) / len(row) for row in one.curve]
    axes.plot(range(1, last + 1), means, color=INK, linewidth=2.4, label="mean of those there")
    axes.set_xticks(range(1, last + 1))
