"""The `tiny` model: a two-layer Llama trained here in seconds, for tests and first tries."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparing.data.blocks import text_blocks
from sparing.data.corpora import python_source

VOCABULARY = 512
STEPS = 150
BLOCK_LENGTH = 64


def train_tiny() -> tuple[LlamaForCausalLM, Any]:
    """A byte-level tokenizer and a 2-layer Llama (about 0.2 M parameters), trained on code."""
    texts = [text[:20_000] for text in python_source()]
    tokenizer = _tokenizer(texts)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    blocks = text_blocks(texts, tokenizer, BLOCK_LENGTH).input_ids
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(STEPS):
        rows = torch.randint(len(blocks), (16,), generator=generator)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        model(input_ids=blocks[rows], labels=blocks[rows]).loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
