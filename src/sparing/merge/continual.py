"""Experts arrive one after another: begin a bank on disk, and let it go on.

Every arrival makes a whole new folder beside the old one, sharing by links what does not change,
and takes its place in one step. A kill leaves the bank as it was before the arrival or after it.
"""

import hashlib
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import sparing
from sparing.checkpoint import put_in_place, read_json, write_json
from sparing.errors import CheckpointError, ConfigError
from sparing.merge.arrivals import arrive, compare
from sparing.merge.bank_folder import require_bank
from sparing.merge.bank_job import Machine, Setting, Settings
from sparing.merge.card import card
from sparing.merge.digests import sha256
from sparing.merge.experts import ADAPTER_CONFIG, Expert, locate, open_expert
from sparing.merge.ledger import Ledger, Task
from sparing.merge.made_it import METHOD, MadeItOptions
from sparing.merge.skeleton import layout
from sparing.merge.view import BLOCK_SIZE, Progress, Silent, default_threads, one_torch_thread
from sparing.merge.workspace import RECORD, Workspace, check_places, open_workspace, put_back
from sparing.shards import Checkpoint


def begin(
    base: str | Path,
    experts: Sequence[str | Path],
    out: Path,
    options: MadeItOptions,
    settings: Settings,
    machine: Machine,
    *,
    resume: bool,
) -> Path:
    """Make a bank of some experts; `merge` calls it.

    Arguments:
        base: folder, file, hub id or built-in name.
        experts: in the order of their arrival.
        out: folder for the bank; takes the place of an old one when all have arrived.
        options: of MADE-IT.
        settings: the same for all arrivals, later ones included.
        machine: to compute with.
        resume: keep the arrivals of an interrupted run.

    Raises:
        CheckpointError: models that do not fit together, damaged files, NaN.
        ConfigError: no such model.
    """
    with ExitStack() as stack:
        source = _Source(base, stack)
        stack.enter_context(one_torch_thread())
        setting = source.setting(options, settings, machine)
        coming = _open(experts, setting, stack)
        check_places(out, [source.folder, *(one.expert.path for one in coming)])
        for one, first in _twins(coming):
            warnings.warn(f"{one.label} is {first} once more: left out.", stacklevel=3)
            coming.remove(one)
        record = _new_record(source, options, settings)
        if resume and _finished(out, record, coming):
            return out
        job = {"record": record, "experts": [one.record() for one in coming]}
        work = stack.enter_context(open_workspace(out, job, resume=resume))
        bank = work.folder / "bank"
        if bank.is_dir():
            record = read_json(bank / RECORD)
        for one in coming[len(record["experts"]) :]:
            record = _step(work, setting, bank if bank.is_dir() else None, one, record)
            put_in_place(work.model, bank, aside=work.folder / "old")
            shutil.rmtree(work.folder / "old", ignore_errors=True)
        work.publish(bank)
    return out


def continue_merge(
    folder: str | Path,
    experts: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    block_size: int = BLOCK_SIZE,
    progress: Progress | None = None,
) -> Path:
    """Let more experts arrive in a bank, one after another.

    After each the bank is complete. An expert that is in it already is noted and passed over, so
    that an interrupted call can be repeated as it was.

    Arguments:
        folder: of the bank.
        experts: models or adapters, in the order of their arrival.
        base: where the base is now, if it has moved; it is recognised by its hash.
        threads: layers at a time; None is one a core, at most 8.
        device: to compute on.
        block_size: numbers at a time, of tensors that are only averaged.
        progress: is told what happens.

    Returns:
        `folder`.

    Raises:
        CheckpointError: no bank, another base, models that do not fit, damaged files, NaN.
        ConfigError: no such model, or another process changes the bank.
    """
    out = Path(folder).expanduser().absolute()
    put_back(out)
    require_bank(out)
    if not experts:
        raise ConfigError(
            "experts", expected="at least one", found="none", mend="Name the models to merge."
        )
    record = read_json(out / RECORD)
    options = MadeItOptions.of(METHOD.slug, record["options"])
    settings = Settings(**{**record["settings"], "per_task": tuple(record["settings"]["per_task"])})
    machine = Machine(threads or default_threads(), block_size, device, progress or Silent())
    with ExitStack() as stack:
        source = _Source(base or record["base"]["name"], stack)
        source.require_same(record["base"])
        stack.enter_context(one_torch_thread())
        setting = source.setting(options, settings, machine)
        for one in _open(experts, setting, stack):
            known = Ledger.load(out).knows(one.digest)
            if known is not None:
                warnings.warn(f"{one.label} is {known}, which is in the bank.", stacklevel=2)
                continue
            # A workspace an arrival: the next must start from what this one has published.
            with open_workspace(out, {"continue": one.digest}, resume=False) as work:
                _step(work, setting, out, one, read_json(out / RECORD))
                work.publish()
    return out


@dataclass(frozen=True)
class _Coming:
    """An expert that is to arrive.

    Arguments:
        expert: opened.
        files: SHA-256 by the names of its files.
        digest: of them all, and of an adapter's config, since its scale is in there.
    """

    expert: Expert
    files: dict[str, str]
    digest: str

    @classmethod
    def of(cls, expert: Expert) -> Self:
        files = {file.name: sha256(file) for file in expert.files}
        digest = hashlib.sha256("".join(files.values()).encode())
        config = expert.path / ADAPTER_CONFIG
        if not expert.complete and config.is_file():
            digest.update(config.read_bytes())
        return cls(expert, files, digest.hexdigest())

    @property
    def label(self) -> str:
        return self.expert.label

    def record(self) -> dict[str, Any]:
        return {"name": self.label, "digest": self.digest, "files": self.files}


def _step(
    work: Workspace,
    setting: Setting,
    previous: Path | None,
    one: _Coming,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Write `work.model`, the bank with one more expert; returns its record."""
    scratch = work.folder / "scratch"
    for folder in (work.model, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    work.model.mkdir()
    task = Task(one.label, one.digest)
    ledger = arrive(setting, previous, one.expert, task, work.model, scratch)
    shutil.rmtree(scratch)
    experts = [*record["experts"], one.record()]
    record = {**record, "experts": experts, "notes": list(ledger.notes)}
    write_json(work.model / RECORD, record)
    (work.model / "README.md").write_text(card(record), encoding="utf-8")
    return record


def _twins(coming: Sequence[_Coming]) -> list[tuple[_Coming, str]]:
    """Those that came before, with the label of the first."""
    first: dict[str, str] = {}
    found = []
    for one in coming:
        if one.digest in first:
            found.append((one, first[one.digest]))
        first.setdefault(one.digest, one.label)
    return found


class _Source:
    """The base model, opened.

    Arguments:
        name: folder, file, hub id or built-in name.
        stack: closes it.
    """

    def __init__(self, name: str | Path, stack: ExitStack) -> None:
        self.name = str(name)
        self.folder = locate(name)
        self.checkpoint = stack.enter_context(Checkpoint(self.folder))

    def setting(self, options: MadeItOptions, settings: Settings, machine: Machine) -> Setting:
        """For arrivals of its fine-tunes."""
        places = layout(self.checkpoint, self.folder, options.target_modules)
        return Setting(self.checkpoint, self.folder, places, options, settings, machine)

    def record(self) -> dict[str, Any]:
        """Its name, hashes, and what tells that its files have not changed since."""
        files = self.checkpoint.files
        return {
            "name": self.name,
            "files": {file.name: sha256(file) for file in files},
            "stamps": self._stamps(),
        }

    def require_same(self, recorded: dict[str, Any]) -> None:
        """Raise a `CheckpointError` unless this is the base of a bank."""
        if self._stamps() == recorded["stamps"]:
            return
        found = {file.name: sha256(file) for file in self.checkpoint.files}
        different = [
            n for n in {**found, **recorded["files"]} if found.get(n) != recorded["files"].get(n)
        ]
        if different:
            raise CheckpointError(
                f"base {self.name}, {different[0]}",
                expected=f"the bank's base, SHA-256 {recorded['files'].get(different[0])}",
                found=f"{found.get(different[0])}",
                mend="Give the base that the bank was begun with.",
            )

    def _stamps(self) -> list[list[Any]]:
        files = self.checkpoint.files
        return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _open(names: Sequence[str | Path], setting: Setting, stack: ExitStack) -> list[_Coming]:
    """Open all experts and compare them with the base, before anything is written."""
    opened = []
    for name in names:
        opened.append(open_expert(name, setting.base, setting.folder))
        stack.callback(opened[-1].close)
        compare(setting, opened[-1])
    return [_Coming.of(expert) for expert in opened]


def _new_record(source: _Source, options: MadeItOptions, settings: Settings) -> dict[str, Any]:
    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    return {
        "method": METHOD.slug,
        "paper": METHOD.paper,
        "options": plain(asdict(options)),
        "settings": plain(asdict(settings)),
        "base": source.record(),
        "experts": [],
        "notes": [],
        "sparing": sparing.__version__,
    }


def _finished(out: Path, record: dict[str, Any], coming: Sequence[_Coming]) -> bool:
    if not (out / RECORD).is_file():
        return False
    found = read_json(out / RECORD)
    same = all(found.get(key) == record[key] for key in ("method", "options", "settings", "base"))
    return same and found["experts"] == [one.record() for one in coming]
