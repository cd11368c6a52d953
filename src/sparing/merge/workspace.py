"""A folder beside the output that takes its place when the merge is done, and survives a kill."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparing.checkpoint import put_in_place, read_json, unwritable, write_json
from sparing.errors import CheckpointError, ConfigError
from sparing.merge.checksum import checksum
from sparing.merge.view import Block, ordered_map
from sparing.shards import SafetensorsFile, Shard, as_bytes

RECORD = "merge.json"
_REPLACED = "replaced"


class Workspace:
    """What has been written so far; see `open_workspace`.

    Arguments:
        folder: hidden, beside the output.
        out: the output.

    Attributes:
        model: the folder that becomes the output.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self.model = folder / "model"

    def partial(self, shard: Shard) -> Path:
        """Where a shard is written before it is finished."""
        return self.folder / f"{shard.name}.partial"

    def finish(self, shard: Shard, checksums: Sequence[tuple[Block, int]]) -> None:
        """Put a durable file in its place and note what is in it."""
        self.partial(shard).replace(self.model / shard.name)
        pieces = [[block.tensor, block.start, block.stop, value] for block, value in checksums]
        write_json(self._journal(shard), pieces)

    def finished(self, shard: Shard, threads: int) -> bool:
        """Whether a shard was written before and is still as it was."""
        journal, path = self._journal(shard), self.model / shard.name
        if not (journal.is_file() and path.is_file()):
            return False
        try:
            file = SafetensorsFile(path)
        except CheckpointError:
            return False
        try:

            def unchanged(piece: list[Any]) -> bool:
                return checksum(as_bytes(file.read(*piece[:3]))) == piece[3]

            return file.tensors == dict(shard.tensors) and all(
                ordered_map(unchanged, read_json(journal), threads)
            )
        finally:
            file.close()

    def _journal(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}.json"

    def publish(self, finished: Path | None = None) -> None:
        """Let the model, or another folder that is finished, take the output's place."""
        replaced = self.folder / _REPLACED
        shutil.rmtree(replaced, ignore_errors=True)
        put_in_place(finished or self.model, self.out, aside=replaced)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def open_workspace(out: Path, job: dict[str, Any], *, resume: bool) -> Iterator[Workspace]:
    """A workspace for one job, locked against others.

    After an error it is removed, unless `resume`; after an interruption or a kill it stays, so that
    a later run can resume.

    Arguments:
        out: the output; replaced only by `Workspace.publish`.
        job: what is merged and how; decides whether an old workspace is of the same merge.
        resume: keep what an interrupted run of the same job has written.

    Raises:
        CheckpointError: an old workspace is of another merge, or a file cannot be written.
        ConfigError: the output may not be replaced, or another process is writing it.
    """
    _check_replaceable(out)
    folder = _folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(out, error) from error
    keep = resume
    try:
        _lock(lock, out)
        put_back(out)
        _prepare(folder, job, resume=resume)
        yield Workspace(folder, out)
        keep = False
    except OSError as error:
        raise unwritable(out, error) from error
    except _AnotherMerge as error:
        keep = True
        raise error.told from None
    except (KeyboardInterrupt, SystemExit):
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


class _AnotherMerge(Exception):  # noqa: N818 (carries an error out; never seen)
    def __init__(self, told: Exception) -> None:
        self.told = told


def _lock(lock: int, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise _AnotherMerge(
            ConfigError(
                f"out {out}",
                expected="no other merge that writes there",
                found="one that is running",
                mend="Wait for it, or choose another folder.",
            )
        ) from None


def put_back(out: Path) -> None:
    """Where a folder cannot be swapped in one step, a kill may find the output moved aside."""
    aside = _folder(out) / _REPLACED
    if aside.is_dir() and not out.exists():
        aside.rename(out)


def _folder(out: Path) -> Path:
    return out.parent / f".{out.name}.merging"


def _prepare(folder: Path, job: dict[str, Any], *, resume: bool) -> None:
    noted = folder / "job.json"
    if resume and noted.is_file():
        if read_json(noted) != job:
            raise _AnotherMerge(
                CheckpointError(
                    str(folder),
                    expected="the interrupted merge of these models with these options",
                    found="another one",
                    mend="Repeat the command that was interrupted, or leave out --resume.",
                )
            )
        return
    for old in folder.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != "lock":
            old.unlink()
    (folder / "model").mkdir()
    write_json(noted, job)


def _check_replaceable(out: Path) -> None:
    """Only what a merge wrote is ever replaced."""
    if out.is_dir() and (not any(out.iterdir()) or (out / RECORD).is_file()):
        return
    if out.exists():
        raise ConfigError(
            f"out {out}",
            expected="a new folder, or one that an earlier merge wrote",
            found="something else",
            mend="Choose another folder, or remove it yourself.",
        )


def check_places(target: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is, or holds, a folder of the inputs.

    Raises:
        ConfigError: it does.
    """
    for path in inputs:
        place = path if path.is_dir() else path.parent
        if target.resolve() in (place.resolve(), *place.resolve().parents):
            raise ConfigError(
                f"out {target}",
                expected="a folder of its own",
                found=f"one that holds the input {path}",
                mend="Choose another folder.",
            )
