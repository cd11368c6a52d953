"""`sparing transfer`: does what is tuned on small models hold on large ones?"""

from pathlib import Path
from typing import Annotated

import typer

from sparing.errors import ConfigError


def transfer(
    table: Annotated[Path, typer.Argument(help="Runs as CSV, JSON or JSONL, or a W&B export.")],
    hp: Annotated[
        str, typer.Option(help="Column of the hyperparameter; several by commas.")
    ] = "lr",
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/transfer"),
    axis: Annotated[str, typer.Option(help="log, window (for betas) or linear.")] = "log",
    width: Annotated[str, typer.Option(help="Column of the width.")] = "width",
    loss: Annotated[str, typer.Option(help="Column of the loss.")] = "loss",
    seed: Annotated[str, typer.Option(help="Column of the seed.")] = "seed",
    status: Annotated[str, typer.Option(help="Column of the state of a run.")] = "status",
    where: Annotated[
        list[str] | None, typer.Option(help="Only rows with column=value; may be repeated.")
    ] = None,
    window: Annotated[int, typer.Option(help="Grid steps to each side of an optimum.")] = 1,
    replicates: Annotated[int, typer.Option(help="Of the bootstrap.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Of intervals.")] = 0.95,
    cost_exponent: Annotated[float, typer.Option(help="A run of width n costs n to this.")] = 2.0,
    budget: Annotated[
        list[float] | None, typer.Option(help="To plan for, in runs of the widest model.")
    ] = None,
) -> None:
    """Rates of convergence of loss and hyperparameters over width, and a verdict with a report."""
    from rich.progress import MofNCompleteColumn
    from rich.table import Table

    from sparing import cli
    from sparing.progress import progress_line

    cli._quiet_libraries()
    from sparing.scale.fast_hp_transfer import Columns, analyze_transfer, read_sweep
    from sparing.scale.fast_hp_transfer.page import (
        BUDGETS,
        estimate,
        figure,
        plan_rows,
        write_transfer_report,
    )

    hps = [name.strip() for name in hp.split(",")]
    columns = Columns(width, loss, seed, status)
    sweep = read_sweep(table, hps, axis=axis, columns=columns, where=_conditions(where or []))  # type: ignore[arg-type]
    with progress_line(cli.console, MofNCompleteColumn()) as line:
        task = line.add_task("bootstrap", total=replicates)
        analysis = analyze_transfer(
            sweep,
            window=window,
            replicates=replicates,
            confidence=confidence,
            cost_exponent=cost_exponent,
            on_replicate=lambda done: line.update(task, completed=done),
        )
    optima = Table("width", *(f"best {name}" for name in hps), "loss", "a", "b", "c", "diverged")
    for row in analysis.widths:
        optima.add_row(
            f"{row.width:g}",
            *(f"{value:.4g}" for value in row.values),
            f"{row.loss:.4f}",
            *(figure(gap) for gap in (row.loss_gap, row.hp_gap, row.suboptimality)),
            str(row.diverged),
        )
    cli.console.print(optima)
    budgets = tuple(budget) if budget else BUDGETS
    plans = plan_rows(analysis, budgets)
    if plans:
        planned = Table("budget", "proxy width", "grid step", "final width", "error", "directly")
        for plan in plans:
            planned.add_row(
                *(plan[n] for n in ("budget", "proxy", "step", "final", "error", "direct"))
            )
        cli.console.print(planned)
    page = write_transfer_report(analysis, sweep, out, budgets)
    for text in (
        f"α {estimate(analysis.alpha)}, β {estimate(analysis.beta)}, "
        f"β − α/2 {estimate(analysis.margin)}: {analysis.verdict}",
        *(*analysis.reasons, *analysis.notes),
        f"report: {page}",
    ):
        cli.console.print(text, soft_wrap=True, highlight=False, markup=False)


def _conditions(texts: list[str]) -> dict[str, str]:
    conditions = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigError(
                "where", expected="column=value", found=repr(text), mend="Such as --where depth=4."
            )
        conditions[name.strip()] = value.strip()
    return conditions
