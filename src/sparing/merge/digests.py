"""SHA-256 of the inputs, computed while the merge goes on."""

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(path: Path) -> str:
    """SHA-256 of a file; the hub's cache names its files by it, so these need not be read."""
    if path.is_symlink() and _SHA256.fullmatch(path.resolve().name):
        return path.resolve().name
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """Hashes the input files in a thread of its own while the merge goes on."""

    def __init__(self, wanted: bool, groups: Sequence[Sequence[Path]]) -> None:
        self._wanted, self._groups = wanted, groups
        self._pool = ThreadPoolExecutor(1)
        files = dict.fromkeys(file for group in groups for file in group) if wanted else {}
        self._found = {file: self._pool.submit(sha256, file) for file in files}

    def __enter__(self) -> "Digests":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def results(self) -> list[dict[str, str | None]]:
        """For every group, digests by the names of the files."""
        return [
            {file.name: self._found[file].result() if self._wanted else None for file in group}
            for group in self._groups
        ]
