"""The picture of a schedule: how hyperparameters moved, and by how much they were perturbed."""

from pathlib import Path

from sparing.checkpoint import atomic_path
from sparing.errors import ConfigError
from sparing.report._extras import require
from sparing.report.canvas import DPI, INK, blank_figure, tidy
from sparing.report.palette import COLOURS, DASHES
from sparing.tune.stn.hparams import HParam
from sparing.tune.stn.schedule import Schedule

_SMALL, _NORMAL, _LARGE = 9.0, 10.0, 12.5
_BIG = 1.0  # values above it get a panel of their own


def draw_schedule(schedule: Schedule, path: Path, hparams: tuple[HParam, ...] = ()) -> None:
    """Write values and scales over training steps as a PNG, atomically.

    Values above 1, such as the side of a cutout, are drawn in a panel apart from rates.

    Arguments:
        schedule: of a run.
        path: of the PNG.
        hparams: discrete ones are drawn as steps; others, and all if none are given, as lines.

    Raises:
        ConfigError: the schedule is empty.
        MissingExtraError: matplotlib is not installed.
        UnwritableError: the path cannot be written.
    """
    if not schedule.records:
        raise ConfigError(
            "schedule", expected="at least one record", found="none", mend="Record a run first."
        )
    require("matplotlib", extra="tune")
    steps = [record.step for record in schedule.records]
    series = {name: [r.values[name] for r in schedule.records] for name in schedule.names}
    scales = {name: [r.scales[name] for r in schedule.records] for name in schedule.names}
    large = [name for name, values in series.items() if max(map(abs, values)) > _BIG]
    rates = [name for name in series if name not in large]
    panels = [("value", names, series) for names in (rates, large) if names]
    panels.append(("scale of the perturbation", list(scales), scales))
    figure = blank_figure((7.0, 2.4 * len(panels)))
    figure.suptitle("Schedule", fontsize=_LARGE, fontweight="bold", color=INK)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    stepped = {hparam.name for hparam in hparams if hparam.discrete}
    for axes, (title, names, numbers) in zip(grid[:, 0], panels, strict=True):
        tidy(axes, fontsize=_SMALL)
        axes.set_ylabel(title, fontsize=_NORMAL, color=INK)
        for name in names:
            index = list(series).index(name)
            axes.plot(
                steps,
                numbers[name],
                color=COLOURS[index % len(COLOURS)],
                linestyle=DASHES[index // len(COLOURS) % len(DASHES)].matplotlib,
                drawstyle="steps-post" if name in stepped and numbers is series else "default",
                linewidth=1.6,
                label=name,
            )
        if numbers is series:
            axes.legend(fontsize=_SMALL, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    grid[-1, 0].set_xlabel("training step", fontsize=_NORMAL, color=INK)
    with atomic_path(path) as fresh:
        figure.savefig(fresh, dpi=DPI)
