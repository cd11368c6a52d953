"""A grid gives one table, whatever runs it and however often it is interrupted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from _pretraining import SMALL, small, weights

from sparing.errors import CheckpointError, ConfigError
from sparing.pretrain import Grid, pretrain, sweep
from sparing.pretrain.sweep import best
from sparing.run_progress import Silent
from sparing.work import Stopped, Work

GRID = Grid(widths=(16, 32), depths=(1,), learning_rates=(0.02, 0.1), seeds=(0,))
COLUMNS = ("width", "depth", "lr", "weight_decay", "seed", "loss", "status")


def table(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("sweep")
    return sweep(small(), GRID, folder, keep=True), folder


def test_every_run_is_a_row_with_the_columns_of_the_analysis(finished) -> None:
    rows, folder = finished
    assert table(folder) == rows
    assert [(row["width"], row["lr"]) for row in rows] == [
        (16, 0.02), (16, 0.1), (32, 0.02), (32, 0.1),
    ]  # fmt: skip
    assert all(set(COLUMNS) <= set(row) for row in rows)
    assert {row["status"] for row in rows} == {"ok"}
    assert len({row["loss"] for row in rows}) == 4


def test_a_row_is_the_run_that_pretrain_makes(finished, tmp_path: Path) -> None:
    rows, folder = finished
    settings = small(width=32, depth=1, learning_rate=0.1, base_width=16, base_depth=1)
    alone = pretrain(settings, tmp_path)
    assert rows[3]["loss"] == alone.selection_loss
    assert rows[3]["validation_loss"] == alone.validation_loss
    mine, theirs = weights(tmp_path), weights(folder / rows[3]["run"])
    assert all(mine[name].equal(theirs[name]) for name in mine)


def test_an_interrupted_sweep_keeps_its_rows_and_ends_with_the_same(finished, tmp_path) -> None:
    seen: list[str] = []

    class StopInThird(Silent):
        def step(self, work: Work, step: int, loss: float) -> None:
            seen.append(work.label)
            if len(set(seen)) == 3 and step == 2:
                raise Stopped

    with pytest.raises(Stopped):
        sweep(small(), GRID, tmp_path, progress=StopInThird())
    assert table(tmp_path) == finished[0][:2]
    assert sweep(small(), GRID, tmp_path) == finished[0]
    assert not list(tmp_path.rglob("model.safetensors"))  # they were not to be kept


def test_a_diverged_run_is_a_row_without_a_loss(tmp_path: Path) -> None:
    grid = Grid(widths=(16,), depths=(1,), learning_rates=(1e-3, 1e30))
    rows = sweep(small(optimizer="adamw", planner="standard"), grid, tmp_path)
    assert [row["status"] for row in rows] == ["ok", "diverged"]
    assert rows[1]["loss"] is None
    assert "finite" in rows[1]["error"]
    assert best(rows)[0]["lr"] == 1e-3


def test_a_run_that_raises_is_a_failed_row_and_the_others_go_on(tmp_path, monkeypatch) -> None:
    from sparing.pretrain import run

    original = run.train

    def broken(model: Any, *args: Any, **options: Any) -> Any:
        if model.config.hidden_size == 16:
            raise RuntimeError("a mistake")
        return original(model, *args, **options)

    monkeypatch.setattr(run, "train", broken)
    grid = Grid(widths=(16, 32), depths=(1,), learning_rates=(0.1,))
    rows = sweep(small(), grid, tmp_path)
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["error"] == "RuntimeError: a mistake"


def test_processes_of_their_own_give_the_same_rows(finished, tmp_path: Path) -> None:
    assert sweep(small(), GRID, tmp_path, isolate=True) == finished[0]


def test_ray_gives_the_same_rows(finished, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        part = dataclasses.replace(GRID, widths=GRID.widths[:1])
        assert sweep(small(), part, tmp_path, ray="local") == finished[0][:2]
    finally:
        ray.shutdown()


def test_depths_decays_and_seeds_are_swept_too(tmp_path: Path) -> None:
    grid = Grid((16,), (1, 2), (5e-3,), seeds=(0, 1), weight_decays=(0.0, 0.5))
    rows = sweep(small(optimizer="adamw", planner="standard", steps=2), grid, tmp_path)
    cells = {(row["depth"], row["weight_decay"], row["seed"]) for row in rows}
    assert len(cells) == len(rows) == 8
    assert len({row["loss"] for row in rows}) == 8


def test_the_smallest_size_is_the_base() -> None:
    cells = Grid((64, 16), (4, 2), (0.1,)).cells(small())
    assert {(cell.base_width, cell.base_depth) for cell in cells} == {(16, 2)}
    (cell,) = Grid((64,), (4,), (0.1,)).cells(small(base_width=32, base_depth=1))
    assert (cell.base_width, cell.base_depth) == (32, 1)


def test_the_best_rate_is_that_of_the_mean_over_seeds() -> None:
    def row(lr: float, seed: int, loss: float | None) -> dict[str, Any]:
        return {"width": 16, "depth": 1, "lr": lr, "weight_decay": 0.0, "seed": seed, "loss": loss}

    rows = [row(0.1, 0, 1.0), row(0.1, 1, 3.0), row(0.2, 0, 1.5), row(0.2, 1, 1.6)]
    rows += [row(0.4, 0, 0.1), row(0.4, 1, None)]
    (found,) = best(rows)
    assert (found["lr"], found["loss"]) == (0.2, pytest.approx(1.55))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"widths": ()}, "widths.*one or more"),
        ({"learning_rates": (0.1, 0.1)}, "learning_rates.*different"),
        ({"widths": (20,)}, "multiple of the head size"),
        ({"learning_rates": (0.1, -0.1)}, "above 0"),
        ({"weight_decays": (0.1,)}, "0 for muonh"),
    ],
)
def test_bad_grids_are_named_before_anything_is_written(values, text, tmp_path: Path) -> None:
    usual: dict[str, Any] = {"widths": (16,), "depths": (1,), "learning_rates": (0.1,)}
    with pytest.raises(ConfigError, match=text):
        sweep(small(), Grid(**{**usual, **values}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_sweep_is_refused(finished) -> None:
    _, folder = finished
    other = Grid(widths=(16, 32), depths=(1,), learning_rates=(0.02,))
    with pytest.raises(CheckpointError, match="learning_rates"):
        sweep(small(), other, folder, keep=True)


def test_the_command_shows_the_best_rates(sparing, tmp_path: Path) -> None:
    options = ["--depths", 1, "--steps", 3, "--head", 8, "--batch-size", 4, "--block-length", 16]
    options += ["--validation-blocks", 4, "--data", SMALL["data"]]
    command = ["sweep", "--lrs", "0.02,0.1,0.5", "--widths", "16,32", *options]
    code, output, _ = sparing(*command, "--out", tmp_path / "run")
    assert code == 0
    assert "best rate" in output
    assert len(table(tmp_path / "run")) == 6
    code, _, error = sparing(*command[:-1], "nowhere.txt", "--out", tmp_path / "bad")
    assert code == 2
    assert "nowhere.txt" in error
    code, _, error = sparing("sweep", "--lrs", "a,b", "--widths", "16", "--out", tmp_path / "bad")
    assert code == 2
    assert "lrs: expected numbers" in error
