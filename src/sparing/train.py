"""One plain training loop, from one CPU to many GPUs, that resumes where it was stopped.

What a step computes does not depend on the number of processes: every rank takes its rows of the
same global batch, and the loss is the sum over tokens divided by the tokens of the whole batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sparing.checkpoint import atomic_path
from sparing.data.blocks import IGNORE, Batch, Blocks
from sparing.errors import CheckpointError, ConfigError, SparingError
from sparing.tuners import Tuner

Schedule = Literal["linear", "cosine", "constant"]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class DivergedError(SparingError, ArithmeticError):
    """The training loss is no longer a finite number."""


@dataclass(frozen=True)
class TrainPlan:
    """How to train.

    Arguments:
        steps: optimiser steps.
        batch_size: rows a step, over all processes.
        learning_rate: at its peak.
        warmup: share of the steps with a rising learning rate.
        schedule: of the learning rate after the warm-up.
        weight_decay: decoupled (AdamW).
        clip: largest norm of the gradient.
        seed: of data order and dropout.
        final: the learning rate that linear and cosine schedules end at, relative to the peak.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    final: float = 0.0

    def rate_factor(self, step: int) -> float:
        """The learning rate of a step, counted from 0, relative to the peak."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        if self.schedule == "constant":
            return 1.0
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * left


@dataclass
class History:
    """What happened: the loss (nats a token) and the seconds of every step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train(
    model: nn.Module,
    data: Blocks,
    plan: TrainPlan,
    accelerator: Accelerator | None = None,
    *,
    make_optimizer: MakeOptimizer | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[nn.Module, History]:
    """Train the parameters that require gradients.

    Arguments:
        model: a causal language model, adapted or not.
        data: blocks to learn from.
        plan: how.
        accelerator: devices and processes; by default this process and its best device.
        make_optimizer: for the model; the learning rates of its groups are their peaks. By
            default AdamW with the plan's rate and decay.
        checkpoint: file to resume from and to save to; removed by the caller when done with.
        checkpoint_seconds: the least time between two saves.
        on_step: called with the step (from 1) and its loss.

    Returns:
        the model as prepared by the accelerator, and the history, including that of the steps
        before an interruption.

    Raises:
        DivergedError: a loss or the norm of a gradient is NaN or infinite; the step is not taken.
        ConfigError: the batch does not divide by the number of processes.
        CheckpointError: the checkpoint belongs to another plan or is damaged.
    """
    accelerator = accelerator or Accelerator()
    _check_divides(plan.batch_size, accelerator.num_processes)
    torch.manual_seed(plan.seed)
    _keep_own_indices(model)
    tuners = [module for module in model.modules() if isinstance(module, Tuner)]
    optimizer: Any = (make_optimizer or _adamw(plan))(model)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    past: dict[str, Any] | None = None
    if checkpoint is not None and checkpoint.exists():
        past = _read(checkpoint, plan, is_sharded(accelerator))
        for tuner in tuners:  # they count steps; what else this does to them is overwritten next
            tuner.after_step(len(past["history"].losses), plan.steps, optimizer)
        model.load_state_dict(past["weights"], strict=False)
    model, optimizer = accelerator.prepare(model, optimizer)
    history = History()
    if past is not None:
        history = past["history"]
        _restore_moments(model, optimizer, past["moments"], is_sharded(accelerator))
        torch.set_rng_state(past["random"])
    order = data.order(plan.steps, plan.batch_size, plan.seed)
    saved = time.monotonic()
    model.train()
    for step in range(len(history.losses), plan.steps):
        start = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * plan.rate_factor(step)
        loss = _backward(model, data.take(order[step]), accelerator, tuners)
        for tuner in tuners:
            tuner.before_step()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = accelerator.clip_grad_norm_(trained, plan.clip)
        if accelerator.scaler is None:  # which would expect such gradients, and skip their steps
            _require_finite("norm of the gradient", float(_whole(norm)))
        optimizer.step()
        for tuner in tuners:
            tuner.after_step(step + 1, plan.steps, optimizer)
        optimizer.zero_grad(set_to_none=True)
        history.losses.append(loss)
        history.seconds.append(time.perf_counter() - start)
        on_step(step + 1, loss)
        if checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds:
            _save(checkpoint, model, optimizer, plan, history, accelerator)
            saved = time.monotonic()
    return model, history


def _adamw(plan: TrainPlan) -> MakeOptimizer:
    return lambda model: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=plan.learning_rate,
        weight_decay=plan.weight_decay,
    )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights are spread over the processes (FSDP2)."""
    return bool(accelerator.is_fsdp2)


def prepared(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A model that is only to be evaluated, on the accelerator's devices and processes."""
    if not is_sharded(accelerator):
        return accelerator.prepare_model(model, evaluation_mode=True)
    # accelerate shards a model only together with an optimizer; this one never takes a step.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return accelerator.prepare(model, optimizer)[0]


def _keep_own_indices(model: nn.Module) -> None:
    """DDP need not send integer buffers around, and cannot send all types of them: they are the
    same in every process, as they follow from the seed."""
    names = [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Blocks, accelerator: Accelerator | None = None, batch_size: int = 4
) -> float:
    """Mean loss in nats a predicted token, the same for any number of processes."""
    accelerator = accelerator or Accelerator()
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    starts = range(0, len(data), batch_size * accelerator.num_processes)
    for start in starts:
        rows = data.take(slice(start, start + batch_size * accelerator.num_processes))
        share = _share(rows, accelerator)
        # A rank without rows still takes part, so that sharded weights can be gathered.
        local = share if len(share.input_ids) else Batch(*(t[:1] for t in rows))
        loss = _token_loss(model, local, accelerator.device).cpu()
        total += loss.double() if len(share.input_ids) else 0.0
    total = accelerator.reduce(total.to(accelerator.device), "sum")
    return float(total) / data.target_tokens


def _backward(
    model: nn.Module, batch: Batch, accelerator: Accelerator, tuners: Sequence[Tuner] = ()
) -> float:
    tokens = int((batch.labels[:, 1:] != IGNORE).sum())
    local = _token_loss(model, _share(batch, accelerator), accelerator.device) / tokens
    # Gradients are averaged over the processes; the factor turns that into a sum.
    objective = local * accelerator.num_processes
    for tuner in tuners:
        extra = tuner.auxiliary_loss()
        objective = objective if extra is None else objective + extra
    accelerator.backward(objective)
    loss = float(accelerator.reduce(local.detach(), "sum"))
    _require_finite("training loss", loss)
    return loss


def _whole(value: Any) -> Any:
    """A number that FSDP2 has left spread over the processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            what,
            expected="a finite number",
            found=str(value),
            mend="Try a smaller learning rate.",
        )


def _share(batch: Batch, accelerator: Accelerator) -> Batch:
    return Batch(*(t[accelerator.process_index :: accelerator.num_processes] for t in batch))


def _token_loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The summed loss of a batch, in float32."""
    inputs, mask, labels = (tensor.to(device) for tensor in batch)
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1].float()
    return F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def _check_divides(batch_size: int, processes: int) -> None:
    if batch_size % processes:
        raise ConfigError(
            "batch_size",
            expected=f"a multiple of the {processes} processes",
            found=str(batch_size),
            mend=f"Use {-(-batch_size // processes) * processes}.",
        )


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def _save(
    path: Path,
    model: nn.Module,
    optimizer: Any,
    plan: TrainPlan,
    history: History,
    accelerator: Accelerator,
) -> None:
    if is_sharded(accelerator):
        # Asked for moments that are not there yet, torch would make some up.
        started = bool(optimizer.optimizer.state)
        weights, moments = (
            get_state_dict(model, optimizer.optimizer, options=_WHOLE)
            if started
            else (get_model_state_dict(model, options=_WHOLE), None)
        )
    else:
        plain = accelerator.unwrap_model(model)
        frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
        weights = {name: t for name, t in plain.state_dict().items() if name not in frozen}
        moments = optimizer.optimizer.state_dict()
    if not accelerator.is_main_process:
        return
    state = {
        "plan": asdict(plan),
        "sharded": is_sharded(accelerator),
        "weights": weights,
        "moments": moments,
        "history": asdict(history),
        "random": torch.get_rng_state(),
    }
    with atomic_path(path) as fresh:
        torch.save(state, fresh)


def _read(path: Path, plan: TrainPlan, sharded: bool) -> dict[str, Any]:
    """What `_save` wrote, if it belongs to this plan."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        asked = {name: state[name] for name in ("plan", "sharded")}
        past = {name: state[name] for name in ("weights", "moments", "random")}
        past["history"] = History(**state["history"])
    except Exception as error:
        raise CheckpointError(
            str(path),
            expected="a training checkpoint",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            mend="Delete the file to start this run again.",
        ) from error
    mine = {"plan": asdict(plan), "sharded": sharded}
    if asked != mine:
        raise CheckpointError(
            str(path),
            expected=f"a checkpoint of {mine}",
            found=f"one of {asked}",
            mend="Delete the file, or run with the options it was made with.",
        )
    return past


def _restore_moments(
    model: nn.Module, optimizer: Any, moments: dict[str, Any] | None, sharded: bool
) -> None:
    if not sharded:
        optimizer.optimizer.load_state_dict(moments)
    elif moments is not None:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(model, optimizer.optimizer, moments, options=options)
