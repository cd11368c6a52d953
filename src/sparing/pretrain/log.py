"""The log of a run: a line a step, in step with the checkpoint that it resumes from."""

import json
import time
from pathlib import Path
from typing import Any, TextIO

from sparing.checkpoint import atomic_path, unwritable
from sparing.pretrain.settings import Settings


class Log:
    """Appends `{"step", "loss", "rate", "tokens", "time"}`; "rate" is relative to the peak.

    A resumed run begins again after its last checkpoint. Lines of later steps, and one that was cut
    short, are dropped then.

    Arguments:
        path: of the file.
        settings: of the run.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path, self._plan = path, settings.train_plan()
        self._tokens = settings.tokens_a_step
        self._file: TextIO | None = None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()

    def step(self, step: int, loss: float) -> None:
        """Write the line of a step, counted from 1."""
        if self._file is None:
            self._keep(step - 1)
            self._file = self._path.open("a", encoding="utf-8")
        line = {
            "step": step,
            "loss": loss,
            "rate": self._plan.rate_factor(step - 1),
            "tokens": step * self._tokens,
            "time": round(time.time(), 3),
        }
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from error

    def _keep(self, lines: int) -> None:
        old = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        with atomic_path(self._path) as fresh:
            fresh.write_text("".join(old.splitlines(keepends=True)[:lines]), encoding="utf-8")
