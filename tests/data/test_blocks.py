"""Blocks of tokens in three parts that share no text."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing import pretrained
from sparing.data import Batch, Blocks, TextData, prepare
from sparing.data.blocks import IGNORE, _split_documents
from sparing.errors import DataError

LENGTH = 32
WORDS = st.lists(
    st.sampled_from(["alpha", "beta", "gamma", "delta", "epsilon"]), min_size=3, max_size=30
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pretrained.load_tokenizer("tiny")


@pytest.fixture
def cut(tokenizer: Any) -> Callable[..., TextData]:
    def cut(source: object, **options: Any) -> TextData:
        return prepare(str(source), tokenizer, **{"block_length": LENGTH, **options})

    return cut


def texts(data: TextData, tokenizer: Any) -> dict[str, str]:
    return {
        name: tokenizer.decode(part.batch.input_ids.flatten()) for name, part in data.parts.items()
    }


def paragraphs(documents: list[str]) -> set[str]:
    found = (p for document in documents for p in re.split(r"\n\s*\n", document))
    return {" ".join(p.split()) for p in found} - {""}


def test_blocks_of_a_packaged_corpus(cut, tokenizer) -> None:
    data = cut("python-topics", selection_blocks=3, validation_blocks=5)
    assert (len(data.selection), len(data.validation)) == (3, 5)
    assert data.train.batch.input_ids.shape[1] == LENGTH
    assert data.train.target_tokens == len(data.train) * (LENGTH - 1)
    assert torch.equal(data.train.batch.labels, data.train.batch.input_ids)
    same = cut("python-topics", selection_blocks=3, validation_blocks=5)
    assert same.fingerprint == data.fingerprint
    assert cut("python-topics", seed=1).fingerprint != data.fingerprint


@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=80), st.integers(1, 5), st.integers(0, 3))
def test_no_paragraph_stands_in_two_parts(pieces: list[str], size: int, seed: int) -> None:
    documents = ["\n\n".join(pieces[i : i + size]) for i in range(0, len(pieces), size)]
    parts, leaked = _split_documents(list(documents), LENGTH, seed)
    train, selection, validation = map(paragraphs, parts)
    assert not train & selection
    assert not train & validation
    assert not selection & validation
    if len(paragraphs(documents)) == sum(len(document.split("\n\n")) for document in documents):
        assert leaked == 0


def test_a_repeated_paragraph_stays_in_training_only() -> None:
    documents = [f"only here {i}\n\nlicence text" for i in range(20)]
    (train, selection, validation), leaked = _split_documents(documents, LENGTH, 0)
    assert all("licence" in document for document in train)
    assert not any("licence" in document for document in selection + validation)
    assert leaked == len(selection) + len(validation)


def test_many_documents_are_split_80_10_10() -> None:
    documents = [f"document {i} " + "x" * 80 for i in range(100)]
    parts, _ = _split_documents(documents, LENGTH, 0)
    assert [len(part) for part in parts] == [80, 10, 10]
    assert sorted(document for part in parts for document in part) == sorted(documents)


def test_neighbouring_runs_of_one_document_keep_a_gap_of_a_block(tokenizer: Any) -> None:
    document = " ".join(f"word{i}" for i in range(3000))
    (train, selection, validation), _ = _split_documents([document], LENGTH, 0)
    ends = document.index(train[0]) + len(train[0])
    for part in (selection, validation):
        start = document.index(part[0])
        gap = document[ends:start]
        assert len(tokenizer(gap)["input_ids"]) >= LENGTH
        ends = start + len(part[0])


def test_text_too_short_for_three_parts_is_refused(cut, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words " * 30)
    with pytest.raises(DataError, match=r"at least one block of 32 tokens for (selection|valid)"):
        cut(tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("words")
    with pytest.raises(DataError, match=r"at least one block of 32 tokens for train"):
        cut(tmp_path / "short.txt")


def write_pairs(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in rows))
    return path


def test_the_loss_is_on_the_completion_and_the_end_mark_only(cut, tokenizer, tmp_path) -> None:
    rows = [(f"question {i}: ", f"answer {i}") for i in range(30)]
    data = cut(write_pairs(tmp_path / "p.jsonl", rows), selection_blocks=4, validation_blocks=5)
    assert [len(part) for part in data.parts.values()] == [21, 4, 5]
    end, seen = tokenizer.eos_token, {}
    for part in data.parts.values():
        for ids, mask, labels in zip(*part.batch, strict=True):
            learned = labels != IGNORE
            assert torch.equal(ids[learned], labels[learned])
            assert not (learned & (mask == 0)).any()
            prompt = tokenizer.decode(ids[(mask == 1) & ~learned])
            seen[prompt] = tokenizer.decode(ids[learned])
    assert seen == {prompt: completion + end for prompt, completion in rows}


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end(cut, tokenizer, tmp_path):
    rows = [(f"{i} " * 60 + "end of prompt", f"answer {i} " * 60) for i in range(30)]
    data = cut(write_pairs(tmp_path / "p.jsonl", rows), selection_blocks=4, validation_blocks=5)
    ids, mask, labels = data.train.batch
    assert mask.all()
    assert ((labels != IGNORE).sum(1) == LENGTH // 2).all()
    assert tokenizer.decode(ids[0][labels[0] == IGNORE]).endswith("end of prompt")
    assert tokenizer.decode(labels[0][labels[0] != IGNORE]).startswith("answer")


def test_no_prompt_stands_in_two_parts(cut, tokenizer, tmp_path: Path) -> None:
    rows = [(f"question {i % 20}: ", f"answer {i}") for i in range(60)]
    data = cut(write_pairs(tmp_path / "p.jsonl", rows), selection_blocks=4, validation_blocks=5)
    assert sum(len(part) for part in data.parts.values()) == 20
    with pytest.raises(DataError, match="rows with different prompts, found 20"):
        cut(tmp_path / "p.jsonl", selection_blocks=10, validation_blocks=10)


def test_documents_and_pairs_do_not_mix(cut, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "p.jsonl", [(f"q {i}", f"a {i}") for i in range(30)])
    path.write_text(path.read_text() + '\n{"text": "a document"}')
    with pytest.raises(DataError, match="1 documents and 30 prompts"):
        cut(path)


def test_parquet_gives_the_same_blocks_as_jsonl(cut, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"text": f"document {i} with some words to fill a block or two. " * 8} for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert cut(tmp_path / "rows.jsonl").fingerprint == cut(tmp_path / "rows.parquet").fingerprint


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 5))
def test_every_epoch_of_the_order_is_a_permutation(steps: int, rows: int, seed: int) -> None:
    blocks = Blocks(Batch(*(torch.zeros(7, LENGTH, dtype=torch.int64) for _ in range(3))))
    order = blocks.order(steps, rows, seed)
    assert order.shape == (steps, rows)
    flat = order.flatten()
    for start in range(0, len(flat) - 6, 7):
        assert sorted(flat[start : start + 7].tolist()) == list(range(7))
    assert torch.equal(order, blocks.order(steps, rows, seed))
