"""Slots of a search: taken once, free again after a death, the same for every number of workers."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from sparing import studies
from sparing.errors import CheckpointError


@pytest.fixture
def database() -> Iterator[Path]:
    """In memory where there is such a place: databases wait for the disk at every number."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder) / "study.db"


def study_at(path: Path | None, directions: tuple[str, ...] = ("minimize",)) -> Any:
    return studies.open_study(studies.require_optuna("tune"), path, "x", directions)


def numbers(study: Any) -> list[tuple[int, int]]:
    """(slot, trial) of all that count."""
    return [(slot, trial.number) for slot, trial in studies.trials_by_slot(study).items()]


def one_worker(path: Path, begin: float) -> int:
    time.sleep(max(0.0, begin - time.time()))
    done = []
    studies.run_slots(study_at(path), 8, lambda trial, slot: float(done.append(slot) or slot))
    return len(done)


def test_workers_that_begin_together_take_each_slot_once(database: Path) -> None:
    """On a file that does not exist yet; fork is safe, as no worker uses torch."""
    with multiprocessing.get_context("fork").Pool(3) as pool:
        done = pool.starmap(one_worker, [(database, time.time() + 0.5)] * 3)
    assert sum(done) == 8
    found = studies.trials_by_slot(study_at(database))
    assert [trial.value for trial in found.values()] == list(range(8)) == list(found)


def test_a_trial_that_failed_for_a_reason_keeps_its_slot_and_an_interrupted_one_does_not() -> None:
    study = study_at(None)
    calls = []

    def objective(trial: Any, slot: int) -> float:
        calls.append(slot)
        if len(calls) == 2:
            trial.set_user_attr(studies.FAILURE, "not a number")
            return float("nan")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        studies.run_slots(study, 4, objective)
    studies.run_slots(study, 4, objective)
    assert calls == [0, 1, 2, 2, 3]
    assert numbers(study) == [(0, 0), (1, 1), (2, 3), (3, 4)]


def test_trials_beyond_the_slots_do_not_count() -> None:
    study = study_at(None)
    for expected in (0, 1, None, None):
        trial = study.ask()
        assert studies.claim_slot(study, trial, 2) == expected
        study.tell(trial, 1.0 if expected is not None else None, state=_state(expected))
    assert numbers(study) == [(0, 0), (1, 1)]


def _state(slot: int | None) -> optuna.trial.TrialState:
    states = optuna.trial.TrialState
    return states.COMPLETE if slot is not None else states.FAIL


def test_slots_of_the_dead_on_this_machine_are_released(database: Path) -> None:
    study = study_at(database)
    mine, dead, elsewhere = study.ask(), study.ask(), study.ask()
    for trial in (mine, dead, elsewhere):
        studies.claim_slot(study, trial, 3)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    here = mine.user_attrs["worker"].rpartition(":")[0]
    dead.set_user_attr("worker", f"{here}:{child}")
    elsewhere.set_user_attr("worker", f"another-host:1:{child}")
    studies.release_dead(study)
    assert [slot for slot, _ in numbers(study)] == [0, 2]
    assert studies.claim_slot(study, study.ask(), 3) == 1


def test_a_study_of_something_else_is_refused(database: Path) -> None:
    study = study_at(database)
    studies.bind(study, database, {"seed": 1, "steps": [2]})
    studies.bind(study_at(database), database, {"seed": 1, "steps": [2]})
    for other in ({"seed": 2, "steps": [2]}, {"seed": 1}, {"seed": 1, "steps": [2], "more": 0}):
        with pytest.raises(CheckpointError, match="expected trials with"):
            studies.bind(study, database, other)
    with pytest.raises(CheckpointError, match="directions"):
        study_at(database, ("minimize", "maximize"))
