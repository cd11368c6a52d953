"""One fine-tune arrives in a bank on disk, layer by layer: a new folder from the old one."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sparing.merge.bank_folder import BankFolder, Scratch
from sparing.merge.bank_job import Job, Setting
from sparing.merge.bank_writer import write_bank
from sparing.merge.experts import Expert
from sparing.merge.layer_experts import LayerExpert
from sparing.merge.ledger import Ledger, ModuleLedger, Task
from sparing.merge.plan import Plan, Planner
from sparing.merge.reader import DTYPES, Reader, arithmetic_of
from sparing.merge.skeleton import Target
from sparing.merge.subspaces import factorize, factorize_product
from sparing.merge.view import ordered_map


def compare(setting: Setting, expert: Expert) -> Plan:
    """Compare a fine-tune with the base.

    Raises:
        CheckpointError: it is none, or has another vocabulary.
        ConfigError: a pattern matches nothing.
    """
    settings = setting.settings
    return Planner(
        setting.base,
        [expert],
        dtype=DTYPES[settings.dtype] if settings.dtype else None,
        on_mismatch=settings.on_mismatch,
        vocabulary="error",
        per_task=settings.per_task,
    ).plan()


def arrive(
    setting: Setting,
    previous: Path | None,
    expert: Expert,
    task: Task,
    into: Path,
    scratch: Path,
) -> Ledger:
    """Write the bank with one more task.

    Arguments:
        setting: the base, the options, and what to compute with.
        previous: the bank's folder, only read; None for a new bank.
        expert: the fine-tune.
        task: its name and digest.
        into: an empty folder for the new bank.
        scratch: a folder that does not exist, for files that may be deleted afterwards.

    Returns:
        The new ledger.

    Raises:
        CheckpointError: it does not fit the base, or has NaN.
        OSError: the disk is full.
    """
    bank = BankFolder(previous) if previous is not None else None
    try:
        plan = compare(setting, expert)
        arithmetic = arithmetic_of(setting.settings.arithmetic, setting.base, [expert])
        ledger = _empty_ledger(setting) if bank is None else copy.deepcopy(bank.ledger)
        job = Job(
            setting,
            expert,
            task,
            plan,
            Reader(setting.base, [expert], plan, arithmetic, setting.machine.device),
            bank,
            ledger,
            len(ledger.tasks),
            Scratch(scratch, [target.module for target in setting.layout.targets]),
            into,
        )
        write_bank(job, _evolve(job))
        return ledger
    finally:
        if bank is not None:
            bank.close()


def _empty_ledger(setting: Setting) -> Ledger:
    return Ledger(
        {
            target.module: ModuleLedger(target.inputs, target.outputs, target.bias is not None)
            for target in setting.layout.targets
        }
    )


def _evolve(job: Job) -> dict[str, int | None]:
    """Decide for every layer, and leave new and joined experts in the scratch folder.

    Returns:
        For every layer, the number of the expert that is new or joined, or None.
    """
    affinities: dict[str, list[float] | None] = {}
    targets, progress = job.setting.layout.targets, job.setting.machine.progress
    progress.stage(f"comparing {job.task.name}", sum(t.inputs * t.outputs for t in targets))
    ranks: dict[str, int] = {}
    for target, found, rank in _over_layers(job, lambda target: _compare_layer(job, target)):
        affinities[target.module] = found
        if found is not None and rank < job.setting.options.router_rank:
            ranks[target.module] = rank
        progress.advance(target.inputs * target.outputs)
    job.ledger.note_reduced(job.task.name, ranks)
    members = {name: module.members for name, module in job.ledger.modules.items()}
    chosen = job.ledger.arrive(job.task, affinities, job.setting.options.adaptive)

    def finish(target: Target) -> tuple[str, int, int] | None:
        module, place = target.module, chosen[target.module]
        if place is None:
            return None
        if place < len(members[module]):
            _join(job, module, place, len(members[module][place]))
        factors = job.scratch.get(module).factors
        return module, factors.rank, factors.router_rank

    for finished in _over_layers(job, finish):
        if finished is not None:
            module, rank, router_rank = finished
            ledger, place = job.ledger.modules[module], chosen[module]
            assert place is not None
            ledger.ranks[place : place + 1] = [rank]
            ledger.router_ranks[place : place + 1] = [router_rank]
    return chosen


def _over_layers(job: Job, function: Callable[[Target], Any]) -> Iterable[Any]:
    return ordered_map(function, job.setting.layout.targets, job.setting.machine.threads)


def _compare_layer(job: Job, target: Target) -> tuple[Target, list[float] | None, int]:
    """Factorise the task's change of a layer and compare it with the layer's experts.

    Returns:
        The layer, affinities or None if the task leaves it alone, and the task's r there.
    """
    fresh = _represent(job, target)
    if fresh is None:
        return target, None, 0
    job.scratch.put(target.module, fresh)
    exact = job.reader.dtype
    new = job.scratch.get(target.module).to(exact).factors  # on the CPU, as the experts are
    alike = job.setting.options.alike
    found = [alike(old.to(exact).factors, new) for old in job.experts(target.module)]
    return target, found, new.router_rank


def _represent(job: Job, target: Target) -> LayerExpert | None:
    """The task's own expert of a layer, or None if it leaves the layer's weight alone."""
    if job.unchanged(target.weight):
        return None
    cut, device = job.setting.options.truncation, job.setting.machine.device
    planned = job.plan.tensors[target.weight]
    (source,) = planned.sources
    like = torch.empty(0, dtype=job.reader.dtype, device=device)
    product = job.expert.factors(source, like) if source is not None else None
    if product is not None:
        left, right = product
        if target.transposed:
            left, right = right.mT, left.mT
        factors = factorize_product(left, right, cut)
    else:
        delta = job.delta(target.weight).view(planned.info.shape)
        factors = factorize(delta.mT if target.transposed else delta, cut, target.module)
    if factors is None:
        return None
    bias = None
    if target.bias is not None:
        bias = torch.zeros(target.outputs, dtype=job.reader.dtype)
        if job.plan.tensors[target.bias].merged:
            bias = job.delta(target.bias)
    return LayerExpert(factors, bias).to(job.storage)


def _join(job: Job, module: str, place: int, members: int) -> None:
    """Put the running mean of an expert and the newcomer in the newcomer's place."""
    old, cut = job.experts(module)[place], job.setting.options.truncation
    job.scratch.put(module, old.joined_by(job.scratch.get(module), members, cut, job.reader.dtype))
