"""What commands that train show: which run, which step, the loss, the time left."""

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from sparing.progress import progress_line
from sparing.work import Work


class Progress(Protocol):
    """Is told what a long command does."""

    def stage(self, text: str) -> None:
        """A preparation began."""
        ...

    def expect(self, work: Sequence[Work]) -> None:
        """This work comes next."""
        ...

    def step(self, work: Work, step: int, loss: float) -> None:
        """A training step was taken."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        pass

    def expect(self, work: Sequence[Work]) -> None:
        pass

    def step(self, work: Work, step: int, loss: float) -> None:
        pass


class Live:
    """A line of progress on a terminal; plain lines elsewhere.

    Arguments:
        console: to write to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = progress_line(
            console, MofNCompleteColumn(), TextColumn("{task.fields[state]}")
        )
        self._task = self._bars.add_task("starting", total=None, state="")
        self._steps_left = 0
        self._counted: dict[str, int] = {}
        self._last = time.monotonic()
        self._pace: float | None = None

    def __enter__(self) -> "Live":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def stage(self, text: str) -> None:
        self._last = time.monotonic()
        self._bars.update(self._task, description=text, state="")
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)

    def expect(self, work: Sequence[Work]) -> None:
        self._last = time.monotonic()
        self._steps_left = sum(each.steps for each in work if not each.result_file.exists())
        self._counted = {}

    def step(self, work: Work, step: int, loss: float) -> None:
        now = time.monotonic()
        done = step - self._counted.get(work.label, 0)
        self._counted[work.label] = step
        self._steps_left -= done
        pace = (now - self._last) / max(done, 1)
        self._last = now
        self._pace = pace if self._pace is None else 0.9 * self._pace + 0.1 * pace
        left = max(0, self._steps_left) * self._pace
        state = f"loss {loss:.3f}   {_duration(left)} left in this part"
        self._bars.update(
            self._task,
            description=work.label,
            completed=step,
            total=work.steps,
            state=state,
        )
        if not self._console.is_terminal and step == work.steps:
            self._console.print(f"{work.label}: step {step}, {state}", highlight=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
