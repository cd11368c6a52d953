"""`sparing route …`: gates for experts, one model that routes among them, and what it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.errors import CheckpointError, ConfigError, near_matches

if TYPE_CHECKING:
    from peft import PeftModel

    from sparing.data import Blocks

app = typer.Typer(
    no_args_is_help=True,
    help="Route every token among adapters that were trained independently (PHATGOOSE).",
)

ModelArgument = Annotated[
    str, typer.Argument(help="The experts' base: hub id, folder, GGUF file or built-in name.")
]
ExpertsArgument = Annotated[
    Path, typer.Argument(help="Folder whose sub-folders are adapters, or one adapter.")
]
RoutedArgument = Annotated[Path, typer.Argument(help="Folder that `route assemble` wrote.")]
DtypeOption = Annotated[
    str, typer.Option(help="Type of the base weights: float32, bfloat16 or float16.")
]


@app.command()
def gate(
    model: ModelArgument,
    experts: ExpertsArgument,
    data: Annotated[
        list[str],
        typer.Option(
            help="NAME=SOURCE for each expert: what it was trained on; see sparing adapt."
        ),
    ],
    key: Annotated[
        str, typer.Option(help="gate; or average, the mean inputs that the paper compares with.")
    ] = "gate",
    steps: Annotated[int, typer.Option(help="Optimiser steps; more made gates worse.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up.")] = 5e-3,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    block_length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the data order.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Also where there are keys.")] = False,
    dtype: DtypeOption = "float32",
) -> None:
    """Train each expert's gates on its own data and keep them beside it.

    Experts that have gates are left as they are, so the same command goes on where it stopped.
    """
    _choose("key", key, ["gate", "average"])
    base, tokenizer = _load(model, dtype)
    from sparing.adapt import adapters_in, has_keys, save_average_inputs, train_gates
    from sparing.cli import console

    found = adapters_in(experts)
    sources = _sources(data, list(found))
    waiting = [name for name in found if name in sources]
    if not again:
        kept = [name for name in found if has_keys(found[name], key)]
        waiting = [name for name in waiting if name not in kept]
        _say(f"kept: {', '.join(kept)}" if kept else "")
    blocks = {name: _blocks(sources[name], tokenizer, block_length) for name in waiting}
    with _progress(len(waiting), steps if key == "gate" else 1) as bar:
        for name in waiting:
            if key == "average":
                save_average_inputs(base, found[name], blocks[name])
                bar(name, 1, None)
                continue
            train_gates(
                base,
                found[name],
                blocks[name],
                steps=steps,
                learning_rate=learning_rate,
                batch_size=batch_size,
                seed=seed,
                again=again,
                on_step=lambda step, loss, name=name: bar(name, step, loss),  # type: ignore[misc]
            )
    for name in waiting:
        console.print(f"{name}: keys of kind {key} in {found[name]}", soft_wrap=True)
    lacking = [name for name in found if not has_keys(found[name], key)]
    if lacking:
        console.print(f"still without: {', '.join(lacking)} (give --data NAME=SOURCE)")


@app.command()
def assemble(
    model: ModelArgument,
    experts: ExpertsArgument,
    out: Annotated[Path, typer.Option(help="New folder for the routed adapter.")],
    key: Annotated[
        str, typer.Option(help="gate; average; or arrow, mean_row, which need no data; random.")
    ] = "gate",
    top_k: Annotated[int, typer.Option(help="Experts a token.")] = 2,
    score: Annotated[
        str | None, typer.Option(help="original, dot, cosine or arrow; else what suits the key.")
    ] = None,
    router: Annotated[str, typer.Option(help="soft or top1.")] = "soft",
    temperature: Annotated[float, typer.Option(help="Of the arrow score.")] = 1.0,
    expert_dtype: Annotated[
        str, typer.Option(help="Storage of the experts: float32, bfloat16 or float16.")
    ] = "float32",
    check_base: Annotated[
        bool, typer.Option(help="Refuse experts that name another base or revision.")
    ] = True,
) -> None:
    """Stack all experts into one adapter that plain peft loads after `import sparing`."""
    if out.exists():
        raise CheckpointError(
            str(out), expected="a new folder", found="an existing one", mend="Choose another --out."
        )
    base, _ = _load(model, "float32")
    from sparing import adapt
    from sparing.checkpoint import atomic_path

    routed = adapt.assemble(
        base,
        adapt.adapters_in(experts),
        key=key,  # type: ignore[arg-type]
        top_k=top_k,
        check_base=check_base,
        score=score,
        router=router,
        temperature=temperature,
        expert_dtype=expert_dtype,
    )
    config: Any = routed.peft_config["default"]
    with atomic_path(out) as fresh:
        routed.save_pretrained(str(fresh))
    modules = len(adapt.expert_layers(routed))
    _say(f"{len(config.experts)} experts on {modules} modules, top {top_k} by {key}: {out}")


@app.command()
def generate(
    model: ModelArgument,
    routed: RoutedArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most.")] = 64,
    mode: Annotated[
        str, typer.Option(help="routed; single, with --expert; or merged, the mean of all.")
    ] = "routed",
    expert: Annotated[str | None, typer.Option(help="For --mode single.")] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens, not the likeliest.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    dtype: DtypeOption = "float32",
) -> None:
    """Continue a text."""
    adapted, tokenizer = _load_routed(model, routed, dtype)
    import torch

    from sparing.adapt import set_mode
    from sparing.cli import console

    set_mode(adapted, mode, expert)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    given = tokenizer(prompt, return_tensors="pt")
    ids = adapted.generate(
        **given,
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    console.print(prompt + text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    model: ModelArgument,
    routed: RoutedArgument,
    out: Annotated[Path, typer.Option(help="Folder for routing.json and routing.png.")],
    text: Annotated[str | None, typer.Option(help="Text to look at.")] = None,
    data: Annotated[str | None, typer.Option(help="Or a source of it; see sparing adapt.")] = None,
    block_length: Annotated[int, typer.Option(help="Tokens a row of --data.")] = 128,
    rows: Annotated[int, typer.Option(help="Rows of --data.")] = 8,
    dtype: DtypeOption = "float32",
) -> None:
    """Tell which experts are used: by module and by token, as JSON and as a picture."""
    if (text is None) == (data is None):
        raise ConfigError(
            "text", expected="either --text or --data", found="both or none", mend="Give one."
        )
    adapted, tokenizer = _load_routed(model, routed, dtype)
    from rich.table import Table

    from sparing.adapt import routing_statistics, set_mode
    from sparing.cli import console
    from sparing.report.routing import write_routing

    set_mode(adapted, "routed")
    if text is not None:
        batches = [dict(tokenizer(text, return_tensors="pt"))]
    else:
        blocks = _blocks(str(data), tokenizer, block_length)
        batches = [{"input_ids": row[None]} for row in blocks.batch.input_ids[:rows]]
    statistics = routing_statistics(adapted, *batches)
    assert statistics.token_ids is not None
    words = [repr(tokenizer.decode([token]))[1:-1] for token in statistics.token_ids.tolist()]
    statistics.write(out / "routing.json")
    write_routing(statistics, out / "routing.png", words)
    table = Table("expert", "share of the weight")
    for name, share in zip(statistics.experts, statistics.share.tolist(), strict=True):
        table.add_row(name, f"{share:.1%}")
    console.print(table)
    _say(f"routing: {out / 'routing.json'} and {out / 'routing.png'}")


def _load(model: str, dtype: str) -> tuple[Any, Any]:
    from sparing.cli import _quiet_libraries

    _choose("dtype", dtype, ["float32", "bfloat16", "float16"])
    _quiet_libraries()
    import torch

    from sparing import pretrained

    return pretrained.load(model, dtype=getattr(torch, dtype))


def _load_routed(model: str, routed: Path, dtype: str) -> "tuple[PeftModel, Any]":
    if not (routed / "adapter_config.json").is_file():
        raise CheckpointError(
            str(routed),
            expected="a folder that `sparing route assemble` wrote",
            found="no adapter_config.json",
            mend="Check the path.",
        )
    base, tokenizer = _load(model, dtype)
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(routed)).eval(), tokenizer


def _sources(texts: list[str], experts: list[str]) -> dict[str, str]:
    """The data of each expert; a bare source will do where there is one expert only."""
    sources: dict[str, str] = {}
    for text in texts:
        name, separator, source = text.partition("=")
        if not separator and len(experts) == 1:
            name, source = experts[0], text
        elif not separator or not source:
            raise ConfigError(
                "data",
                expected="NAME=SOURCE, as every expert's gates are trained on its own data",
                found=repr(text),
                mend=f"For example: --data {experts[0]}=python-source",
            )
        _choose("data", name, experts)
        sources[name] = source
    return sources


def _choose(option: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise ConfigError(
            option,
            expected=f"one of {', '.join(choices)}",
            found=repr(value),
            mend=near_matches(value, choices),
        )


def _blocks(source: str, tokenizer: Any, length: int) -> "Blocks":
    from sparing.data import prepare

    return prepare(source, tokenizer, block_length=length).train


@contextmanager
def _progress(experts: int, steps: int) -> Iterator[Any]:
    """A bar over all experts on a terminal; called with the expert, its step and loss."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from sparing.cli import console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    task = bars.add_task("gates", total=experts * steps)

    def advance(name: str, step: int, loss: float | None) -> None:
        told = name if loss is None else f"{name}, loss {loss:.3f}"
        bars.update(task, description=told, advance=1)
        if not console.is_terminal and step == steps and loss is not None:
            console.print(f"{told} after {steps} steps", highlight=False)

    with bars:
        yield advance


def _say(text: str) -> None:
    from sparing.cli import console

    if text:
        console.print(text, soft_wrap=True, highlight=False)
