"""From documents to token blocks in three parts that share no text."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparing.checkpoint import atomic_path
from sparing.data.corpora import Example, read_examples
from sparing.errors import DataError

IGNORE = -100
LARGEST_SHARE_TO_SPLIT = 0.1
_PARAGRAPH = re.compile(r"\n\s*\n")


class Batch(NamedTuple):
    """Model inputs, (rows, length) int64; labels are -100 where nothing is to be learned."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Blocks:
    """Token blocks of one length.

    Arguments:
        batch: all blocks, (blocks, length).
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.input_ids)

    @property
    def target_tokens(self) -> int:
        """Tokens that are predicted (the first of a block never is)."""
        return int((self.batch.labels[:, 1:] != IGNORE).sum())

    def take(self, rows: Tensor | slice) -> Batch:
        """The batch of these rows."""
        return Batch(*(tensor[rows] for tensor in self.batch))

    def order(self, steps: int, batch_size: int, seed: int) -> Tensor:
        """(steps, batch_size) int64: which rows each step sees; every epoch is a permutation."""
        generator = torch.Generator().manual_seed(seed)
        needed = steps * batch_size
        epochs = [
            torch.randperm(len(self), generator=generator) for _ in range(-(-needed // len(self)))
        ]
        return torch.cat(epochs)[:needed].view(steps, batch_size)


@dataclass(frozen=True)
class TextData:
    """A corpus cut into parts.

    Arguments:
        name: as the user gave it.
        train: to learn from.
        selection: to choose learning rates on; no competitor is reported on it.
        validation: to report on.
        fingerprint: of all tokens and the split.
        leaked_paragraphs: dropped from selection and validation as they stood in another part too.
    """

    name: str
    train: Blocks
    selection: Blocks
    validation: Blocks
    fingerprint: str
    leaked_paragraphs: int

    @property
    def parts(self) -> dict[str, Blocks]:
        """The three parts by name."""
        return {"train": self.train, "selection": self.selection, "validation": self.validation}


def prepare(
    source: str,
    tokenizer: Any,
    *,
    block_length: int = 128,
    selection_blocks: int = 8,
    validation_blocks: int = 16,
    seed: int = 0,
) -> TextData:
    """Read, split and tokenise a corpus.

    Many documents are split by document. Where one is long (over a tenth of all text), each is cut
    into runs with a gap of one block between the parts, so that no validation block continues a
    training block. No paragraph stands in two parts: those of training are dropped from selection,
    and those of both from validation.

    Arguments:
        source: see `read_examples`.
        tokenizer: of the model.
        block_length: in tokens.
        selection_blocks: for choosing learning rates.
        validation_blocks: for the reported loss.
        seed: of the split.

    Raises:
        DataError: the data cannot be read, or is too short for the three parts.
    """
    examples = read_examples(source)
    pairs = sum(example.prompt is not None for example in examples)
    if pairs:
        if pairs < len(examples):
            raise DataError(
                f"data {source!r}",
                expected="either documents only, or prompts with completions only",
                found=f"{len(examples) - pairs} documents and {pairs} prompts with completions",
                mend="Give one kind at a time.",
            )
        parts = _split_rows(examples, selection_blocks, validation_blocks, seed, source)
        blocks = [_pair_blocks(part, tokenizer, block_length) for part in parts]
        leaked = 0
    else:
        documents, leaked = _split_documents([e.text for e in examples], block_length, seed)
        blocks = [text_blocks(part, tokenizer, block_length) for part in documents]
    limits = (None, selection_blocks, validation_blocks)
    named = dict(zip(("train", "selection", "validation"), blocks, strict=True))
    for name, batch in named.items():
        if len(batch.input_ids) == 0:
            raise DataError(
                f"data {source!r}",
                expected=f"at least one block of {block_length} tokens for {name}",
                found=f"{sum(int(b.attention_mask.sum()) for b in blocks)} tokens in full blocks",
                mend="Give more text, or a smaller --block-length.",
            )
    train, selection, validation = (
        Blocks(Batch(*(tensor[:limit] for tensor in batch)))
        for batch, limit in zip(blocks, limits, strict=True)
    )
    digest = hashlib.blake2b(digest_size=8)
    for part in (train, selection, validation):
        digest.update(part.batch.input_ids.numpy().tobytes())
        digest.update(part.batch.labels.numpy().tobytes())
    return TextData(source, train, selection, validation, digest.hexdigest(), leaked)


def save_blocks(path: Path, parts: dict[str, Blocks]) -> None:
    """Keep prepared data, so that every job sees the very same tokens."""
    tensors = {
        f"{name}.{field}": getattr(part.batch, field)
        for name, part in parts.items()
        for field in Batch._fields
    }
    with atomic_path(path) as fresh:
        save_file(tensors, fresh)


def load_blocks(path: str, part: str) -> Blocks:
    """One part of what `save_blocks` kept."""
    with safe_open(path, framework="pt") as file:
        return Blocks(Batch(*(file.get_tensor(f"{part}.{field}") for field in Batch._fields)))


def _split_documents(
    documents: list[str], block_length: int, seed: int
) -> tuple[list[list[str]], int]:
    """Documents for training, selection and validation: 80, 10 and 10 % of the characters."""
    total = sum(map(len, documents))
    if max(map(len, documents)) <= LARGEST_SHARE_TO_SPLIT * total:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
        shuffled = [documents[i] for i in order.tolist()]
        parts: list[list[str]] = [[], [], []]
        done = 0
        for document in shuffled:
            share = done / total
            parts[0 if share >= 0.2 else 1 if share >= 0.1 else 2].append(document)
            done += len(document)
    else:
        parts = [[], [], []]
        gap = 8 * block_length  # characters; no tokenizer in use packs more into a token on average
        for document in documents:
            a, b = int(0.8 * len(document)), int(0.9 * len(document))
            for part, run in zip(
                parts, (document[:a], document[a + gap : b], document[b + gap :]), strict=True
            ):
                part.append(run)
    leaked, seen = 0, _paragraphs(parts[0])
    for part in parts[1:]:
        own = _paragraphs(part)
        for i, document in enumerate(part):
            kept = [p for p in _PARAGRAPH.split(document) if _normal(p) not in seen]
            leaked += sum(_normal(p) in seen for p in _PARAGRAPH.split(document))
            part[i] = "\n\n".join(kept)
        seen |= own
    return parts, leaked


def _paragraphs(documents: Sequence[str]) -> set[str]:
    found = {_normal(p) for document in documents for p in _PARAGRAPH.split(document)}
    return found - {""}


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


def text_blocks(documents: Sequence[str], tokenizer: Any, length: int) -> Batch:
    """All full blocks of the documents laid end to end, an end mark after each."""
    ids: list[int] = []
    for document in documents:
        if document.strip():
            ids += tokenizer(document, verbose=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
    tokens = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    return Batch(tokens, torch.ones_like(tokens), tokens.clone())


def _split_rows(
    examples: list[Example], selection: int, validation: int, seed: int, source: str
) -> list[list[Example]]:
    """Distinct prompts only, so that no held-out prompt has been trained on."""
    unique = list({example.prompt: example for example in examples}.values())
    if len(unique) < selection + validation + 1:
        raise DataError(
            f"data {source!r}",
            expected=f"more than {selection + validation} rows with different prompts",
            found=str(len(unique)),
            mend="Give more rows, or fewer --selection-blocks and --validation-blocks.",
        )
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [unique[i] for i in order]
    held = selection + validation
    return [rows[held:], rows[:selection], rows[selection:held]]


def _pair_blocks(examples: Sequence[Example], tokenizer: Any, length: int) -> Batch:
    """One row a pair, padded; the loss is on the completion and the end mark only."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(examples), length), pad or 0, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, example in enumerate(examples):
        prompt = tokenizer(example.prompt or "", verbose=False)["input_ids"]
        answer = tokenizer(example.text, verbose=False, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
        # A long prompt loses its beginning, so that half of the room is left to learn from.
        prompt = prompt[-(length - min(len(answer), length // 2)) :]
        tokens = torch.tensor([*prompt, *answer][:length], dtype=torch.int64)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return Batch(ids, mask, labels)
