"""Everything that decides the numbers of a comparison, and the run folder that belongs to it."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.budget import Budget
from sparing.errors import ConfigError, near_matches

_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "block_length": 2,
    "selection_blocks": 1,
    "validation_blocks": 1,
}
_CHOICES = {
    "schedule": ("linear", "cosine", "constant"),
    "dtype": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Settings:
    """The question that a comparison answers.

    Arguments:
        model: hub id, folder, GGUF file, "smollm2-135m" or "tiny".
        data: named corpus, file, folder or hub data set.
        budget: such as "0.45%", "600k" or "4MiB".
        methods: competitors, as for `competitors.competitor`.
        steps: optimiser steps of every run.
        batch_size: rows a step, over all processes.
        block_length: tokens a row.
        seeds: of data order, initialisation and random choices; the learning rate is chosen with
            the first.
        learning_rates: grid by method, or for all under the key "*"; else each method's own.
        target_modules: layers to adapt: "all-linear", names or a regular expression.
        schedule: "linear", "cosine" or "constant".
        warmup: share of the steps.
        weight_decay: decoupled.
        selection_blocks: rows to choose the learning rate on.
        validation_blocks: rows to report on.
        dtype: of the base model's weights.
    """

    model: str
    data: str
    budget: str
    methods: tuple[str, ...]
    steps: int = 60
    batch_size: int = 4
    block_length: int = 128
    seeds: tuple[int, ...] = (0,)
    learning_rates: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    target_modules: Any = "all-linear"
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    selection_blocks: int = 8
    validation_blocks: int = 16
    dtype: str = "float32"

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                found = str(getattr(self, name))
                raise ConfigError(name, expected=f"at least {least}", found=found, mend="Raise it.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    name,
                    expected=f"one of {', '.join(choices)}",
                    found=repr(getattr(self, name)),
                    mend=near_matches(str(getattr(self, name)), list(choices)),
                )
        if not self.seeds:
            raise ConfigError("seeds", expected="at least one", found="none", mend="Use --seeds 1.")
        for method in self.learning_rates:
            if method != "*" and method not in self.methods:
                raise ConfigError(
                    "lr_grid",
                    expected=f"one of the methods {', '.join(self.methods)}",
                    found=repr(method),
                    mend="Correct the name before the colon.",
                )

    def grid(self, method: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """The learning rates to try for a method, ascending."""
        return tuple(
            sorted(self.learning_rates.get(method) or self.learning_rates.get("*") or default)
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data, equal for equal settings."""
        return json.loads(json.dumps(dataclasses.asdict(self), sort_keys=True))

    def default_folder(self) -> Path:
        """`runs/<model>-<data>-<digest>`: the same command finds its own unfinished work."""
        digest = hashlib.blake2b(
            json.dumps(self.as_json(), sort_keys=True).encode(), digest_size=3
        ).hexdigest()
        names = [Path(name).stem or name for name in (self.model, self.data)]
        return Path("runs") / f"{'-'.join(names)}-{digest}"


def claim_of(settings: Settings, versions: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a run folder of this comparison says, for `run_folder.claim_folder`."""
    return {"settings": settings.as_json(), "versions": dict(versions)}


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Read `1e-4,1e-3` (for all methods) and `mos:1e-3,3e-3` (for one).

    Raises:
        ConfigError: no positive numbers.
    """
    grid: dict[str, tuple[float, ...]] = {}
    for text in texts:
        method, _, numbers = text.rpartition(":")
        try:
            values = tuple(float(number) for number in numbers.split(","))
        except ValueError:
            values = ()
        if not values or not all(0 < value < math.inf for value in values):
            raise ConfigError(
                "lr_grid",
                expected="positive numbers, such as 1e-4,1e-3 or mos:1e-3,3e-3",
                found=repr(text),
                mend="Separate the numbers by commas.",
            )
        grid[method or "*"] = values
    return grid
