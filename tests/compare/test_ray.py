"""Runs spread over Ray give the numbers of the embedded ones, bit by bit."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _small import SMALL, numbers

from sparing import executors
from sparing.checkpoint import UnwritableError
from sparing.compare import compare
from sparing.compare.jobs import Job
from sparing.compare.progress import Silent
from sparing.errors import ConfigError
from sparing.train import TrainPlan

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers at most, whatever the machine has; started here so that it can be stopped."""
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def job(folder: Path, method: str) -> Job:
    plan = TrainPlan(steps=1, batch_size=1, learning_rate=1.0)
    return Job("train", "tiny", "data", str(folder / method), method=method, plan=plan)


def test_a_comparison_on_ray_gives_the_same_numbers(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, methods=('mos{"r":2}',), learning_rates={"*": (1e-3,)})
    embedded = compare(settings, folder=tmp_path / "embedded", isolate=False)
    seen: list[tuple[str, int]] = []

    class Seen(Silent):
        def step(self, job: Job, step: int, loss: float) -> None:
            seen.append((job.kind, step))

    spread = compare(settings, folder=tmp_path / "ray", ray="local", progress=Seen())
    assert numbers(spread) == numbers(embedded)
    assert seen == [("train", 4)]


def test_a_dead_worker_is_a_failed_row_and_the_others_go_on(tmp_path, monkeypatch) -> None:
    def worker(job: Job, threads: int) -> dict[str, Any]:
        if job.method == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.method == "raises":
            raise KeyError("a mistake")
        return {"threads": threads}

    monkeypatch.setattr(executors, "_on_worker", worker)
    runner = executors.OnRay("local")
    work = [job(tmp_path, method) for method in ("dies", "raises", "works")]
    dead, raised, fine = runner.run(work, lambda *_: None)
    assert "worker died" in dead["error"].lower()
    assert raised == {"error": "KeyError: 'a mistake'"}
    assert fine == {"threads": torch.get_num_threads()}
    assert not list(tmp_path.rglob("result.json"))


def test_a_full_disk_on_a_worker_ends_the_comparison(tmp_path, monkeypatch) -> None:
    def worker(job: Job, threads: int) -> dict[str, Any]:
        raise UnwritableError("there", expected="room", found="none", mend="Free some.")

    monkeypatch.setattr(executors, "_on_worker", worker)
    with pytest.raises(UnwritableError) as caught:
        executors.OnRay("local").run([job(tmp_path, "any")], lambda *_: None)
    assert type(caught.value) is UnwritableError
    assert str(caught.value) == "there: expected room, found none. Free some."


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError, match=r"ray address '10\.0\.0\.1:1'.*nobody listens"):
        executors.OnRay("10.0.0.1:1").run([], lambda *_: None)
