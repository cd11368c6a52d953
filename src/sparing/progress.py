"""The line of progress that all long commands show on a terminal."""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn


def progress_line(console: Console, *columns: ProgressColumn) -> Progress:
    """A description, a bar and further columns; gone when done, and nothing off a terminal.

    Arguments:
        console: to write to.
        columns: right of the bar.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
