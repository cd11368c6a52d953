"""`sparing plan`: what a scaling rule does with every parameter of a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.errors import ConfigError, near_matches


def plan(
    base: Annotated[str, typer.Option(help="Tuned model: config JSON, folder or hub id.")],
    target: Annotated[str, typer.Option(help="Model to plan for: config JSON, folder or hub id.")],
    lr: Annotated[float, typer.Option(help="Learning rate of matrices, tuned in the base run.")],
    method: Annotated[str, typer.Option(help="hyperp, wd-scaling or muon-mup.")] = "hyperp",
    aux_lr: Annotated[
        float | None, typer.Option(help="Of embeddings and vectors; as --lr where not given.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Tuned in the base run.")] = 0.1,
    base_tokens: Annotated[float | None, typer.Option(help="Tokens of the base run.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the run to come.")] = None,
    base_batch: Annotated[float | None, typer.Option(help="Its tokens a step.")] = None,
    batch: Annotated[float | None, typer.Option(help="Tokens a step of the run to come.")] = None,
    decay_exponent: Annotated[
        float, typer.Option("--p", help="wd-scaling: decay grows as width to this power.")
    ] = 0.5,
    one_sided_exponent: Annotated[
        float | None,
        typer.Option("--one-sided-p", help="The same where one side grows; else half of --p."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the plan, as JSON.")] = None,
) -> None:
    """Plan learning rates, decay and initialisation for a model, without loading its weights."""
    from rich.table import Table

    from sparing.checkpoint import write_json
    from sparing.cli import _quiet_libraries, console

    _quiet_libraries()
    from sparing.scale.planners import PLANNERS
    from sparing.scale.settings import PlanSettings

    if method not in PLANNERS:
        raise ConfigError(
            "method",
            expected=f"one of {', '.join(PLANNERS)}",
            found=repr(method),
            mend=near_matches(method, sorted(PLANNERS)),
        )
    runs = base_tokens, tokens, base_batch, batch
    settings = PlanSettings(lr, aux_lr, weight_decay, *runs, decay_exponent, one_sided_exponent)
    planned = PLANNERS[method](_without_weights(base), _without_weights(target), settings)
    table = Table("parameter", "shape", "step", "rate", "decay", "init", "multiplier", "why")
    for row in planned.rows():
        std = "" if row["init_std"] is None else f"{row['init_std']:.3g}"
        shape = "×".join(map(str, row["shape"]))
        numbers = f"{row['lr']:.3g}", f"{row['weight_decay']:.3g}", std, f"{row['multiplier']:.3g}"
        table.add_row(row["name"], shape, row["algorithm"], *numbers, row["why"])
    console.print(table)
    for note in planned.notes:
        console.print(note, soft_wrap=True, highlight=False)
    if out is not None:
        write_json(out, planned.to_json())
        console.print(f"plan: {out}", soft_wrap=True, highlight=False)


def _without_weights(model: str) -> Any:
    import torch

    from sparing import pretrained

    source = model if Path(model).is_file() else pretrained.resolve(model)
    with torch.device("meta"):
        return pretrained.architecture(source)
