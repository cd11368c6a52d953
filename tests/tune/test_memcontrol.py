"""The search over masks: restored bases, honest fronts, resumption, many workers."""

import csv
import itertools
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from _networks import Stack, small_unet, unet_inputs
from _search import X, control, output, size, train
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.errors import CheckpointError, ConfigError, MissingExtraError
from sparing.train import DivergedError
from sparing.tune import (
    Denoising,
    FineTuning,
    Front,
    Images,
    LogUniform,
    MemControl,
    MemorizationNorm,
    Reward,
    Run,
    Trial,
    block_groups,
    pareto_set,
)
from sparing.tune.figure import draw_front
from sparing.tune.front import dominates

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a place: databases wait for the disk at every number."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def drawn(front: Front) -> list[tuple[str, float]]:
    return [(trial.mask, trial.learning_rate) for trial in front.trials]


# --- one trial --------------------------------------------------------------------------------


def test_the_base_is_put_back_between_trials():
    """Oracle 14: bit by bit, buffers too; what a trial gives does not depend on those before."""
    search = control()
    before = {name: t.clone() for name, t in search.model.state_dict().items()}

    def marks(run: Run) -> None:
        train(run)
        run.model.seen += 1
        assert run.model.seen.item() == 1

    first = search.evaluate(marks, "111", 1e-2)
    after = search.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in search.model.parameters())
    search.evaluate(marks, "010", 5e-2)
    assert search.evaluate(marks, "111", 1e-2) == first
    search.search(marks)
    assert all(torch.equal(search.model.state_dict()[name], before[name]) for name in before)


def test_a_trial_with_frozen_blocks_leaves_them_alone():
    search = control()
    before = {name: t.clone() for name, t in search.model.state_dict().items()}
    tuned = search.tune(train, "010", 1e-2)
    changed = {n for n, t in tuned.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"blocks.1.linear.weight", "blocks.1.linear.bias"}


def test_training_what_no_mask_trains_is_an_error():
    search = control()

    def careless(run: Run) -> None:
        optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-6)
        run.model.requires_grad_(True)
        run.model(X).square().sum().backward()
        optimizer.step()

    with pytest.raises(ConfigError, match=r"enter.weight: .*no mask trains"):
        search.evaluate(careless, "111", 1e-2)


def test_all_trials_share_their_random_numbers_and_leave_the_users_alone():
    seen = []

    def noisy(run: Run) -> None:
        seen.append((torch.rand(3).tolist(), torch.rand(3, generator=run.generator("x")).tolist()))

    search = control(seed=4)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    search.evaluate(noisy, "100", 1e-3)
    search.evaluate(noisy, "011", 1e-2)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    assert seen[0] == seen[1]
    control(seed=5).evaluate(noisy, "100", 1e-3)
    assert seen[2][1] != seen[0][1]


def test_rewards_see_the_model_in_evaluation_mode_without_gradients():
    modes = []

    def watch(model: nn.Module) -> float:
        modes.append((model.training, torch.is_grad_enabled()))
        return 0.0

    control(rewards=[watch]).evaluate(lambda run: modes.append(run.model.training), "111", 1e-2)
    assert modes == [True, (False, False)]


# --- fronts -----------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=15)


@given(points=POINTS)
def test_front_is_what_nothing_dominates(points):
    """Oracle 11."""
    members = {points[i] for i in pareto_set(points)}
    for point in points:
        beaten = any(dominates(other, point) for other in points)
        assert (point in members) != beaten
    assert not any(dominates(a, b) for a, b in itertools.permutations(members, 2))


@settings(max_examples=30)
@given(points=POINTS)
def test_front_is_that_of_optuna_and_survives_monotone_rescaling(points):
    """Oracle 11."""
    found = pareto_set(points)
    assert found == pareto_set([(math.exp(a), b**3 - 5) for a, b in points])
    study = optuna.create_study(directions=["minimize"] * 2)
    study.add_trials([optuna.trial.create_trial(values=p) for p in points])
    assert {points[i] for i in found} == {tuple(t.values) for t in study.best_trials}


def front_of(points, maximize=(False, False)) -> Front:
    trials = [Trial(i, f"{i:03b}", 1e-3, tuple(p), 1.0, 10) for i, p in enumerate(points)]
    return Front(("m", "q"), maximize, ("a", "b", "c"), tuple(trials))


def test_picks_follow_their_rules():
    points = [(0.0, 10.0), (1.0, 3.0), (4.0, 2.5), (10.0, 2.0), (9.0, 9.0)]
    front = front_of(points)
    assert [trial.number for trial in front.members] == [0, 1, 2, 3]
    assert front.pick().number == 1
    assert front.pick("quality", budget=5.0).number == 2
    assert front.pick("quality", budget=4.0).number == 2
    assert front.pick("memorization", tolerance=0.5).number == 1
    assert front.pick("memorization", tolerance=0.0).number == 3
    flipped = front_of([(-a, b) for a, b in points], (True, False))
    assert [trial.number for trial in flipped.members] == [0, 1, 2, 3]
    assert flipped.pick("quality", budget=-5.0).number == 2
    scaled = front_of([(a * 100 + 7, b / 9) for a, b in points])
    assert scaled.pick().number == 1


def test_picks_that_cannot_be_made_are_refused():
    front = front_of([(1.0, 1.0)])
    with pytest.raises(ConfigError, match="the best is 1"):
        front.pick("quality", budget=0.5)
    with pytest.raises(ConfigError, match="budget: expected a number, found None"):
        front.pick("quality")
    with pytest.raises(ConfigError, match="tolerance: expected a number of at least 0"):
        front.pick("memorization", tolerance=-1)
    with pytest.raises(ConfigError, match="found 'best'"):
        front.pick("best")
    failed = Trial(0, "111", 1.0, None, 1.0, 3, "failed", "m is nan")
    with pytest.raises(ConfigError, match="none finished"):
        replace(front, trials=(failed,)).pick()


def test_fronts_are_saved_as_json_csv_and_picture(tmp_path: Path):
    failed = Trial(2, "111", 1.0, None, 1.0, 3, "failed", "q is nan")
    front = front_of([(1.0, 2.0), (2.0, 1.0)])
    front = replace(front, trials=(*front.trials, failed))
    front.save(tmp_path / "front.json")
    assert Front.load(tmp_path / "front.json") == front
    front.write_csv(tmp_path / "trials.csv")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["mask"] for row in rows] == ["000", "001", "111"]
    assert [(row["m"], row["on_front"], row["state"]) for row in rows][1:] == [
        ("2.0", "1", "complete"),
        ("", "0", "failed"),
    ]
    for one in (front, replace(front, trials=(failed,)), replace(front, trials=())):
        draw_front(one, tmp_path / "front.png")
        assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    single = control(rewards=[size], trials=2, sampler="random").search(train)
    draw_front(single, tmp_path / "single.png")
    (tmp_path / "front.json").write_text('{"rewards": []}')
    with pytest.raises(CheckpointError, match="a front"):
        Front.load(tmp_path / "front.json")


# --- the search -------------------------------------------------------------------------------


def test_exhaustive_search_is_the_brute_force_front():
    """Oracle 13: all masks but the empty one, with all rates."""
    rates = [1e-3, 1e-1]
    search = control(sampler="exhaustive", learning_rates=rates, trials=None, blocks=3)
    front = search.search(train)
    masks = ["".join(bits) for bits in itertools.product("01", repeat=3)][1:]
    expected = {(m, r): tuple(search.evaluate(train, m, r)) for m in masks for r in rates}
    assert {(t.mask, t.learning_rate): t.values for t in front.trials} == expected
    best = {
        key
        for key, point in expected.items()
        if not any(dominates(other, point) for other in expected.values())
    }
    assert {(t.mask, t.learning_rate) for t in front.members} == best
    assert 1 <= len(best) < len(expected)


@pytest.mark.parametrize(("sampler", "half"), [("nsga2", 10), ("tpe", 3), ("random", 2)])
def test_a_resumed_search_is_the_uninterrupted_one(tmp_path: Path, sampler: str, half: int):
    """Oracle 12: 10 + 10 trials are 20 rows, no trial twice, and the same masks for the seed."""
    options = {"sampler": sampler, "population": 4, "seed": 3}
    first = control(tmp_path / "a.db", trials=half, **options).search(train)
    both = control(tmp_path / "a.db", trials=2 * half, **options).search(train)
    straight = control(None, trials=2 * half, **options).search(train)
    assert drawn(both) == drawn(straight)
    assert drawn(first) == drawn(both)[:half]
    assert [trial.number for trial in both.trials] == list(range(2 * half))
    assert len(set(drawn(both))) == 2 * half
    assert [t.values for t in both.trials] == [t.values for t in straight.trials]
    again = control(tmp_path / "a.db", trials=2 * half, **options)
    assert again.search(None) == again.front() == both  # nothing is left to train
    other = control(None, trials=2 * half, **options | {"seed": 4}).search(train)
    assert drawn(other) != drawn(straight)


def test_genetic_search_recombines_the_best():
    """After the first generation, masks come from the front rather than from coin flips: block 2
    memorises, block 0 does not, and most later masks agree."""

    def memorization(model: nn.Module) -> float:
        return float(model.blocks[2].linear.weight.requires_grad)

    def quality(model: nn.Module) -> float:
        return 2.0 - model.blocks[0].linear.weight.requires_grad

    shares = []
    for sampler in ("nsga2", "random"):
        search = control(
            rewards=[memorization, quality], sampler=sampler, population=8, trials=48, blocks=5
        )
        late = search.search(lambda run: None).trials[24:]
        shares.append(sum(t.mask[0] == "1" and t.mask[2] == "0" for t in late) / len(late))
    assert shares[0] > 0.6 > shares[1]


def test_no_mask_is_empty_unless_something_is_trained_always():
    search = control(blocks=1, trials=6, sampler="random")
    assert {trial.mask for trial in search.search(train).trials} == {"1"}
    model = Stack(1)
    groups = block_groups(model, "full", always=["norm"], freeze=["enter"])
    options = {"storage": None, "sampler": "exhaustive", "learning_rates": [1e-3]}
    front = MemControl(model, groups, [size], **options).search(train)
    assert [(t.mask, t.trainable) for t in front.trials] == [("0", 8), ("1", 28)]


def test_rewards_that_are_no_number_fail_the_trial():
    """NaN is never the best."""

    def sometimes(model: nn.Module) -> float:
        on = [block.linear.weight.requires_grad for block in model.blocks]
        return float("nan") if on[0] else 1.0 - 0.1 * sum(on)

    front = control(rewards=[sometimes, size], trials=12, sampler="random").search(train)
    assert {t.state for t in front.trials if t.mask[0] == "1"} == {"failed"}
    assert {t.reason for t in front.trials if t.mask[0] == "1"} == {"sometimes is nan"}
    assert {t.state for t in front.trials if t.mask[0] == "0"} == {"complete"}
    assert front.members
    assert all(t.mask[0] == "0" for t in front.members)


def test_diverged_training_fails_the_trial_and_other_errors_stop_the_search(tmp_path: Path):
    def diverges(run: Run) -> None:
        raise DivergedError("step 1", expected="a finite loss", found="nan", mend="Lower it.")

    front = control(trials=2).search(diverges)
    assert [(t.state, t.values) for t in front.trials] == [("failed", None)] * 2
    assert "finite loss" in front.trials[0].reason

    def broken(run: Run) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        control(tmp_path / "a.db", trials=2).search(broken)
    assert [t.state for t in control(tmp_path / "a.db", trials=2).search(train).trials] == [
        "complete"
    ] * 2


def test_an_interrupted_trial_is_run_again(tmp_path: Path):
    calls = []

    def interrupted(run: Run) -> None:
        calls.append((run.mask, run.learning_rate))
        if len(calls) == 4:
            raise KeyboardInterrupt
        train(run)

    with pytest.raises(KeyboardInterrupt):
        control(tmp_path / "a.db", trials=6).search(interrupted)
    front = control(tmp_path / "a.db", trials=6).search(interrupted)
    assert len(calls) == 7
    assert calls[3] == calls[4]
    assert drawn(front) == calls[:3] + calls[4:] == drawn(control(None, trials=6).search(train))


def work(storage: Path, begin: float, die_at: int | None) -> int:
    """One worker, which a fork may be: it does not use autograd."""
    time.sleep(max(0.0, begin - time.time()))
    done = []

    def nudge(run: Run) -> None:
        if len(done) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(run.mask)
        nudged(run)

    control(storage, trials=12, sampler="random").search(nudge)
    return len(done)


def nudged(run: Run) -> None:
    with torch.no_grad():
        for group in run.parameters:
            for parameter in group["params"]:
                parameter += group["lr"]


def test_workers_share_one_storage(tmp_path: Path):
    """Two processes begin together on a new file: twelve trials in all, those of one alone."""
    storage = tmp_path / "a.db"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        done = pool.starmap(work, [(storage, time.time() + 0.5, None)] * 2)
    assert sum(done) == 12
    front = control(storage, trials=12, sampler="random").front()
    alone = control(None, trials=12, sampler="random").search(nudged)
    assert drawn(front) == drawn(alone)
    assert [t.values for t in front.trials] == [t.values for t in alone.trials]


def test_the_slot_of_a_killed_worker_is_free_again(tmp_path: Path):
    storage = tmp_path / "a.db"
    killed = multiprocessing.get_context("fork").Process(target=work, args=(storage, 0.0, 2))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    front = control(storage, trials=12, sampler="random").search(nudged)
    assert drawn(front) == drawn(control(None, trials=12, sampler="random").search(nudged))
    assert {trial.state for trial in front.trials} == {"complete"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed = 1, found seed = 0"),
        ({"rewards": [output, size]}, "rewards"),
        ({"rewards": [size]}, "directions"),
        ({"learning_rates": [1e-3]}, "learning_rate_range"),
        ({"sampler": "tpe"}, "sampler"),
        ({"settings": {"steps": 3}}, "settings"),
        ({"blocks": 2}, "groups"),
    ],
)
def test_the_storage_of_another_search_is_refused(tmp_path: Path, changes, words):
    control(tmp_path / "a.db", trials=1).search(train)
    with pytest.raises(CheckpointError, match=words):
        control(tmp_path / "a.db", trials=2, **changes).search(train)


def test_trials_of_another_base_are_refused(tmp_path: Path):
    control(tmp_path / "a.db", trials=1).search(train)
    model = Stack()
    model.enter.weight.data += 1
    with pytest.raises(CheckpointError, match="base"):
        control(tmp_path / "a.db", model=model).search(train)


def test_a_storage_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "a.db").write_text("not a database, but long enough to be read as one" * 100)
    with pytest.raises(CheckpointError, match="a database of optuna"):
        control(tmp_path / "a.db").search(train)
    with pytest.raises(CheckpointError, match="folder that can be written"):
        control(tmp_path / "a.db" / "b.db").search(train)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rewards": []}, "rewards: expected at least one"),
        ({"rewards": [size, size]}, "different names"),
        ({"trials": 0}, "trials"),
        ({"trials": 3, "sampler": "exhaustive", "learning_rates": [1e-3]}, "trials"),
        ({"sampler": "exhaustive", "trials": None}, "a list of learning rates"),
        ({"population": 1}, "population"),
        ({"pruner": "median"}, "several rewards cannot be pruned"),
        ({"rewards": [size], "pruner": "best"}, "pruner"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [1e-3, 1e-3]}, "different positive"),
        ({"learning_rates": [-1.0]}, "positive"),
    ],
)
def test_options_that_cannot_work_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        control(**options)
    with pytest.raises(ConfigError, match="lower and a higher bound"):
        LogUniform(1e-2, 1e-3)


def test_unknown_samplers_are_named():
    with pytest.raises(ConfigError, match="'nsga2', 'tpe', 'random', 'exhaustive'"):
        control(sampler="grid").search(train)


def test_pruning_ends_hopeless_trials_with_one_reward_only():
    """The median pruner stops what is worse than half of the trials before."""
    order = iter([1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 0.5])
    now: dict[str, float] = {}
    steps = []

    def trained(run: Run) -> None:
        now["value"] = next(order)
        for step in range(1, 4):
            steps.append(step)
            run.report(step)
        assert run.model.training

    search = control(
        rewards=[Reward(lambda model: now["value"], "m")],
        pruner="median",
        trials=7,
        sampler="random",
    )
    front = search.search(trained)
    assert [trial.state for trial in front.trials] == ["complete"] * 5 + ["pruned", "complete"]
    assert len(steps) == 6 * 3 + 1
    assert [trial.number for trial in front.members] == [6]
    assert control(rewards=[size]).pruner == "halving"
    assert control(rewards=[size, output]).pruner is None


def test_rewards_may_be_better_when_higher():
    front = control(
        rewards=[size, Reward(size, "copies", maximize=True)], trials=6, sampler="random"
    ).search(train)
    assert front.maximize == (False, True)
    assert len(front.members) == 6  # each is better where the other is worse
    single = control(rewards=[Reward(size, "s", maximize=True)], pruner=None).search(train)
    assert [t.values[0] for t in single.members] == [max(t.values[0] for t in single.complete)]


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"sparing\[tune\]"):
        control().search(train)


def test_a_unet_is_searched_and_tuned():
    """SVDiff on a UNet of diffusers: restored bitwise, and tuned again to what the trial gave."""
    x, _, c = unet_inputs(6)
    model = small_unet()
    groups = block_groups(model, "svdiff")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    denoising = Denoising(DDIMScheduler(num_train_timesteps=50), torch.zeros(1, 8))
    norm = MemorizationNorm(denoising, Images(x[:3], c[:3]))
    fine_tuning = FineTuning(
        denoising, Images(x[3:], c[3:]), Images(x[:3], c[:3]), steps=2, batch_size=4
    )
    search = MemControl(
        model,
        groups,
        [norm, lambda model: float(sum(p.requires_grad for p in model.parameters()))],
        learning_rates=LogUniform(1e-3, 1e-1),
        learning_rate_1d=1e-3,
        trials=3,
        storage=None,
    )
    front = search.search(fine_tuning)
    assert front.rewards == ("max_norm", "<lambda>")
    sizes = {g.name: len(g.parameters) for g in groups.groups}
    for trial in front.trials:
        on = [n for n, bit in zip(groups.names, trial.mask, strict=True) if bit == "1"]
        assert trial.values[1] == sum(sizes[name] for name in on)
    after = search.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    best = front.members[0]
    tuned = search.tune(fine_tuning, best.mask, best.learning_rate)
    assert norm(tuned) == pytest.approx(best.values[0], rel=1e-6)
    assert norm(tuned) != pytest.approx(norm(small_unet()), rel=1e-6)
