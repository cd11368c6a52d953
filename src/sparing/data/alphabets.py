"""Tokenizers that need no training: the bytes, or the characters of a text."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, UNKNOWN = "<|end|>", "<|unknown|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """257 tokens: the bytes of UTF-8, and an end mark after each document."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(
        models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END)


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for every character that occurs, one for all others, and an end mark.

    Arguments:
        texts: that the alphabet is taken from.
    """
    symbols = [UNKNOWN, *sorted(set().union(*map(set, texts)))]
    raw = Tokenizer(
        models.WordLevel(
            {symbol: number for number, symbol in enumerate(symbols)}, unk_token=UNKNOWN
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, unk_token=UNKNOWN)


def tokenizer_for(name: str, source: str) -> Any:
    """A tokenizer by name.

    Arguments:
        name: "bytes", "characters" (of the data), or a model whose tokenizer is taken.
        source: the data, see `read_examples`.

    Raises:
        ConfigError: no such model.
        DataError: the data cannot be read.
    """
    if name == "bytes":
        return byte_tokenizer()
    if name == "characters":
        from sparing.data.corpora import read_examples

        examples = read_examples(source)
        return character_tokenizer([(each.prompt or "") + each.text for each in examples])
    from sparing import pretrained

    return pretrained.load_tokenizer(name)
