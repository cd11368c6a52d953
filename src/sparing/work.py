"""Units of work that are done once: each leaves one `result.json` in its folder.

The result is written last and atomically. Work whose result is there is never done again; work
that was interrupted resumes.
"""

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sparing.checkpoint import UnwritableError, atomic_path, read_json, write_json
from sparing.errors import CheckpointError

Report = Callable[[int, float], None]


class Stopped(Exception):  # noqa: N818
    """Nobody waits for the work any more."""


class Work(ABC):
    """One unit of work, described by plain data that can be sent to another process.

    Attributes:
        folder: of this work, for everything it writes.
    """

    folder: str

    @property
    @abstractmethod
    def label(self) -> str:
        """For progress displays."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Training steps; 0 where nothing is trained."""

    @abstractmethod
    def act(self, report: Report, accelerator: Accelerator) -> dict[str, Any]:
        """Do it.

        Arguments:
            report: to be called with every step (from 1) and its loss.
            accelerator: devices and processes.

        Returns:
            plain data; of training, the loss on held-out text is its "selection_loss".
        """

    @property
    def result_file(self) -> Path:
        """Present once the work is done, or has failed for good."""
        return Path(self.folder) / "result.json"

    def run(self, report: Report = lambda step, loss: None) -> dict[str, Any]:
        """Do the work, or read what it gave before.

        An exception becomes the result `{"error": ...}`, with the traceback in the folder.

        Raises:
            UnwritableError: nothing more can be done here; the work can go on later.
            Stopped: so can one whose `report` asks for an end.
        """
        if self.result_file.exists():
            return dict(read_json(self.result_file))
        # Under FSDP, only one process would load the weights. But methods choose entries by them,
        # and accelerate cannot spread models that have buffers, as adapters do, from one process.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        accelerator.wait_for_everyone()  # every process has looked before one can leave a result
        try:
            result = self.act(report, accelerator)
        except (UnwritableError, Stopped):
            raise
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            if accelerator.is_main_process:
                with atomic_path(Path(self.folder) / "traceback.txt") as fresh:
                    fresh.write_text(traceback.format_exc())
            if isinstance(error, CheckpointError):
                return result  # a file can be mended, so the work is not done for good
        if accelerator.is_main_process:
            write_json(self.result_file, result)
        accelerator.wait_for_everyone()
        return result
