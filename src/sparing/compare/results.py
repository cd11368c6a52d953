"""The saved outcome of a comparison: `results.json`, schema version 1.

The classes below are the schema; docs/results.md explains every field to readers of the file.
"""

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparing.checkpoint import read_json, write_json
from sparing.errors import CheckpointError

SCHEMA_VERSION = 1

Status = Literal["ok", "failed", "reference"]


@dataclass(frozen=True)
class Summary:
    """One figure over seeds.

    Arguments:
        mean: over the seeds.
        std: sample standard deviation; 0 for a single seed.
        values: one a seed, in the order of `settings["seeds"]`.
    """

    mean: float
    std: float
    values: list[float]

    @classmethod
    def of(cls, values: list[float]) -> "Summary":
        """Summarise at least one value."""
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), spread, list(values))


@dataclass(frozen=True)
class LearningRate:
    """How a method's learning rate was chosen.

    Arguments:
        best: the one with the lowest loss on the selection slice.
        grid: all that were tried, ascending.
        selection_loss: of each, in nats a token; null where the run failed.
    """

    best: float
    grid: list[float]
    selection_loss: list[float | None]


@dataclass(frozen=True)
class Row:
    """One competitor.

    Arguments:
        method: as given on the command line.
        title: for people.
        status: "reference" rows are the untouched model and full fine-tuning.
        options: the options that the budget solver chose, and the fixed ones.
        note: a remark on the budget, such as "31 % below the budget"; may be empty.
        learning_rate: null for the untouched model.
        loss_before: validation loss of the untouched model, nats a token.
        loss: validation loss after training; null if failed.
        trainable_parameters: exact count.
        budget_share: trainable parameters (or adapter bytes) over the budget.
        adapter_bytes: of the saved weight file.
        peak_memory_bytes: of the training process (resident set, or CUDA allocated).
        seconds_per_step: median over the steps of the reported runs.
        latency_ratio: forward with the adapter over forward without, not merged.
        merged_latency_ratio: the same after merging; null if the method cannot merge.
        curve: for each seed the training loss at every step.
        error: one line, null unless failed; the traceback is in the run folder.
        adapter: folder of the saved adapter (first seed), relative to the run folder.
    """

    method: str
    title: str
    status: Status
    options: dict[str, Any]
    note: str = ""
    learning_rate: LearningRate | None = None
    loss_before: float | None = None
    loss: Summary | None = None
    trainable_parameters: int | None = None
    budget_share: float | None = None
    adapter_bytes: int | None = None
    peak_memory_bytes: int | None = None
    seconds_per_step: float | None = None
    latency_ratio: float | None = None
    merged_latency_ratio: float | None = None
    curve: list[list[float]] = field(default_factory=list)
    error: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Results:
    """A whole comparison.

    Arguments:
        model: name, source, parameters (total).
        data: name, block length, predicted tokens of each part, paragraphs dropped, fingerprint.
        budget: text, unit ("parameters" or "bytes") and limit as a whole number.
        settings: steps, batch size, schedule, optimiser, seeds and all else that was equal.
        rows: in the order of the command line, references first.
        environment: machine and versions.
        created: ISO 8601, UTC.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    budget: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    environment: dict[str, str]
    created: str
    schema_version: int = SCHEMA_VERSION

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file of this schema version.

        Raises:
            CheckpointError: no such file, no JSON, or another schema version.
        """
        content = read_json(path)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                str(path),
                expected=f"results of schema version {SCHEMA_VERSION}",
                found=f"version {version!r}",
                mend="Read it with the version of sparing that wrote it.",
            )
        rows = [_row(row) for row in content.pop("rows")]
        return cls(rows=rows, **content)


def _row(content: dict[str, Any]) -> Row:
    rate, loss = content.pop("learning_rate"), content.pop("loss")
    return Row(
        learning_rate=LearningRate(**rate) if rate else None,
        loss=Summary(**loss) if loss else None,
        **content,
    )
