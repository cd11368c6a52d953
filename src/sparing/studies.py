"""Searches kept in a database of optuna, so that they resume and many workers share one.

A search has slots, numbered from 0. A trial takes the lowest free one, and the slot of a trial
whose worker died becomes free again. What a trial draws at random depends on its slot, so that an
interrupted search draws what an uninterrupted one would.
"""

import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from sparing.checkpoint import unwritable
from sparing.errors import CheckpointError, MissingExtraError

HEARTBEAT_SECONDS = 60
SLOT, FAILURE, _SURPLUS, _WORKER = "slot", "failure", "surplus", "worker"
_ATTEMPTS = 5  # two workers may be creating the same tables


def require_optuna(extra: str) -> Any:
    """optuna, told to write no lines of its own.

    Arguments:
        extra: to name where it is missing.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError.of("optuna", extra) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_study(
    optuna: Any, storage: str | Path | None, name: str, directions: Sequence[str], **options: Any
) -> Any:
    """Create a study, or load the one of that name.

    Arguments:
        storage: a file for SQLite, the address of a database, or None for memory.
        name: of the study inside its database.
        directions: "minimize" or "maximize", one an objective.
        **options: for `optuna.create_study`, such as a pruner.

    Raises:
        CheckpointError: the database cannot be used, or its study has other directions.
    """
    place = None if storage is None else _storage(optuna, storage)
    try:
        study = optuna.create_study(
            storage=place,
            study_name=name,
            directions=list(directions),
            load_if_exists=True,
            **options,
        )
    except Exception as error:  # of any database
        raise _unusable(storage, error) from error
    found = [direction.name.lower() for direction in study.directions]
    if found != list(directions):
        raise _of_another_search(storage, "directions", list(directions), found)
    return study


def bind(study: Any, storage: str | Path | None, description: Mapping[str, Any]) -> None:
    """Note what a search is about at its start, and refuse another search later.

    Arguments:
        description: of what its trials depend on, in values that JSON knows.

    Raises:
        CheckpointError: the study holds trials of another search; names the first difference.
    """
    known = study.user_attrs.get("search")
    if known is None:
        study.set_user_attr("search", dict(description))
        return
    for key in [*description, *known]:
        if known.get(key) != description.get(key):
            raise _of_another_search(storage, key, description.get(key), known.get(key))


def claim_slot(study: Any, trial: Any, slots: int) -> int | None:
    """The lowest free slot below `slots`, or None if workers started more trials than there are.

    Trial numbers, which the database hands out one by one, decide who is first: a trial waits
    until those with a lower number have theirs. So no lock is needed.
    """
    trial.set_user_attr(_WORKER, _this_worker())
    while True:
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        earlier = [t for t in earlier if _holds(t)]
        if all(SLOT in t.user_attrs for t in earlier):
            break
        release_dead(study)
        time.sleep(0.02)
    taken = {t.user_attrs[SLOT] for t in earlier}
    free = next(slot for slot in count() if slot not in taken)
    if free >= slots:
        trial.set_user_attr(_SURPLUS, True)
        return None
    trial.set_user_attr(SLOT, free)
    return free


def trials_by_slot(study: Any) -> dict[int, Any]:
    """Trials that finished, failed for a reason of their own, or run, by slot, in order."""
    holders = [t for t in study.get_trials(deepcopy=False) if _holds(t) and SLOT in t.user_attrs]
    return {t.user_attrs[SLOT]: t for t in sorted(holders, key=lambda t: t.user_attrs[SLOT])}


def release_dead(study: Any) -> None:
    """Free the slots of workers that died on this machine; others are missed by their heartbeat."""
    import optuna

    here, _, me = _this_worker().rpartition(":")
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        place, _, process = trial.user_attrs.get(_WORKER, "").rpartition(":")
        if place == here and process != me and not _alive(int(process)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def run_slots(
    study: Any,
    slots: int,
    objective: Callable[[Any, int], Any],
    callbacks: Sequence[Callable[[Any, Any], None]] = (),
) -> None:
    """Run trials until all slots are taken, by this worker or others.

    Arguments:
        objective: from a trial and its slot to its values.
        callbacks: of optuna, called with study and trial after each.
    """

    def slotted(trial: Any) -> Any:
        slot = claim_slot(study, trial, slots)
        if slot is None:
            raise _SurplusTrialError
        return objective(trial, slot)

    while True:
        release_dead(study)
        if len([slot for slot in trials_by_slot(study) if slot < slots]) >= slots:
            return
        study.optimize(slotted, n_trials=1, catch=(_SurplusTrialError,), callbacks=list(callbacks))


class _SurplusTrialError(Exception):
    """Another worker took the last slot."""


def _holds(trial: Any) -> bool:
    """Whether a trial counts: one that failed without a reason was interrupted."""
    if trial.state.name == "FAIL":
        return FAILURE in trial.user_attrs
    return trial.state.name != "WAITING" and _SURPLUS not in trial.user_attrs


def _this_worker() -> str:
    space = Path("/proc/self/ns/pid")
    inode = space.stat().st_ino if space.exists() else 0
    return f"{socket.gethostname()}:{inode}:{os.getpid()}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _storage(optuna: Any, storage: str | Path) -> Any:
    address, options = str(storage), {}
    if "://" not in address:
        path = Path(storage).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        address = f"sqlite:///{path}"
    if address.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}
    for attempt in count(1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(
                    address,
                    engine_kwargs=options,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=3 * HEARTBEAT_SECONDS,
                )
        except Exception as error:  # of any database
            race = "already exists" in str(error) or type(error).__name__ == "IntegrityError"
            if attempt == _ATTEMPTS or not race:
                raise _unusable(storage, error) from error
            time.sleep(0.2 * attempt)
    raise AssertionError


def _unusable(storage: str | Path | None, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"storage {storage}",
        expected="a database of optuna, or a path for a new one",
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        mend="Choose another path.",
    )


def _of_another_search(
    storage: str | Path | None, key: str, expected: Any, found: Any
) -> CheckpointError:
    return CheckpointError(
        f"storage {storage}",
        expected=f"trials with {key} = {_short(expected)}",
        found=f"{key} = {_short(found)}",
        mend="Choose another storage, or search what these trials are of.",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
