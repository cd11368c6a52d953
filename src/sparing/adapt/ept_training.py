"""Train an EPT adapter on several tasks in our own loop, one task a step."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparing.adapt.ept_batches import TaskBatches
from sparing.data.blocks import Batch, Blocks
from sparing.errors import ConfigError, near_matches
from sparing.train import History, TrainPlan, evaluate, train


class TaskBlocks(Blocks):
    """Token blocks of several tasks, drawn in batches of one task.

    Arguments:
        parts: the blocks of each task, by name, all of one length.
        probabilities: see `TaskBatches`.

    Attributes:
        tasks: of each block, the number of its task in the order of `parts`, (blocks,) int64.
    """

    def __init__(
        self,
        parts: Mapping[str, Blocks],
        probabilities: Literal["equal", "softmax"] = "equal",
    ) -> None:
        super().__init__(
            Batch(*map(torch.cat, zip(*(b.batch for b in parts.values()), strict=True)))
        )
        self.probabilities = probabilities
        self.names = list(parts)
        counts = torch.tensor([len(blocks) for blocks in parts.values()])
        self.tasks = torch.arange(len(counts)).repeat_interleave(counts)

    def order(self, steps: int, batch_size: int, seed: int) -> Tensor:
        batches = TaskBatches(
            self.tasks.tolist(), batch_size, probabilities=self.probabilities, seed=seed
        )
        rows: list[list[int]] = []
        while len(rows) < steps:
            rows += batches
        return torch.tensor(rows[:steps])


def train_tasks(
    model: Any,
    data: TaskBlocks,
    plan: TrainPlan,
    accelerator: Accelerator | None = None,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[nn.Module, History]:
    """`sparing.train.train` with the task of every step set before it.

    Arguments:
        model: with an active EPT adapter whose tasks have the names of the data's.
        data: blocks of all tasks.
        plan: how.
        accelerator: devices and processes.
        on_step: called with the step (from 1) and its loss.

    Raises:
        ConfigError: the data has a task that the adapter does not have.
        Others as for `sparing.train.train`.
    """
    known = model.base_model.routers(model.active_adapter).config.names
    for name in data.names:
        if name not in known:
            raise ConfigError(
                "data",
                expected=f"tasks of the adapter: {', '.join(known)}",
                found=repr(name),
                mend=near_matches(name, known),
            )
    drawn = data.order(plan.steps, plan.batch_size, plan.seed)[:, 0]
    names = [data.names[task] for task in data.tasks[drawn].tolist()]
    model.set_task(names[0])

    def advance(step: int, loss: float) -> None:
        if step < plan.steps:
            model.set_task(names[step])
        on_step(step, loss)

    return train(model, data, plan, accelerator, on_step=advance)


def evaluate_tasks(model: Any, parts: Mapping[str, Blocks]) -> dict[str, float]:
    """Mean loss in nats a predicted token of each task, under its own name."""
    losses = {}
    for name, blocks in parts.items():
        model.set_task(name)
        losses[name] = evaluate(model, blocks)
    return losses
