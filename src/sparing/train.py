"""One plain training loop, from one CPU to many GPUs, that resumes where it was stopped.

What a step computes does not depend on the number of processes: every rank takes its rows of the
same global batch, and the loss is the sum over tokens divided by the tokens of the whole batch.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from sparing.checkpoint import atomic_path
from sparing.data.blocks import IGNORE, Batch, Blocks
from sparing.errors import CheckpointError, ConfigError, SparingError
from sparing.tuners import Tuner

Schedule = Literal["linear", "cosine", "constant"]


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
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def rate_factor(self, step: int) -> float:
        """The learning rate of a step, counted from 0, relative to the peak."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        if self.schedule == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0


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
        checkpoint: file to resume from and to save to; removed by the caller when done with.
        checkpoint_seconds: the least time between two saves.
        on_step: called with the step (from 1) and its loss.

    Returns:
        the model as prepared by the accelerator, and the history, including that of the steps
        before an interruption.

    Raises:
        DivergedError: a loss is NaN or infinite.
        ConfigError: the batch does not divide by the number of processes.
        CheckpointError: the checkpoint belongs to another plan or is damaged.
    """
    accelerator = accelerator or Accelerator()
    _check_divides(plan.batch_size, accelerator.num_processes)
    torch.manual_seed(plan.seed)
    tuners = [module for module in model.modules() if isinstance(module, Tuner)]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=plan.learning_rate,
        weight_decay=plan.weight_decay,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    history = History()
    if checkpoint is not None and checkpoint.exists():
        _resume(checkpoint, model, optimizer, plan, history)
    order = data.order(plan.steps, plan.batch_size, plan.seed)
    saved = time.monotonic()
    model.train()
    for step in range(len(history.losses), plan.steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * plan.rate_factor(step)
        loss = _backward(model, data.take(order[step]), accelerator)
        for tuner in tuners:
            tuner.before_step()
        accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], plan.clip)
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


def _backward(model: nn.Module, batch: Batch, accelerator: Accelerator) -> float:
    tokens = int((batch.labels[:, 1:] != IGNORE).sum())
    local = _token_loss(model, _share(batch, accelerator), accelerator.device) / tokens
    # Gradients are averaged over the processes; the factor turns that into a sum.
    accelerator.backward(local * accelerator.num_processes)
    loss = float(accelerator.reduce(local.detach(), "sum"))
    if not math.isfinite(loss):
        raise DivergedError(
            "training loss",
            expected="a finite number",
            found=str(loss),
            mend="Try a smaller learning rate.",
        )
    return loss


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
    weights, moments = get_state_dict(model, optimizer.optimizer, options=_WHOLE)
    if not accelerator.is_main_process:
        return
    state = {
        "plan": asdict(plan),
        "weights": weights,
        "moments": moments,
        "history": asdict(history),
        "random": torch.get_rng_state(),
    }
    with atomic_path(path) as fresh:
        torch.save(state, fresh)


def _resume(
    path: Path, model: nn.Module, optimizer: Any, plan: TrainPlan, history: History
) -> None:
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            str(path),
            expected="a training checkpoint",
            found=f"{type(error).__name__}: {error}",
            mend="Delete the file to start this run again.",
        ) from error
    if state["plan"] != asdict(plan):
        raise CheckpointError(
            str(path),
            expected=f"a checkpoint of {asdict(plan)}",
            found=f"one of {state['plan']}",
            mend="Delete the file, or run with the options it was made with.",
        )
    set_state_dict(
        model,
        optimizer.optimizer,
        model_state_dict=state["weights"],
        optim_state_dict=state["moments"],
        options=StateDictOptions(full_state_dict=True, strict=False),
    )
    history.losses, history.seconds = state["history"]["losses"], state["history"]["seconds"]
    torch.set_rng_state(state["random"])
