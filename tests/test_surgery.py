"""Blocks, attentions and feed-forward networks are found in every common architecture."""

import pytest
import transformers
from torch import nn

from sparing.errors import ConfigError
from sparing.surgery import (
    Projection,
    attentions,
    block_names,
    block_of,
    feed_forwards,
    widths,
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FFN = {"intermediate_size": 24}
BART = {
    f"{side}_{option}": value
    for side in ("encoder", "decoder")
    for option, value in (("layers", 2), ("ffn_dim", 24), ("attention_heads", 2))
}
MODELS = {
    "llama": (
        transformers.LlamaConfig(**SMALL, **FFN, num_key_value_heads=1, vocab_size=8),
        ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"),
        "layers.1.mlp.act_fn",
        "layers.1.mlp.down_proj",
    ),
    "gpt2": (
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=8),
        ("h.1.mlp.c_fc",),
        "h.1.mlp.act",
        "h.1.mlp.c_proj",
    ),
    "bert": (
        transformers.BertConfig(**SMALL, **FFN, vocab_size=8),
        ("encoder.layer.1.intermediate.dense",),
        "encoder.layer.1.intermediate.intermediate_act_fn",
        "encoder.layer.1.output.dense",
    ),
    "vit": (
        transformers.ViTConfig(**SMALL, **FFN, image_size=8, patch_size=4),
        ("layers.1.mlp.fc1",),
        "layers.1.mlp.activation_fn",
        "layers.1.mlp.fc2",
    ),
    "bart": (
        transformers.BartConfig(d_model=16, vocab_size=8, **BART),
        ("encoder.layers.1.fc1",),
        "encoder.layers.1.activation_fn",
        "encoder.layers.1.fc2",
    ),
    "t5": (
        transformers.T5Config(
            d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=8,
            feed_forward_proj="gated-gelu",
        ),
        (
            "encoder.block.1.layer.1.DenseReluDense.wi_0",
            "encoder.block.1.layer.1.DenseReluDense.wi_1",
        ),
        "encoder.block.1.layer.1.DenseReluDense.act",
        "encoder.block.1.layer.1.DenseReluDense.wo",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_feed_forward_network_of_a_block(kind):
    config, first, activation, last = MODELS[kind]
    model = transformers.AutoModel.from_config(config)
    blocks, networks = block_names(model), feed_forwards(model)
    assert len(blocks) == len(networks) == (4 if kind in ("bart", "t5") else 2)
    found = networks[1]
    assert (found.block, found.first, found.activation, found.last) == (1, first, activation, last)
    assert (found.width, found.hidden) == (16, 24)
    assert block_of(last, blocks) == 1
    assert widths(model.get_submodule(last)) == (24, 16)


def test_a_module_outside_of_the_blocks_has_no_number():
    model = transformers.AutoModel.from_config(MODELS["llama"][0])
    assert block_of("embed_tokens", block_names(model)) is None


def test_eleven_blocks_are_not_confused_with_one():
    blocks = [f"layers.{i}" for i in range(12)]
    assert block_of("layers.11.mlp", blocks) == 11


def test_a_model_without_feed_forward_networks_is_refused():
    with pytest.raises(ConfigError, match="feed-forward"):
        feed_forwards(nn.Sequential(nn.Linear(4, 4)))


ATTENTIONS = {
    # kind: (roles, module, query and output of the last one)
    "llama": ({"self"}, "layers.1.self_attn", "layers.1.self_attn.q_proj", "o_proj"),
    "gpt2": ({"self"}, "h.1.attn", "h.1.attn.c_attn", "c_proj"),
    "bert": (
        {"encoder-self"},
        "encoder.layer.1.attention.self",
        "encoder.layer.1.attention.self.query",
        "attention.output.dense",
    ),
    "vit": ({"self"}, "layers.1.attention", "layers.1.attention.q_proj", "o_proj"),
    "bart": (
        {"encoder-self", "decoder-self", "decoder-cross"},
        "decoder.layers.1.encoder_attn",
        "decoder.layers.1.encoder_attn.q_proj",
        "out_proj",
    ),
    "t5": (
        {"encoder-self", "decoder-self", "decoder-cross"},
        "decoder.block.1.layer.1.EncDecAttention",
        "decoder.block.1.layer.1.EncDecAttention.q",
        "EncDecAttention.o",
    ),
}


@pytest.mark.parametrize("kind", sorted(ATTENTIONS))
def test_the_attentions_of_a_model(kind):
    roles, module, query, output = ATTENTIONS[kind]
    model = transformers.AutoModel.from_config(MODELS[kind][0])
    found = attentions(model)
    assert len(found) == (6 if kind in ("bart", "t5") else 2)
    assert {attention.role for attention in found} == roles
    last = found[-1]
    assert (last.module, last.query.layer) == (module, query)
    assert last.output.endswith(output)
    assert (last.width, last.num_heads, last.head_dim) == (16, 2, 8)
    assert last.num_kv_heads == (1 if kind == "llama" else 2)


def test_fused_projections_lie_side_by_side():
    model = transformers.AutoModel.from_config(MODELS["gpt2"][0])
    attention = attentions(model)[0]
    fused = "h.0.attn.c_attn"
    assert attention.query == Projection(fused, 0, 16)
    assert attention.key == Projection(fused, 16, 32)
    assert attention.value == Projection(fused, 32, 48)
    assert attention.value.width == 16


def test_fused_projections_of_grouped_queries_have_narrower_keys():
    config = transformers.Phi3Config(
        **SMALL, **FFN, num_key_value_heads=1, vocab_size=8, pad_token_id=0
    )
    attention = attentions(transformers.AutoModel.from_config(config))[0]
    assert (attention.query.stop, attention.key.stop, attention.value.stop) == (16, 24, 32)
    assert (attention.num_heads, attention.num_kv_heads) == (2, 1)


def test_cross_attention_of_gpt2_reads_the_query_elsewhere():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=8, add_cross_attention=True
    )
    _, cross = attentions(transformers.AutoModel.from_config(config))
    assert cross.role == "cross"
    assert cross.query == Projection("h.0.crossattention.q_attn", 0, 16)
    assert cross.key == Projection("h.0.crossattention.c_attn", 0, 16)


def test_a_model_without_attention_is_refused_with_the_known_names():
    with pytest.raises(ConfigError, match="Known names: q_proj"):
        attentions(nn.Sequential(nn.Linear(4, 4)))
