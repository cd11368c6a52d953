"""`sparing modes`: the report on modes and the export of one."""

import csv

import peft
import pytest
import torch
from conftest import perturb, token_ids
from typer.testing import CliRunner

from sparing import cli, pretrained
from sparing.adapt import DopamineConfig, load_hard_model
from sparing.errors import CheckpointError, ConfigError


@pytest.fixture
def modes(tmp_path, monkeypatch):
    """Folders of two modes of the tiny model, with thresholds among its z."""
    monkeypatch.setattr(cli, "console", cli.Console(width=200))
    folders = [tmp_path / "mode.a", tmp_path / "mode.b"]
    for seed, folder in enumerate(folders):
        base = pretrained.load("tiny").model
        model = peft.get_peft_model(base, DopamineConfig(tau_init=0.0, task_type="CAUSAL_LM"))
        perturb(model, 0.2, seed=seed)
        model.save_pretrained(folder)
    return folders


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["modes", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_report_writes_the_table_and_the_heat_maps(modes, tmp_path, capsys):
    out = tmp_path / "report"
    run("report", "tiny", "--mode", modes[0], "--mode", modes[1], "--out", out, "--rows", 2)
    assert {file.name for file in out.iterdir()} == {
        *("neurons.csv", "neurons.json", "base.png", "mode-a.png", "mode-b.png"),
        "mode-a-to-mode-b.png",
    }
    rows = list(csv.DictReader((out / "neurons.csv").open()))
    assert {row["mode"] for row in rows} == {"__base__", "mode-a", "mode-b"}
    assert len(rows) == 3 * 2 * 128
    alone = tmp_path / "alone"
    run("report", "tiny", "--mode", modes[0], "--out", alone, "--rows", 2)
    assert (alone / "base-to-mode-a.png").is_file()


def test_export_writes_what_the_mode_computes(modes, tmp_path):
    run("export", "tiny", "--mode", modes[0], "--out", tmp_path / "hard.safetensors")
    model = peft.PeftModel.from_pretrained(pretrained.load("tiny").model, modes[0]).eval()
    loaded = load_hard_model(pretrained.load("tiny").model, tmp_path / "hard.safetensors").eval()
    with torch.no_grad():
        expected = model(token_ids()).logits
        torch.testing.assert_close(loaded(token_ids()).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="existing"):
        run("export", "tiny", "--mode", modes[0], "--out", tmp_path / "hard.safetensors")


def test_folders_that_are_no_modes_or_twice_the_same_are_refused(modes, tmp_path):
    with pytest.raises(CheckpointError, match="dopamine"):
        run("report", "tiny", "--mode", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(ConfigError, match="different names"):
        run("report", "tiny", "--mode", modes[0], "--mode", modes[0], "--out", tmp_path / "out")
