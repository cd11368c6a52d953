"""Killed at any moment, the same command ends with the same numbers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _small import ARGUMENTS, SMALL, numbers
from safetensors.torch import load_file

from sparing import executors
from sparing.compare import Results, compare

MOMENTS = (
    "base/result.json",
    "lora/*/result.json",
    "lora/lr0.01-seed0/adapter",
    "mos*/*/result.json",
    "*/*/measure/result.json",
)


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sparing",
            *ARGUMENTS,
            "--lr-grid",
            "1e-3,1e-2",
            "--out",
            str(folder),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_once_there(process: subprocess.Popen[str], folder: Path, moment: str, pause: float):
    while process.poll() is None and not any((folder / "runs").glob(moment)):
        time.sleep(0.01)
    time.sleep(pause)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """Not interrupted, and in this process."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return compare(SMALL, folder=folder, isolate=False), folder


def test_killed_twice_it_ends_with_the_same_numbers(straight, tmp_path: Path) -> None:
    expected, other = straight
    folder = tmp_path / "run"
    seed = int(os.environ.get("SPARING_TEST_SEED", "0"))
    moments = random.Random(seed)
    first, second = sorted(moments.sample(range(len(MOMENTS)), 2))

    process = start(folder)  # the leader alone: its worker has to notice
    kill_once_there(process, folder, MOMENTS[first], moments.uniform(0, 0.3))
    process.kill()
    process.communicate()

    process = start(folder)  # the whole group at once
    kill_once_there(process, folder, MOMENTS[second], moments.uniform(0, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    process = start(folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    results = Results.load(folder / "results.json")
    assert numbers(results) == numbers(expected)
    for row in results.rows[1:]:
        mine, theirs = (
            load_file(f / row.adapter / "adapter_model.safetensors") for f in (folder, other)
        )
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in mine)


def test_once_finished_nothing_is_computed_again(straight, monkeypatch) -> None:
    expected, folder = straight
    files = [file for file in folder.rglob("*") if file.is_file() and file.parent != folder]
    times = {file: file.stat().st_mtime_ns for file in files}
    assert len(times) > 15

    def refuse(*args: object) -> None:
        raise AssertionError("a process was started")

    isolated = executors.Isolated()
    monkeypatch.setattr(isolated._context, "Process", refuse)
    monkeypatch.setattr("sparing.compare.comparison.executor", lambda *_: isolated)
    assert compare(SMALL, folder=folder).rows == expected.rows
    assert {file: file.stat().st_mtime_ns for file in times} == times
