"""Files are never half-written."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sparing import checkpoint
from sparing.checkpoint import UnwritableError, atomic_path, read_json, write_json
from sparing.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with atomic_path(target) as fresh:
        fresh.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["file.txt"]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_path(target) as fresh:
            fresh.mkdir()
            (fresh / content).write_text(content)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, OSError])
def test_an_error_inside_leaves_the_old_file(tmp_path: Path, kind: type[BaseException]) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as fresh:
            fresh.write_text("half")
            raise kind

    with pytest.raises(UnwritableError if kind is OSError else kind):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_an_error_inside_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()

    def fail() -> None:
        with atomic_path(target) as fresh:
            fresh.mkdir()
            (fresh / "half").touch()
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()

    def refuse(self: Path, other: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(checkpoint, "_swap", lambda first, second: False)
    with pytest.raises(UnwritableError, match="folder"), atomic_path(target) as fresh:
        fresh.mkdir()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="two renames elsewhere")
def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    seen: list[bool] = []
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (seen.append(target.is_dir()), rename(path, to))[1]
    )
    with atomic_path(target) as fresh:
        fresh.mkdir()
        (fresh / "new").touch()
    assert names(target) == ["new"]
    assert seen
    assert all(seen)


@pytest.mark.parametrize("at", [(os, "fsync"), (tempfile, "mkdtemp")])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "file.json"
    target.write_text("old")
    monkeypatch.setattr(*at, full)
    with pytest.raises(CheckpointError, match=r"file\.json.*No space left"):
        write_json(target, {})
    assert target.read_text() == "old"


WRITERS = {
    "plain": "fresh.write_bytes(bytes(50_000))",
    "safetensors": "save_file({'a': torch.zeros(50_000)}, fresh)",
    "torch": "torch.save(torch.zeros(50_000), fresh)",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_the_system_cuts_off_is_an_unwritable_one(tmp_path: Path, writer: str) -> None:
    program = f"""
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from sparing import checkpoint
from sparing.checkpoint import UnwritableError, atomic_path
try:
    with atomic_path(Path(sys.argv[1])) as fresh:
        {WRITERS[writer]}
except UnwritableError as error:
    print(error)
"""

    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "target")],
        capture_output=True,
        text=True,
        preexec_fn=little_room,
    )
    assert "target: expected a folder that can be written" in done.stdout, done.stderr
    assert names(tmp_path) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableError, match="file/below"):
        write_json(tmp_path / "file" / "below" / "x.json", {})


def test_json_round_trips_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"loss": 3.25, "name": "é"})
    assert read_json(path) == {"loss": 3.25, "name": "é"}
    path.write_text(path.read_text()[:-4])
    with pytest.raises(CheckpointError, match=r"x\.json.*valid JSON"):
        read_json(path)
    with pytest.raises(CheckpointError, match=r"y\.json"):
        read_json(tmp_path / "y.json")
