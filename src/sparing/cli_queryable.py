"""`sparing queryable …`: see how a Queryable LoRA routes, freeze it, or add atoms to it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.errors import CheckpointError

app = typer.Typer(
    no_args_is_help=True,
    help="Look at, freeze or extend an adapter that `sparing adapt --method queryable-lora` wrote.",
)

ModelArgument = Annotated[
    str, typer.Argument(help="The adapter's base: hub id, folder, GGUF file or built-in name.")
]
AdapterArgument = Annotated[Path, typer.Argument(help="Folder of the adapter.")]
InstructionOption = Annotated[
    str | None, typer.Option(help="What is to be done, for an adapter with an instruction prior.")
]


@app.command()
def show(
    model: ModelArgument,
    adapter: AdapterArgument,
    prompt: Annotated[str, typer.Option(help="Text to route.")],
    instruction: InstructionOption = None,
) -> None:
    """Print the mean weight of every atom in every block for a prompt."""
    adapted, tokenizer = _load(model, adapter)
    import torch

    from sparing.adapt import routing_report

    if instruction is not None:
        adapted.set_instruction(instruction, tokenizer=tokenizer)
    given = dict(tokenizer(prompt, return_tensors="pt"))
    given["prompt_mask"] = torch.ones_like(given["input_ids"])
    _say(str(routing_report(adapted, **given)))


@app.command()
def freeze(
    model: ModelArgument,
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option(help="Folder for the plain LoRA.")],
    instruction: InstructionOption = None,
    data: Annotated[
        str | None, typer.Option(help="Or text to take mean weights over; see sparing adapt.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of --data.", min=1)] = 16,
    block_length: Annotated[int, typer.Option(help="Tokens a row of --data.")] = 128,
) -> None:
    """Write the best static approximation as a LoRA for plain peft."""
    adapted, tokenizer = _load(model, adapter)
    from sparing.adapt import freeze_routing

    calibration = None
    if data is not None:
        blocks = _blocks(data, tokenizer, block_length).batch.input_ids[:rows]
        calibration = [{"input_ids": row[None], "prompt_mask": row[None] >= 0} for row in blocks]
    freeze_routing(
        adapted, out, instruction=instruction, calibration=calibration, tokenizer=tokenizer
    )
    _say(f"a plain LoRA of rank {adapted.peft_config['default'].r}: {out}")


@app.command()
def extend(
    model: ModelArgument,
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option(help="Folder for the extended adapter.")],
    data: Annotated[str, typer.Option(help="Of the new task; see sparing adapt.")],
    count: Annotated[int, typer.Option(help="New atoms.")] = 4,
    instruction: InstructionOption = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-3,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    block_length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the data order.")] = 0,
) -> None:
    """Freeze all atoms, add new ones, and train these and the router on another task."""
    adapted, tokenizer = _load(model, adapter, trainable=True)
    from sparing.checkpoint import atomic_path
    from sparing.train import TrainPlan, train

    adapted.extend_atoms(count)
    if instruction is not None:
        adapted.set_instruction(instruction, tokenizer=tokenizer)
    plan = TrainPlan(steps, batch_size, learning_rate, seed=seed)
    _, history = train(adapted, _blocks(data, tokenizer, block_length), plan)
    with atomic_path(out) as fresh:
        adapted.save_pretrained(str(fresh))
    atoms = adapted.peft_config["default"].num_atoms
    _say(f"{atoms} atoms, loss {history.losses[0]:.4f} -> {history.losses[-1]:.4f}: {out}")


def _load(model: str, adapter: Path, trainable: bool = False) -> tuple[Any, Any]:
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(
            str(adapter),
            expected="the folder of an adapter",
            found="no adapter_config.json",
            mend="Check the path.",
        )
    from sparing.cli import _quiet_libraries

    _quiet_libraries()
    from peft import PeftModel

    from sparing import adapt, pretrained

    base, tokenizer = pretrained.load(model)
    loaded = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable).eval()
    if not isinstance(loaded.peft_config["default"], adapt.QueryableLoRAConfig):
        raise CheckpointError(
            str(adapter),
            expected="a Queryable LoRA",
            found=str(loaded.peft_config["default"].peft_type),
            mend="Train one with sparing adapt --method queryable-lora.",
        )
    return loaded, tokenizer


def _blocks(source: str, tokenizer: Any, length: int) -> Any:
    from sparing.data import prepare

    return prepare(source, tokenizer, block_length=length).train


def _say(text: str) -> None:
    from sparing.cli import console

    console.print(text, soft_wrap=True, highlight=False)
