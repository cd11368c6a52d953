"""The residual stream is found where each architecture has it."""

import copy

import pytest
import torch
import transformers
from conftest import small_gpt2, small_llama, token_ids
from torch import Tensor, nn

from sparing.errors import ConfigError
from sparing.residual import ResidualStream
from sparing.surgery import block_names, feed_forwards

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = {"vocab_size": 64, "intermediate_size": 48}


def small_vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, intermediate_size=48, image_size=16, patch_size=8)
    return transformers.ViTModel(config)


def small_t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, vocab_size=64))


def small_bart() -> nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "vocab_size": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    inner = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, **heads, **inner)
    )


def small_bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL, **VOCABULARY))


def small_gemma2() -> nn.Module:
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Gemma2Config(**SMALL, **VOCABULARY, **heads)
    return transformers.Gemma2ForCausalLM(config)


def small_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, **VOCABULARY))


class Seen:
    """What went on in the last block."""

    def __init__(self, model: nn.Module) -> None:
        network = feed_forwards(model)[-1]
        block = model.get_submodule(block_names(model)[network.block])
        first, last = model.get_submodule(network.first[0]), model.get_submodule(network.last)
        self.stream = ResidualStream(block, first)
        block.register_forward_pre_hook(self._start)
        first.register_forward_pre_hook(self._network)
        last.register_forward_hook(self._last)
        block.register_forward_hook(self._end)
        ids = token_ids()
        with torch.no_grad():
            if isinstance(model, transformers.ViTModel):
                model.eval()(torch.randn(2, 3, 16, 16))
            elif model.config.is_encoder_decoder:
                model.eval()(input_ids=ids, decoder_input_ids=ids)
            else:
                model.eval()(ids)

    def _start(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.start = args[0]

    def _network(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.network = args[0]

    def _last(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.x, self.added = self.stream.read(), output

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        self.end = output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("make", [small_llama, small_gpt2, small_vit, small_t5])
def test_a_pre_norm_block_adds_its_network_to_x(make) -> None:
    seen = Seen(make())
    torch.testing.assert_close(seen.x + seen.added, seen.end)
    assert not torch.allclose(seen.x, seen.network)


@pytest.mark.parametrize("make", [small_bert, small_bart])
def test_in_a_post_norm_block_x_is_what_the_network_reads(make) -> None:
    seen = Seen(make())
    assert seen.x is seen.network


def test_a_second_norm_after_the_network_changes_nothing() -> None:
    """Gemma 2 is x + norm(FFN(norm(x)))."""
    model = small_gemma2()
    seen = Seen(model)
    norm = model.model.layers[-1].post_feedforward_layernorm
    torch.testing.assert_close(seen.x + norm(seen.added), seen.end)


def test_where_both_sub_layers_read_the_block_x_is_its_input() -> None:
    """GPT-NeoX is x + attention(norm(x)) + FFN(norm(x))."""
    seen = Seen(small_neox())
    assert torch.equal(seen.x, seen.start)


def _streams(model: nn.Module) -> list[ResidualStream]:
    blocks = block_names(model)
    return [
        ResidualStream(
            model.get_submodule(blocks[network.block]), model.get_submodule(network.first[0])
        )
        for network in feed_forwards(model)
    ]


def test_nothing_is_kept_alive_and_a_network_alone_is_refused() -> None:
    model = small_llama()
    stream = _streams(model)[0]
    with torch.no_grad():
        model(token_ids())
    with pytest.raises(ConfigError, match="inside its block"):
        stream.read()
    assert stream._normed == []


def test_removing_leaves_no_hook() -> None:
    model = small_llama()
    for stream in _streams(model):
        stream.remove()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_a_copy_watches_the_copied_block() -> None:
    model = small_llama()
    model.streams = _streams(model)
    with torch.no_grad():
        model(token_ids())
        twin = copy.deepcopy(model)
        found = []
        down = twin.model.layers[0].mlp.down_proj
        down.register_forward_hook(lambda *_: found.append(twin.streams[0].read()))
        twin(token_ids())
        assert len(found) == 1
        with pytest.raises(ConfigError):
            model.streams[0].read()
