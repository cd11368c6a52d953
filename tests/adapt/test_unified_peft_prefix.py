"""Prefixes as gated parallel adapters: the identity, its limits, and real attention modules."""

import copy

import peft
import pytest
import torch
import transformers
from _architectures import MAKERS, inputs_of, small
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from sparing.adapt import Slot, UnifiedPeftConfig, fold_prefix, gated_attention, record_gates
from sparing.adapt._unified_attention import attend
from sparing.adapt._unified_prefix import HeadPart, PrefixNetwork
from sparing.errors import ConfigError

C = UnifiedPeftConfig


def prefixed(kind: str = "llama", length: int = 3, noise: float = 0.5, **options: object):
    options = {"mlp_dim": None} | options
    model = peft.get_peft_model(small(kind), C.prefix(length, **options)).eval()  # type: ignore[arg-type]
    perturb(model, noise)
    return model


def head_parts(model: nn.Module) -> list[HeadPart]:
    return [module for module in model.modules() if isinstance(module, HeadPart)]


@torch.no_grad()
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


# ---- equations 6 and 7 ---------------------------------------------------------------------------


def concatenated(query, key, value, keys, values, visible):
    """Attention over the prefix and the content in one row, written independently."""
    groups = query.shape[1] // key.shape[1]
    key, value = (
        torch.cat([p.expand(len(x), -1, -1, -1), x], 2).repeat_interleave(groups, 1)
        for p, x in ((keys, key), (values, value))
    )
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    shown = torch.cat([visible.new_ones(*visible.shape[:-1], keys.shape[1]), visible], -1)
    return scores.masked_fill(~shown, -torch.inf).softmax(-1) @ value


def drawn(seed, length=3, queries=5, content=5, groups=2, kv_heads=2, width=4, batch=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        normal(batch, groups * kv_heads, queries, width),
        normal(batch, kv_heads, content, width),
        normal(batch, kv_heads, content, width),
        normal(kv_heads, length, width),
        normal(kv_heads, length, width),
    )


@given(
    seed=st.integers(0, 999),
    length=st.integers(1, 6),
    content=st.integers(1, 7),
    groups=st.integers(1, 3),
    mask=st.sampled_from(["none", "causal", "padding"]),
    additive=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_gated_sum_equals_attention_over_prefix_and_content(
    seed, length, content, groups, mask, additive
):
    queries = content if mask == "causal" else 4  # others are cross-attention: other lengths
    tensors = drawn(seed, length, queries, content, groups)
    visible = torch.ones(2, 1, queries, content, dtype=torch.bool)
    if mask == "causal":
        visible = visible.tril()
    elif mask == "padding":
        visible[1, :, :, : content // 2] = False
    given_mask: Tensor = visible
    if additive:
        given_mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(
            ~visible, torch.finfo(torch.float64).min
        )
    found, _ = gated_attention(*tensors, mask=given_mask)
    expected = concatenated(*tensors, visible)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-15)


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_the_gate_mixes_content_attention_and_prefix_attention(seed):
    query, key, value, keys, values = drawn(seed, groups=1)
    found, gate = gated_attention(query, key, value, keys, values)
    content = torch.softmax(query @ key.transpose(2, 3) / 2, -1) @ value
    prefix = torch.softmax(query @ keys.transpose(1, 2) / 2, -1) @ values
    assert ((gate > 0) & (gate < 1)).all()
    gate = gate[..., None]
    torch.testing.assert_close(found, (1 - gate) * content + gate * prefix, rtol=0, atol=2e-15)


def test_a_prefix_that_nothing_matches_changes_nothing():
    query, key, value, keys, values = drawn(0)
    query, keys = query.abs(), -1e6 * keys.abs()
    found, gate = gated_attention(query, key, value, keys, values)
    assert gate.max() == 0
    none = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    expected = concatenated(query, key, value, keys[:, :0], values[:, :0], none)
    torch.testing.assert_close(found, expected)


def test_a_prefix_that_everything_matches_hides_the_content():
    query, key, value, keys, values = drawn(0)
    query, keys = query.abs(), 1e6 * keys.abs()
    found, gate = gated_attention(query, key, value, keys, values)
    assert gate.min() == 1
    assert torch.equal(found, gated_attention(query, key + 1, 3 - value, keys, values)[0])


def test_a_prefix_of_zeros_shrinks_the_heads_and_is_not_the_identity():
    query, key, value, keys, values = drawn(0, groups=1)
    found, gate = gated_attention(query, key, value, 0 * keys, 0 * values)
    scores = query @ key.transpose(2, 3) / 2
    share = 3 / (3 + scores.exp().sum(-1))
    torch.testing.assert_close(gate, share)
    torch.testing.assert_close(found, (1 - share[..., None]) * (scores.softmax(-1) @ value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("additive", [False, True])
def test_a_row_whose_content_is_all_masked_sees_the_prefix_alone(dtype, additive):
    query, key, value, keys, values = (t.to(dtype) for t in drawn(0, groups=1))
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    if additive:
        mask = torch.zeros(2, 1, 5, 5, dtype=dtype).fill_(torch.finfo(dtype).min)
    found, gate = gated_attention(query, key, value, keys, values, mask)
    assert (gate == 1).all()
    prefix = (query @ keys.transpose(1, 2) / 2).float().softmax(-1).to(dtype) @ values
    torch.testing.assert_close(found, prefix, rtol=2e-2, atol=2e-2)


# ---- in real models ------------------------------------------------------------------------------

PEFT_LAYERS = {"llama": (2, 2, 8), "gpt2": (2, 2, 16), "qwen3": (2, 2, 16)}


@pytest.mark.parametrize("kind", sorted(PEFT_LAYERS))
@pytest.mark.parametrize("padded", [False, True])
def test_prefix_equals_that_of_peft_with_the_same_vectors(kind, padded):
    layers, heads, width = PEFT_LAYERS[kind]
    length, base, inputs = 3, small(kind), inputs_of(kind, padded)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length),
    ).eval()
    model = peft.get_peft_model(base, C.prefix(length, None)).eval()
    perturb(model, 0.5)
    tables = [torch.stack(part.tables()) for part in head_parts(model)]
    assert len(tables) == layers
    vectors = torch.stack(tables)  # (layers, 2, heads, l, width)
    assert vectors.shape == (layers, 2, heads, length, width)
    embedding = theirs.prompt_encoder["default"].embedding.weight
    embedding.data.copy_(vectors.permute(3, 0, 1, 2, 4).flatten(1))
    # PEFT lets real tokens start at position l; ours leave positions as they are.
    positions = length + torch.arange(12).expand(2, -1)
    found = logits(model, **inputs, position_ids=positions)
    expected = logits(theirs, **inputs)
    kept = inputs.get("attention_mask", torch.ones(2, 12)).bool()
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("padded", [False, True])
def test_backends_agree(kind, padded):
    inputs = inputs_of(kind, padded)
    model = prefixed(kind)
    fused = logits(model, **inputs)
    with pytest.warns(UserWarning, match="does not report"), record_gates(model) as gates:
        by_steps = logits(model, **inputs)
    torch.testing.assert_close(by_steps, fused, rtol=1e-4, atol=1e-4)
    assert len(gates) == len(head_parts(model))
    for recorded in gates.values():
        (gate,) = recorded
        assert ((gate > 0) & (gate <= 1)).all()
    model.base_model.model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, **inputs), fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_attention_weights_of_real_tokens_sum_to_one_minus_the_gate(kind):
    model, inputs = prefixed(kind), inputs_of(kind)
    model.base_model.model.set_attn_implementation("eager")
    with record_gates(model) as gates:
        logits(model, **inputs)
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    for weight, (gate,) in zip(weights, gates.values(), strict=True):
        assert weight.shape == (2, 4 if kind != "gpt2" else 2, 12, 12)
        torch.testing.assert_close(weight.sum(-1), 1 - gate)


def test_gates_are_recorded_only_where_there_are_any():
    model = prefixed()
    with pytest.raises(ConfigError, match="training mode"), record_gates(model.train()):
        pass
    with pytest.raises(ConfigError, match="no gated prefix"), record_gates(small_llama()):
        pass


def test_without_the_gate_the_prefix_is_added_to_the_heads():
    config = C(attn=Slot("prefix", composition="scaled", scale=2.0), ffn=Slot(), bottleneck=3)
    base, inputs = small("gpt2"), inputs_of("gpt2")
    by_hand = copy.deepcopy(base)
    model = peft.get_peft_model(base, config).eval()
    perturb(model, 0.5)
    for block, part in zip(by_hand.transformer.h, head_parts(model), strict=True):
        keys, values = part.tables()
        seen: dict[str, Tensor] = {}
        block.attn.c_attn.register_forward_hook(
            lambda m, args, out, seen=seen: seen.__setitem__("q", out[..., :32])
        )

        def added(m, args, keys=keys, values=values, seen=seen):
            query = seen["q"].unflatten(-1, (2, 16)).transpose(1, 2)
            change = torch.softmax(query @ keys.transpose(1, 2) / 4, -1) @ values
            return (args[0] + 2 * change.transpose(1, 2).flatten(2),)

        block.attn.c_proj.register_forward_pre_hook(added)
    torch.testing.assert_close(logits(model, **inputs), logits(by_hand, **inputs))


def test_prefixes_of_two_active_adapters_are_one_after_the_other():
    model, inputs = prefixed("llama", 2), inputs_of("llama")
    model.add_adapter("second", C.prefix(3, None))
    model.set_adapter("second")
    perturb(model, 0.5, seed=1)
    model.base_model.set_adapter(["default", "second"])
    joint = prefixed("llama", 5)
    with torch.no_grad():
        for mine, one in zip(head_parts(joint), _pairs(model), strict=True):
            for name in ("keys", "values"):
                parts = [getattr(part.source, name) for part in one]
                getattr(mine.source, name).copy_(torch.cat(parts, 1))
    torch.testing.assert_close(logits(model, **inputs), logits(joint, **inputs))


def _pairs(model: nn.Module) -> list[tuple[HeadPart, HeadPart]]:
    parts = head_parts(model)
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_grouped_queries_need_vectors_for_key_heads_only():
    model = prefixed("qwen3", 3)  # 4 query heads share 2 key heads of width 16, in 2 layers
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * 3 * 2 * 16)


def test_gradients_reach_the_prefix_through_every_backend():
    gradients = []
    for backend in ("sdpa", "eager"):
        model = prefixed("llama")
        model.base_model.model.set_attn_implementation(backend)
        model(token_ids(), labels=token_ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_backend_without_extendable_masks_is_refused():
    model = prefixed("llama")
    model.base_model.model.config._attn_implementation_internal = "flash_attention_2"
    attention = model.base_model.model.model.layers[0].self_attn
    query, key, value, *_ = drawn(0, width=8)
    with pytest.raises(ConfigError, match="set_attn_implementation"):
        attend(attention, query.float(), key.float(), value.float(), None)


def test_attention_in_a_way_of_its_own_is_refused():
    class Block(nn.Module):
        head_dim = 4

        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                self.add_module(name, nn.Linear(8, 8))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"attn": Block()}) for _ in range(2))

    with pytest.raises(ConfigError, match="attends in its own way"):
        peft.get_peft_model(Model(), C.prefix(3))
    assert peft.get_peft_model(Model(), C.parallel_adapter(3, "attn")) is not None


# ---- the network that prefixes come from ---------------------------------------------------------


def test_every_kind_of_attention_has_a_network_of_its_own():
    model = prefixed("bart", mlp_dim=8)
    trunks = model.base_model.shared["default"]
    assert set(trunks) == {"encoder-self", "decoder-self", "decoder-cross"}
    used = [m.trunk for m in model.modules() if isinstance(m, PrefixNetwork)]
    assert {id(trunk) for trunk in used} == {id(trunk) for trunk in trunks.values()}
    assert len(used) == 6


def test_the_network_is_one_with_two_layers():
    model = prefixed("gpt2", 3, mlp_dim=8)
    (trunk,) = model.base_model.shared["default"].values()
    parts = head_parts(model)
    mlp = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2 * 2 * 32))
    with torch.no_grad():
        mlp[0].weight.copy_(trunk.weight)
        mlp[0].bias.copy_(trunk.bias)
        mlp[2].weight.copy_(torch.cat([part.source.weight for part in parts]))
        mlp[2].bias.copy_(torch.cat([part.source.bias for part in parts]))
        vectors = mlp(trunk.embeddings).view(3, 2, 2, 2, 16).permute(1, 2, 3, 0, 4)
        for layer, part in enumerate(parts):
            torch.testing.assert_close(torch.stack(part.tables()), vectors[layer])


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_folding_keeps_the_output_and_saves_the_vectors_alone(kind, tmp_path):
    model, inputs = prefixed(kind, 3, mlp_dim=8), inputs_of(kind)
    before = logits(model, **inputs)
    fold_prefix(model)
    assert torch.equal(logits(model, **inputs), before)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rsplit(".", 1)[-1] for name in tensors} == {"keys", "values"}
    loaded = peft.PeftModel.from_pretrained(small(kind), tmp_path).eval()
    assert loaded.peft_config["default"].prefix_mlp_dim is None
    torch.testing.assert_close(logits(loaded, **inputs), before)


def test_folding_twice_or_without_a_network_changes_nothing():
    model, inputs = prefixed("llama", mlp_dim=None), inputs_of("llama")
    before = logits(model, **inputs)
    fold_prefix(model)
    fold_prefix(model)
    assert torch.equal(logits(model, **inputs), before)


def test_folding_needs_an_adapter():
    with pytest.raises(ConfigError, match="unified-peft adapter"):
        fold_prefix(small_gpt2())
    with pytest.raises(ConfigError, match="'other'"):
        fold_prefix(prefixed(), "other")


def test_vectors_kept_in_evaluation_follow_every_change_of_the_network():
    model, inputs = prefixed("llama", mlp_dim=8), inputs_of("llama")
    first = logits(model, **inputs)
    (source, *_) = (m for m in model.modules() if isinstance(m, PrefixNetwork))
    with torch.no_grad():
        assert source()[0] is source()[0]
        source.trunk.embeddings.add_(1)
    assert not torch.allclose(logits(model, **inputs), first)
    with torch.no_grad():
        source.trunk.embeddings.sub_(1)
    torch.testing.assert_close(logits(model, **inputs), first)


def test_saved_networks_train_on(tmp_path):
    model = prefixed("llama", mlp_dim=8)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small("llama"), tmp_path, is_trainable=True)
    loaded(token_ids(), labels=token_ids()).loss.backward()
    trained = {name for name, p in loaded.named_parameters() if p.grad is not None}
    assert any("shared" in name and "embeddings" in name for name in trained)
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_generation_from_a_left_padded_row_equals_that_of_the_row_alone():
    model = prefixed("llama")
    ids = token_ids(rows=1, length=6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    found = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert torch.equal(found[:, 3:], alone)


def test_a_static_cache_gives_the_same_text():
    model = prefixed("llama")
    ids = token_ids(rows=1, length=6)
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(input_ids=ids, **options)
    static = model.generate(input_ids=ids, cache_implementation="static", **options)
    assert torch.equal(plain, static)


def test_cross_attention_inside_gpt2_is_adapted_too():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, add_cross_attention=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), C.mam(3, 4)).eval()
    states = torch.randn(2, 5, 32)
    first = logits(model, input_ids=token_ids(), encoder_hidden_states=states)
    assert set(model.base_model.shared["default"]) == {"self", "cross"}
    with torch.no_grad():
        model.base_model.shared["default"]["cross"].embeddings.add_(3)
    second = logits(model, input_ids=token_ids(), encoder_hidden_states=states)
    assert not torch.allclose(first, second)
