"""A comparison that takes seconds, and what of it must be the same every time."""

import dataclasses
from typing import Any

from sparing.compare import Results, Settings

SMALL = Settings(
    model="tiny",
    data="python-topics",
    budget="3%",
    methods=("lora", 'mos{"r":2}'),
    steps=4,
    batch_size=2,
    block_length=32,
    selection_blocks=3,
    validation_blocks=5,
    learning_rates={"*": (1e-3, 1e-2)},
)
ARGUMENTS = [
    "compare", "tiny", "--data", "python-topics", "--budget", "3%",
    "--methods", 'lora,mos{"r":2}', "--steps", "4", "--batch-size", "2", "--block-length", "32",
    "--selection-blocks", "3", "--validation-blocks", "5",
]  # fmt: skip
MEASURED = ("peak_memory_bytes", "seconds_per_step", "latency_ratio", "merged_latency_ratio")


def numbers(results: Results) -> list[dict[str, Any]]:
    """The rows without what is timed or depends on the machine's memory."""
    rows = [dataclasses.asdict(row) for row in results.rows]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
