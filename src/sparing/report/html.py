"""The page of a comparison: one file that works without any network."""

import json
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from sparing.checkpoint import atomic_path
from sparing.compare.results import LearningRate, Results, Row
from sparing.report import numerals
from sparing.report._extras import require
from sparing.report._template import render
from sparing.report.interactive import curves_spec, pareto_spec
from sparing.report.palette import looks
from sparing.report.rows import (
    competitors,
    failures,
    in_order,
    is_lora,
    num_seeds,
    on_grid_edge,
    untouched_loss,
)
from sparing.report.standing import standing
from sparing.report.table import Column, filled_columns, short_name, title


@dataclass(frozen=True)
class Cell:
    """One cell of the sortable table; `key` is what it is sorted by."""

    text: str
    key: str
    numeric: bool


@dataclass(frozen=True)
class TableRow:
    """One row of the sortable table."""

    row: Row
    colour: str
    kind: str
    cells: list[Cell]


@dataclass(frozen=True)
class GridCell:
    """The selection loss of one learning rate."""

    text: str
    best: bool


@dataclass(frozen=True)
class GridRow:
    """All learning rates of one method."""

    method: str
    cells: list[GridCell]
    warning: str


@dataclass(frozen=True)
class Fact:
    """A figure at the top of the page."""

    name: str
    value: str


def write_html(results: Results, path: Path) -> Path:
    """Write the page atomically.

    Raises:
        MissingExtraError: plotly is not installed.
        CheckpointError: the folder cannot be written.
    """
    text = html_page(results)
    with atomic_path(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path


def html_page(results: Results) -> str:
    """The text of the page, about five megabytes because it brings plotly.js along."""
    plotly: str = require("plotly.offline").get_plotlyjs()
    columns = filled_columns(results)
    return render(
        "report.html.j2",
        title=title(results),
        results=results,
        standing=standing(results),
        facts=facts(results),
        columns=columns,
        rows=table_rows(results, columns),
        pareto=pareto_spec(results),
        curves=curves_spec(results),
        trained=[row for row in in_order(results) if row.options],
        rates=sorted({rate for row in results.rows for rate in _grid(row)}),
        grid=grid_rows(results),
        failed=failures(results),
        snippet=snippet(results),
        adapters=[row.adapter for row in competitors(results) if row.adapter],
        plain=numerals.plain,
        write_rate=numerals.learning_rate,
        plotly=Markup(plotly),
    )


def facts(results: Results) -> list[Fact]:
    """What a reader looks for first."""
    found = [Fact("Model", short_name(results.model.get("name", "not named")))]
    if isinstance(results.model.get("parameters"), int):
        found.append(Fact("Parameters", numerals.compact(results.model["parameters"])))
    found.append(Fact("Data", short_name(results.data.get("name", "not named"))))
    found.append(Fact("Budget", _budget(results)))
    before = untouched_loss(results)
    if before is not None:
        found.append(Fact("Untouched loss", numerals.loss(before)))
    best = next(iter(competitors(results)), None)
    if best is not None and best.loss is not None:
        found.append(Fact("Lowest loss", numerals.loss(best.loss.mean)))
    found.append(Fact("Seeds", str(num_seeds(results))))
    return found


def table_rows(results: Results, columns: list[Column]) -> list[TableRow]:
    """The rows of the table with what they are sorted by."""
    best = next(iter(competitors(results)), None)
    style = looks(results)
    rows = []
    for row in in_order(results):
        kind = "best" if row is best else "lora" if is_lora(row) else row.status
        colour = style[row.method].colour if row.method in style else "transparent"
        rows.append(
            TableRow(row, colour, kind, [_cell(column, row, results) for column in columns])
        )
    return rows


def grid_rows(results: Results) -> list[GridRow]:
    """Selection losses by learning rate, with a warning where the best one is on the edge."""
    rates = sorted({rate for row in results.rows for rate in _grid(row)})
    rows = []
    for row in in_order(results):
        if row.learning_rate is None:
            continue
        chosen = row.learning_rate
        cells = [GridCell(_selection(chosen, rate), rate == chosen.best) for rate in rates]
        rows.append(GridRow(row.method, cells, _warning(row, chosen)))
    return rows


def snippet(results: Results) -> str:
    """Python that loads the best saved adapter; empty if none was saved."""
    saved = [row for row in competitors(results) if row.adapter]
    if not saved:
        return ""
    name = str(results.model.get("name") or results.model.get("source") or "the base model")
    return "\n".join(
        [
            "from pathlib import Path",
            "",
            "import sparing.pretrained  # importing sparing makes its methods known to PEFT",
            "from peft import PeftModel",
            "",
            'run = Path(".")  # the folder of this report',
            f"base = sparing.pretrained.load({_quoted(name)}).model",
            f"model = PeftModel.from_pretrained(base, run / {_quoted(saved[0].adapter or '')})",
        ]
    )


def _cell(column: Column, row: Row, results: Results) -> Cell:
    number, text = column.number(row, results), column.text(row, results)
    if column.numeric:
        return Cell(text, "" if number is None else repr(float(number)), True)
    return Cell(text, text.lower(), False)


def _grid(row: Row) -> list[float]:
    return [] if row.learning_rate is None else row.learning_rate.grid


def _selection(chosen: LearningRate, rate: float) -> str:
    if rate not in chosen.grid:
        return ""
    loss = chosen.selection_loss[chosen.grid.index(rate)]
    return "failed" if loss is None else numerals.loss(loss)


def _warning(row: Row, chosen: LearningRate) -> str:
    if len(chosen.grid) == 1:
        return "the only one tried"
    return "on the edge of the grid: try a wider one" if on_grid_edge(row) else ""


def _budget(results: Results) -> str:
    text, limit = str(results.budget.get("text", "not stated")), results.budget.get("limit")
    if not isinstance(limit, int):
        return text
    if results.budget.get("unit") == "bytes":
        return f"{text} ({numerals.size(limit)})"
    return f"{text} ({numerals.count(limit)} parameters)"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
