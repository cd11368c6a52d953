"""Documents and prompt/completion pairs, from packages, files, folders or the hub."""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.errors import DataError, MissingExtraError, near_matches

SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Example:
    """One document.

    Arguments:
        text: what the model learns to continue or, with a prompt, to answer.
        prompt: given, not learned; None for plain text.
    """

    text: str
    prompt: str | None = None


def read_examples(source: str) -> list[Example]:
    """Read a named corpus, a file, a folder of files or a hub data set.

    Raises:
        DataError: nothing of that name, no text in it, or bytes that are not UTF-8.
    """
    if source in CORPORA:
        examples = [Example(text) for text in CORPORA[source]()]
    elif (path := _existing(source)) is not None:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        examples = [example for file in files for example in _read_file(file)]
    elif _HUB_NAME.fullmatch(source) and not source.endswith(SUFFIXES):
        examples = list(_from_hub(source))
    else:
        raise DataError(
            f"data {source!r}",
            expected="a named corpus, a file, a folder or a hub data set (owner/name)",
            found="none of these",
            mend=near_matches(source, sorted(CORPORA)),
        )
    examples = [example for example in examples if example.text.strip()]
    if not examples:
        raise DataError(
            f"data {source!r}",
            expected=f"text in files of type {', '.join(SUFFIXES)}",
            found="none",
            mend="Check the path and the column names (text, or prompt and completion).",
        )
    return examples


def _existing(source: str) -> Path | None:
    try:
        path = Path(source).expanduser()
        return path if source and path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, or another user's home
        return None


def python_topics() -> Iterator[str]:
    """The help topics of the running Python: prose on the language, 80 documents."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def python_source() -> Iterator[str]:
    """Modules of the standard library, as code."""
    import argparse
    import ast
    import asyncio.base_events
    import collections
    import decimal
    import email.message
    import http.client
    import logging
    import pathlib
    import statistics
    import tarfile
    import textwrap
    import typing
    import unittest.case
    import zipfile

    modules = (
        argparse, ast, asyncio.base_events, collections, email.message, http.client, logging,
        pathlib, statistics, tarfile, textwrap, typing, unittest.case, zipfile, decimal, inspect,
    )  # fmt: skip
    yield from (inspect.getsource(module) for module in modules)


CORPORA: dict[str, Callable[[], Iterable[str]]] = {
    "python-topics": python_topics,
    "python-source": python_source,
}


def _read_file(path: Path) -> Iterator[Example]:
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise MissingExtraError.of("pyarrow", "compare") from error
        try:
            rows = parquet.read_table(path).to_pylist()
        except Exception as error:
            raise DataError(
                str(path), expected="a Parquet file", found=str(error), mend="Write it again."
            ) from error
        yield from (_from_row(row, f"{path}, row {i}") for i, row in enumerate(rows))
        return
    text = _decode(path)
    if path.suffix != ".jsonl":
        yield Example(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    where, expected="one JSON object", found=str(error), mend="Mend the line."
                ) from error
            yield _from_row(row, where)


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            str(path),
            expected="a file that can be read",
            found=f"{type(error).__name__}: {error.strerror}",
            mend="Mend its permissions, or name another one.",
        ) from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, byte {error.start}",
            expected="UTF-8 text",
            found=f"0x{content[error.start]:02x}",
            mend="Convert the file, for example with: iconv -f LATIN1 -t UTF-8",
        ) from error


def _from_row(row: Any, where: str) -> Example:
    if isinstance(row, dict):
        for columns in (("completion", "prompt"), ("text",)):
            values = [v for c in columns if isinstance(v := row.get(c), str) and _is_unicode(v)]
            if len(values) == len(columns):
                return Example(*values)
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise DataError(
        where,
        expected="a text column, or prompt and completion, holding strings of Unicode text",
        found=found or "nothing",
        mend="Rename the columns.",
    )


def _is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can spell but no tokenizer can read."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _from_hub(source: str) -> Iterator[Example]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError.of("datasets", "compare") from error
    try:
        rows = load_dataset(source, split="train")
    except Exception as error:
        raise DataError(
            f"data {source!r}",
            expected="a hub data set with a train split, or a file",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            mend="Check the name and the network, or pass a local file.",
        ) from error
    yield from (_from_row(dict(row), f"{source}, row {i}") for i, row in enumerate(rows))
