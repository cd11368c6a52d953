"""Alternating steps on weights and hyperparameters, and the replay of a schedule (STN, algorithm).

One process and one device; for others, call `train_step` and `validation_step` in your own loop.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.checkpoint import atomic_path
from sparing.errors import CheckpointError, ConfigError
from sparing.tune.stn.network import SelfTuningNetwork
from sparing.tune.stn.regularized import RegularizedNetwork, to_device
from sparing.tune.stn.schedule import Record, Schedule, ScheduleFunction
from sparing.tune.stn.stream import Stream, check_apart


@dataclass(frozen=True)
class Plan:
    """How to train.

    Arguments:
        steps: on the weights, warm-up included.
        warmup: of them, before the first step on hyperparameters; already under perturbation.
        train_steps: on the weights, in a cycle; 2 in the paper.
        valid_steps: on the hyperparameters, after them; 1 in the paper.
        clip: largest norm of the weights' gradient; 0.25 in the paper's LSTM.
        evaluate_every: steps between evaluations of the whole validation data at λ; None is never.
        decay: factor on the learning rate of the weights when an evaluation is above the best of
            all but the last `nonmono` ones: 0.1 in the paper's CNN, 0.25 in its LSTM. None is off.
        nonmono: evaluations that may be worse; 60 and 5 in the paper.
        patience: evaluations without a new best before the run stops; 75 and 20 in the paper.
        min_lr: learning rate below which the run stops; 1e-5 in the paper's CNN.
        seed: of dropout, and of the order of data where its loader has no generator.
    """

    steps: int
    warmup: int = 0
    train_steps: int = 2
    valid_steps: int = 1
    clip: float | None = None
    evaluate_every: int | None = None
    decay: float | None = None
    nonmono: int = 60
    patience: int | None = None
    min_lr: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("train_steps", 1), ("valid_steps", 1)):
            _require(getattr(self, name) >= least, name, self, f"at least {least}")
        _require(self.clip is None or self.clip > 0, "clip", self, "above 0")
        every = self.evaluate_every
        _require(every is None or every >= 1, "evaluate_every", self, "at least 1")
        if self.decay is not None:
            _require(0 < self.decay < 1, "decay", self, "between 0 and 1")
            _require(every is not None, "evaluate_every", self, "a number, for decay needs it")
        if self.patience is not None:
            _require(self.patience >= 1, "patience", self, "at least 1")
            _require(every is not None, "evaluate_every", self, "a number, for patience needs it")


@dataclass
class Run:
    """What happened in a run.

    Attributes:
        schedule: of the hyperparameters, a record for every cycle.
        losses: regularised training loss of every step.
        evaluations: (steps done, validation loss at λ).
        best_step: of the lowest evaluation; -1 if there was none.
        best: the network's state there, on the CPU; for `network.load_state_dict`.
        stopped: why the run ended early, or "".
    """

    schedule: Schedule = field(default_factory=Schedule)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = -1
    best: dict[str, Tensor] | None = field(default=None, repr=False)
    stopped: str = ""


def fit(
    network: SelfTuningNetwork,
    train: Iterable[Any],
    validation: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    on_cycle: Callable[[Record], None] = lambda record: None,
) -> Run:
    """Train weights and tune hyperparameters in turn.

    The global random state is seeded inside, and as it was afterwards.

    Arguments:
        network: in place.
        train: loader of training batches.
        validation: loader of other batches.
        optimizer: of `network.parameter_groups`.
        plan: how.
        checkpoint: file to resume from and to save to; removed by the caller when done with.
        checkpoint_seconds: the least time between two saves.
        on_cycle: called with every new record.

    Returns:
        the history, including that before an interruption.

    Raises:
        DataError: validation data are training data, or a loader is empty.
        ConfigError: the optimiser has λ or σ, or lacks the responses.
        DivergedError: a loss is not finite; the steps before it stand.
        CheckpointError: the checkpoint belongs to another plan or is damaged.
    """
    check_apart(train, validation)
    _check_optimizer(network, optimizer)
    streams = {"train": Stream(train, "training data"), "valid": Stream(validation, "validation")}
    device, run = network.device, Run()
    with _seeded(plan.seed, device):
        if checkpoint is not None and checkpoint.exists():
            run = _resume(checkpoint, network, optimizer, plan, streams)
        else:
            run.schedule.records.append(_record(network, 0))
        saved = time.monotonic()
        while len(run.losses) < plan.steps and not run.stopped:
            batch = to_device(streams["train"].next(), device)
            run.losses.append(network.train_step(batch, optimizer, plan.clip))
            done = len(run.losses)
            in_cycle = done - plan.warmup
            if network.tune and in_cycle > 0 and in_cycle % plan.train_steps == 0:
                for _ in range(plan.valid_steps):
                    batch = to_device(streams["valid"].next(), device)
                    loss = network.validation_step(batch)
                run.schedule.records.append(_record(network, done, run.losses[-1], loss))
                on_cycle(run.schedule.records[-1])
            if plan.evaluate_every is not None and done % plan.evaluate_every == 0:
                _evaluate(network, validation, optimizer, plan, run)
            if checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds:
                _save(checkpoint, network, optimizer, plan, streams, run)
                saved = time.monotonic()
    return run


def replay(
    network: RegularizedNetwork,
    train: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    schedule: ScheduleFunction,
    steps: int,
    *,
    clip: float | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train a plain network whose regularisers follow a schedule.

    Arguments:
        network: in place.
        train: loader of training batches.
        optimizer: of its parameters.
        schedule: values by step: a recorded `Schedule`, or `constant`, `gaussian`, `sinusoid`.
        steps: on the weights.
        clip: largest norm of the gradient.
        seed: of dropout, and of the order of data where its loader has no generator.
        on_step: called with the steps done and the loss.

    Returns:
        the regularised loss of every step.

    Raises:
        ConfigError: the network tunes its hyperparameters itself, or one has no value.
        DataError: the loader is empty.
        DivergedError: a loss is not finite.
    """
    if isinstance(network, SelfTuningNetwork):
        raise ConfigError(
            "network",
            expected="a RegularizedNetwork",
            found="a SelfTuningNetwork, which has a schedule of its own",
            mend="Build RegularizedNetwork(model, hparams) on a fresh model.",
        )
    stream, losses = Stream(train, "training data"), []
    with _seeded(seed, network.device):
        for step in range(steps):
            batch = to_device(stream.next(), network.device)
            losses.append(network.train_step(batch, optimizer, schedule(step), clip))
            on_step(step + 1, losses[-1])
    return losses


def _require(good: bool, name: str, plan: Plan, expected: str) -> None:
    if not good:
        found = repr(getattr(plan, name))
        mend = f"Change Plan.{name}."
        raise ConfigError(f"Plan.{name}", expected=expected, found=found, mend=mend)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _check_optimizer(network: SelfTuningNetwork, optimizer: torch.optim.Optimizer) -> None:
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = [name for name, p in network.hyper.named_parameters() if id(p) in mine]
    lacking = [p for p in network.response_parameters() if id(p) not in mine]
    if own or lacking:
        raise ConfigError(
            "optimizer",
            expected="the weights and responses of the network, without λ and σ",
            found=f"hyper.{own[0]} in it" if own else f"{len(lacking)} responses missing from it",
            mend="Build it with network.parameter_groups().",
        )


def _record(network: SelfTuningNetwork, step: int, *losses: float) -> Record:
    return Record(step, network.current(), network.scales(), *losses)


def _evaluate(
    network: SelfTuningNetwork,
    validation: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    run: Run,
) -> None:
    """Measure, keep the best, lower the rate, or stop."""
    past = [loss for _, loss in run.evaluations]
    loss, done = network.evaluate(validation), len(run.losses)
    run.evaluations.append((done, loss))
    if not past or loss < min(past):
        run.best_step = done
        run.best = {n: t.detach().cpu().clone() for n, t in network.state_dict().items()}
    elder = past[: -plan.nonmono] if plan.nonmono else past
    if plan.decay is not None and elder and loss > min(elder):
        for group in optimizer.param_groups:
            group["lr"] *= plan.decay
    since = sum(step > run.best_step for step, _ in run.evaluations)
    if plan.patience is not None and since >= plan.patience:
        run.stopped = f"no better evaluation in {since}"
    if optimizer.param_groups[0]["lr"] < plan.min_lr:
        run.stopped = "learning rate below its minimum"


def _save(
    path: Path,
    network: SelfTuningNetwork,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    streams: dict[str, Stream],
    run: Run,
) -> None:
    device = network.device
    state = {
        "plan": asdict(plan),
        "network": network.state_dict(),
        "optimizers": [o.state_dict() for o in _optimizers(network, optimizer)],
        "generators": [g.get_state() for g in (network.generator, network.change_generator)],
        "streams": {name: stream.state() for name, stream in streams.items()},
        "run": asdict(run),
        "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    with atomic_path(path) as fresh:
        torch.save(state, fresh)


def _optimizers(
    network: SelfTuningNetwork, optimizer: torch.optim.Optimizer
) -> tuple[torch.optim.Optimizer, ...]:
    return optimizer, network.hyper_optimizer, network.scale_optimizer


def _resume(
    path: Path,
    network: SelfTuningNetwork,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    streams: dict[str, Stream],
) -> Run:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        asked, past = state["plan"], dict(state["run"])
        past["schedule"] = Schedule([Record(**record) for record in past["schedule"]["records"]])
        run = Run(**past)
    except Exception as error:
        raise _damaged(path, error) from error
    if asked != asdict(plan):
        raise CheckpointError(
            str(path),
            expected=f"a checkpoint of {asdict(plan)}",
            found=f"one of {asked}",
            mend="Delete the file, or run with the plan it was made with.",
        )
    try:
        network.load_state_dict(state["network"])
        pairs = zip(_optimizers(network, optimizer), state["optimizers"], strict=True)
        for own, saved in pairs:
            own.load_state_dict(saved)
    except (RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error
    for name, stream in streams.items():
        stream.resume(state["streams"][name])
    generators = (network.generator, network.change_generator)
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)
    torch.set_rng_state(state["random"])
    if state["cuda"] is not None and network.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], network.device)
    return run


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        str(path),
        expected="a checkpoint of this network and optimiser",
        found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        mend="Delete the file to start this run again.",
    )
