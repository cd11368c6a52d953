"""`sparing tasks …`: one EPT adapter for several tasks, and each task as a plain model or LoRA."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

app = typer.Typer(
    no_args_is_help=True,
    help="Train one adapter on several tasks, and take single tasks out of it (EPT).",
)

ModelArgument = Annotated[
    str, typer.Argument(help="The adapter's base: hub id, folder, GGUF file or built-in name.")
]
AdapterArgument = Annotated[Path, typer.Argument(help="Folder that `sparing tasks train` wrote.")]
TaskOption = Annotated[str, typer.Option(help="Name of the task.")]


@app.command()
def train(
    model: ModelArgument,
    data: Annotated[
        list[str], typer.Option(help="NAME=SOURCE of each task; for sources see sparing adapt.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the adapter.")],
    option: Annotated[
        list[str] | None, typer.Option(help="Option of EPT: name=value, as JSON.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 1e-3,
    steps: Annotated[int, typer.Option(help="Optimiser steps, one task each.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    block_length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    probabilities: Annotated[
        str, typer.Option(help="Of tasks: equal; or softmax of their shares of the data.")
    ] = "equal",
    target_modules: Annotated[
        str, typer.Option(help='"all-linear", names with commas, or a regex.')
    ] = "all-linear",
    seed: Annotated[int, typer.Option(help="Of data order and random choices.")] = 0,
) -> None:
    """Train one adapter on all tasks, one task a step, and tell each task's held-out loss."""
    _check_new(out)
    from sparing.cli import _options, _targets, console

    options, sources = _options(option or []), _sources(data)
    base, tokenizer = _load_base(model)
    import peft
    from rich.table import Table

    from sparing.adapt.ept import EPTConfig
    from sparing.adapt.ept_training import TaskBlocks, evaluate_tasks, train_tasks
    from sparing.checkpoint import atomic_path
    from sparing.data import prepare
    from sparing.train import TrainPlan, evaluate

    found = {name: prepare(s, tokenizer, block_length=block_length) for name, s in sources.items()}
    held_out = {name: parts.selection for name, parts in found.items()}
    before = {name: evaluate(base, blocks) for name, blocks in held_out.items()}
    try:
        chosen: dict[str, Any] = {"target_modules": _targets(target_modules), "seed": seed}
        config = EPTConfig(task_type="CAUSAL_LM", task_names=list(sources), **{**chosen, **options})
    except TypeError as error:
        raise ConfigError(
            "option", expected="options of EPTConfig", found=str(error), mend="Correct --option."
        ) from error
    adapted = peft.get_peft_model(base, config)
    blocks = TaskBlocks({n: p.train for n, p in found.items()}, probabilities)  # type: ignore[arg-type]
    plan = TrainPlan(steps, batch_size, learning_rate, seed=seed)
    train_tasks(adapted, blocks, plan)
    after = evaluate_tasks(adapted, held_out)
    with atomic_path(out) as fresh:
        adapted.save_pretrained(str(fresh))
    table = Table("task", "held-out loss before", "after")
    for name in sources:
        table.add_row(name, f"{before[name]:.4f}", f"{after[name]:.4f}")
    console.print(table)
    counts: Any = adapted.parameter_counts()
    console.print(
        f"{counts.total:,} parameters trained, {counts.without_routers:,} of them without routers; "
        f"adapter: {out}",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def routes(model: ModelArgument, adapter: AdapterArgument) -> None:
    """Print the experts of each task in each layer: number:size×weight."""
    from sparing.cli import console

    adapted, _ = _load(model, adapter)
    console.print(
        str(adapted.route_table()), soft_wrap=True, highlight=False, markup=False, emoji=False
    )


@app.command()
def merge(
    model: ModelArgument,
    adapter: AdapterArgument,
    task: TaskOption,
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
) -> None:
    """Write the base with one task merged into it, as a plain model."""
    _check_new(out)
    from sparing.checkpoint import atomic_path
    from sparing.cli import console

    adapted, tokenizer = _load(model, adapter)
    adapted.set_task(task)
    merged: Any = adapted.merge_and_unload()
    with atomic_path(out) as fresh:
        merged.save_pretrained(str(fresh))
        tokenizer.save_pretrained(str(fresh))
    console.print(f"merged model for {task}: {out}", soft_wrap=True, highlight=False)


@app.command()
def export(
    model: ModelArgument,
    adapter: AdapterArgument,
    task: TaskOption,
    out: Annotated[Path, typer.Option(help="New folder for the LoRA.")],
) -> None:
    """Write one task as a LoRA for plain peft."""
    _check_new(out)
    from sparing.cli import console

    adapted, _ = _load(model, adapter)
    adapted.export_lora(out, task)
    console.print(f"LoRA for {task}: {out}", soft_wrap=True, highlight=False)


def _sources(texts: list[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for text in texts:
        name, separator, source = text.partition("=")
        if not (separator and name and source) or name in sources:
            raise ConfigError(
                "data",
                expected="NAME=SOURCE with another name for each task",
                found=repr(text),
                mend="For example: --data code=python-source --data help=python-topics",
            )
        sources[name] = source
    return sources


def _check_new(out: Path) -> None:
    if out.exists():
        raise CheckpointError(
            str(out), expected="a new folder", found="an existing one", mend="Choose another --out."
        )


def _load_base(model: str) -> tuple[Any, Any]:
    from sparing.cli import _quiet_libraries

    _quiet_libraries()
    from sparing import pretrained

    return pretrained.load(model)


def _load(model: str, adapter: Path) -> "tuple[PeftModel, Any]":
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(
            str(adapter),
            expected="a folder that `sparing tasks train` wrote",
            found="no adapter_config.json",
            mend="Check the path.",
        )
    base, tokenizer = _load_base(model)
    from peft import PeftModel

    from sparing.adapt.ept import EPTTuner

    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    if not isinstance(adapted.base_model, EPTTuner):
        raise CheckpointError(
            str(adapter),
            expected="an EPT adapter",
            found=str(adapted.peft_config["default"].peft_type),
            mend="Train one with `sparing tasks train`.",
        )
    return adapted, tokenizer
