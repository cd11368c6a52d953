"""Writes the files of a merged model: shards block by block, task heads, config and tokenizer."""

import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from sparing.checkpoint import write_json
from sparing.merge.card import changed_config, side_files
from sparing.merge.checksum import checksum
from sparing.merge.experts import Expert, require_finite
from sparing.merge.view import Block, View, ordered_map
from sparing.merge.workspace import Workspace
from sparing.shards import INDEX, Checkpoint, Shard, ShardWriter, TensorInfo, index_of, pieces


def write_shards(
    work: Workspace, shards: Sequence[Shard], value: Callable[[Block], Tensor], view: View
) -> None:
    """Write the shards that an earlier run did not finish."""
    view.progress.stage("writing", sum(i.numel for s in shards for i in s.tensors.values()))
    for shard in shards:
        if work.finished(shard, view.threads):
            view.progress.advance(sum(info.numel for info in shard.tensors.values()))
            continue
        work.finish(shard, write_shard(work.partial(shard), shard, value, view))


def write_shard(
    path: Path, shard: Shard, value: Callable[[Block], Tensor], view: View
) -> list[tuple[Block, int]]:
    """Write one file, block by block.

    Arguments:
        path: of the file.
        shard: what goes into it.
        value: from a block to its numbers, of any floating type and device; called in threads.
        view: for threads, blocks and progress.

    Returns:
        Every block that was written, with its checksum.

    Raises:
        CheckpointError: NaN or infinity.
        OSError: the disk is full.
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
        return block, checksum(writer.write(block.tensor, block.start, result))

    written = []
    try:
        for done in ordered_map(write, blocks, view.threads):
            view.progress.advance(done[0].size)
            written.append(done)
    finally:
        writer.close()
    return written


def write_tasks(
    model: Path,
    base: Checkpoint,
    experts: Sequence[Expert],
    patterns: Sequence[str],
    view: View,
    first: int = 0,
) -> None:
    """Keep each expert's own tensors that were not merged.

    Arguments:
        model: folder of the result.
        base: the base model.
        experts: whose tensors.
        patterns: of their names.
        view: for threads, blocks and progress.
        first: number of the first expert, in the names of the files.
    """
    for number, expert in enumerate(experts, first):
        names = [n for n in expert.shapes if any(fnmatchcase(n, pattern) for pattern in patterns)]
        if not names:
            continue
        stored = getattr(expert, "checkpoint", None)
        infos = {}
        for name in names:
            own = stored.tensors.get(name) if stored is not None else None
            infos[name] = own or TensorInfo(base.tensors[name].dtype, expert.shapes[name])
        shard = Shard(f"{number}-{_word(expert.label)}.safetensors", infos)
        (model / "tasks").mkdir(exist_ok=True)

        def value(block: Block, of: Expert = expert, held: Checkpoint | None = stored) -> Tensor:
            place = (block.tensor, block.start, block.stop)
            if held is not None and block.tensor in held.tensors:
                return held.read(*place)
            weights = base.read(*place).float()
            return weights + of.delta(*place, weights)

        write_shard(model / "tasks" / shard.name, shard, value, view)


def _word(label: str) -> str:
    name = Path(label).name
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def write_side_files(
    model: Path,
    folder: Path,
    config: dict[str, Any] | None,
    dtype: str | None,
    rows: int | None,
    shards: Sequence[Shard],
) -> None:
    """Config, tokenizer and index of a merged model, from those of the base in `folder`."""
    for file in side_files(folder):
        shutil.copyfile(file, model / file.name)
    if config is not None and (dtype is not None or rows is not None):
        write_json(model / "config.json", changed_config(config, dtype, rows))
    if len(shards) > 1:
        write_json(model / INDEX, index_of(shards))
