"""Train one adapter: the same jobs as a comparison, for one method at one learning rate."""

import dataclasses
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparing import pretrained
from sparing.budget import Budget
from sparing.checkpoint import atomic_path, read_json, write_json
from sparing.compare import jobs
from sparing.compare.competitors import Competitor, competitor
from sparing.compare.jobs import Job
from sparing.compare.progress import Progress, Silent
from sparing.compare.settings import Settings
from sparing.compare.sizing import MetaModel, solve
from sparing.data import prepare, save_blocks
from sparing.errors import CheckpointError, ConfigError, SparingError
from sparing.train import DivergedError, TrainPlan


@dataclass(frozen=True)
class Request:
    """What to train.

    Arguments:
        model: hub id, folder, GGUF file or a built-in name.
        method: a competitor, as in comparisons.
        data: corpus, file, folder or hub data set.
        budget: sizes the method if given.
        options: of the method's config, on top of the budget's choice.
        learning_rate: None for the middle of the method's grid.
        steps: optimiser steps.
        batch_size: rows a step.
        block_length: tokens a row.
        target_modules: layers to adapt.
        seed: of data order and random choices.
        dtype: of the base weights.
    """

    model: str
    method: str
    data: str
    budget: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    steps: int = 100
    batch_size: int = 4
    block_length: int = 128
    target_modules: Any = "all-linear"
    seed: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Outcome:
    """What came of it: trained parameters, and losses on held-out text in nats a token."""

    parameters: int
    loss_before: float
    loss: float


def train_adapter(request: Request, out: Path, progress: Progress | None = None) -> Outcome:
    """Train an adapter and write it to `out`; an interrupted call resumes when repeated.

    Work in progress lives in `.<name>.work` beside `out` until the adapter is complete.

    Raises:
        ConfigError: a bad option; or full fine-tuning, which leaves no adapter.
        CheckpointError: `out` exists, or unfinished work of another request is in the way.
        DivergedError: the loss became NaN or infinite.
    """
    progress = progress or Silent()
    entry = competitor(request.method)
    if entry.config_class is None:
        raise ConfigError(
            "method", expected="a method with an adapter", found="full", mend="Choose another."
        )
    if out.exists():
        raise CheckpointError(
            str(out), expected="a new folder", found="an existing one", mend="Choose another --out."
        )
    entry = dataclasses.replace(entry, fixed={**entry.fixed, **request.options})
    plan = _plan(request, entry)
    source = pretrained.resolve(request.model)
    pretrained.check(source)
    progress.stage("sizing the method")
    options = _sized(request, entry, source)
    progress.stage("preparing the data")
    data = prepare(
        request.data, pretrained.load_tokenizer(source), block_length=request.block_length
    )
    # Nothing has been written before everything that was given is known to be usable.
    work = out.absolute().parent / f".{out.name}.work"
    _claim(work, request, data.fingerprint)
    save_blocks(work / "data.safetensors", data.parts)
    base = Job("base", source, str(work / "data.safetensors"), str(work / "base"))
    base = dataclasses.replace(base, dtype=request.dtype)
    training = dataclasses.replace(
        base,
        kind="train",
        folder=str(work / "train"),
        method=request.method,
        options=options,
        target_modules=request.target_modules,
        plan=plan,
    )
    progress.expect([training])
    before = _finish(jobs.run(base), work)
    result = jobs.run(training, lambda step, loss: progress.step(training, step, loss))
    after = _finish(result, work)
    with atomic_path(out) as fresh:
        shutil.copytree(work / "train" / "adapter", fresh)
    shutil.rmtree(work)
    return Outcome(after["trainable_parameters"], before["selection_loss"], after["selection_loss"])


def _plan(request: Request, entry: Competitor) -> TrainPlan:
    """The plan, if the numbers are usable."""
    rate, grid = request.learning_rate, entry.learning_rates
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigError(
            "learning_rate", expected="above 0", found=str(rate), mend=f"Try {grid[0]}."
        )
    Settings(  # knows what can be asked for
        model=request.model,
        data=request.data,
        budget=request.budget or "100%",
        methods=(request.method,),
        steps=request.steps,
        batch_size=request.batch_size,
        block_length=request.block_length,
        dtype=request.dtype,
    )
    return TrainPlan(
        steps=request.steps,
        batch_size=request.batch_size,
        learning_rate=rate or grid[len(grid) // 2],
        seed=request.seed,
    )


def _sized(request: Request, entry: Competitor, source: str) -> dict[str, Any]:
    """The method's options, which suit the model."""
    meta, options = MetaModel(source, request.target_modules), dict(request.options)
    try:
        if request.budget is not None:
            options |= solve(entry, meta, Budget.parse(request.budget)).options
        meta.size(entry, options)
    except SparingError:
        raise
    except Exception as error:  # whatever PEFT raises for options that do not fit the model
        raise ConfigError(
            f"method {request.method!r}",
            expected="options that suit the method and the model",
            found=f"{type(error).__name__}: {error}",
            mend="Correct --option or --target-modules.",
        ) from error
    return options


def _claim(work: Path, request: Request, data: str) -> None:
    mark, mine = work / "request.json", {**dataclasses.asdict(request), "data_fingerprint": data}
    if not mark.exists():
        write_json(mark, mine)
    elif read_json(mark) != mine:
        raise CheckpointError(
            str(work),
            expected="unfinished work of this very command",
            found="that of another one",
            mend="Delete the folder, or choose another --out.",
        )


def _finish(result: dict[str, Any], work: Path) -> dict[str, Any]:
    if "error" in result:
        shutil.rmtree(work)
        raise DivergedError(
            "training",
            expected="a finished run",
            found=str(result["error"]),
            mend="Nothing was written; try a smaller --learning-rate or other options.",
        )
    return result
