"""Tokenizers of bytes and characters lose nothing and survive saving."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparing.data.alphabets import UNKNOWN, byte_tokenizer, character_tokenizer, tokenizer_for
from sparing.errors import ConfigError, DataError

TEXT = "Größe → «ja»,\n\t日本  e\u0301\n"
# Unicode text without halves of surrogate pairs, which are no text.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_bytes_are_one_token_each_and_come_back(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert BYTES.decode(ids) == text


@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_characters_are_one_token_each_and_come_back(text: str) -> None:
    tokenizer = character_tokenizer([text, "x"])
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


BYTES = byte_tokenizer()


def test_sizes_and_marks() -> None:
    assert len(BYTES) == 257
    characters = character_tokenizer([TEXT, "more"])
    assert len(characters) == len(set(TEXT + "more")) + 2
    for tokenizer in (BYTES, characters):
        assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert characters.convert_ids_to_tokens(characters("☃")["input_ids"]) == [UNKNOWN]


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: character_tokenizer([TEXT])])
def test_saved_and_loaded_it_is_the_same(make, tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.decode(again(TEXT)["input_ids"]) == TEXT
    assert again.eos_token_id == tokenizer.eos_token_id


def test_by_name(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcab")
    assert len(tokenizer_for("characters", str(file))) == 5
    assert len(tokenizer_for("bytes", str(file))) == 257
    assert len(tokenizer_for("tiny", str(file))) == 512
    with pytest.raises(ConfigError, match="Did you mean tiny"):
        tokenizer_for("tyny", str(file))
    with pytest.raises(DataError, match="Did you mean python-topics"):
        tokenizer_for("characters", "python-topic")
