"""`sparing pretrain` and `sparing sweep`: small language models from scratch, by scaling rules."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.errors import ConfigError, DataError

Rate = Annotated[float, typer.Option(help="Learning rate of matrices, tuned in the base run.")]
Data = Annotated[
    str, typer.Option(help="python-topics, python-source, a file, a folder or a hub data set.")
]
Tokens = Annotated[str, typer.Option(help="characters, bytes, or a model for its tokenizer.")]
Family = Annotated[str, typer.Option(help="llama or gpt2.")]
Head = Annotated[int, typer.Option(help="Width of an attention head, at all sizes.")]
Tied = Annotated[bool, typer.Option("--tied", help="Tie embedding and head.")]
OptimizerName = Annotated[str, typer.Option(help="muonh, adamh, adamw, muon or muon++.")]
PlannerName = Annotated[
    str | None,
    typer.Option(help="hyperp, wd-scaling, muon-mup, or standard: nothing is rescaled."),
]
AuxRate = Annotated[float | None, typer.Option(help="Of embeddings and vectors.")]
BaseWidth = Annotated[int | None, typer.Option(help="Width of the run that was tuned.")]
BaseDepth = Annotated[int | None, typer.Option(help="Blocks of the run that was tuned.")]
BaseTokens = Annotated[float | None, typer.Option(help="Training tokens of that run.")]
BaseBatch = Annotated[float | None, typer.Option(help="Tokens a step of that run.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
BatchSize = Annotated[int, typer.Option(help="Rows a step, over all processes.")]
Length = Annotated[int, typer.Option(help="Tokens a row.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps.")]
Schedule = Annotated[str, typer.Option(help="linear, cosine or constant.")]
Final = Annotated[float, typer.Option(help="Where the schedule ends, relative to the peak.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient.")]
Held = Annotated[int, typer.Option(help="Rows of each held-out part.")]
Pause = Annotated[float, typer.Option(help="Seconds between two checkpoints, at least.")]


def pretrain(
    lr: Rate,
    out: Annotated[Path, typer.Option(help="Run folder; the same command resumes.")],
    data: Data = "python-topics",
    tokenizer: Tokens = "characters",
    family: Family = "llama",
    width: Annotated[int, typer.Option(help="Of the residual stream.")] = 128,
    depth: Annotated[int, typer.Option(help="Blocks.")] = 4,
    head: Head = 16,
    tied: Tied = False,
    optimizer: OptimizerName = "muonh",
    planner: PlannerName = None,
    aux_lr: AuxRate = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Tuned in the base run; 0.1 where it is allowed.")
    ] = None,
    base_width: BaseWidth = None,
    base_depth: BaseDepth = None,
    base_tokens: BaseTokens = None,
    base_batch: BaseBatch = None,
    steps: Steps = 200,
    batch_size: BatchSize = 16,
    block_length: Length = 64,
    warmup: Warmup = 0.0,
    schedule: Schedule = "linear",
    final: Final = 0.1,
    clip: Clip = 1.0,
    seed: Annotated[int, typer.Option(help="Of initialisation and data order.")] = 0,
    validation_blocks: Held = 64,
    checkpoint_seconds: Pause = 30.0,
) -> None:
    """Train a small language model from scratch, with numbers tuned on a smaller one."""
    options = dict(locals())
    from sparing import cli

    cli._quiet_libraries()
    from sparing.checkpoint import read_json
    from sparing.pretrain import pretrain as run
    from sparing.run_progress import Live

    del options["out"], options["checkpoint_seconds"]
    with Live(_screen()) as live:
        outcome = run(_settings(**options), out, live, checkpoint_seconds)
    if not _is_first():
        return
    cli.console.print(
        f"{outcome.parameters:,} parameters, {outcome.tokens:,} tokens: validation loss "
        f"{outcome.validation_loss:.4f} nats a token",
        highlight=False,
    )
    for note in read_json(out / "plan.json")["notes"]:
        cli.console.print(f"plan: {note}", soft_wrap=True, highlight=False, markup=False)
    cli.console.print(f"model: {out / 'model'}", soft_wrap=True, highlight=False)


def sweep(
    lrs: Annotated[str, typer.Option(help="Learning rates, with commas.")],
    widths: Annotated[str, typer.Option(help="With commas; the smallest is the base.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep; the same command resumes.")],
    depths: Annotated[str, typer.Option(help="Blocks, with commas.")] = "2",
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0",
    weight_decays: Annotated[
        str | None, typer.Option(help="With commas; 0.1 where decay is allowed.")
    ] = None,
    data: Data = "python-topics",
    tokenizer: Tokens = "characters",
    family: Family = "llama",
    head: Head = 16,
    tied: Tied = False,
    optimizer: OptimizerName = "muonh",
    planner: PlannerName = None,
    aux_lr: AuxRate = None,
    base_width: BaseWidth = None,
    base_depth: BaseDepth = None,
    steps: Steps = 200,
    batch_size: BatchSize = 16,
    block_length: Length = 64,
    warmup: Warmup = 0.0,
    schedule: Schedule = "linear",
    final: Final = 0.1,
    clip: Clip = 1.0,
    validation_blocks: Held = 64,
    checkpoint_seconds: Pause = 30.0,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Save the final models too.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(help="Spread the runs over Ray: auto, local or an address.")
    ] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Give every run a process of its own.")
    ] = False,
) -> None:
    """Train over widths, depths, rates and seeds; one table for `sparing transfer`."""
    options = dict(locals())
    from sparing import cli

    cli._quiet_libraries()
    from sparing.pretrain import Grid
    from sparing.pretrain import sweep as run
    from sparing.pretrain.sweep import TABLE
    from sparing.run_progress import Live

    grid = Grid(
        widths=_numbers("widths", widths, int),
        depths=_numbers("depths", depths, int),
        learning_rates=_numbers("lrs", lrs, float),
        seeds=_numbers("seeds", seeds, int),
        weight_decays=(
            None if weight_decays is None else _numbers("weight_decays", weight_decays, float)
        ),
    )
    for name in ("lrs", "widths", "depths", "seeds", "weight_decays", "out", "keep_models"):
        del options[name]
    for name in ("ray", "isolate", "checkpoint_seconds"):
        del options[name]
    settings = _settings(
        lr=grid.learning_rates[0], width=grid.widths[0], depth=grid.depths[0], **options
    )
    with Live(_screen()) as live:
        rows = run(
            settings,
            grid,
            out,
            ray=ray,
            isolate=isolate,
            keep=keep_models,
            progress=live,
            checkpoint_seconds=checkpoint_seconds,
        )
    if not _is_first():
        return
    _show(rows)
    _analyse(rows)
    cli.console.print(f"table: {out / TABLE}", soft_wrap=True, highlight=False)
    if any(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


def _settings(lr: float, aux_lr: float | None, **options: Any) -> Any:
    from sparing.pretrain import Settings

    return Settings(learning_rate=lr, aux_learning_rate=aux_lr, **options)


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from sparing import cli
    from sparing.pretrain.sweep import best

    grid = sorted({row["lr"] for row in rows})
    table = Table("width", "depth", "best rate", "decay", "loss", "")
    for row in best(rows):
        edge = len(grid) > 1 and row["lr"] in (grid[0], grid[-1])
        table.add_row(
            str(row["width"]),
            str(row["depth"]),
            f"{row['lr']:g}",
            f"{row['weight_decay']:g}",
            f"{row['loss']:.4f}",
            "edge of the grid" if edge else "",
        )
    cli.console.print(table)
    for status in ("diverged", "failed"):
        bad = [row for row in rows if row["status"] == status]
        if bad:
            cli.console.print(f"{len(bad)} of {len(rows)} runs {status}, such as {bad[0]['run']}")


def _analyse(rows: list[dict[str, Any]]) -> None:
    """Say how fast the best rate converges with width, where there are widths enough."""
    from sparing import cli
    from sparing.scale import analyze_transfer

    if len({row["width"] for row in rows}) < 3:
        return
    for depth, decay in sorted({(row["depth"], row["weight_decay"]) for row in rows}):
        where = {"depth": depth, "weight_decay": decay}
        try:
            found = analyze_transfer(rows, where=where)
            text = f"{found.verdict}: {'; '.join(found.reasons)}"
        except DataError as error:
            text = f"no rates: {error}"
        cli.console.print(
            f"transfer at depth {depth}, decay {decay:g}: {text}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) for value in values):
        raise ConfigError(
            name,
            expected="numbers, such as 32,64,128" if kind is int else "numbers, such as 0.01,0.02",
            found=repr(text),
            mend="Separate them by commas.",
        )
    return values


def _is_first() -> bool:
    """Whether this is the process that speaks, under `accelerate launch`."""
    return int(os.environ.get("RANK", "0")) == 0


def _screen() -> Any:
    from rich.console import Console

    from sparing import cli

    return cli.console if _is_first() else Console(quiet=True)
