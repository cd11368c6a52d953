"""A table from any function that trains: every width at every value with every seed."""

import math
from collections.abc import Callable, Sequence
from typing import Any


def run_grid(
    train: Callable[[int, float, int], float],
    widths: Sequence[int],
    values: Sequence[float],
    seeds: Sequence[int] = (0,),
    *,
    hp: str = "lr",
    on_run: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Rows as `analyze_transfer` reads them, one for each run, in the order of the grid.

    Arguments:
        train: of width, value and seed; returns the loss. One that is not finite, or an
            `ArithmeticError` such as `sparing.train.DivergedError`, is a diverged run.
        widths, values, seeds: of the grid.
        hp: name of the hyperparameter.
        on_run: called with each row, for progress or to write it down.
    """
    rows = []
    for width in widths:
        for value in values:
            for seed in seeds:
                try:
                    loss = float(train(width, value, seed))
                except ArithmeticError:
                    loss = math.nan
                ended = math.isfinite(loss)
                row = {
                    "width": width,
                    hp: value,
                    "seed": seed,
                    "loss": loss if ended else None,
                    "status": "done" if ended else "diverged",
                }
                rows.append(row)
                on_run(row)
    return rows
