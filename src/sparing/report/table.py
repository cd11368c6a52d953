"""The table of a comparison: one list of columns, for the terminal, Markdown and the HTML page."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from sparing.compare.results import Results, Row
from sparing.report import numerals
from sparing.report.rows import (
    competitors,
    failures,
    in_order,
    is_untouched,
    loss_of,
    untouched_loss,
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Column:
    """One column.

    Arguments:
        heading: short, with the unit.
        meaning: a sentence for those who ask.
        text: the cell of a row.
        number: what the column is sorted by; None for text, and where a row has no figure.
        rank: of importance; where there is no room, the highest go first.
    """

    heading: str
    meaning: str
    text: Callable[[Row, Results], str]
    number: Callable[[Row, Results], float | None]
    rank: int
    numeric: bool = True


def _shown(write: Callable[[Value], str], value: Value | None) -> str:
    return numerals.MISSING if value is None else write(value)


def _loss(row: Row, _: Results) -> str:
    if row.loss is not None:
        return numerals.loss_summary(row.loss)
    return _shown(numerals.loss, loss_of(row))


def _perplexity(row: Row, _: Results) -> float | None:
    loss = loss_of(row)
    return None if loss is None else numerals.perplexity_of(loss)


def _change(row: Row, results: Results) -> float | None:
    loss, before = loss_of(row), row.loss_before
    before = untouched_loss(results) if before is None else before
    if loss is None or before is None or is_untouched(row):
        return None
    return loss - before


def _rate(row: Row, _: Results) -> float | None:
    return None if row.learning_rate is None else row.learning_rate.best


def _share(row: Row, _: Results) -> float | None:
    """References are not held to the budget."""
    return None if row.status == "reference" else row.budget_share


def _note(row: Row, _: Results) -> str:
    if row.status == "failed":
        return f"failed: {row.error or 'no reason was recorded'}"
    parts = ["reference"] if row.status == "reference" else []
    return "; ".join([*parts, row.note] if row.note else parts)


def _no_number(_row: Row, _results: Results) -> None:
    return None


COLUMNS: tuple[Column, ...] = (
    Column(
        "method",
        "As given on the command line.",
        lambda row, _: row.method,
        _no_number,
        rank=0,
        numeric=False,
    ),
    Column(
        "val loss",
        "Mean validation loss in nats a token, ± sample standard deviation over seeds.",
        _loss,
        lambda row, _: loss_of(row),
        rank=0,
    ),
    Column(
        "perplexity",
        "exp of the mean validation loss.",
        lambda row, results: _shown(numerals.perplexity, _perplexity(row, results)),
        _perplexity,
        rank=5,
    ),
    Column(
        "change",
        "Validation loss minus that of the untouched model; below zero is better.",
        lambda row, results: _shown(numerals.change, _change(row, results)),
        _change,
        rank=3,
    ),
    Column(
        "best lr",
        "The learning rate of the grid with the lowest loss on the selection slice.",
        lambda row, results: _shown(numerals.learning_rate, _rate(row, results)),
        _rate,
        rank=6,
    ),
    Column(
        "trainable",
        "Trainable parameters, exactly.",
        lambda row, _: _shown(numerals.count, row.trainable_parameters),
        lambda row, _: row.trainable_parameters,
        rank=1,
    ),
    Column(
        "of budget",
        "Trainable parameters (of a budget in bytes: adapter bytes) as a share of the budget.",
        lambda row, results: _shown(numerals.share, _share(row, results)),
        _share,
        rank=7,
    ),
    Column(
        "adapter",
        "Size of the saved weight file.",
        lambda row, _: _shown(numerals.size, row.adapter_bytes),
        lambda row, _: row.adapter_bytes,
        rank=8,
    ),
    Column(
        "peak memory",
        "Of the training process: resident set on CPU, allocated memory on CUDA.",
        lambda row, _: _shown(numerals.size, row.peak_memory_bytes),
        lambda row, _: row.peak_memory_bytes,
        rank=3,
    ),
    Column(
        "s/step",
        "Seconds per training step, median.",
        lambda row, _: _shown(numerals.significant, row.seconds_per_step),
        lambda row, _: row.seconds_per_step,
        rank=2,
    ),
    Column(
        "latency",
        "Forward pass with the adapter, not merged, over forward pass without.",
        lambda row, _: _shown(numerals.ratio, row.latency_ratio),
        lambda row, _: row.latency_ratio,
        rank=9,
    ),
    Column(
        "merged",
        "The same after merging; none where the method cannot merge.",
        lambda row, _: _shown(numerals.ratio, row.merged_latency_ratio),
        lambda row, _: row.merged_latency_ratio,
        rank=10,
    ),
    Column(
        "note",
        "References, remarks on the budget, and errors.",
        _note,
        _no_number,
        rank=4,
        numeric=False,
    ),
)


def filled_columns(results: Results) -> list[Column]:
    """The columns in which at least one row has something to say."""
    empty = {"", numerals.MISSING}
    return [
        column
        for column in COLUMNS
        if any(column.text(row, results) not in empty for row in results.rows)
    ]


def render_table(results: Results, width: int | None = None) -> Table:
    """The table for a terminal.

    Arguments:
        results: of a comparison.
        width: characters that the terminal has. With it, the least important columns are left out
            until the rest fits, and the caption names them; without, all are there.
    """
    columns = filled_columns(results)
    hidden: list[str] = []
    while width is not None and len(columns) > 3 and _width_of(columns, results) > width:
        last = max(columns, key=lambda column: column.rank)
        columns.remove(last)
        hidden.append(last.heading)
    remarks = [f"No room for: {', '.join(hidden)}."] if hidden else []
    if "note" in hidden:
        remarks += [f"{row.method} {_note(row, results)}" for row in failures(results)]
    table = Table(title=Text(title(results)), caption=Text("\n".join(remarks)) if hidden else None)
    for column in columns:
        table.add_column(
            Text(column.heading),
            justify="right" if column.numeric else "left",
            no_wrap=column.heading != "note",
            overflow="fold",
        )
    best = next(iter(competitors(results)), None)
    for row in in_order(results):
        cells = [Text(column.text(row, results)) for column in columns]
        table.add_row(*cells, style=_style(row, best))
    return table


def markdown_table(results: Results) -> str:
    """The table in GitHub's Markdown; the method with the lowest loss is bold."""
    columns = filled_columns(results)
    best = next(iter(competitors(results)), None)
    lines = [
        _markdown_row([column.heading for column in columns]),
        _markdown_row(["---:" if column.numeric else ":---" for column in columns]),
    ]
    for row in in_order(results):
        cells = [markdown_escape(column.text(row, results)) for column in columns]
        if row is best:
            cells[0] = f"**{cells[0]}**"
        lines.append(_markdown_row(cells))
    return "\n".join(lines) + "\n"


def title(results: Results) -> str:
    """What was compared, on what, within what."""
    model = short_name(results.model.get("name", "model"))
    data = short_name(results.data.get("name", "data"))
    return f"{model} on {data}, budget {results.budget.get('text', 'not stated')}"


def short_name(name: object) -> str:
    """The last part of a path; a hub id, or any other name, as it is."""
    text = str(name)
    is_path = text.startswith(("/", "./", "../", "~")) or text.count("/") > 1
    return text.rstrip("/").rpartition("/")[2] if is_path and text.strip("./~") else text


def markdown_escape(text: str) -> str:
    """`text` with nothing left that Markdown or HTML would act on, on one line."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(one_line, quote=False))


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _width_of(columns: Sequence[Column], results: Results) -> int:
    """Characters of the whole table, a note counted as at most 24 because it wraps."""
    total = 1
    for column in columns:
        texts = [column.heading, *(column.text(row, results) for row in results.rows)]
        widest = max(cell_len(text) for text in texts)
        total += 3 + (min(widest, 24) if column.heading == "note" else widest)
    return total


def _style(row: Row, best: Row | None) -> str:
    if row is best:
        return "bold green"
    return {"failed": "red", "reference": "dim"}.get(row.status, "")
