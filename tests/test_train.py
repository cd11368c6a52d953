"""One training loop, whose numbers do not depend on interruptions or on how rows are spread."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import small_llama, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn

from sparing.adapt import HUTConfig, MoSConfig, NeuroAdaConfig, SaRAConfig
from sparing.data import Batch, Blocks
from sparing.data.blocks import IGNORE
from sparing.errors import CheckpointError, ConfigError
from sparing.train import DivergedError, TrainPlan, evaluate, train

PLAN = TrainPlan(steps=6, batch_size=2, learning_rate=1e-2, weight_decay=0.01)
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3),
    "mos": lambda: MoSConfig(r=2, target_modules="all-linear", lora_dropout=0.3),
    "neuroada": lambda: NeuroAdaConfig(k=1, target_modules="all-linear"),
    "sara": lambda: SaRAConfig(
        n_params=300,
        target_modules="all-linear",
        progressive_at=0.5,
        lambda_rank=0.01,
        rank_every=2,
        rank_matrices="one",
    ),
    "hut": lambda: HUTConfig(r=2, target_modules="all-linear"),
}


class InterruptedHereError(Exception):
    pass


def blocks(rows: int = 7, length: int = 12) -> Blocks:
    """Rows of which some are padded and some tokens are not to be learned."""
    ids = token_ids(rows, length, seed=3)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 8:], labels[1, 8:] = 0, IGNORE
    labels[2, :5] = IGNORE
    return Blocks(Batch(ids, mask, labels))


def adapted(method: str) -> nn.Module:
    base = small_llama()
    torch.manual_seed(0)
    return get_peft_model(base, CONFIGS[method]())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def stop_after(last: int) -> Any:
    def on_step(step: int, loss: float) -> None:
        if step > last:
            raise InterruptedHereError

    return on_step


@pytest.mark.parametrize("method", CONFIGS)
def test_an_interrupted_run_ends_bitwise_like_one_that_was_not(method: str, tmp_path: Path) -> None:
    straight, history = train(adapted(method), blocks(), PLAN)
    expected = weights(straight)
    for last in range(1, PLAN.steps):
        file = tmp_path / f"{last}.pt"
        with pytest.raises(InterruptedHereError):
            train(
                adapted(method),
                blocks(),
                PLAN,
                checkpoint=file,
                checkpoint_seconds=0,
                on_step=stop_after(last),
            )
        torch.rand(7)  # whatever happened in between does not matter
        resumed, again = train(adapted(method), blocks(), PLAN, checkpoint=file)
        assert again.losses == history.losses
        assert len(again.seconds) == PLAN.steps
        assert_equal(weights(resumed), expected)


def test_full_fine_tuning_resumes_bitwise_too(tmp_path: Path) -> None:
    straight, history = train(small_llama().requires_grad_(True), blocks(), PLAN)
    file = tmp_path / "checkpoint.pt"
    options: dict[str, Any] = {"checkpoint": file, "checkpoint_seconds": 0}
    with pytest.raises(InterruptedHereError):
        train(small_llama(), blocks(), PLAN, on_step=stop_after(3), **options)
    resumed, again = train(small_llama(), blocks(), PLAN, **options)
    assert again.losses == history.losses
    assert_equal(weights(resumed), weights(straight))


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    runs = [train(adapted("lora"), blocks(), replace(PLAN, seed=s))[1].losses for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_the_loss_falls_and_frozen_weights_stay() -> None:
    model = adapted("lora")
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained, history = train(model, blocks(), replace(PLAN, steps=20))
    assert history.losses[-1] < history.losses[0]
    for name, tensor in before.items():
        assert torch.equal(trained.get_parameter(name), tensor)


def reference_loss(model: nn.Module, data: Blocks) -> float:
    """Written out token by token."""
    total, tokens = 0.0, 0
    ids, mask, labels = data.batch
    with torch.no_grad():
        for row in range(len(ids)):
            logits = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
            for place in range(1, ids.shape[1]):
                if labels[row, place] != IGNORE:
                    log_p = F.log_softmax(logits[0, place - 1].double(), dim=-1)
                    total -= float(log_p[labels[row, place]])
                    tokens += 1
    return total / tokens


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_the_evaluated_loss_is_the_hand_written_one(batch_size: int) -> None:
    model, data = small_llama(), blocks()
    expected = reference_loss(model, data)
    assert evaluate(model, data, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


def test_the_first_training_loss_is_the_hand_written_one_of_its_batch() -> None:
    data = blocks()
    rows = data.order(PLAN.steps, PLAN.batch_size, PLAN.seed)[0]
    _, history = train(adapted("hut"), data, PLAN)
    expected = reference_loss(small_llama(), Blocks(data.take(rows)))
    assert history.losses[0] == pytest.approx(expected, rel=1e-6)


class Ranks:
    """Stands for an accelerator of several processes, one of which is played at a time.

    `reduce` returns this process' part; the caller adds the parts up.
    """

    device = torch.device("cpu")
    is_fsdp2 = False

    def __init__(self, rank: int, processes: int) -> None:
        self.process_index, self.num_processes = rank, processes

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return tensor

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_loss_does_not_depend_on_the_rows_a_process(processes: int) -> None:
    model, data = small_llama(), blocks()
    parts = [evaluate(model, data, Ranks(rank, processes)) for rank in range(processes)]
    assert sum(parts) == pytest.approx(evaluate(model, data), rel=1e-6)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_gradients_averaged_over_processes_are_those_of_the_batch(processes: int) -> None:
    from sparing.train import _backward

    batch = blocks(4).batch
    gradients, losses = [], []
    for rank in range(processes):
        model = small_llama()
        losses.append(_backward(model, batch, Ranks(rank, processes)))
        gradients.append([p.grad for p in model.parameters()])
    whole = small_llama()
    loss = _backward(whole, batch, Ranks(0, 1))
    assert sum(losses) == pytest.approx(loss, rel=1e-6)
    for parts, parameter in zip(zip(*gradients, strict=True), whole.parameters(), strict=True):
        average = torch.stack(parts).mean(0)
        assert torch.allclose(average, parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused() -> None:
    from sparing.train import _check_divides

    _check_divides(4, 2)
    with pytest.raises(ConfigError, match=r"batch_size.*multiple of the 3 processes.*Use 6"):
        _check_divides(4, 3)


@pytest.mark.parametrize("rate", [1e25, 1e30])
def test_a_diverged_loss_is_an_error(rate: float) -> None:
    with pytest.raises(DivergedError, match="smaller learning rate"):
        train(adapted("lora"), blocks(), replace(PLAN, learning_rate=rate))


def test_an_optimizer_of_ones_own_follows_the_schedule_in_every_group() -> None:
    seen: list[list[float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append([group["lr"] for group in self.param_groups])

    def make(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        return Watched([{"params": [first], "lr": 0.2}, {"params": rest, "lr": 0.01}])

    plan = replace(PLAN, final=0.25, warmup=0.0)
    train(small_llama(), blocks(), plan, make_optimizer=make)
    factors = [plan.rate_factor(step) for step in range(plan.steps)]
    assert seen == [[pytest.approx(0.2 * f), pytest.approx(0.01 * f)] for f in factors]
    assert factors[0] == 1.0
    assert factors[-1] > 0.25


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_changes_anything(tmp_path) -> None:
    model = small_llama()
    calls: list[int] = []

    def poison(grad: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grad * torch.nan if len(calls) == 3 else grad

    model.get_parameter("model.norm.weight").register_hook(poison)
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(DivergedError, match="norm of the gradient"):
        train(model, blocks(), PLAN, checkpoint=file, checkpoint_seconds=0)
    kept = torch.load(file, weights_only=True)
    assert len(kept["history"]["losses"]) == 2
    assert_equal({n: kept["weights"][n] for n, _ in model.named_parameters()},
                 {n: p.detach() for n, p in model.named_parameters()})  # fmt: skip
    moments = [t for state in kept["moments"]["state"].values() for t in state.values()]
    assert all(bool(torch.isfinite(t).all()) for t in moments)


def saved(folder: Path) -> Path:
    file = folder / "checkpoint.pt"
    train(adapted("hut"), blocks(), PLAN, checkpoint=file, checkpoint_seconds=0)
    return file


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"steps": 7}, {"seed": 1}])
def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected a checkpoint of"):
        train(adapted("hut"), blocks(), replace(PLAN, **change), checkpoint=file)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    file = saved(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected a training checkpoint"):
        train(adapted("hut"), blocks(), PLAN, checkpoint=file)


@pytest.mark.parametrize("content", [{"plan": {}}, [1, 2], {}])
def test_another_file_of_torch_is_no_checkpoint(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected a training checkpoint"):
        train(adapted("hut"), blocks(), PLAN, checkpoint=file)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (10, 0.1), (10, 0.5), (10, 0.0)])
def test_the_rate_rises_to_its_peak_and_never_above(schedule, steps: int, warmup: float) -> None:
    plan = replace(PLAN, steps=steps, warmup=warmup, schedule=schedule)
    factors = [plan.rate_factor(step) for step in range(steps)]
    assert max(factors) == 1.0
    assert min(factors) > 0
    peak = factors.index(1.0)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert all(a >= b for a, b in itertools.pairwise(factors[peak:]))
