"""Real comparisons on the tiny model, in this process."""

import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from _small import SMALL
from peft import PeftModel
from safetensors import safe_open

from sparing import executors, pretrained
from sparing.compare import Results, Settings, compare, jobs
from sparing.compare.jobs import load_blocks
from sparing.errors import CheckpointError, ConfigError
from sparing.train import evaluate


def run(settings: Settings, folder: Path, **options: Any) -> Results:
    return compare(settings, folder=folder, **{"isolate": False, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """Two methods, two learning rates and two seeds."""
    folder = tmp_path_factory.mktemp("compare") / "run"
    return run(dataclasses.replace(SMALL, seeds=(0, 1)), folder), folder


def test_the_rows_hold_all_columns(finished: tuple[Results, Path]) -> None:
    results, _ = finished
    untouched, *methods = results.rows
    assert [row.method for row in results.rows] == ["untouched", "lora", 'mos{"r":2}']
    assert [row.status for row in results.rows] == ["reference", "ok", "ok"]
    assert results.budget["limit"] == int(0.03 * results.model["parameters"])
    assert untouched.loss is not None
    for row in methods:
        assert row.loss is not None
        assert row.learning_rate is not None
        assert row.loss_before == untouched.loss.mean
        assert row.trainable_parameters is not None
        assert 0.8 * results.budget["limit"] <= row.trainable_parameters <= results.budget["limit"]
        assert row.budget_share == row.trainable_parameters / results.budget["limit"]
        assert row.learning_rate.grid == [1e-3, 1e-2]
        losses = row.learning_rate.selection_loss
        assert row.learning_rate.best == row.learning_rate.grid[losses.index(min(losses))]
        assert [len(curve) for curve in row.curve] == [4, 4]
        for figure in (row.peak_memory_bytes, row.seconds_per_step, row.latency_ratio):
            assert figure is not None
            assert figure > 0
        assert row.merged_latency_ratio is not None


def test_seeds_are_averaged(finished: tuple[Results, Path]) -> None:
    for row in finished[0].rows[1:]:
        assert row.loss is not None
        assert len(row.loss.values) == 2
        assert row.loss.values[0] != row.loss.values[1]
        assert row.loss.mean == statistics.fmean(row.loss.values)
        assert row.loss.std == statistics.stdev(row.loss.values)
        assert row.curve[0] != row.curve[1]


def test_results_load_as_they_were_saved(finished: tuple[Results, Path]) -> None:
    results, folder = finished
    assert Results.load(folder / "results.json") == results
    content = json.loads((folder / "results.json").read_text())
    assert content["schema_version"] == 1
    content["schema_version"] = 2
    (folder / "other.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="schema version 1, found version 2"):
        Results.load(folder / "other.json")


def test_every_adapter_loads_with_peft_to_the_reported_loss(finished) -> None:
    results, folder = finished
    validation = load_blocks(str(folder / "data.safetensors"), "validation")
    for row in results.rows[1:]:
        adapter = folder / row.adapter
        model = PeftModel.from_pretrained(pretrained.load("tiny").model, adapter)
        assert evaluate(model, validation) == row.loss.values[0]
        file = adapter / "adapter_model.safetensors"
        assert file.stat().st_size == row.adapter_bytes
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == results.model["source"]


def test_all_methods_saw_the_same_rows_in_the_same_order(finished) -> None:
    """Before the first step every adapted model is the base model."""
    lora, mos = finished[0].rows[1:]
    assert [curve[0] for curve in lora.curve] == [curve[0] for curve in mos.curve]


def test_a_finished_comparison_computes_nothing_again(finished, monkeypatch) -> None:
    results, folder = finished

    def refuse(*args: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(jobs, "_ACTIONS", dict.fromkeys(("base", "train", "measure"), refuse))
    monkeypatch.setattr("sparing.compare.comparison.solve", refuse)
    again = run(dataclasses.replace(SMALL, seeds=(0, 1)), folder)
    assert again.rows == results.rows


@pytest.mark.parametrize("executor", [executors.InProcess, executors.Isolated])
def test_full_fine_tuning_is_a_reference(executor, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sparing.compare.comparison.executor", lambda *_: executor())
    settings = dataclasses.replace(SMALL, methods=("full",), learning_rates={"*": (1e-4,)}, steps=1)
    results = compare(settings, folder=tmp_path)
    row = results.rows[1]
    assert (row.status, row.note) == ("reference", "not held to the budget")
    assert row.trainable_parameters == results.model["parameters"]
    assert row.loss is not None
    assert row.adapter is not None
    tuned = pretrained.load(str(tmp_path / row.adapter), device="cpu")
    assert sum(p.numel() for p in tuned.model.parameters()) == results.model["parameters"]


def test_a_method_whose_loss_is_nan_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    rates = {"lora": (1e30,), 'mos{"r":2}': (1e-3, 1e30)}
    results = run(dataclasses.replace(SMALL, learning_rates=rates), tmp_path)
    _, lora, mos = results.rows
    assert lora.status == "failed"
    assert lora.loss is None
    assert "DivergedError" in (lora.error or "")
    traceback = (tmp_path / "runs" / "lora" / "lr1e+30-seed0" / "traceback.txt").read_text()
    assert "DivergedError" in traceback
    assert "Traceback" in traceback
    assert mos.status == "ok"
    assert mos.learning_rate is not None
    assert mos.learning_rate.best == 1e-3
    assert mos.learning_rate.selection_loss[1] is None
    assert Results.load(tmp_path / "results.json") == results


def test_a_last_step_that_diverges_fails_the_run(tmp_path: Path) -> None:
    """The training losses were finite; that of the selection slice is not."""
    settings = dataclasses.replace(SMALL, learning_rates={"*": (1e30,)}, steps=1)
    results = run(settings, tmp_path)
    assert [row.status for row in results.rows] == ["reference", "failed", "failed"]
    assert "selection loss" in (results.rows[1].error or "")
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_a_method_that_raises_is_a_row_with_its_traceback(tmp_path, monkeypatch) -> None:
    from sparing.adapt.mos import MoSAdapter

    def broken(self: object, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a mistake in the method")

    monkeypatch.setattr(MoSAdapter, "delta", broken)
    results = run(SMALL, tmp_path)
    assert [row.status for row in results.rows] == ["reference", "ok", "failed"]
    assert results.rows[2].error == "RuntimeError: a mistake in the method"
    (text,) = {file.read_text() for file in tmp_path.glob("runs/mos*/*/traceback.txt")}
    assert "in broken" in text


def test_options_that_peft_refuses_are_a_row(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, methods=("lora", 'peft:lora{"r":8,"lora_alpha":"x"}'))
    results = run(settings, tmp_path)
    assert [row.status for row in results.rows] == ["reference", "ok", "failed"]
    assert "TypeError" in (results.rows[2].error or "")


def test_a_dead_process_is_a_row_that_the_same_command_tries_again(tmp_path, monkeypatch) -> None:
    dying = dataclasses.replace(SMALL, methods=("lora",), learning_rates={"*": (1e-3,)})

    monkeypatch.setattr(executors, "_child", _die)
    monkeypatch.setattr("sparing.compare.comparison.executor", lambda *_: executors.Isolated())
    results = compare(dying, folder=tmp_path)
    assert [row.status for row in results.rows] == ["failed", "failed"]
    assert results.rows[1].error == "the process ended with exit code -9"
    monkeypatch.undo()
    results = run(dying, tmp_path)
    assert [row.status for row in results.rows] == ["reference", "ok"]


def _die(*args: object) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def copied(finished: tuple[Results, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


@pytest.mark.parametrize(
    "change", [{"steps": 5}, {"budget": "2%"}, {"seeds": (0,)}, {"methods": ("lora",)}]
)
def test_the_folder_of_another_comparison_is_refused(copied: Path, change: dict[str, Any]) -> None:
    before = sorted(copied.rglob("*"))
    settings = dataclasses.replace(SMALL, **{"seeds": (0, 1), **change})
    with pytest.raises(
        CheckpointError, match=f"run: expected a run folder with {next(iter(change))}"
    ):
        run(settings, copied)
    assert sorted(copied.rglob("*")) == before


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": {}}'])
def test_a_folder_with_other_settings_in_it_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(CheckpointError, match="expected a run folder with"):
        run(SMALL, tmp_path)


def test_changed_data_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} has some words of its own." for i in range(400)))
    settings = dataclasses.replace(SMALL, data=str(text), methods=("lora",), steps=1)
    run(settings, tmp_path / "run")
    text.write_text(text.read_text().replace("words", "things"))
    with pytest.raises(CheckpointError, match="other text under the same name"):
        run(settings, tmp_path / "run")


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    for change in ({"target_modules": "none"}, {"budget": "1"}, {"data": "nowhere"}):
        with pytest.raises(ValueError, match="expected"):
            run(dataclasses.replace(SMALL, **change), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"block_length": 1},
        {"validation_blocks": 0},
        {"seeds": ()},
        {"schedule": "linea"},
        {"dtype": "float8"},
        {"budget": "lots"},
        {"learning_rates": {"hut": (1e-3,)}},
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change)).replace("learning_rates", "lr_grid")):
        dataclasses.replace(SMALL, **change)


def test_the_prepared_data_are_kept_for_every_job(finished: tuple[Results, Path]) -> None:
    results, folder = finished
    with safe_open(folder / "data.safetensors", framework="pt") as file:
        parts = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    assert parts == {"train", "selection", "validation"}
    assert math.isclose(results.data["validation_tokens"], 5 * 31)
