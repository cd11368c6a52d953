"""Learning curves: training loss by step, over seeds."""

import math
from dataclasses import dataclass

from sparing.compare.results import Results, Row
from sparing.report.rows import competitors, trained_references


@dataclass(frozen=True)
class Curve:
    """The training loss of one method.

    Arguments:
        row: whose it is.
        steps: counted from one.
        losses: mean over the seeds that reached the step, then running mean over `window` steps.
    """

    row: Row
    steps: list[int]
    losses: list[float]


def smoothing_window(results: Results) -> int:
    """Steps that a drawn figure is averaged over: an odd 1/40 of the run; 1 is no smoothing."""
    longest = max((len(run) for row in results.rows for run in row.curve), default=0)
    return max(1, longest // 40) | 1


def curves(results: Results) -> list[Curve]:
    """One for each method that finished, and for full fine-tuning."""
    window = smoothing_window(results)
    drawn = []
    for row in [*trained_references(results), *competitors(results)]:
        means = mean_over_seeds(row.curve)
        if means:
            drawn.append(Curve(row, list(range(1, len(means) + 1)), running_mean(means, window)))
    return drawn


def description(results: Results) -> str:
    """How the curves were averaged, for the reader of the plot."""
    seeds = max((len(row.curve) for row in results.rows), default=0)
    window = smoothing_window(results)
    parts = [f"mean over {seeds} seeds" if seeds > 1 else "one seed"]
    parts += [f"running mean of {window} steps"] if window > 1 else []
    return ", ".join(parts)


def mean_over_seeds(runs: list[list[float]]) -> list[float]:
    """Step by step; nan where no run has a finite loss."""
    length = max((len(run) for run in runs), default=0)
    return [_mean([run[step] for run in runs if step < len(run)]) for step in range(length)]


def running_mean(values: list[float], window: int) -> list[float]:
    """Centred mean over `window` steps, an odd number; over fewer near both ends. Skips nan."""
    smooth = []
    for step, value in enumerate(values):
        near = values[max(0, step - window // 2) : step + window // 2 + 1]
        smooth.append(_mean(near) if math.isfinite(value) else math.nan)
    return smooth


def loss_range(drawn: list[Curve]) -> tuple[float, float]:
    """Ends of the axis: all that was drawn, less the steepest first two percent of steps."""
    kept = [
        loss
        for curve in drawn
        for loss in curve.losses[len(curve.losses) // 50 :]
        if math.isfinite(loss)
    ]
    if not kept:
        return 0.0, 1.0
    margin = 0.05 * (max(kept) - min(kept)) or 0.05
    return min(kept) - margin, max(kept) + margin


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
