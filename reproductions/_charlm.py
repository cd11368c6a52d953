"""Shared by reproductions: small Llamas on the characters of Python's topic documentation."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


@lru_cache(maxsize=1)
def characters() -> tuple[Tensor, int]:
    """(characters,) int64 ids of the whole text, and how many different ones there are."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    known = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
    return torch.tensor([known[symbol] for symbol in text]), len(known)


def split(held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """Ids to train on, and the last ones to validate on."""
    ids, _ = characters()
    border = int(len(ids) * (1 - held_out))
    return ids[:border], ids[border:]


def model(
    width: int, layers: int = 2, *, context: int = 64, head: int = 16, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama for characters: heads of `head`, feed-forward networks of 4 × width, untied."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // head,
            num_key_value_heads=width // head,
            head_dim=head,
            vocab_size=characters()[1],
            max_position_embeddings=context,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def batches(
    ids: Tensor, steps: int, *, rows: int = 32, context: int = 64, seed: int = 0
) -> Iterator[Tensor]:
    """(rows, context) int64, at random places: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(ids) - context, (rows, 1), generator=generator)
        yield ids[starts + torch.arange(context)]


@torch.no_grad()
def loss(network: LlamaForCausalLM, ids: Tensor, *, context: int = 64, rows: int = 64) -> float:
    """Mean loss in nats a character over `rows` evenly spaced pieces."""
    network.eval()
    starts = torch.linspace(0, len(ids) - context - 1, rows).long().unsqueeze(1)
    block = ids[starts + torch.arange(context)]
    value = network(input_ids=block, labels=block).loss
    network.train()
    return float(value)
