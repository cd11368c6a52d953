"""`sparing stn`: a run from a file, and the replay of its schedule."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Dropout(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "stn_test_network.py").write_text(NETWORK)
    generator = torch.Generator().manual_seed(0)
    for name in ("train", "held_out"):
        x = torch.randn(40, 6, generator=generator)
        y = torch.randint(0, 3, (40,), generator=generator)
        save_file({"inputs": x, "labels": y}, tmp_path / f"{name}.safetensors")
    content: dict[str, Any] = {
        "model": "stn_test_network:build",
        "train": "train.safetensors",
        "validation": "held_out.safetensors",
        "hparams": [{"name": "input", "init": 0.05, "range": [0, 0.9], "places": ["0"]}],
        "network": {"hyper_lr": 0.05},
        "optimizer": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        "plan": {"steps": 12, "warmup": 2, "evaluate_every": 4},
        "batch_size": 10,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


def changed(recipe: Path, **entries: object) -> Path:
    content = yaml.safe_load(recipe.read_text()) | entries
    recipe.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return recipe


def test_a_run_leaves_a_plain_model_and_its_schedule(sparing, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, errors = sparing("stn", "train", recipe, "--out", out)
    assert code == 0, errors
    assert "input: 0." in text
    assert "best validation loss" in text
    weights = load_file(out / "model.safetensors")
    assert set(weights) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert (out / "schedule.png").stat().st_size > 0
    assert len((out / "schedule.csv").read_text().splitlines()) == 1 + 1 + 5
    assert not (out / "run.pt").exists()
    code, text, errors = sparing(
        "stn", "replay", out / "schedule.csv", recipe, "--out", tmp_path / "again"
    )
    assert code == 0, errors
    assert "validation loss" in text
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(weights)


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"plan": None}, "no plan"),
        ({"plna": 1}, "plan"),
        ({"plan": {"stepz": 3}}, "stepz"),
        ({"model": "nowhere:build"}, "module:function"),
        ({"train": "missing.safetensors"}, "missing.safetensors"),
        ({"validation": "train.safetensors"}, "not trained on"),
        ({"hparams": [{"name": "lr", "init": 0.1}]}, "optimiser"),
        ({"hparams": []}, "at least one hyperparameter"),
        ({"network": {"layerz": "all"}}, "layerz"),
        ({"optimizer": {"rate": 1}}, "rate"),
    ],
)
def test_a_recipe_that_cannot_work_is_one_clear_error(
    sparing, recipe: Path, entries: dict, word: str
) -> None:
    code, _, errors = sparing("stn", "train", changed(recipe, **entries), "--out", recipe.parent)
    assert code == 2
    assert word in errors
    assert "Traceback" not in errors
