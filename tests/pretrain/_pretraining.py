"""A training run from scratch that takes a second."""

import textwrap
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sparing.pretrain import Settings

SMALL: dict[str, Any] = {
    "learning_rate": 0.05,
    "data": textwrap.__file__,  # any text
    "width": 16,
    "depth": 2,
    "head": 8,
    "steps": 6,
    "batch_size": 4,
    "block_length": 16,
    "validation_blocks": 4,
}


def small(**changes: Any) -> Settings:
    return Settings(**{**SMALL, **changes})


def weights(folder: Path) -> dict[str, Any]:
    """Of the final model."""
    return load_file(folder / "model" / "model.safetensors")
