"""Kills and interruptions: the old output or nothing, and what was finished is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparing.errors import CheckpointError, ConfigError
from sparing.merge import merge
from sparing.merge.workspace import open_workspace

OPTIONS = {"ratio": 0.2, "max_shard_size": 40_000, "block_size": 1000, "threads": 2}

SLOW_MERGE = """
import sys, time
from pathlib import Path
from sparing.merge import merge
class Slow:
    stages = 0
    def stage(self, text, total): self.writing = text == "writing"
    def advance(self, done): time.sleep(0.02 if self.writing else 0)
root = Path(sys.argv[1])
merge(root / "base", [root / "e1", root / "e2"], "pcb-merging", root / "out", progress=Slow(),
      resume=len(sys.argv) > 2, ratio=0.2, max_shard_size=40_000, block_size=1000, threads=2)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {f"layer{i}": torch.randn(100, 80, generator=generator) for i in range(12)}
    for name, scale in (("base", 0.0), ("e1", 0.1), ("e2", 0.1)):
        (tmp_path / name).mkdir()
        state = {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "test"}')
    return tmp_path


def arguments(root: Path) -> tuple[Path, list[Path], str, Path]:
    return root / "base", [root / "e1", root / "e2"], "pcb-merging", root / "out"


def kill_while_writing(root: Path, *more: str) -> None:
    """kill -9 once some shards are finished and some are not."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_MERGE, str(root), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    model = root / ".out.merging" / "model"
    end = time.monotonic() + 60
    while len(list(model.glob("*.safetensors"))) < 3 and time.monotonic() < end:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(model.glob("*.safetensors"))) < 12


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_leaves_nothing_and_resuming_keeps_what_was_finished(root: Path) -> None:
    kill_while_writing(root)
    assert not (root / "out").exists()
    work = root / ".out.merging" / "model"
    finished = {
        path.name: path.stat().st_mtime_ns
        for path in work.glob("*.safetensors")
        if (root / ".out.merging" / f"{path.name}.json").is_file()
    }
    assert len(finished) >= 2
    out = merge(*arguments(root), resume=True, **OPTIONS)
    expected = merge(*arguments(root)[:3], root / "straight", **OPTIONS)
    assert contents(out) == contents(expected)
    for name, written in finished.items():
        assert (out / name).stat().st_mtime_ns == written
    assert not (root / ".out.merging").exists()


def test_a_kill_leaves_the_old_output_and_a_new_run_starts_over(root: Path) -> None:
    merge(root / "base", [root / "e1"], "average", root / "out")
    before = contents(root / "out")
    kill_while_writing(root, "resume")
    assert contents(root / "out") == before
    merge(*arguments(root), **OPTIONS)
    expected = merge(*arguments(root)[:3], root / "straight", **OPTIONS)
    assert contents(root / "out") == contents(expected)
    assert not (root / ".out.merging").exists()


def test_a_finished_shard_that_was_damaged_is_written_again(root: Path) -> None:
    kill_while_writing(root)
    work = root / ".out.merging" / "model"
    first, second = sorted(work.glob("*.safetensors"))[:2]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    out = merge(*arguments(root), resume=True, **OPTIONS)
    assert contents(out) == contents(merge(*arguments(root)[:3], root / "straight", **OPTIONS))


def test_another_merge_cannot_be_resumed(root: Path) -> None:
    kill_while_writing(root)
    with pytest.raises(CheckpointError, match="another one"):
        merge(*arguments(root), resume=True, **{**OPTIONS, "ratio": 0.3})
    state = load_file(root / "e1" / "model.safetensors")
    save_file(state, root / "e1" / "model.safetensors")
    with pytest.raises(CheckpointError, match="another one"):
        merge(*arguments(root), resume=True, **OPTIONS)
    assert (root / ".out.merging").exists()
    merge(*arguments(root), **OPTIONS)


def test_resuming_a_finished_merge_does_nothing(root: Path) -> None:
    out = merge(*arguments(root), **OPTIONS)
    before = out.stat().st_ino
    merge(*arguments(root), resume=True, **OPTIONS)
    assert out.stat().st_ino == before


def test_an_interruption_can_be_resumed(root: Path) -> None:
    class Impatient:
        def stage(self, text: str, total: int) -> None:
            self.left = 60 if text == "writing" else 10**9

        def advance(self, done: int) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(*arguments(root), progress=Impatient(), **OPTIONS)
    assert list((root / ".out.merging" / "model").glob("*.safetensors"))
    assert not (root / "out").exists()
    merge(*arguments(root), resume=True, **OPTIONS)
    assert json.loads((root / "out" / "merge.json").read_text())["method"] == "pcb-merging"


def test_two_merges_cannot_write_one_output(root: Path) -> None:
    with open_workspace(root / "out", {}, resume=False):
        with pytest.raises(ConfigError, match="no other merge"):
            merge(*arguments(root), **OPTIONS)
        assert (root / ".out.merging" / "job.json").is_file()


def test_a_place_that_cannot_be_written_is_named(root: Path) -> None:
    (root / "file").write_text("")
    with pytest.raises(CheckpointError, match="can be written"):
        merge(*arguments(root)[:3], root / "file" / "out", **OPTIONS)


def test_a_full_disk_is_named_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="No space left"):
        merge(*arguments(root), **OPTIONS)
    assert not (root / "out").exists()
    assert not (root / ".out.merging").exists()
