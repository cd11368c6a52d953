"""`sparing stn`: one run that tunes its own regularisation, and the replay of its schedule."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Self-tuning networks: train, and replay a schedule.")

RecipeArgument = Annotated[Path, typer.Argument(help="YAML file; see docs/methods/stn.md.")]


@app.command()
def train(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="Folder of the run; resumes there.")] = Path("runs/stn"),
) -> None:
    """Train a model and tune its regularisation in one run."""
    from rich.progress import MofNCompleteColumn

    from sparing import cli
    from sparing.progress import progress_line

    cli._quiet_libraries()
    from sparing.tune.stn.recipe import Recipe
    from sparing.tune.stn.recipe import train as run_recipe
    from sparing.tune.stn.schedule import Record

    chosen = Recipe.load(recipe)
    with progress_line(cli.console, MofNCompleteColumn()) as line:
        task = line.add_task("training", total=chosen.training_plan().steps)

        def show(record: Record) -> None:
            line.update(task, completed=record.step)

        run, network = run_recipe(chosen, out, on_cycle=show)
    for name, value in network.current().items():
        cli.console.print(f"{name}: {value:.4g}", highlight=False)
    if run.evaluations:
        best = min(loss for _, loss in run.evaluations)
        cli.console.print(f"best validation loss: {best:.4f} at step {run.best_step}")
    for name in ("model.safetensors", "schedule.csv", "schedule.png", "network"):
        cli.console.print(f"{out / name}", soft_wrap=True, highlight=False)


@app.command()
def replay(
    schedule: Annotated[Path, typer.Argument(help="schedule.csv of a run.")],
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/replay"),
) -> None:
    """Train a plain model from scratch under a recorded schedule."""
    from rich.progress import MofNCompleteColumn

    from sparing import cli
    from sparing.progress import progress_line

    cli._quiet_libraries()
    from sparing.tune.stn.recipe import Recipe, repeat
    from sparing.tune.stn.schedule import Schedule

    recorded, chosen = Schedule.load(schedule), Recipe.load(recipe)
    with progress_line(cli.console, MofNCompleteColumn()) as line:
        task = line.add_task("training", total=chosen.training_plan().steps)
        loss = repeat(
            chosen, recorded, out, on_step=lambda step, _: line.update(task, completed=step)
        )
    cli.console.print(f"validation loss: {loss:.4f}")
    cli.console.print(f"{out / 'model.safetensors'}", soft_wrap=True, highlight=False)
