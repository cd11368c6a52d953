"""Two processes train like one, interrupted or not, with whole and with sharded weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _pretraining import small, weights

from sparing.pretrain import pretrain

# Sums over a batch are formed in another order; Newton–Schulz passes that on.
LOSS, WEIGHT = 1e-5, 1e-4

RUNS: dict[str, dict[str, Any]] = {
    "muonh": {},
    "adamh": {"optimizer": "adamh"},
    "muon": {"optimizer": "muon", "learning_rate": 0.01},
    "muon++": {"optimizer": "muon++", "learning_rate": 0.01},
    "adamw": {"optimizer": "adamw", "planner": "standard", "learning_rate": 5e-3},
}
MODES = {
    "ddp": ["--multi_gpu"],
    "fsdp2": [
        "--use_fsdp",
        "--fsdp_version=2",
        "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
        "--fsdp_state_dict_type=FULL_STATE_DICT",
    ],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in RUNS.items():
        pretrain(small(**changes), folder / name)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_like_one(mode: str, alone: Path, tmp_path: Path) -> None:
    launcher = shutil.which("accelerate", path=Path(sys.executable).parent) or "accelerate"
    command = [launcher, "launch", *MODES[mode], "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("_pretrain_processes.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("model: ") == 1
    for name in RUNS:
        one, two = (json.loads((f / name / "result.json").read_text()) for f in (alone, tmp_path))
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], abs=LOSS)
        assert two["parameters"] == one["parameters"]
        curves = [
            [json.loads(line)["loss"] for line in (f / name / "log.jsonl").read_text().splitlines()]
            for f in (alone, tmp_path)
        ]
        assert curves[1] == pytest.approx(curves[0], abs=LOSS)
        expected, found = weights(alone / name), weights(tmp_path / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=WEIGHT, msg=key)
