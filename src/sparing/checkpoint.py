"""Files that are never half-written, and errors that say what is wrong with a damaged one."""

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparing.errors import CheckpointError


class UnwritableError(CheckpointError):
    """A file cannot be written: no room, no permission, or a file where a folder should be."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well.

    Works for files and for folders (create one at the path). After an error, or a killed process,
    `target` is what it was before.

    Raises:
        UnwritableError: the folder cannot be written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise unwritable(target, error) from error
    fresh, replaced = work / target.name, work / f"{target.name}.replaced"
    try:
        yield fresh
        put_in_place(fresh, target, aside=replaced)
    except OSError as error:
        raise unwritable(target, error) from error
    except Exception as error:  # safetensors and torch report a full disk in ways of their own
        if _tells_of_the_disk(error):
            raise unwritable(target, error) from error
        raise
    finally:
        if replaced.is_dir() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(fresh: Path, target: Path, *, aside: Path) -> None:
    """Make a finished file or folder durable and move it to `target`.

    Arguments:
        fresh: what was written, on the same file system.
        target: its place; a folder that is there already is moved to `aside` first.
        aside: a path that does not exist, for the caller to delete afterwards.

    Raises:
        OSError: as the file system says.
    """
    _flush(fresh)
    if target.is_dir() and _swap(fresh, target):
        fresh.rename(aside)
        return
    if target.is_dir():
        target.rename(aside)
    fresh.replace(target)


def _swap(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, so that a kill never finds either gone.

    Returns:
        False where the system or the file system cannot do that.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux, which alone has the function
    paths = os.fsencode(first), os.fsencode(second)
    return rename(here, paths[0], here, paths[1], exchange) == 0


def write_json(target: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, sort_keys=False, ensure_ascii=False) + "\n"
    with atomic_path(target) as fresh:
        fresh.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing or no valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            str(path), expected="a JSON file", found="nothing", mend="Check the path."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            str(path),
            expected="valid JSON",
            found=str(error),
            mend="Delete the file and run again.",
        ) from error


def _flush(path: Path) -> None:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _tells_of_the_disk(error: Exception) -> bool:
    return any(mark in str(error) for mark in ("os error", "inline_container", "failed writing"))


def unwritable(target: Path, error: Exception) -> UnwritableError:
    """The error that names a place that cannot be written, and why."""
    return UnwritableError(
        str(target),
        expected="a folder that can be written and has room",
        found=f"{type(error).__name__}: {error}",
        mend="Free some space, mend the permissions, or choose another folder.",
    )
