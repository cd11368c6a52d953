"""Two processes give the numbers of one, interrupted or not."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _small import SMALL, numbers
from peft import PeftModel

from sparing import pretrained
from sparing.compare import Results, compare
from sparing.compare.competitors import split_methods
from sparing.compare.jobs import load_blocks
from sparing.train import evaluate

# The sums over a batch are formed in another order. Nats a token; measured: up to 6e-7.
TOLERANCE = 1e-5

METHODS = 'lora,mos{"r":2},neuroada,sara,hut,full'
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
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The rows of all methods in one process, by method."""
    methods = split_methods(METHODS)
    settings = dataclasses.replace(SMALL, methods=tuple(methods), learning_rates={"*": (1e-3,)})
    results = compare(settings, folder=tmp_path_factory.mktemp("alone"), isolate=False)
    return {row["method"]: row for row in numbers(results)}


def launch(mode: str, folder: Path) -> str:
    launcher = shutil.which("accelerate", path=Path(sys.executable).parent) or "accelerate"
    command = [launcher, "launch", *MODES[mode], "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    program = Path(__file__).with_name("_processes.py")
    done = subprocess.run(
        [*command, str(program), str(folder), METHODS],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_numbers_of_one(mode: str, alone, tmp_path: Path) -> None:
    output = launch(mode, tmp_path)
    assert output.count("report: ") == 1
    together = Results.load(tmp_path / "results.json")
    assert len(together.rows) == 1 + len(split_methods(METHODS))
    for mine in numbers(together):
        theirs = alone[mine["method"]]
        for name in ("method", "status", "options", "trainable_parameters", "adapter_bytes"):
            assert mine[name] == theirs[name]
        assert mine["loss"]["mean"] == pytest.approx(theirs["loss"]["mean"], abs=TOLERANCE)
        for curve, other in zip(mine["curve"], theirs["curve"], strict=True):
            assert curve == pytest.approx(other, abs=TOLERANCE)
    validation = load_blocks(str(tmp_path / "data.safetensors"), "validation")
    for row in together.rows:
        if row.adapter is not None and row.method != "full":
            base = pretrained.load("tiny").model
            model = PeftModel.from_pretrained(base, tmp_path / row.adapter)
            assert evaluate(model, validation) == pytest.approx(row.loss.mean, abs=TOLERANCE)
