"""Writes the folder of a bank after an arrival; see `bank_folder` for what is in it."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from sparing.checkpoint import write_json
from sparing.merge.bank_folder import MEANS, PREFIX, stored_name
from sparing.merge.bank_job import Job
from sparing.merge.card import side_files
from sparing.merge.layer_experts import PARTS
from sparing.merge.plan import FLOATS
from sparing.merge.view import Block
from sparing.merge.writing import write_shard, write_tasks
from sparing.shards import INDEX, Checkpoint, Shard, TensorInfo, index_of, plan_shards

_WHOLE = 1 << 62  # block size for tensors that are written at once


def write_bank(job: Job, chosen: Mapping[str, int | None]) -> None:
    """Write everything but the record and the model card.

    Arguments:
        job: the arrival; its ledger is that after it.
        chosen: for every layer, the number of the expert that is new or joined, and is in the
            scratch folder; None where nothing happened.

    Raises:
        CheckpointError: NaN or infinity.
        OSError: the disk is full.
    """
    _Writer(job, chosen).write()


class _Writer:
    def __init__(self, job: Job, chosen: Mapping[str, int | None]) -> None:
        self.job, self.chosen, self.into = job, chosen, job.into
        self.setting, self.layout = job.setting, job.setting.layout
        self.weights = {target.weight for target in self.layout.targets}
        self.owner = {f"{PREFIX}{ours}": theirs for theirs, ours in self.layout.names.items()}
        self.names = {
            stored_name(module, part): (module, part)
            for module in job.ledger.modules
            for part in PARTS
        }

    def write(self) -> None:
        self._carry_over()
        infos = {
            name: planned.info
            for name, planned in self.job.plan.tensors.items()
            if name in self.layout.names
        }
        held = {t.bias for t in self.layout.targets if self.chosen[t.module] is not None}
        means = self._write_means(held)
        view = self.job.view(self.setting.machine.block_size)
        self.setting.machine.progress.stage("writing", sum(info.numel for info in infos.values()))

        def mean_of(block: Block) -> Tensor:
            name = self.owner[block.tensor]
            values = self.setting.base.read(name, block.start, block.stop)
            if means is None or name not in means.tensors:
                return values
            exact = values.to(self.job.reader.dtype)
            return exact + means.read(name, block.start, block.stop).to(exact)

        try:
            shards = self._shards("weights", {n: i for n, i in infos.items() if n in self.weights})
            for shard in shards:
                if not (self.into / shard.name).is_file():
                    write_shard(self.into / shard.name, shard, self._base_values, view)
            shared = self._shards(
                "shared", {n: i for n, i in infos.items() if n not in self.weights}
            )
            for shard in shared:
                write_shard(self.into / shard.name, shard, mean_of, view)
        finally:
            if means is not None:
                means.close()
        experts = _named("experts", self._expert_infos(), self.setting.settings.max_shard_size)
        for shard in experts:
            write_shard(self.into / shard.name, shard, self._stacked, self.job.view(_WHOLE))
        write_tasks(
            self.into,
            self.setting.base,
            [self.job.expert],
            self.setting.settings.per_task,
            view,
            first=self.job.number,
        )
        write_json(self.into / INDEX, index_of([*shards, *shared, *experts]))
        write_json(self.into / "config.json", self._config())
        self.job.ledger.save(self.into)

    def _base_values(self, block: Block) -> Tensor:
        return self.setting.base.read(self.owner[block.tensor], block.start, block.stop)

    def _shards(self, kind: str, infos: Mapping[str, TensorInfo]) -> list[Shard]:
        named = {f"{PREFIX}{self.layout.names[name]}": info for name, info in infos.items()}
        return _named(kind, named, self.setting.settings.max_shard_size)

    def _carry_over(self) -> None:
        """Files that stay as they are: linked where the file system can, else copied."""
        for file in side_files(self.setting.folder):
            shutil.copyfile(file, self.into / file.name)
        (self.into / MEANS.parent).mkdir()
        if self.job.bank is None:
            return
        kept = list(self.job.bank.folder.glob("weights-*.safetensors"))
        kept += list(self.job.bank.folder.glob("tasks/*.safetensors"))
        for file in kept:
            place = self.into / file.relative_to(self.job.bank.folder)
            place.parent.mkdir(exist_ok=True)
            try:
                os.link(file, place)
            except OSError:
                shutil.copyfile(file, place)

    def _write_means(self, held: set[str | None]) -> Checkpoint | None:
        """Running means of all that no expert holds (eq. 7).

        Arguments:
            held: biases whose change an expert has taken.
        """
        old = self.job.bank.means if self.job.bank is not None else None
        infos: dict[str, TensorInfo] = {}
        changed: set[str] = set()
        for name, planned in self.job.plan.tensors.items():
            if name in self.weights or planned.info.dtype not in FLOATS:
                continue
            if name not in held and not self.job.unchanged(name):
                changed.add(name)
            if name in changed or (old is not None and name in old.tensors):
                infos[name] = TensorInfo(torch.float32, planned.info.shape)
        if not infos:
            return None
        before, after = self.job.number, self.job.number + 1

        def mean(block: Block) -> Tensor:
            total = torch.zeros(block.size, dtype=self.job.reader.dtype)
            if old is not None and block.tensor in old.tensors:
                values = old.read(block.tensor, block.start, block.stop)
                total += before * values.to(total.dtype)
            if block.tensor in changed:
                total += self.job.delta(block.tensor, block.start, block.stop).cpu()
            return total / after

        view = self.job.view(self.setting.machine.block_size)
        write_shard(self.into / MEANS, Shard(MEANS.name, infos), mean, view)
        return Checkpoint(self.into / MEANS)

    def _expert_infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, ledger in self.job.ledger.modules.items():
            if not ledger.ranks:
                continue
            tops = [max(k, r) for k, r in zip(ledger.ranks, ledger.router_ranks, strict=True)]
            infos[stored_name(name, "inputs")] = TensorInfo(
                self.job.storage, (sum(tops), ledger.inputs)
            )
            infos[stored_name(name, "outputs")] = TensorInfo(
                self.job.storage, (sum(ledger.ranks), ledger.outputs)
            )
            if ledger.bias:
                infos[stored_name(name, "biases")] = TensorInfo(
                    self.job.storage, (len(ledger.ranks), ledger.outputs)
                )
        return infos

    def _stacked(self, block: Block) -> Tensor:
        """A whole stacked tensor: old rows, and those of the new or joined expert."""
        module, part = self.names[block.tensor]
        experts, place = self.job.experts(module), self.chosen[module]
        if place is not None:
            experts[place : place + 1] = [self.job.scratch.get(module)]
        return torch.cat([expert.part(part) for expert in experts]).flatten()

    def _config(self) -> dict[str, Any]:
        base = dict(self.setting.base.config or {})
        kind = self.setting.settings.dtype or base.get("dtype") or base.get("torch_dtype")
        modules = {
            name: {
                "ranks": ledger.ranks,
                "router_ranks": ledger.router_ranks,
                "members": ledger.members,
                "bias": ledger.bias,
            }
            for name, ledger in self.job.ledger.modules.items()
            if ledger.ranks
        }
        return {
            "architectures": ["MadeItModel"],
            "model_type": "made_it",
            "dtype": kind,
            "architecture": self.layout.architecture,
            "tasks": [task.name for task in self.job.ledger.tasks],
            "routing": asdict(self.setting.options.routing(generates=self.layout.generates)),
            "modules": modules,
            "base_config": base | ({"dtype": kind} if kind else {}),
        }


def _named(kind: str, infos: Mapping[str, TensorInfo], most: int) -> list[Shard]:
    shards = plan_shards(infos, most) if infos else []
    return [
        replace(shard, name=f"{kind}-{number:05d}-of-{len(shards):05d}.safetensors")
        for number, shard in enumerate(shards, 1)
    ]
