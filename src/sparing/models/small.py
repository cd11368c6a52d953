"""Small Llamas and GPTs of `transformers` by width, depth and head size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from sparing.errors import ConfigError, near_matches

# The families' default ids of special tokens belong to tokenizers of their own.
_NO_SPECIAL: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


@dataclass(frozen=True)
class Shape:
    """The size of a causal language model.

    Arguments:
        width: of the residual stream; a multiple of `head`.
        depth: blocks.
        vocabulary: tokens of the tokenizer.
        context: the longest sequence, in tokens.
        head: width of an attention head, the same at all widths; even, for rotary positions.
        feed_forward: hidden width of a feed-forward network over the width.
        tied: whether the embedding is the head as well.

    Raises:
        ConfigError: a size below 1, or a width that heads do not divide.
    """

    width: int
    depth: int
    vocabulary: int
    context: int
    head: int = 16
    feed_forward: float = 4.0
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "depth", "vocabulary", "context", "head", "feed_forward"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    name,
                    expected="a number above 0",
                    found=repr(getattr(self, name)),
                    mend="Choose such a number.",
                )
        if self.width % self.head:
            raise ConfigError(
                "width",
                expected=f"a multiple of the head size {self.head}",
                found=str(self.width),
                mend=f"Use {-(-self.width // self.head) * self.head}, or another head size.",
            )
        if self.head % 2:
            raise ConfigError(
                "head", expected="an even number", found=str(self.head), mend="Use 16, 32 or 64."
            )

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward networks."""
        return max(1, round(self.feed_forward * self.width))


def _llama(shape: Shape) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.width // shape.head,
        num_key_value_heads=shape.width // shape.head,
        head_dim=shape.head,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        **_NO_SPECIAL,
    )


def _gpt2(shape: Shape) -> PretrainedConfig:
    return GPT2Config(
        n_embd=shape.width,
        n_inner=shape.hidden,
        n_layer=shape.depth,
        n_head=shape.width // shape.head,
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        tie_word_embeddings=shape.tied,
        **_NO_SPECIAL,
        # Small models see each text once or twice; dropout would only slow them.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


FAMILIES: dict[str, Callable[[Shape], PretrainedConfig]] = {"llama": _llama, "gpt2": _gpt2}


def config_of(family: str, shape: Shape) -> PretrainedConfig:
    """The configuration of a model of one family.

    Raises:
        ConfigError: no such family.
    """
    if family not in FAMILIES:
        raise ConfigError(
            "family",
            expected=f"one of {', '.join(FAMILIES)}",
            found=repr(family),
            mend=near_matches(family, sorted(FAMILIES)),
        )
    return FAMILIES[family](shape)


def build(family: str, shape: Shape, seed: int = 0) -> PreTrainedModel:
    """A fresh model in float32, on the device in force, initialised as `transformers` does.

    Arguments:
        family: a key of `FAMILIES`.
        shape: its size.
        seed: of the initialisation; torch's own generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config_of(family, shape))
