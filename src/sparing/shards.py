"""Safetensors, a piece of a tensor at a time: checkpoints of any size in little memory.

Reading and writing go through plain positioned file calls instead of memory maps, so that resident
memory is what a caller holds and no more, and so that many threads can share one file.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sparing.budget import Budget, Unit
from sparing.checkpoint import read_json
from sparing.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor.

    Arguments:
        dtype: of its numbers.
        shape: of the tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in a file."""
        return self.numel * self.dtype.itemsize


class SafetensorsFile:
    """One safetensors file, opened for reading; its header is checked against its length.

    Arguments:
        path: of the file.

    Attributes:
        tensors: what is in it, by name, in the order of the file.

    Raises:
        CheckpointError: no such file, damaged, truncated, or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                str(path), expected="a file that can be read", found=str(error), mend="Fetch it."
            ) from error
        try:
            self.tensors, self._offsets = self._read_header(os.fstat(self._descriptor).st_size)
        except BaseException:
            self.close()
            raise

    def _read_header(self, size: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        start = os.pread(self._descriptor, 8, 0)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise self._damaged(f"{size:,} bytes that do not start with a whole header")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            header.pop("__metadata__", None)
            listed = sorted(
                (entry["data_offsets"][0], entry["data_offsets"][1], name, entry)
                for name, entry in header.items()
            )
            tensors, offsets, end = {}, {}, 0
            for first, last, name, entry in listed:
                info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                sized = all(type(side) is int and side >= 0 for side in info.shape)
                if not sized or first != end or last - first != info.nbytes:
                    raise self._damaged(f"a wrong shape or wrong offsets of tensor {name!r}")
                tensors[name], offsets[name], end = info, 8 + length + first, last
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._damaged(f"a header with {type(error).__name__}: {error}") from error
        if size != 8 + length + end:
            kind = "truncated to" if size < 8 + length + end else "followed by rubbish, in all"
            raise self._damaged(f"{kind} {size:,} of {8 + length + end:,} bytes")
        return tensors, offsets

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers `start` to `stop` of a tensor, flat and in the type of the file.

        Raises:
            CheckpointError: the file ended meanwhile.
        """
        info = self.tensors[name]
        stop = info.numel if stop is None else stop
        buffer = torch.empty((stop - start) * info.dtype.itemsize, dtype=torch.uint8)
        view, done = as_bytes(buffer), 0
        offset = self._offsets[name] + start * info.dtype.itemsize
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise self._damaged(f"its end inside tensor {name!r}")
            done += count
        return buffer.view(info.dtype)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _damaged(self, found: str) -> CheckpointError:
        return CheckpointError(
            str(self.path),
            expected="a complete safetensors file",
            found=found,
            mend="The file is damaged or of another kind; fetch or save it again.",
        )


class Checkpoint:
    """The weights of a folder, or of one file, read lazily.

    Arguments:
        path: a folder with `model.safetensors`, or with shards and their index, or one file.

    Attributes:
        tensors: what is in it, by name, in the order of the files.
        files: the safetensors files, in order.
        config: of `config.json`, or None.

    Raises:
        CheckpointError: damaged, truncated or incomplete files, or pickles.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _find(path)
        self._opened: list[SafetensorsFile] = []
        self._holder: dict[str, SafetensorsFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for file in self.files:
                self._opened.append(SafetensorsFile(file))
                self._add(self._opened[-1])
            self._check_index()
        except BaseException:
            self.close()
            raise
        config = path / "config.json"
        self.config: dict[str, Any] | None = read_json(config) if config.is_file() else None

    def _add(self, file: SafetensorsFile) -> None:
        for name, info in file.tensors.items():
            if name in self.tensors:
                raise CheckpointError(
                    f"tensor {name!r}",
                    expected="it to be in one file",
                    found=f"it in {self._holder[name].path} and {file.path}",
                    mend="Delete the file that does not belong to this model.",
                )
            self.tensors[name], self._holder[name] = info, file

    def _check_index(self) -> None:
        index = self.path / INDEX
        if not index.is_file():
            return
        listed = read_json(index)["weight_map"]
        wrong = [n for n, f in listed.items() if n not in self.tensors or self.file(n).name != f]
        if wrong:
            raise CheckpointError(
                str(self.path),
                expected=f"the tensors that {INDEX} lists",
                found=f"no {wrong[0]!r} in {listed[wrong[0]]}",
                mend="A shard belongs to another model; fetch the folder again.",
            )

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._holder[name].path

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers `start` to `stop` of a tensor, flat and in the type of the file."""
        return self._holder[name].read(name, start, stop)

    def close(self) -> None:
        """Close the files."""
        for file in self._opened:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _find(path: Path) -> list[Path]:
    if path.is_file():
        _refuse_pickle(path, [path])
        return [path]
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                str(index), expected="a weight_map", found="none", mend="Fetch it again."
            ) from error
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if not files:
        _refuse_pickle(path, sorted(path.glob("*")))
    raise CheckpointError(
        str(path),
        expected=f"{SINGLE}, or shards with {INDEX}",
        found=f"{len(files)} safetensors files and no index" if files else "no weights",
        mend="Save the model again with save_pretrained, or check the path.",
    )


def _refuse_pickle(path: Path, files: Sequence[Path]) -> None:
    pickles = [file.name for file in files if file.suffix in _PICKLES]
    if pickles:
        raise CheckpointError(
            str(path),
            expected="weights as safetensors",
            found=f"the pickle {pickles[0]}, which can run code when it is loaded",
            mend="If you trust it, load it with transformers and save_pretrained it elsewhere.",
        )


@dataclass(frozen=True)
class Shard:
    """One file to be written.

    Arguments:
        name: of the file.
        tensors: what goes into it, in order.
    """

    name: str
    tensors: Mapping[str, TensorInfo]


def plan_shards(tensors: Mapping[str, TensorInfo], most_bytes: int) -> list[Shard]:
    """Cut tensors into files of at most `most_bytes`; a tensor that is larger gets its own.

    Returns:
        One shard named `model.safetensors`, or several named as in the Hugging Face format.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if groups[-1] and size + info.nbytes > most_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of the index file of several shards."""
    size = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    where = {name: shard.name for shard in shards for name in shard.tensors}
    return {"metadata": {"total_size": size}, "weight_map": where}


class ShardWriter:
    """Writes the numbers of one shard in any order, from any thread.

    The file has its full size from the start, so that a full disk shows at once.

    Arguments:
        path: to write to.
        shard: what will be in it.

    Raises:
        OSError: the file cannot be written or the disk is full.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, info in shard.tensors.items():
            header[name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [end, end + info.nbytes],
            }
            end += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        self._shard = shard
        self._offsets = {
            name: 8 + len(text) + header[name]["data_offsets"][0] for name in shard.tensors
        }
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _reserve(self._descriptor, 8 + len(text) + end)
            _write(self._descriptor, memoryview(struct.pack("<Q", len(text)) + text), 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, name: str, start: int, values: Tensor) -> memoryview:
        """Write flat numbers of a tensor's own type from number `start` on.

        Returns:
            The bytes written.

        Raises:
            OSError: the disk is full or failing.
        """
        assert values.dtype == self._shard.tensors[name].dtype
        data = as_bytes(values)
        _write(self._descriptor, data, self._offsets[name] + start * values.dtype.itemsize)
        return data

    def close(self) -> None:
        """Make the file durable and close it."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def as_bytes(values: Tensor) -> memoryview:
    """The bytes of a flat tensor on the CPU, not copied if it is contiguous."""
    if not values.numel():
        return memoryview(b"")
    array: Any = values.contiguous().view(torch.uint8).numpy()
    return memoryview(array)


def pieces(numel: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `most` numbers that cover `numel` of them; none if it is 0."""
    for start in range(0, numel, most):
        yield start, min(numel, start + most)


def parse_size(size: int | str) -> int:
    """Bytes as a number or as text, such as 500MB or 4GiB.

    Raises:
        ConfigError: no size, or less than one byte.
    """
    if isinstance(size, str) and not size.strip().isdigit():
        budget = Budget.parse(size)
        if budget.unit is Unit.BYTES:
            return int(budget.amount)
    elif not isinstance(size, bool) and int(size) >= 1:
        return int(size)
    raise ConfigError(
        "max_shard_size",
        expected="bytes, or text such as 500MB or 4GiB",
        found=repr(size),
        mend="The default is 5GB.",
    )


def same_content(
    first: Checkpoint, name: str, second: Checkpoint, other: str, most: int = 1 << 20
) -> bool:
    """Whether two tensors of one shape and type hold the same bytes."""
    ranges: Iterable[tuple[int, int]] = pieces(first.tensors[name].numel, most)
    return first.tensors[name] == second.tensors[other] and all(
        torch.equal(
            first.read(name, *ends).view(torch.uint8), second.read(other, *ends).view(torch.uint8)
        )
        for ends in ranges
    )
