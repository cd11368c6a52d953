"""A run folder belongs to one command: its settings, the versions it ran with, and its data."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sparing.checkpoint import read_json, write_json
from sparing.errors import CheckpointError
from sparing.reproduce import environment

SETTINGS_FILE = "settings.json"
Claim = Mapping[str, Mapping[str, Any]]


def claim_folder(folder: Path, claim: Claim) -> None:
    """Make the run folder this command's own, or check that it already is.

    Arguments:
        folder: need not exist.
        claim: what decides the numbers, in parts such as "settings"; plain data.

    Raises:
        CheckpointError: it belongs to another run, or cannot be written.
    """
    check_folder(folder, claim)
    if not (folder / SETTINGS_FILE).exists():
        write_json(folder / SETTINGS_FILE, claim)


def check_folder(folder: Path, claim: Claim) -> None:
    """Check that the run folder is nobody else's, without writing to it.

    Raises:
        CheckpointError: it belongs to another run.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        return
    theirs = read_json(path)
    for part, content in claim.items():
        for key, value in content.items():
            other = theirs.get(part, {}).get(key) if isinstance(theirs, dict) else None
            if other != value:
                raise CheckpointError(
                    str(folder),
                    expected=f"a run folder with {key} = {value!r}",
                    found=f"{key} = {other!r}",
                    mend="Choose another --out, or delete the folder.",
                )


def versions() -> dict[str, str]:
    """Of the packages that a number may depend on."""
    found = environment()
    return {name: found[name] for name in ("torch", "transformers", "peft", "sparing")}


@contextlib.contextmanager
def one_process_first() -> Iterator[None]:
    """Under `accelerate launch`, files are prepared by one process before the others look."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
            yield
    else:
        yield
