"""A grid of training runs, and one table of them for the analysis of transfer."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sparing.checkpoint import atomic_path
from sparing.errors import ConfigError
from sparing.executors import executor
from sparing.pretrain.run import CHECKPOINT_SECONDS, Run, plan_of, prepare_folder
from sparing.pretrain.settings import Settings
from sparing.run_folder import one_process_first
from sparing.run_progress import Progress, Silent

TABLE = "sweep.jsonl"


@dataclass(frozen=True)
class Grid:
    """The values to combine, each with each.

    Arguments:
        widths, depths: of the models.
        learning_rates: as in the base run; the planner makes of them what a size gets.
        seeds: of initialisation and data order.
        weight_decays: as in the base run; None for the settings' own.

    Raises:
        ConfigError: an empty list, or a value twice.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    weight_decays: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            if not values or len(set(values)) < len(values):
                raise ConfigError(
                    field.name,
                    expected="one or more different values",
                    found=repr(values),
                    mend="Separate them by commas, each once.",
                )

    def cells(self, settings: Settings) -> list[Settings]:
        """The settings of every run; the smallest width and depth are the base unless it is set."""
        decays: Sequence[float | None] = self.weight_decays or (settings.weight_decay,)
        return [
            dataclasses.replace(
                settings,
                width=width,
                depth=depth,
                weight_decay=decay,
                learning_rate=rate,
                seed=seed,
                base_width=settings.base_width or min(self.widths),
                base_depth=settings.base_depth or min(self.depths),
            )
            for width, depth, decay, rate, seed in itertools.product(
                self.widths, self.depths, decays, self.learning_rates, self.seeds
            )
        ]


def sweep(
    settings: Settings,
    grid: Grid,
    folder: Path,
    *,
    ray: str | None = None,
    isolate: bool = False,
    keep: bool = False,
    progress: Progress | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> list[dict[str, Any]]:
    """Run a grid, or finish one that was interrupted.

    Arguments:
        settings: what all runs share.
        grid: what differs.
        folder: for everything that is written.
        ray: address of a Ray cluster ("auto", "local" or host:port) to spread the runs over.
        isolate: give every run a process of its own.
        keep: save the final models too.
        progress: is told what happens.
        checkpoint_seconds: the least time between two saves of a run.

    Returns:
        the rows of `folder/sweep.jsonl`, in the order of the grid: the values, "loss" (of the
        selection part, null unless "status" is "ok"), "validation_loss", and where the run is.

    Raises:
        ConfigError: an option that cannot work, at any cell of the grid.
        DataError: the data cannot be used.
        CheckpointError: the folder belongs to another sweep.
    """
    progress, folder = progress or Silent(), folder.absolute()
    cells = grid.cells(settings)
    runner = executor(ray, isolate, Run.__module__)
    progress.stage("preparing the data")
    claim = {
        "settings": settings.as_json(),
        "grid": json.loads(json.dumps(dataclasses.asdict(grid))),
        "kept": {"models": keep},
    }
    with one_process_first():
        vocabulary = prepare_folder(folder, cells[0], claim)
        for cell in cells[1:]:
            plan_of(cell, vocabulary)
    runs = [
        Run(cell, str(folder / "runs" / _name(cell)), str(folder), vocabulary, keep,
            checkpoint_seconds)
        for cell in cells
    ]  # fmt: skip
    progress.expect(runs)
    results: dict[str, dict[str, Any]] = {}

    def on_result(run: Run, result: dict[str, Any]) -> None:
        results[run.folder] = result
        if PartialState().is_main_process:
            done = [_row(each, results[each.folder]) for each in runs if each.folder in results]
            _write(folder / TABLE, done)

    runner.run(runs, functools.partial(progress.step), on_result)
    return [_row(run, results[run.folder]) for run in runs]


def _row(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    s = run.settings
    return {
        "width": s.width,
        "depth": s.depth,
        "lr": s.learning_rate,
        "weight_decay": s.decay,
        "seed": s.seed,
        "loss": result.get("selection_loss"),
        "status": result.get("status", "failed"),
        "validation_loss": result.get("validation_loss"),
        "train_loss": result.get("train_loss"),
        "parameters": result.get("parameters"),
        "steps": s.steps,
        "tokens": s.steps * s.tokens_a_step,
        "family": s.family,
        "optimizer": s.optimizer,
        "planner": s.planner_name,
        "run": f"runs/{_name(s)}",
        "error": result.get("error"),
    }


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of lowest loss, averaged over seeds, of every width and depth that has one.

    A value of the grid where a seed diverged or failed is out.
    """
    sizes: dict[tuple[int, int], dict[tuple[float, float], list[dict[str, Any]]]] = {}
    for row in rows:
        size, tried = (row["width"], row["depth"]), (row["lr"], row["weight_decay"])
        sizes.setdefault(size, {}).setdefault(tried, []).append(row)
    found = []
    for tried_at in sizes.values():
        means = [
            {**cell[0], "loss": sum(row["loss"] for row in cell) / len(cell)}
            for cell in tried_at.values()
            if all(row["loss"] is not None for row in cell)
        ]
        if means:
            found.append(min(means, key=lambda row: row["loss"]))
    return found


def _name(settings: Settings) -> str:
    return (
        f"width{settings.width}-depth{settings.depth}-wd{settings.decay!r}"
        f"-lr{settings.learning_rate!r}-seed{settings.seed}"
    )


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_path(path) as fresh:
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
