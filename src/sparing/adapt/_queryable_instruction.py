"""Instructions as vectors: text through the base model's own tokenizer and embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing import pretrained
from sparing.errors import ConfigError, DataError
from sparing.routing import standardized

Encoder = Callable[[list[str]], Tensor]


def embedding_width(model: Any) -> int | None:
    """The width of a model's token embeddings, or None if it has none."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = find() if find else None
    except NotImplementedError:
        return None
    return embeddings.embedding_dim if isinstance(embeddings, nn.Embedding) else None


@torch.no_grad()
def embed(
    model: Any, text: str | Sequence[str], tokenizer: Any = None, encoder: Encoder | None = None
) -> Tensor:
    """e_I of texts: the mean of their token embeddings, standardised, as these are tiny.

    Arguments:
        model: the base model.
        text: one or several.
        tokenizer: of the model; by default loaded by the model's name.
        encoder: maps n texts to (n, d_e) instead; its numbers are taken as they are.

    Returns:
        (d_e,) for one text, (n, d_e) for several; float32.

    Raises:
        DataError: a text has no tokens.
        ConfigError: the model has no name to find its tokenizer by, or no token embeddings.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if encoder is not None:
        found = encoder(texts).float()
    else:
        found = _mean_embeddings(model, texts, tokenizer or _tokenizer_of(model))
    return found[0] if isinstance(text, str) else found


def _mean_embeddings(model: Any, texts: list[str], tokenizer: Any) -> Tensor:
    if embedding_width(model) is None:
        raise ConfigError(
            type(model).__name__,
            expected="a model with token embeddings, to embed the text",
            found="none",
            mend="Give an encoder, or the instruction as a tensor.",
        )
    table = model.get_input_embeddings()
    means = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(
                "instruction",
                expected="text with at least one token",
                found=repr(text),
                mend="Write what is to be done, or pass None for no instruction.",
            )
        means.append(table(torch.tensor(ids, device=table.weight.device)).float().mean(0))
    return standardized(torch.stack(means))


def _tokenizer_of(model: Any) -> Any:
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        raise ConfigError(
            "tokenizer",
            expected="one, as the model does not say where it came from",
            found="none",
            mend="Pass tokenizer=, an encoder=, or the instruction as a tensor.",
        )
    return pretrained.load_tokenizer(name)
