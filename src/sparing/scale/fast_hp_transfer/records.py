"""Rows of a table from files, data frames and exports."""

import ast
import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparing.errors import DataError

Row = Mapping[str, Any]


def read_rows(source: Any) -> tuple[str, list[Row]]:
    """Where the rows are from, in words, and the rows.

    Arguments:
        source: path of a CSV, JSON or JSONL file, a data frame, dictionaries, or a dictionary of
            lists. Nested dictionaries, also those that an export wrote as text, become columns
            with points.

    Raises:
        DataError: no such file, or one that holds no table.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        return str(path), [_flat(row) for row in _from_file(path)]
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        source = source.to_dict("records")
    elif isinstance(source, Mapping):
        source = _from_columns(source, "table")
    return "table", [_flat(row) for row in source]


def _from_file(path: Path) -> Iterable[Row]:
    if not path.is_file():
        raise DataError(
            str(path), expected="a table of runs", found="no such file", mend="Check the path."
        )
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(
            str(path), expected="a file that ends in .csv, .json or .jsonl",
            found=path.suffix or "no ending", mend="Convert or rename the file.",
        )  # fmt: skip
    try:
        if path.suffix == ".jsonl":
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content = json.loads(text)
    except ValueError as error:
        raise DataError(
            str(path), expected=f"valid {path.suffix[1:].upper()}", found=str(error),
            mend="Write the table again.",
        ) from error  # fmt: skip
    if isinstance(content, dict):
        content = _from_columns(content, str(path))
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError(
            str(path), expected="objects, one a run", found=type(content).__name__,
            mend="Write one object with width, hyperparameter and loss for each run.",
        )  # fmt: skip
    return content


def _from_columns(content: Mapping[str, Any], where_from: str) -> list[Row]:
    """Rows of a table given as columns of one length."""
    columns = {
        name: list(values) for name, values in content.items() if not isinstance(values, str)
    }
    if len({len(values) for values in columns.values()}) != 1 or len(columns) < len(content):
        raise DataError(
            where_from, expected="columns of one length", found=", ".join(content) or "none",
            mend="Give a list of rows, or a dictionary of lists.",
        )  # fmt: skip
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _flat(row: Row) -> dict[str, Any]:
    """A row without nesting; dictionaries that an export wrote as text are read."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, str) and value.startswith("{"):
            value = _dictionary(value)
        if isinstance(value, Mapping):
            if set(value) <= {"value", "desc"} and "value" in value:
                flat[str(name)] = value["value"]  # as Weights & Biases writes a config
            else:
                inner = _flat(value)
                flat |= {f"{name}.{key}": inside for key, inside in inner.items()}
        else:
            flat[str(name)] = value
    return flat


def _dictionary(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
