"""The search over λ and ratio."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparing.errors import CheckpointError, ConfigError
from sparing.merge import PCBWeights, Space, pcb_merge, search

TARGET = (0.9, 1.2)


def distance(options: dict[str, Any]) -> float:
    return sum((lam - best) ** 2 for lam, best in zip(options["lam"], TARGET, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", ["cma-es", "tpe"])
def test_finds_better_lambdas_within_the_budget(tmp_path: Path, sampler: Any) -> None:
    tried = []

    def score(options: dict[str, Any]) -> float:
        tried.append(options)
        return distance(options)

    space = Space(2)
    found = search(score, space, tmp_path / "s.db", budget=20, sampler=sampler, maximize=False)
    assert tried[0] == {"lam": [1.0, 1.0]}
    assert len(tried) == len(found.scores) == 20
    assert found.score == min(found.scores) < distance(tried[0])
    assert distance(found.options) == pytest.approx(found.score)
    assert all(0.8 <= lam <= 1.3 for options in tried for lam in options["lam"])


@pytest.mark.filterwarnings("ignore")
def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    space, calls = Space(2, ratio=(0.05, 0.5)), []

    def score(options: dict[str, Any]) -> float:
        calls.append(options)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return -distance(options) - abs(options["ratio"] - 0.2)

    with pytest.raises(KeyboardInterrupt):
        search(score, space, tmp_path / "s.db", budget=12)
    found = search(score, space, tmp_path / "s.db", budget=12)
    assert len(calls) == 7 + 6
    assert len(found.scores) == 12
    again = search(score, space, tmp_path / "s.db", budget=12)
    assert len(calls) == 13
    assert again == found


KILLED = """
import os, sys
from sparing.merge import Space, search
def score(options):
    print("trial", flush=True)
    if sys.argv[2] == "kill" and len(seen) == 4:
        os.kill(os.getpid(), 9)
    seen.append(1)
    return sum(options["lam"])
seen = []
print(len(search(score, Space(2), sys.argv[1], budget=8, sampler="tpe").scores))
"""


def test_survives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "s.db")]
    first = subprocess.run([*command, "kill"], capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL
    second = subprocess.run([*command, "go"], capture_output=True, text=True, check=True)
    assert first.stdout.count("trial") == 5
    assert second.stdout.split() == ["trial"] * 4 + ["8"]


@pytest.mark.filterwarnings("ignore")
def test_one_lambda_for_all_and_a_ratio(tmp_path: Path) -> None:
    taus = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    base = {"t": torch.zeros(50)}
    experts = [{"t": tau} for tau in taus]

    def score(options: dict[str, Any]) -> float:
        return -float((pcb_merge(base, experts, **options)["t"] - taus[0]).norm())

    space = Space(3, lam=(0.5, 3.0), ratio=(0.1, 1.0), per_task=False)
    found = search(score, space, tmp_path / "s.db", budget=5)
    assert set(found.options) == {"lam", "ratio"}
    assert score(found.options) == pytest.approx(found.score)


@pytest.mark.filterwarnings("ignore")
def test_lambdas_are_searched_with_one_competition(tmp_path: Path) -> None:
    taus = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    weights = PCBWeights.compute({"t": torch.zeros(50)}, [{"t": tau} for tau in taus])
    found = search(
        lambda options: -float((weights.merge(**options)["t"] - 1.25 * taus[0]).norm()),
        Space(2),
        tmp_path / "s.db",
        budget=15,
    )
    assert found.scores[0] is not None
    assert found.score > found.scores[0]
    merged = weights.merge(**found.options)["t"]
    assert -float((merged - 1.25 * taus[0]).norm()) == pytest.approx(found.score)


@pytest.mark.filterwarnings("ignore")
def test_scores_that_are_no_numbers_count_but_never_win(tmp_path: Path) -> None:
    values = iter([float("nan"), 1.0, float("inf"), 2.0])
    found = search(lambda _: next(values), Space(2), tmp_path / "s.db", budget=4, sampler="tpe")
    assert found.score == 2
    assert found.scores == [None, 1, None, 2]
    with pytest.raises(ConfigError, match="finite number"):
        search(lambda _: float("nan"), Space(2), tmp_path / "n.db", budget=2, sampler="tpe")


@pytest.mark.filterwarnings("ignore")
def test_storage_of_another_search_is_refused(tmp_path: Path) -> None:
    search(lambda _: 1.0, Space(2), tmp_path / "s.db", budget=1)
    with pytest.raises(CheckpointError, match="trials with space"):
        search(lambda _: 1.0, Space(3), tmp_path / "s.db", budget=1)
    with pytest.raises(CheckpointError, match="trials with directions"):
        search(lambda _: 1.0, Space(2), tmp_path / "s.db", budget=1, maximize=False)
    (tmp_path / "text.db").write_text("not a database")
    with pytest.raises(CheckpointError, match="database"):
        search(lambda _: 1.0, Space(2), tmp_path / "text.db", budget=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"experts": 0},
        {"lam": (1.0, 0.5)},
        {"start": 2.0},
        {"ratio": (0.0, 0.5)},
        {"ratio": (0.5, 1.5)},
    ],
)
def test_a_space_that_cannot_work_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Space(**{"experts": 2, **wrong})


def test_a_search_that_cannot_work_is_named(tmp_path: Path) -> None:
    for wrong in ({"budget": 0}, {"sampler": "grid"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            search(lambda _: 1.0, Space(2), tmp_path / "s.db", **wrong)
