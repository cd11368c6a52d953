"""The command line. Rooms are imported inside the commands, so that --help answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparing.cli_check import check as check_widths
from sparing.cli_ept import app as tasks
from sparing.cli_modes import app as modes
from sparing.cli_pretrain import pretrain, sweep
from sparing.cli_queryable import app as queryable
from sparing.cli_route import app as route
from sparing.cli_scale import plan
from sparing.cli_search import search
from sparing.cli_stn import app as stn
from sparing.cli_transfer import transfer
from sparing.errors import ConfigError, SparingError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make neural networks do more with the parameters they have.",
)
app.add_typer(route, name="route")
app.add_typer(queryable, name="queryable")
app.add_typer(modes, name="modes")
app.add_typer(tasks, name="tasks")
app.add_typer(stn, name="stn")
app.command()(search)
app.command()(plan)
app.command()(pretrain)
app.command()(sweep)
app.command()(transfer)
app.command("check")(check_widths)
console = Console()

ModelArgument = Annotated[
    str, typer.Argument(help="Hub id, folder, GGUF file, smollm2-135m or tiny.")
]
DataOption = Annotated[
    str, typer.Option(help="python-topics, python-source, a file, a folder or a hub data set.")
]
TargetOption = Annotated[
    str, typer.Option(help='Layers to adapt: "all-linear", names with commas, or a regex.')
]
StepsOption = Annotated[int, typer.Option(help="Optimiser steps of every run.")]
BatchOption = Annotated[int, typer.Option(help="Rows a step, over all processes.")]
LengthOption = Annotated[int, typer.Option(help="Tokens a row.")]
DtypeOption = Annotated[str, typer.Option(help="Type of the base weights: float32 or bfloat16.")]


def main() -> None:
    """Entry point: 0 is fine, 1 means that some runs failed, 2 is bad input."""
    try:
        app()
    except SparingError as error:
        line = " ".join(str(error).split())
        Console(stderr=True).print(f"[bold red]error[/] {_escape(line)}", soft_wrap=True)
        sys.exit(2)


@app.command()
def methods(
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
) -> None:
    """List the methods: built ones are ready, the others planned."""
    from rich.table import Table

    from sparing.catalog import CATALOG
    from sparing.errors import near_matches

    rooms = sorted({method.room for method in CATALOG})
    if room is not None and room not in rooms:
        raise ConfigError(
            "room", expected="a room", found=repr(room), mend=near_matches(room, rooms)
        )
    table = Table("method", "room", "status", "title")
    for method in CATALOG:
        if room in (None, method.room):
            colour = "green" if method.status == "ready" else "dim"
            table.add_row(method.slug, method.room, f"[{colour}]{method.status}[/]", method.title)
    console.print(table)


@app.command()
def compare(
    model: ModelArgument,
    data: DataOption = "python-topics",
    budget: Annotated[str, typer.Option(help="Such as 0.45%, 600k or 4MiB.")] = "0.5%",
    methods: Annotated[
        str,
        typer.Option(help='With commas: lora, full, our methods, peft:<name>, peft:<name>{"r":8}.'),
    ] = "lora,all-adapt",
    steps: StepsOption = 60,
    batch_size: BatchOption = 4,
    block_length: LengthOption = 128,
    seeds: Annotated[int, typer.Option(help="Seeds to average over.")] = 1,
    lr_grid: Annotated[
        list[str] | None,
        typer.Option(help="Rates to try: 1e-4,1e-3 for all methods or mos:1e-3,3e-3 for one."),
    ] = None,
    target_modules: TargetOption = "all-linear",
    schedule: Annotated[str, typer.Option(help="linear, cosine or constant.")] = "linear",
    selection_blocks: Annotated[int, typer.Option(help="Rows to choose the rate on.")] = 8,
    validation_blocks: Annotated[int, typer.Option(help="Rows to report on.")] = 16,
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Spread the runs over Ray: auto, local or an address.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run everything in this process.")
    ] = False,
) -> None:
    """Compare fine-tuning methods on one model at one budget; the same command resumes."""
    _quiet_libraries()
    from sparing.compare.comparison import compare as run
    from sparing.compare.competitors import split_methods
    from sparing.compare.progress import Live
    from sparing.compare.settings import Settings, parse_grid

    settings = Settings(
        model=model,
        data=data,
        budget=budget,
        methods=tuple(split_methods(methods)),
        steps=steps,
        batch_size=batch_size,
        block_length=block_length,
        seeds=tuple(range(seeds)),
        learning_rates=parse_grid(lr_grid or []),
        target_modules=_targets(target_modules),
        schedule=schedule,
        selection_blocks=selection_blocks,
        validation_blocks=validation_blocks,
        dtype=dtype,
    )
    folder = out or settings.default_folder()
    first = int(os.environ.get("RANK", "0")) == 0
    screen = console if first else Console(quiet=True)
    with Live(screen) as live:
        results = run(settings, folder=folder, ray=ray, isolate=not in_process, progress=live)
    if not first:
        return  # an exit code of its own would make the launcher end the first before its report
    from sparing.report import render_table, write_report

    write_report(results, folder)
    console.print(render_table(results, console.width))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    if any(row.status == "failed" for row in results.rows):
        raise typer.Exit(1)


@app.command()
def adapt(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    method: Annotated[str, typer.Option(help="One of our methods, lora or peft:<name>.")] = "mos",
    data: DataOption = "python-topics",
    budget: Annotated[
        str | None, typer.Option(help="Size by budget, such as 0.45%; else the options decide.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the method: name=value, as JSON.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: the middle of the method's grid.")
    ] = None,
    steps: StepsOption = 100,
    batch_size: BatchOption = 4,
    block_length: LengthOption = 128,
    target_modules: TargetOption = "all-linear",
    seed: Annotated[int, typer.Option(help="Of data order and random choices.")] = 0,
    dtype: DtypeOption = "float32",
) -> None:
    """Train one adapter and write it, ready for peft.PeftModel.from_pretrained."""
    _quiet_libraries()
    from sparing.compare.progress import Live
    from sparing.compare.single import Request, train_adapter

    request = Request(
        model=model,
        method=method,
        data=data,
        budget=budget,
        options=_options(option or []),
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        block_length=block_length,
        target_modules=_targets(target_modules),
        seed=seed,
        dtype=dtype,
    )
    with Live(console) as live:
        outcome = train_adapter(request, out, live)
    console.print(
        f"{outcome.parameters:,} parameters trained; held-out loss "
        f"{outcome.loss_before:.4f} -> {outcome.loss:.4f} nats a token; adapter: {out}",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(help="Methods; see --all.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seeds: Annotated[int, typer.Option(help="Seeds to run.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = Path("evidence"),
) -> None:
    """Run the small experiment that stands for a paper's claim, and record what it shows."""
    from sparing.errors import near_matches
    from sparing.reproduce import available
    from sparing.reproduce import reproduce as run

    chosen = available() if everything else slugs or []
    if not chosen:
        raise ConfigError(
            "slug",
            expected="at least one method",
            found="none",
            mend=near_matches("", available()) + " Or --all.",
        )
    for slug in chosen:
        claim, evidence = run(slug, device=device, seeds=range(seeds), out=out)
        console.print(f"[bold]{slug}[/]: {claim.text} ({claim.number}; {claim.source})")
        for kind, checks in (("check", evidence.checks), ("control", evidence.controls)):
            for check in checks:
                mark = "[green]yes[/]" if check.holds else "[red]no[/]"
                console.print(
                    f"  {kind}: {_escape(check.statement)}: {check.measured:.4g} "
                    f"(threshold {check.threshold:.4g}) {mark}"
                )
        console.print(f"  verdict: [bold]{evidence.verdict}[/] in {evidence.seconds:.0f} s")


@app.command()
def merge(
    expert: Annotated[
        list[str], typer.Option(help="A fine-tune of the base, or an adapter; once for each.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Hub id, folder, safetensors file or built-in name.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the merged model.")] = None,
    method: Annotated[
        str, typer.Option(help="average, task-arithmetic, ties, dare, pcb-merging or made-it.")
    ] = "pcb-merging",
    bank: Annotated[
        Path | None,
        typer.Option("--continue", help="Bank of made-it that the experts arrive in, in order."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the method: name=value, as JSON.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted merge.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Default: one a core, at most 8.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of the files written.")] = "5GB",
    dtype: Annotated[
        str | None, typer.Option(help="Of the result: float32, bfloat16, float16; else the base's.")
    ] = None,
    device: Annotated[str, typer.Option(help="To compute on: cpu or cuda.")] = "cpu",
    on_mismatch: Annotated[
        str, typer.Option(help="Tensors that do not fit: error, or skip to leave the base's.")
    ] = "error",
    vocabulary: Annotated[
        str, typer.Option(help="Embeddings of different length: error, base or crop.")
    ] = "error",
    per_task: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors to keep out, such as task heads.")
    ] = None,
    hash_inputs: Annotated[bool, typer.Option(help="Record SHA-256 of the inputs.")] = True,
) -> None:
    """Merge fine-tunes of one base into one model, in the memory of a few tensors.

    Give --base and --out for a new model, or --continue for a bank of experts that made-it began:
    its options stay as they were.
    """
    _quiet_libraries()
    from sparing.merge import continue_merge
    from sparing.merge import merge as run
    from sparing.merge.progress import Live

    with Live(console) as live:
        if bank is not None:
            _require_none("--continue", out=out, option=option, dtype=dtype, per_task=per_task)
            folder = continue_merge(
                bank, expert, base=base, threads=threads, device=device, progress=live
            )
        else:
            folder = run(
                _given(base, "--base", "the model that the experts were fine-tuned from"),
                expert,
                method,
                _given(out, "--out", "a folder for the merged model"),
                resume=resume,
                threads=threads,
                max_shard_size=max_shard_size,
                dtype=dtype,
                device=device,
                on_mismatch=on_mismatch,  # type: ignore[arg-type]
                vocabulary=vocabulary,  # type: ignore[arg-type]
                per_task=per_task or [],
                hash_inputs=hash_inputs,
                progress=live,
                **_options(option or []),
            )
    console.print(f"merged model: {folder}", soft_wrap=True, highlight=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a bank of made-it.")],
) -> None:
    """Draw the report of a finished comparison again, and print its table; or describe a bank."""
    from sparing.merge.ledger import LEDGER

    if (folder / LEDGER).is_file():
        from sparing.merge.bank_report import bank_report
        from sparing.merge.ledger import Ledger

        console.print(str(bank_report(Ledger.load(folder))), soft_wrap=True, highlight=False)
        return
    from sparing.compare.results import Results
    from sparing.report import render_table, write_report

    results = Results.load(folder / "results.json")
    write_report(results, folder)
    console.print(render_table(results, console.width))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, highlight=False)


def _given(value: Any, name: str, expected: str) -> Any:
    if value is None:
        raise ConfigError(name, expected=expected, found="nothing", mend=f"Give {name}.")
    return value


def _require_none(where: str, **options: Any) -> None:
    """Options that a bank has for good cannot be given again."""
    for name, value in options.items():
        if value is not None:
            name = f"--{name.replace('_', '-')}"
            raise ConfigError(
                name,
                expected=f"nothing beside {where}: the bank keeps what it was begun with",
                found=repr(value),
                mend="Leave it out, or begin a new bank.",
            )


def _targets(text: str) -> Any:
    """Names stay names; PEFT takes a lone string for a regular expression of the whole name."""
    names = [name.strip() for name in text.split(",")]
    if text != "all-linear" and all(name.replace(".", "_").isidentifier() for name in names):
        return names
    return text


def _options(texts: list[str]) -> dict[str, Any]:
    import json

    options: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigError(
                "option", expected="name=value", found=repr(text), mend="For example: --option r=8"
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _quiet_libraries() -> None:
    """Progress is ours to show; the libraries' own bars and advice would tear it apart."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()
