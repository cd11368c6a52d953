"""What can be read as data, and what is said of what cannot."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparing.data import CORPORA, Example, read_examples
from sparing.errors import DataError

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
KEEP_FOLDER = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)


@pytest.mark.parametrize("name", CORPORA)
def test_packaged_corpora_have_text(name: str) -> None:
    examples = read_examples(name)
    assert sum(len(example.text) for example in examples) > 100_000
    assert all(example.prompt is None for example in examples)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("python-topic", "python-topics"),
        ("pythonsource", "python-source"),
        ("zzz", "Choose one of"),
    ],
)
def test_an_unknown_corpus_gets_near_matches(name: str, near: str) -> None:
    with pytest.raises(DataError, match=near):
        read_examples(name)


@pytest.mark.parametrize(
    "name", ["missing.txt", "folder/missing.jsonl", "a/b/c", "./x", "x" * 5000, "~nobody/x", ""]
)
def test_a_path_to_nothing_is_no_hub_data_set(name: str) -> None:
    with pytest.raises(DataError, match="found none of these"):
        read_examples(name)


def test_a_folder_is_read_in_order_with_all_kinds_of_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "id": 4}\n')
    (tmp_path / "d.bin").write_bytes(b"\xff")
    (tmp_path / "folder.py").mkdir()
    texts = [example.text for example in read_examples(str(tmp_path))]
    assert texts == ["one", "two", "three", "four"]


@given(st.binary(max_size=40), st.sampled_from([b"\xff", b"\xc3(", b"\xe2\x82", b"\x80"]))
@KEEP_FOLDER
def test_the_first_byte_that_is_not_utf8_is_named(
    tmp_path: Path, before: bytes, bad: bytes
) -> None:
    before = before.decode("utf-8", errors="ignore").encode()
    path = tmp_path / "latin.txt"
    path.write_bytes(before + bad)
    with pytest.raises(DataError) as caught:
        read_examples(str(path))
    assert caught.value.where == f"{path}, byte {len(before)}"
    assert caught.value.found == f"0x{bad[0]:02x}"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [example.text for example in read_examples(str(path))] == ["a", "b"]


@pytest.mark.parametrize("content", ["", "  \n\n"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match="found none"):
            read_examples(str(source))


@given(st.lists(UNICODE, min_size=1, max_size=5), st.booleans())
@KEEP_FOLDER
def test_jsonl_round_trips(tmp_path: Path, texts: list[str], escaped: bool) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert [example.text for example in read_examples(str(path))] == texts


@given(st.binary(max_size=60))
@KEEP_FOLDER
def test_any_bytes_are_examples_or_a_data_error(tmp_path: Path, content: bytes) -> None:
    for suffix in (".txt", ".jsonl", ".parquet"):
        path = tmp_path / f"fuzz{suffix}"
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            assert all(example.text.encode() for example in read_examples(str(path)))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": 3}', "found text"),
        ('{"words": "a"}', "found words"),
        ('["text"]', "found list"),
        ('{"prompt": "a"}', "found prompt"),
        ('{"text": "\\ud83d"}', "Unicode text"),
        ('{"text": "a"', "one JSON object"),
    ],
)
def test_a_row_that_is_no_text_is_named_by_line(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{found}"):
        read_examples(str(path))


def test_parquet_rows_are_read_and_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": ["1+1=", "2+2="], "completion": ["2", "4"]}), path)
    assert read_examples(str(path)) == [Example("2", "1+1="), Example("4", "2+2=")]
    parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet, row 1"):
        read_examples(str(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.parquet: expected a Parquet file"):
        read_examples(str(path))
