"""What a comparison shows while it runs: which run, which step, the loss, the time left."""

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    TextColumn,
)

from sparing.compare.jobs import Job
from sparing.progress import progress_line


class Progress(Protocol):
    """Is told what a comparison does."""

    def stage(self, text: str) -> None:
        """A preparation began."""
        ...

    def expect(self, jobs: Sequence[Job]) -> None:
        """These jobs come next."""
        ...

    def step(self, job: Job, step: int, loss: float) -> None:
        """A job took a training step."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        pass

    def expect(self, jobs: Sequence[Job]) -> None:
        pass

    def step(self, job: Job, step: int, loss: float) -> None:
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

    def expect(self, jobs: Sequence[Job]) -> None:
        self._last = time.monotonic()
        waiting = [job for job in jobs if job.plan and not job.result_file.exists()]
        self._steps_left = sum(
            job.plan.steps for job in waiting if job.plan and job.kind == "train"
        )
        self._counted = {}
        kinds = {job.kind for job in waiting}
        if kinds == {"measure"}:
            self.stage(f"measuring {len(waiting)} trained adapters")

    def step(self, job: Job, step: int, loss: float) -> None:
        assert job.plan is not None
        now = time.monotonic()
        done = step - self._counted.get(job.label, 0)
        self._counted[job.label] = step
        self._steps_left -= done
        pace = (now - self._last) / max(done, 1)
        self._last = now
        self._pace = pace if self._pace is None else 0.9 * self._pace + 0.1 * pace
        left = max(0, self._steps_left) * self._pace
        state = f"loss {loss:.3f}   {_duration(left)} left in this part"
        self._bars.update(
            self._task,
            description=job.label,
            completed=step,
            total=job.plan.steps,
            state=state,
        )
        if not self._console.is_terminal and step == job.plan.steps:
            self._console.print(f"{job.label}: step {step}, {state}", highlight=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
