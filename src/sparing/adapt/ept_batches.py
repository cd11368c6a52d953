"""Batches of one task each, as EPT is trained."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.utils.data import Sampler

from sparing.errors import ConfigError, DataError


class TaskBatches(Sampler[list[int]]):
    """Draws a task for every batch, then items of it without repetition until all were seen.

    A `batch_sampler` for `torch.utils.data.DataLoader`. Every epoch has as many batches as there
    are full batches of items. Draws depend on the seed and the epoch only, so all processes of a
    distributed run draw the same tasks; `accelerate` shares the batches out afterwards, with
    `split_batches=True` in parts of one batch, which keeps the processes on one task.

    Arguments:
        tasks: of every item, its task's number.
        batch_size: items of a batch, >= 1; a task with fewer items repeats them.
        probabilities: "equal", the paper's 1/T; "softmax", the released code's softmax of the
            tasks' shares of the items, which is nearly equal.
        seed: of the draws.

    Raises:
        ConfigError: an option out of range.
        DataError: there are no items.
    """

    def __init__(
        self,
        tasks: Sequence[int],
        batch_size: int,
        *,
        probabilities: Literal["equal", "softmax"] = "equal",
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(
                "batch_size", expected="at least 1", found=str(batch_size), mend="Use 32."
            )
        if probabilities not in ("equal", "softmax"):
            raise ConfigError(
                "probabilities",
                expected="'equal' or 'softmax'",
                found=repr(probabilities),
                mend="Use 'equal'.",
            )
        if not len(tasks):
            raise DataError(
                "tasks", expected="the task of every item", found="no items", mend="Add data."
            )
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.items: dict[int, list[int]] = {}
        for item, task in enumerate(tasks):
            self.items.setdefault(int(task), []).append(item)
        shares = torch.tensor([len(own) for own in self.items.values()]) / len(tasks)
        equal = torch.full_like(shares, 1 / len(shares))
        self.probabilities = equal if probabilities == "equal" else shares.softmax(0)
        self.num_batches = max(1, len(tasks) // batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Draw anew; otherwise every epoch draws the next by itself."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        waiting: dict[int, list[int]] = {task: [] for task in self.items}
        names = list(self.items)
        for _ in range(self.num_batches):
            drawn = torch.multinomial(self.probabilities, 1, generator=generator)
            yield self._take(names[int(drawn)], waiting, generator)

    def _take(
        self, task: int, waiting: dict[int, list[int]], generator: torch.Generator
    ) -> list[int]:
        items = self.items[task]
        while len(waiting[task]) < self.batch_size:  # an exhausted task starts again
            order = torch.randperm(len(items), generator=generator)
            waiting[task] += [items[place] for place in order.tolist()]
        batch, waiting[task] = waiting[task][: self.batch_size], waiting[task][self.batch_size :]
        return batch
