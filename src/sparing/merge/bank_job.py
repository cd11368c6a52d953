"""What one arrival in a bank on disk has to do with: the models, the bank, places and limits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparing.merge.bank_folder import BankFolder, Scratch
from sparing.merge.experts import Expert, FullExpert
from sparing.merge.layer_experts import LayerExpert
from sparing.merge.ledger import Ledger, Task
from sparing.merge.made_it import STORAGE, MadeItOptions
from sparing.merge.plan import OnMismatch, Plan
from sparing.merge.reader import Reader
from sparing.merge.skeleton import Layout
from sparing.merge.view import Block, Progress, View
from sparing.shards import Checkpoint, same_content


@dataclass(frozen=True)
class Settings:
    """What stays the same for all arrivals, beside the options; see `merge`."""

    dtype: str | None = None
    arithmetic: Literal["auto", "float32", "float64"] = "auto"
    on_mismatch: OnMismatch = "error"
    per_task: tuple[str, ...] = ()
    max_shard_size: int = 5 * 10**9


@dataclass(frozen=True)
class Machine:
    """What an arrival may use, which does not change its result.

    Arguments:
        threads: layers at a time.
        block_size: numbers at a time, of tensors that are only averaged.
        device: to compute on.
        progress: is told what happens.
    """

    threads: int
    block_size: int
    device: str
    progress: Progress


@dataclass(frozen=True)
class Setting:
    """What all arrivals in one bank have in common.

    Arguments:
        base: the base's weights.
        folder: the base's folder.
        layout: where experts go.
        options: of MADE-IT.
        settings: the same for all arrivals.
        machine: to compute with.
    """

    base: Checkpoint
    folder: Path
    layout: Layout
    options: MadeItOptions
    settings: Settings
    machine: Machine


@dataclass(frozen=True)
class Job:
    """One arrival.

    Arguments:
        setting: in which it happens.
        expert: the fine-tune.
        task: its name and digest.
        plan: how its tensors fit the base's.
        reader: of the base and the task vector.
        bank: before, or None.
        ledger: of the bank; becomes that after.
        number: of tasks before this one.
        scratch: experts that are not in the bank yet.
        into: folder for the new bank.
    """

    setting: Setting
    expert: Expert
    task: Task
    plan: Plan
    reader: Reader
    bank: BankFolder | None
    ledger: Ledger
    number: int
    scratch: Scratch
    into: Path

    @property
    def storage(self) -> torch.dtype:
        """Type of experts on disk."""
        return STORAGE[self.setting.options.storage]

    def experts(self, module: str) -> list[LayerExpert]:
        """A layer's experts before the arrival."""
        if self.bank is None or not self.bank.ledger.modules[module].ranks:
            return []
        return self.bank.experts(module)

    def delta(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers of the task vector, flat."""
        stop = self.plan.tensors[name].info.numel if stop is None else stop
        return self.reader.read(Block(name, start, stop))[1][0]

    def unchanged(self, name: str) -> bool:
        """Whether the fine-tune has left a tensor as it is in the base, as far as can be seen
        without computing."""
        planned = self.plan.tensors[name]
        if not planned.merged:
            return True
        (source,) = planned.sources
        return (
            isinstance(self.expert, FullExpert)
            and source is not None
            and same_content(self.setting.base, name, self.expert.checkpoint, source)
        )

    def view(self, block_size: int) -> View:
        """For writing: threads, blocks and progress."""
        machine = self.setting.machine
        return View(
            {},
            1,
            self.reader.read,
            threads=machine.threads,
            block_size=block_size,
            progress=machine.progress,
        )
