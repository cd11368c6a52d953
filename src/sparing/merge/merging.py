"""Merge models of any size in the memory of a few blocks of numbers."""

import copy
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import sparing
from sparing.checkpoint import read_json, write_json
from sparing.errors import ConfigError, near_matches
from sparing.merge import average, dare, made_it, pcb_merging, task_arithmetic, ties
from sparing.merge.bank_job import Machine, Settings
from sparing.merge.card import card
from sparing.merge.continual import begin
from sparing.merge.digests import Digests
from sparing.merge.experts import Expert, locate, open_expert, shared_files
from sparing.merge.method import Continual, Method
from sparing.merge.plan import OnMismatch, Plan, Planner, Vocabulary
from sparing.merge.reader import DTYPES, Reader, arithmetic_of, warn_of_strangers
from sparing.merge.view import (
    BLOCK_SIZE,
    Block,
    Progress,
    Silent,
    View,
    default_threads,
    one_torch_thread,
)
from sparing.merge.workspace import RECORD, check_places, open_workspace
from sparing.merge.writing import write_shards, write_side_files, write_tasks
from sparing.shards import Checkpoint, parse_size, plan_shards

METHODS: dict[str, Method | Continual] = {
    module.METHOD.slug: module.METHOD
    for module in (average, task_arithmetic, ties, dare, pcb_merging, made_it)
}


def merge(
    base: str | Path,
    experts: Sequence[str | Path],
    method: str,
    out: str | Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    arithmetic: Literal["auto", "float32", "float64"] = "auto",
    device: str = "cpu",
    on_mismatch: OnMismatch = "error",
    vocabulary: Vocabulary = "error",
    per_task: Sequence[str] = (),
    hash_inputs: bool = True,
    block_size: int = BLOCK_SIZE,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Merge fine-tunes of one base into one model.

    Memory: `threads` x (experts + a few) x `block_size` numbers, whatever the size of the models.
    An adapter of a method other than LoRA also needs its own layers and two merged ones.

    Arguments:
        base: a folder, a safetensors file, a hub id or a built-in name.
        experts: the same, or folders of PEFT adapters.
        method: one of `METHODS`.
        out: folder for the result, which `from_pretrained` loads (of `MadeItModel` for "made-it");
            replaced at the very end, and only if it is new or was written by a merge.
        resume: keep the finished shards of an interrupted run of the same merge.
        threads: that read, compute and write at a time; None is one a core, at most 8, less one
            that hashes.
        max_shard_size: of the files, as bytes or text.
        dtype: of the result's floating tensors; None is the base's.
        arithmetic: to compute in; "auto" is float64 where float32 or float64 weights come in, else
            float32.
        device: to compute on.
        on_mismatch: "error", or "skip" to leave as they are in the base tensors that an expert
            lacks or has in another shape, and leave out those the base lacks.
        vocabulary: for embeddings of different length: "error"; "base" merges the rows that the
            base has, where a row that an expert lacks counts as unchanged; "crop" keeps the rows
            that all have.
        per_task: patterns of tensors that are not merged, such as task heads. The result has the
            base's; those of each expert are kept under `tasks/`.
        hash_inputs: record SHA-256 of all input files, which takes as long as reading them.
        block_size: numbers in a block, at least 1.
        progress: is told what happens.
        options: of the method.

    Returns:
        `out`.

    Raises:
        ConfigError: an option cannot work, or there is no such model.
        CheckpointError: damaged files, pickles, NaN, models that do not fit together, a disk
            without room, or a run that cannot be resumed.
    """
    chosen, typed = _method(method, options, len(experts))
    _check_words(dtype, arithmetic, on_mismatch, vocabulary)
    _check_counts(threads, block_size)
    _check_device(device)
    threads = threads or default_threads(busy=int(hash_inputs))
    most_bytes = parse_size(max_shard_size)
    target, folder = Path(out).expanduser().absolute(), locate(base)
    progress = progress or Silent()
    if isinstance(chosen, Continual):
        _check_continual(vocabulary, hash_inputs)
        kept = Settings(dtype, arithmetic, on_mismatch, tuple(per_task), most_bytes)
        machine = Machine(threads, block_size, device, progress)
        return begin(base, experts, target, typed, kept, machine, resume=resume)
    with ExitStack() as stack:
        stack.enter_context(one_torch_thread())
        model = stack.enter_context(Checkpoint(folder))
        opened: list[Expert] = []
        for name in experts:
            opened.append(open_expert(name, model, folder))
            stack.callback(opened[-1].close)
        check_places(target, [folder, *(expert.path for expert in opened)])
        _warn_of_twins(opened)
        plan = Planner(
            model,
            opened,
            dtype=DTYPES[dtype] if dtype else None,
            on_mismatch=on_mismatch,
            vocabulary=vocabulary,
            per_task=per_task,
        ).plan()
        reader = Reader(model, opened, plan, arithmetic_of(arithmetic, model, opened), device)
        view = View(
            reader.sizes,
            len(opened),
            reader.read,
            threads=threads,
            block_size=block_size,
            progress=progress,
        )
        settings = {
            "dtype": dtype,
            "arithmetic": str(reader.dtype).removeprefix("torch."),
            "on_mismatch": on_mismatch,
            "vocabulary": vocabulary,
            "per_task": list(per_task),
            "max_shard_size": max_shard_size,
        }
        record = _record(chosen, typed, settings, (str(base), model.files), opened, plan)
        job = copy.deepcopy(record) | {"block_size": block_size, "inputs": _stamps(model, opened)}
        if resume and (target / RECORD).is_file() and read_json(target / RECORD)["job"] == job:
            return target
        warn_of_strangers(reader, opened)
        work = stack.enter_context(open_workspace(target, job, resume=resume))
        digests = stack.enter_context(Digests(hash_inputs, [model.files, *_files(opened)]))
        known = chosen.survey(view, typed) if chosen.survey else None

        def value(block: Block) -> Tensor:
            if not plan.tensors[block.tensor].merged:
                return model.read(block.tensor, block.start, block.stop)
            weights, deltas = reader.read(block)
            return weights + chosen.update(deltas, typed, known, block)

        shards = plan_shards({name: p.info for name, p in plan.tensors.items()}, most_bytes)
        write_shards(work, shards, value, view)
        write_tasks(work.model, model, opened, per_task, view)
        write_side_files(work.model, folder, model.config, dtype, plan.vocabulary, shards)
        for source, found in zip(
            (record["base"], *record["experts"]), digests.results(), strict=True
        ):
            source["files"] = found
        write_json(work.model / RECORD, {**record, "job": job})
        (work.model / "README.md").write_text(card(record), encoding="utf-8")
        work.publish()
    return target


def _method(slug: str, options: dict[str, Any], experts: int) -> tuple[Method | Continual, Any]:
    if slug not in METHODS:
        raise ConfigError(
            "method",
            expected="a merge method",
            found=repr(slug),
            mend=near_matches(slug, list(METHODS)),
        )
    if experts == 0:
        raise ConfigError(
            "experts", expected="at least one", found="none", mend="Name the models to merge."
        )
    typed = METHODS[slug].options.of(slug, options)
    typed.check(experts)
    return METHODS[slug], typed


def _check_words(dtype: str | None, arithmetic: str, on_mismatch: str, vocabulary: str) -> None:
    for name, given, allowed in (
        ("dtype", dtype, (None, *DTYPES)),
        ("arithmetic", arithmetic, ("auto", "float32", "float64")),
        ("on_mismatch", on_mismatch, ("error", "skip")),
        ("vocabulary", vocabulary, ("error", "base", "crop")),
    ):
        if given not in allowed:
            raise ConfigError(
                name,
                expected=f"one of {', '.join(str(choice) for choice in allowed)}",
                found=repr(given),
                mend=f"The default is {allowed[0]}.",
            )


def _check_counts(threads: int | None, block_size: int) -> None:
    for name, number in (("threads", threads), ("block_size", block_size)):
        if number is not None and (type(number) is not int or number < 1):
            raise ConfigError(name, expected="at least 1", found=repr(number), mend="Leave it out.")


def _check_continual(vocabulary: str, hash_inputs: bool) -> None:
    if vocabulary != "error":
        raise ConfigError(
            "vocabulary",
            expected="error: a bank keeps the base's vocabulary",
            found=repr(vocabulary),
            mend="Leave it out, and give fine-tunes with the base's vocabulary.",
        )
    if not hash_inputs:
        raise ConfigError(
            "hash_inputs",
            expected="true: a bank knows its base and its experts by their hashes",
            found="false",
            mend="Leave it out.",
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "device",
            expected="a device of this machine",
            found=f"{device!r}: {str(error).splitlines()[0]}",
            mend="Use cpu.",
        ) from error


def _warn_of_twins(experts: Sequence[Expert]) -> None:
    for first, second in shared_files(experts):
        warnings.warn(f"{first} and {second} are the same files: they vote twice.", stacklevel=3)


def _files(experts: Sequence[Expert]) -> list[list[Path]]:
    return [expert.files for expert in experts]


def _stamps(base: Checkpoint, experts: Sequence[Expert]) -> list[list[Any]]:
    files = [file for group in (base.files, *_files(experts)) for file in group]
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _record(
    method: Method,
    options: Any,
    settings: dict[str, Any],
    base: tuple[str, list[Path]],
    experts: Sequence[Expert],
    plan: Plan,
) -> dict[str, Any]:
    def source(name: str, files: Sequence[Path]) -> dict[str, Any]:
        return {"name": name, "files": {file.name: None for file in files}}

    return {
        "method": method.slug,
        "paper": method.paper,
        "options": _as_json(asdict(options)),
        "settings": settings,
        "base": source(*base),
        "experts": [source(expert.label, expert.files) for expert in experts],
        "notes": list(plan.notes),
        "sparing": sparing.__version__,
    }


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
