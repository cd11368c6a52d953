"""What a merge shows while it runs: the pass over the models, how far it is, the time left."""

import warnings
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import TaskProgressColumn, TimeRemainingColumn

from sparing.progress import progress_line


class Live:
    """A line of progress on a terminal; plain lines elsewhere. Warnings are shown as notes.

    Arguments:
        console: to write to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = progress_line(console, TaskProgressColumn(), TimeRemainingColumn())
        self._task = self._bars.add_task("reading headers", total=None)
        self._open = ExitStack()

    def __enter__(self) -> "Live":
        self._open.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = self._note  # type: ignore[assignment]
        self._open.enter_context(self._bars)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def stage(self, text: str, total: int) -> None:
        self._bars.reset(self._task, description=text, total=total)
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)

    def advance(self, done: int) -> None:
        self._bars.advance(self._task, done)

    def _note(self, message: Warning | str, category: type[Warning], *place: Any) -> None:
        if category is UserWarning:
            self._console.print(f"[yellow]note[/] {escape(str(message))}", soft_wrap=True)
