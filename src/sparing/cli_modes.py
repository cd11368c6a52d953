"""`sparing modes …`: which neurons a mode of TauGate uses, and the mode as a plain model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

app = typer.Typer(
    no_args_is_help=True,
    help="Look into modes that `sparing adapt --method dopamine` trained (TauGate).",
)

ModelArgument = Annotated[
    str, typer.Argument(help="The modes' base: hub id, folder, GGUF file or built-in name.")
]


@app.command()
def report(
    model: ModelArgument,
    mode: Annotated[list[Path], typer.Option(help="Folder of a mode; once for each.")],
    out: Annotated[Path, typer.Option(help="Folder for tables and heat maps.")],
    data: Annotated[
        str, typer.Option(help="Text to look at; see sparing adapt.")
    ] = "python-topics",
    rows: Annotated[int, typer.Option(help="Rows of it.")] = 8,
    block_length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    soft: Annotated[bool, typer.Option("--soft", help="Run soft gates, not hard ones.")] = False,
    most: Annotated[int, typer.Option(help="Neurons to print.")] = 10,
) -> None:
    """Tell which neurons each mode uses, and where it differs from the base or the first mode."""
    adapted, tokenizer, names = _load(model, mode)
    from rich.table import Table

    from sparing.adapt import neuron_attribution
    from sparing.cli import console
    from sparing.data import prepare

    blocks = prepare(data, tokenizer, block_length=block_length, validation_blocks=rows)
    batches = [row[None] for row in blocks.validation.batch.input_ids]
    found = neuron_attribution(adapted, batches, names, hard=not soft)
    found.write_csv(out / "neurons.csv")
    found.write_json(out / "neurons.json")
    table = Table("mode", "open", "closed")
    for name in found.usage:
        found.write_heat_map(out / f"{name.strip('_')}.png", name)
        share = found.open_share(name)
        table.add_row(name, f"{share:.2%}", f"{1 - share:.2%}")
    console.print(table)
    before = "__base__" if len(names) == 1 else names[0]
    for name in names if len(names) == 1 else names[1:]:
        found.write_heat_map(out / f"{before.strip('_')}-to-{name}.png", name, before)
        table = Table("layer", "neuron", f"participation, {before} to {name}")
        for layer, neuron, change in found.differences(name, before, most):
            table.add_row(layer, str(neuron), f"{change:+.3f}")
        console.print(table)
    console.print(f"neurons: {out}", soft_wrap=True, highlight=False)


@app.command()
def export(
    model: ModelArgument,
    mode: Annotated[Path, typer.Option(help="Folder of the mode.")],
    out: Annotated[Path, typer.Option(help="New safetensors file.")],
) -> None:
    """Write a mode as a plain model with hard gates, for sparing.adapt.load_hard_model."""
    if out.exists():
        raise CheckpointError(
            str(out), expected="a new file", found="an existing one", mend="Choose another --out."
        )
    adapted, _, _ = _load(model, [mode])
    from sparing.adapt import hard_model, save_hard_model
    from sparing.cli import console

    save_hard_model(hard_model(adapted), out)
    console.print(f"hard model: {out}", soft_wrap=True, highlight=False)


def _load(model: str, folders: Sequence[Path]) -> "tuple[PeftModel, Any, list[str]]":
    """The model with all modes, its tokenizer, and the names of the modes, which are those of
    their folders."""
    names = [folder.resolve().name.replace(".", "-") for folder in folders]  # of modules, in PEFT
    for folder in folders:
        if not (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                str(folder),
                expected="a folder that `sparing adapt --method dopamine` wrote",
                found="no adapter_config.json",
                mend="Check the path.",
            )
    if len(set(names)) < len(names):
        raise ConfigError(
            "mode",
            expected="folders of different names",
            found=", ".join(names),
            mend="Rename one.",
        )
    from sparing.cli import _quiet_libraries

    _quiet_libraries()
    from peft import PeftModel

    from sparing import pretrained

    base, tokenizer = pretrained.load(model)
    adapted = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        adapted.load_adapter(str(folder), adapter_name=name)
    return adapted.eval(), tokenizer, names
