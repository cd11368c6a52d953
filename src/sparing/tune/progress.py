"""What a search shows while it runs: trials done, the best so far, the time left."""

import statistics

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn
from rich.table import Table

from sparing.progress import progress_line
from sparing.tune.front import Front


class Live:
    """A line of progress on a terminal; plain lines elsewhere.

    Arguments:
        console: to write to.
        trials: in all.
    """

    def __init__(self, console: Console, trials: int) -> None:
        self._console, self._trials = console, trials
        self._bars = progress_line(
            console, MofNCompleteColumn(), TextColumn("{task.fields[state]}")
        )
        self._task = self._bars.add_task("searching", total=trials, state="")

    def __enter__(self) -> "Live":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def stage(self, text: str) -> None:
        """A preparation began."""
        self._bars.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)

    def trial(self, front: Front) -> None:
        """One more trial has ended."""
        done = [trial for trial in front.trials if trial.state != "running"]
        if not done:
            return
        last = done[-1]
        pace = statistics.fmean(trial.seconds for trial in done)
        left = max(0, self._trials - len(done)) * pace
        state = f"{len(front.members)} on the front, about {left:.0f} s left"
        self._bars.update(self._task, description="searching", completed=len(done), state=state)
        if not self._console.is_terminal:
            self._console.print(
                f"trial {last.number}: {last.mask}, {outcome(front, last.number)}; {state}",
                highlight=False,
            )


def outcome(front: Front, number: int) -> str:
    """The rewards of a trial in words, or why it has none."""
    trial = next(trial for trial in front.trials if trial.number == number)
    if trial.values is None:
        return f"{trial.state} {trial.reason}".strip()
    pairs = zip(front.rewards, trial.values, strict=True)
    return ", ".join(f"{name} {value:.4g}" for name, value in pairs)


def front_table(front: Front) -> Table:
    """The members of the front, one a row."""
    table = Table("trial", "mask", "learning rate", *front.rewards, "trainable", "s")
    for trial in front.members:
        assert trial.values is not None
        table.add_row(
            str(trial.number),
            trial.mask,
            f"{trial.learning_rate:.2e}",
            *(f"{value:.4g}" for value in trial.values),
            f"{trial.trainable:,}",
            f"{trial.seconds:.1f}",
        )
    return table
