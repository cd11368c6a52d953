"""`sparing search`: which blocks of a diffusion model to fine-tune (MemControl)."""

from pathlib import Path
from typing import Annotated

import typer

from sparing.errors import ConfigError


def search(
    model: Annotated[
        str, typer.Argument(help="digits (built in), or folder or hub id of a UNet of diffusers.")
    ] = "digits",
    data: Annotated[
        Path | None, typer.Option(help="Safetensors of images and conditions, with your model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the search.")] = Path("runs/search"),
    family: Annotated[
        str, typer.Option(help="Parameters: svdiff, difffit, attention or full.")
    ] = "svdiff",
    coverage: Annotated[
        str, typer.Option(help="strict: bits cover all; legacy: as in the released code.")
    ] = "strict",
    rewards: Annotated[
        str,
        typer.Option(
            help="Memorisation first: max_norm, avg_norm, MIFID, distance or extraction; and FID."
        ),
    ] = "max_norm,FID",
    trials: Annotated[int, typer.Option(help="In all, with those of earlier runs.")] = 20,
    sampler: Annotated[str, typer.Option(help="nsga2, tpe or random.")] = "nsga2",
    learning_rates: Annotated[str, typer.Option(help="Lower and higher bound.")] = "1e-5,1e-3",
    steps: Annotated[int, typer.Option(help="Optimiser steps of a trial.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    repeats: Annotated[int, typer.Option(help="Of each private image in the data.")] = 10,
    samples: Annotated[int, typer.Option(help="Images to generate in a trial.")] = 128,
    sampling_steps: Annotated[int, typer.Option(help="Of DDIM.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free; 1 is none.")] = 2.0,
    pretraining: Annotated[int, typer.Option(help="Steps of the base, for digits.")] = 300,
    storage: Annotated[
        str | None, typer.Option(help="Database that workers share; default: SQLite in --out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    pick: Annotated[str, typer.Option(help="knee, quality or memorization.")] = "knee",
    budget: Annotated[
        float | None, typer.Option(help="Bound on memorisation, to pick by quality.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Loss of quality, as a share, to pick by memorization.")
    ] = None,
    final_steps: Annotated[
        int, typer.Option(help="Then tune with the picked mask, and save it; 0 is not.")
    ] = 0,
) -> None:
    """Search which blocks to fine-tune, for quality and against memorisation; resumes."""
    from sparing import cli

    cli._quiet_libraries()
    from sparing.tune.command import Request, Search
    from sparing.tune.progress import Live, front_table, outcome

    request = Request(
        model=model,
        data=data,
        family=family,
        coverage=coverage,
        rewards=tuple(name.strip() for name in rewards.split(",")),
        trials=trials,
        steps=steps,
        batch_size=batch_size,
        repeats=repeats,
        learning_rates=_bounds(learning_rates),
        sampler=sampler,
        samples=samples,
        sampling_steps=sampling_steps,
        guidance=guidance,
        pretraining=pretraining,
        seed=seed,
    )
    with Live(cli.console, trials) as live:
        found = Search(request, out, storage=storage, stage=live.stage, on_trial=live.trial)
        front = found.run()
        bounds = {"budget": budget, "tolerance": tolerance}
        chosen = front.pick(pick, **bounds)  # type: ignore[arg-type]
        if final_steps:
            live.stage(f"tuning with mask {chosen.mask}")
            found.finish(chosen, final_steps)
    cli.console.print(front_table(front))
    cli.console.print(
        f"picked trial {chosen.number}: mask {chosen.mask}, learning rate "
        f"{chosen.learning_rate:.2e}, {outcome(front, chosen.number)}",
        soft_wrap=True,
        highlight=False,
    )
    for name in ("trials.csv", "front.json", "front.png", *(["tuned"] if final_steps else [])):
        cli.console.print(f"{out / name}", soft_wrap=True, highlight=False)


def _bounds(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            "learning_rates",
            expected="a lower and a higher bound",
            found=repr(text),
            mend="For example: --learning-rates 1e-5,1e-3",
        ) from error
    return low, high
