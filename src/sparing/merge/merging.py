"""Merge models of any size in the memory of a few blocks of numbers."""

import copy
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import sparing
from sparing.checkpoint import read_json, write_json
from sparing.errors import CheckpointError, ConfigError, near_matches
from sparing.merge import average, dare, pcb_merging, task_arithmetic, ties
from sparing.merge.card import card, changed_config, sha256, side_files
from sparing.merge.experts import Expert, locate, open_expert, require_finite, shared_files
from sparing.merge.method import Method
from sparing.merge.plan import OnMismatch, Plan, Planner, Vocabulary
from sparing.merge.view import (
    BLOCK_SIZE,
    Block,
    Progress,
    Silent,
    View,
    one_torch_thread,
    ordered_map,
)
from sparing.merge.workspace import RECORD, Workspace, open_workspace
from sparing.shards import (
    INDEX,
    Checkpoint,
    Shard,
    ShardWriter,
    TensorInfo,
    index_of,
    parse_size,
    pieces,
    plan_shards,
)

METHODS: dict[str, Method] = {
    module.METHOD.slug: module.METHOD
    for module in (average, task_arithmetic, ties, dare, pcb_merging)
}
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MOST_THREADS = 8
_SAMPLE = 4096  # numbers that tell a fine-tune from another model


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
        out: folder for the result, which `from_pretrained` loads; replaced at the very end, and
            only if it is new or was written by a merge.
        resume: keep the finished shards of an interrupted run of the same merge.
        threads: that read, compute and write at a time; None is one a core, at most 8.
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
    threads = threads or min(_MOST_THREADS, os.cpu_count() or 1)
    most_bytes = parse_size(max_shard_size)
    target, folder = Path(out).expanduser().absolute(), locate(base)
    progress = progress or Silent()
    with ExitStack() as stack:
        stack.enter_context(one_torch_thread())
        model = stack.enter_context(Checkpoint(folder))
        opened: list[Expert] = []
        for name in experts:
            opened.append(open_expert(name, model, folder))
            stack.callback(opened[-1].close)
        _check_places(target, folder, opened)
        _warn_of_twins(opened)
        plan = Planner(
            model,
            opened,
            dtype=_DTYPES[dtype] if dtype else None,
            on_mismatch=on_mismatch,
            vocabulary=vocabulary,
            per_task=per_task,
        ).plan()
        reader = _Reader(model, opened, plan, _arithmetic(arithmetic, model, opened), device)
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
        _warn_of_strangers(reader, opened)
        work = stack.enter_context(open_workspace(target, job, resume=resume))
        digests = stack.enter_context(_Digests(hash_inputs, [model.files, *_files(opened)]))
        known = chosen.survey(view, typed) if chosen.survey else None

        def value(block: Block) -> Tensor:
            if not plan.tensors[block.tensor].merged:
                return model.read(block.tensor, block.start, block.stop)
            weights, deltas = reader.read(block)
            return weights + chosen.update(deltas, typed, known, block)

        shards = plan_shards({name: p.info for name, p in plan.tensors.items()}, most_bytes)
        _write_shards(work, shards, value, view)
        _write_tasks(work, model, opened, per_task, view)
        _write_side_files(work, folder, model.config, dtype, plan.vocabulary, shards)
        for source, found in zip(
            (record["base"], *record["experts"]), digests.results(), strict=True
        ):
            source["files"] = found
        write_json(work.model / RECORD, {**record, "job": job})
        (work.model / "README.md").write_text(card(record), encoding="utf-8")
        work.publish()
    return target


def _method(slug: str, options: dict[str, Any], experts: int) -> tuple[Method, Any]:
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
        ("dtype", dtype, (None, *_DTYPES)),
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


def _check_places(target: Path, folder: Path, experts: Sequence[Expert]) -> None:
    for path in (folder, *(expert.path for expert in experts)):
        place = path if path.is_dir() else path.parent
        if target.resolve() in (place.resolve(), *place.resolve().parents):
            raise ConfigError(
                f"out {target}",
                expected="a folder of its own",
                found=f"one that holds the input {path}",
                mend="Choose another folder.",
            )


def _warn_of_twins(experts: Sequence[Expert]) -> None:
    for first, second in shared_files(experts):
        warnings.warn(f"{first} and {second} are the same files: they vote twice.", stacklevel=3)


def _arithmetic(choice: str, base: Checkpoint, experts: Sequence[Expert]) -> torch.dtype:
    if choice != "auto":
        return _DTYPES[choice]
    infos = list(base.tensors.values())
    for expert in experts:
        checkpoint = getattr(expert, "checkpoint", None)
        if expert.complete and checkpoint is not None:
            infos += checkpoint.tensors.values()
    precise = any(info.dtype in (torch.float32, torch.float64) for info in infos)
    return torch.float64 if precise else torch.float32


class _Reader:
    """Reads blocks of the base and of all task vectors.

    Attributes:
        sizes: of the tensors to be merged.
        dtype: of all that is read.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Expert],
        plan: Plan,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self._base, self._experts, self._plan = base, experts, plan
        self.dtype, self._device = dtype, device
        self.sizes = {n: p.info.numel for n, p in plan.tensors.items() if p.merged}
        self._shapes = [expert.shapes for expert in experts]
        if not any(self.sizes.values()):
            raise CheckpointError(
                "experts",
                expected="tensors that they share with the base",
                found="nothing to merge",
                mend="Check that the experts are fine-tunes of the base.",
            )

    def read(self, block: Block) -> tuple[Tensor, list[Tensor]]:
        """The base's numbers, and every expert's task vector."""
        name, start, stop = block.tensor, block.start, block.stop
        weights = self._base.read(name, start, stop).to(self._device, self.dtype)
        require_finite(weights, str(self._base.file(name)), name)
        deltas = []
        for place, (expert, source) in enumerate(
            zip(self._experts, self._plan.tensors[name].sources, strict=True)
        ):
            delta = torch.zeros_like(weights)
            if source is not None:
                has = TensorInfo(self.dtype, self._shapes[place][source]).numel
                end = max(start, min(stop, has))  # its vocabulary may be shorter
                if end > start:
                    found = expert.delta(source, start, end, weights[: end - start])
                    delta = found if end == stop else torch.cat((found, delta[end - start :]))
            deltas.append(delta)
        return weights, deltas


def _warn_of_strangers(reader: _Reader, experts: Sequence[Expert]) -> None:
    """A fine-tune is near its base; a model that is farther than 0 is from another one."""
    name = max(reader.sizes, key=lambda n: reader.sizes[n])
    weights, deltas = reader.read(Block(name, 0, min(reader.sizes[name], _SAMPLE)))
    for expert, delta in zip(experts, deltas, strict=True):
        if delta.norm() > weights.norm() > 0:
            warnings.warn(
                f"{expert.label} is farther from the base than the base from 0 in {name!r}: it is "
                "hardly a fine-tune of this base.",
                stacklevel=3,
            )


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


class _Digests:
    """Hashes the input files in a thread of its own while the merge goes on."""

    def __init__(self, wanted: bool, groups: Sequence[Sequence[Path]]) -> None:
        self._wanted, self._groups = wanted, groups
        self._pool = ThreadPoolExecutor(1)
        files = dict.fromkeys(file for group in groups for file in group) if wanted else {}
        self._found = {file: self._pool.submit(sha256, file) for file in files}

    def __enter__(self) -> "_Digests":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def results(self) -> list[dict[str, str | None]]:
        """For every group, digests by the names of the files."""
        return [
            {file.name: self._found[file].result() if self._wanted else None for file in group}
            for group in self._groups
        ]


def _write_shards(
    work: Workspace, shards: Sequence[Shard], value: Callable[[Block], Tensor], view: View
) -> None:
    view.progress.stage("writing", sum(i.numel for s in shards for i in s.tensors.values()))
    for shard in shards:
        if work.finished(shard, view.threads):
            view.progress.advance(sum(info.numel for info in shard.tensors.values()))
            continue
        work.finish(shard, _write_shard(work.partial(shard), shard, value, view))


def _write_shard(
    path: Path, shard: Shard, value: Callable[[Block], Tensor], view: View
) -> list[tuple[Block, int]]:
    """Returns:
    Every block that was written, with its checksum.
    """
    writer = ShardWriter(path, shard)
    blocks = (
        Block(name, start, stop)
        for name, info in shard.tensors.items()
        for start, stop in pieces(info.numel, view.block_size)
    )

    def write(block: Block) -> tuple[Block, int]:
        result = value(block).to("cpu", shard.tensors[block.tensor].dtype)
        if result.is_floating_point():
            require_finite(result, "the result", block.tensor)
        return block, zlib.crc32(writer.write(block.tensor, block.start, result))

    written = []
    try:
        for done in ordered_map(write, blocks, view.threads):
            view.progress.advance(done[0].size)
            written.append(done)
    finally:
        writer.close()
    return written


def _write_tasks(
    work: Workspace,
    base: Checkpoint,
    experts: Sequence[Expert],
    patterns: Sequence[str],
    view: View,
) -> None:
    """Keep each expert's own tensors that were not merged."""
    for number, expert in enumerate(experts):
        names = [n for n in expert.shapes if any(fnmatchcase(n, pattern) for pattern in patterns)]
        if not names:
            continue
        stored = getattr(expert, "checkpoint", None)
        infos = {}
        for name in names:
            own = stored.tensors.get(name) if stored is not None else None
            infos[name] = own or TensorInfo(base.tensors[name].dtype, expert.shapes[name])
        shard = Shard(f"{number}-{_word(expert.label)}.safetensors", infos)
        (work.model / "tasks").mkdir(exist_ok=True)

        def value(block: Block, of: Expert = expert, held: Checkpoint | None = stored) -> Tensor:
            place = (block.tensor, block.start, block.stop)
            if held is not None and block.tensor in held.tensors:
                return held.read(*place)
            weights = base.read(*place).float()
            return weights + of.delta(*place, weights)

        _write_shard(work.model / "tasks" / shard.name, shard, value, view)


def _word(label: str) -> str:
    name = Path(label).name
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _write_side_files(
    work: Workspace,
    folder: Path,
    config: dict[str, Any] | None,
    dtype: str | None,
    rows: int | None,
    shards: Sequence[Shard],
) -> None:
    for file in side_files(folder):
        shutil.copyfile(file, work.model / file.name)
    if config is not None and (dtype is not None or rows is not None):
        write_json(work.model / "config.json", changed_config(config, dtype, rows))
    if len(shards) > 1:
        write_json(work.model / INDEX, index_of(shards))
