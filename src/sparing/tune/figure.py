"""The picture of a search: every trial, and the front of those that no other beats."""

from pathlib import Path

from sparing.checkpoint import atomic_path
from sparing.report._extras import require
from sparing.report._labels import Label, place_labels
from sparing.report.canvas import DPI, INK, blank_figure, tidy
from sparing.report.palette import COLOURS, GREY
from sparing.tune.front import Front

_SMALL, _NORMAL, _LARGE = 9.0, 10.0, 12.5
_MOST_NAMES = 7


def draw_front(front: Front, path: Path) -> None:
    """Write the first two rewards of all trials as a PNG, atomically.

    Members of the front are joined and named by their masks; trials dominated in all rewards are
    grey. With one reward, it is drawn against the number of the trial.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UnwritableError: the path cannot be written.
    """
    require("matplotlib", extra="tune")
    figure = blank_figure((7.0, 4.8))
    figure.suptitle(
        f"{len(front.complete)} trials, {len(front.members)} on the front",
        fontsize=_LARGE,
        fontweight="bold",
        color=INK,
    )
    axes = figure.subplots()
    tidy(axes, fontsize=_SMALL)
    single = len(front.rewards) == 1
    names = ["trial", front.rewards[0]] if single else list(front.rewards[:2])
    better = [False, front.maximize[0]] if single else list(front.maximize[:2])
    titles = [_title(name, higher) for name, higher in zip(names, better, strict=True)]
    axes.set_xlabel(titles[0], fontsize=_NORMAL, color=INK)
    axes.set_ylabel(titles[1], fontsize=_NORMAL, color=INK)

    def point(trial) -> tuple[float, float]:  # type: ignore[no-untyped-def]
        return (trial.number, trial.values[0]) if single else trial.values[:2]

    members = front.members
    others = [point(trial) for trial in front.complete if trial not in members]
    if others:
        axes.plot(*zip(*others, strict=True), "o", color=GREY, markersize=5, alpha=0.7, zorder=2)
    if members:
        drawn = [point(trial) for trial in members]
        axes.plot(
            *zip(*drawn, strict=True),
            color=COLOURS[0],
            marker="s",
            linestyle="-" if len(front.rewards) == 2 else "",
            drawstyle="steps-post",  # what the front reaches, as in other figures
            linewidth=1.5,
            markersize=7.5,
            markeredgecolor="white",
            zorder=3,
        )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if 0 < len(members) <= _MOST_NAMES:
        labels = [Label(trial.mask, *point(trial), COLOURS[0]) for trial in members]
        place_labels(axes, labels, fontsize=_SMALL)
    with atomic_path(path) as fresh:
        figure.savefig(fresh, dpi=DPI)


def _title(name: str, higher: bool) -> str:
    if name == "trial":
        return name
    return f"{name} ({'higher' if higher else 'lower'} is better)"
