"""`sparing plan`: what a scaling rule does with every parameter of a model."""

from pathlib import Path
from typing import Annotated

import typer

from sparing.errors import ConfigError


def plan(
    model: Annotated[str, typer.Argument(help="The target: hub id, folder or config.json.")],
    eta0: Annotated[float, typer.Option(help="Learning rate tuned in the base run.")],
    method: Annotated[str, typer.Option(help="hyperp.")] = "hyperp",
    base_depth: Annotated[int, typer.Option(help="Blocks of the base run.")] = 8,
    base_tokens: Annotated[float, typer.Option(help="Training tokens of the base run.")] = 10.4e9,
    base_batch: Annotated[float, typer.Option(help="Tokens a step of the base run.")] = 2.0**21,
    tokens: Annotated[float | None, typer.Option(help="Training tokens of the target.")] = None,
    batch: Annotated[float | None, typer.Option(help="Tokens a step of the target.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the plan, as JSON.")] = None,
) -> None:
    """Plan learning rates, decay and initialisation for a model, without loading its weights."""
    if method != "hyperp":
        raise ConfigError(
            "method", expected="hyperp", found=repr(method), mend="Others are planned."
        )
    from rich.table import Table

    from sparing.checkpoint import write_json
    from sparing.cli import _quiet_libraries, console

    _quiet_libraries()
    import torch

    from sparing import pretrained
    from sparing.scale import HyperP, hyperp_plan

    file = Path(model)
    source = str(file.parent) if file.name == "config.json" else pretrained.resolve(model)
    with torch.device("meta"):
        target = pretrained.architecture(source)
    law = HyperP(eta0, depth=base_depth, tokens=base_tokens, batch=base_batch)
    planned = hyperp_plan(target, law, tokens=tokens, batch=batch)
    table = Table("parameter", "shape", "step", "rate", "init", "why")
    for row in planned.rows():
        std = "" if row["init_std"] is None else f"{row['init_std']:.3g}"
        shape = "×".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, row["algorithm"], f"{row['lr']:.3g}", std, row["why"])
    console.print(table)
    for note in planned.notes:
        console.print(note, soft_wrap=True, highlight=False)
    if out is not None:
        write_json(out, planned.to_json())
        console.print(f"plan: {out}", soft_wrap=True, highlight=False)
