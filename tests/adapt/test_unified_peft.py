"""Unified view: the design space, its named points, and what each of them equals."""

import copy
import dataclasses
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from _architectures import ENCODER, MAKERS, SEQUENCE_TO_SEQUENCE, inputs_of, small
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparing.adapt import Slot, UnifiedPeftConfig, budget_match, parameter_counts
from sparing.adapt._unified_bottleneck import Bottleneck, OutputSide, Reading
from sparing.adapt._unified_prefix import MultiHeadAdapter
from sparing.errors import ConfigError
from sparing.surgery import attentions, feed_forwards

C = UnifiedPeftConfig
POINTS = {
    "mam": lambda: C.mam(3, 4, prefix_mlp_dim=8),
    "adapter": lambda: C.adapter(4),
    "houlsby": lambda: C.houlsby(4),
    "parallel adapter": lambda: C.parallel_adapter(4, "both"),
    "scaled parallel adapter": lambda: C.scaled_parallel_adapter(4),
    "multi-head adapter": lambda: C.multi_head_adapter(4),
    "prefix": lambda: C.prefix(3, mlp_dim=None),
    "ungated prefix": lambda: C(attn=Slot("prefix", composition="learned"), bottleneck=3),
    "lora": lambda: C.lora(4, where="both"),
    "learned scale": lambda: C(
        attn=Slot(), ffn=Slot("adapter", composition="learned"), bottleneck=4
    ),
}
STARTS_AS_BASE = ("parallel adapter", "scaled parallel adapter", "multi-head adapter", "lora")


def adapted(base: nn.Module, config: peft.PeftConfig, noise: float = 0.0) -> peft.PeftModel:
    model = peft.get_peft_model(base, config).eval()
    perturb(model, noise)
    return model


@torch.no_grad()  # with gradients T5's bias would choose another kernel before it is frozen
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


def configs_of(model: nn.Module) -> list[object]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    return {
        name.removeprefix("base_model.model.").split(".unified_peft_")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, Bottleneck)
    }


def g(part: Bottleneck, z: Tensor) -> Tensor:
    """The plain bottleneck adapter, written independently."""
    hidden = torch.relu(z @ part.down.T + part.down_bias)
    return hidden @ part.up.T + part.up_bias


# ---- every point on every architecture -----------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("point", sorted(POINTS))
def test_every_point_changes_every_architecture_and_unloads_without_a_trace(point, kind):
    base, inputs = small(kind), inputs_of(kind)
    before, configs = logits(base, **inputs), configs_of(base)
    model = adapted(base, POINTS[point]())
    if point in STARTS_AS_BASE:
        assert torch.equal(logits(model, **inputs), before)
    perturb(model, 0.3)
    assert (logits(model, **inputs) - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), before)
    plain = model.unload()
    assert torch.equal(logits(plain, **inputs), before)
    assert [id(c) for c in configs_of(plain)] == [id(c) for c in configs]


@pytest.mark.parametrize("point", sorted(POINTS))
def test_saved_points_load_to_the_same_output(point, tmp_path):
    base, inputs = small("gpt2"), inputs_of("gpt2")
    fresh = copy.deepcopy(base)
    model = adapted(base, POINTS[point](), 0.3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(logits(loaded, **inputs), logits(model, **inputs))
    loaded_config = dataclasses.asdict(loaded.peft_config["default"])
    assert loaded_config["attn"] == dataclasses.asdict(POINTS[point]().attn)


@pytest.mark.parametrize("point", sorted(POINTS))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_cached_generation_equals_the_full_forward(point, kind):
    model = adapted(small(kind), POINTS[point](), 0.3)
    ids = token_ids(length=9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    cache = None
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        step = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = step.past_key_values
        kept = mask[:, start:stop].bool()
        torch.testing.assert_close(
            step.logits[kept], full[:, start:stop][kept], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", SEQUENCE_TO_SEQUENCE)
@pytest.mark.parametrize("point", ["mam", "houlsby", "multi-head adapter"])
def test_beam_search_with_a_cache_equals_beam_search_without(point, kind):
    model = adapted(small(kind), POINTS[point](), 0.3)
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    inputs = inputs_of(kind, padded=True)
    inputs.pop("decoder_input_ids")
    cached = model.generate(**inputs, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **options))


@pytest.mark.parametrize("point", ["mam", "parallel adapter", "houlsby", "multi-head adapter"])
def test_gradient_checkpointing_gives_the_same_gradients(point):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(small_gpt2(), POINTS[point](), 0.1).train()
        model.base_model.model.config.attn_pdrop = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(token_ids(), labels=token_ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_two_adapters_of_different_kinds_work_side_by_side_and_alone():
    base, inputs = small("llama"), inputs_of("llama")
    model = adapted(base, C.mam(3, 4, prefix_mlp_dim=8), 0.3)
    first = logits(model, **inputs)
    model.add_adapter("lora", C.lora(4, where="both"))
    assert torch.equal(logits(model, **inputs), first)
    model.set_adapter("lora")
    perturb(model, 0.3, seed=1)
    second = logits(model, **inputs)
    alone = adapted(small("llama"), C.lora(4, where="both"))
    perturb(alone, 0.3, seed=1)
    torch.testing.assert_close(logits(alone, **inputs), second)
    model.base_model.set_adapter(["default", "lora"])
    both = logits(model, **inputs)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)


def test_one_config_given_twice_makes_two_adapters():
    config = C.parallel_adapter(4, "both")
    model = adapted(small("llama"), config, 0.3)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    perturb(model, 0.3)
    assert torch.isfinite(logits(model, **inputs_of("llama"))).all()
    readings = {id(m.reading) for m in model.modules() if isinstance(m, OutputSide)}
    assert len(readings) == 4


@pytest.mark.parametrize("point", ["mam", "parallel adapter"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_works_on_its_own(point, copier):
    model, inputs = adapted(small("gpt2"), POINTS[point](), 0.3), inputs_of("gpt2")
    before = logits(model, **inputs)
    copied = copier(model)
    torch.testing.assert_close(logits(copied, **inputs), before)
    perturb(copied, 0.3, seed=5)
    assert torch.equal(logits(model, **inputs), before)
    assert not torch.allclose(logits(copied, **inputs), before)


# ---- positions: equal to adapters written by hand ------------------------------------------------


@pytest.mark.parametrize("kind", ["bart", "gpt2", "llama", "bert", "t5", "vit"])
def test_parallel_adapter_reads_what_the_first_layer_reads_and_adds_to_what_the_last_returns(kind):
    base, inputs = small(kind), inputs_of(kind)
    by_hand = copy.deepcopy(base)
    model = adapted(base, C.scaled_parallel_adapter(5, scale=2.5), 0.3)
    parts, read = bottlenecks(model), {}
    for network in feed_forwards(by_hand):
        part = parts[network.last]
        by_hand.get_submodule(network.first[0]).register_forward_pre_hook(
            lambda m, args, key=network.block: read.__setitem__(key, args[0])
        )
        by_hand.get_submodule(network.last).register_forward_hook(
            lambda m, args, h, key=network.block, part=part: h + 2.5 * g(part, read[key])
        )
    torch.testing.assert_close(logits(model, **inputs), logits(by_hand, **inputs))


@pytest.mark.parametrize("kind", ["bart", "gpt2", "llama", "bert", "t5", "qwen3"])
def test_parallel_attention_adapter_is_added_to_the_heads_before_the_output_layer(kind):
    base, inputs = small(kind), inputs_of(kind)
    by_hand = copy.deepcopy(base)
    model = adapted(base, C.parallel_adapter(5, "attn"), 0.3)
    parts, read = bottlenecks(model), {}
    for attention in attentions(by_hand):
        part, key = parts[attention.output], attention.module
        by_hand.get_submodule(attention.query.layer).register_forward_pre_hook(
            lambda m, args, key=key: read.__setitem__(key, args[0])
        )
        by_hand.get_submodule(attention.output).register_forward_pre_hook(
            lambda m, args, key=key, part=part: (args[0] + g(part, read[key]),)
        )
    torch.testing.assert_close(logits(model, **inputs), logits(by_hand, **inputs))


@pytest.mark.parametrize("kind", ["bart", "gpt2", "llama", "bert", "t5"])
def test_houlsby_comes_after_the_output_layer_and_after_the_feed_forward_network(kind):
    base, inputs = small(kind), inputs_of(kind)
    by_hand = copy.deepcopy(base)
    model = adapted(base, C.houlsby(5), 0.3)
    parts = bottlenecks(model)
    names = {a.output for a in attentions(by_hand)} | {n.last for n in feed_forwards(by_hand)}
    assert parts.keys() == names
    for name in names:
        by_hand.get_submodule(name).register_forward_hook(
            lambda m, args, h, part=parts[name]: h + g(part, h)
        )
    torch.testing.assert_close(logits(model, **inputs), logits(by_hand, **inputs))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pfeiffer_uses_the_norm_after_the_network_twice(kind):
    base, inputs = small(kind), inputs_of(kind)
    by_hand = copy.deepcopy(base)
    model = adapted(base, C.pfeiffer(5), 0.3)
    parts = bottlenecks(model)
    assert len(parts) == 2
    for name, part in parts.items():
        assert name.endswith("output.LayerNorm")
        assert "attention" not in name
        norm = by_hand.get_submodule(name)
        plain = copy.deepcopy(norm)

        def twice(v: Tensor, norm: nn.Module = plain, part: Bottleneck = part) -> Tensor:
            return norm(v + g(part, norm(v)))

        norm.forward = twice
    torch.testing.assert_close(logits(model, **inputs), logits(by_hand, **inputs))


@pytest.mark.parametrize("kind", ["bart", "gpt2", "llama"])
def test_pfeiffer_is_refused_where_no_norm_follows(kind):
    with pytest.raises(ConfigError, match="LayerNorm beside it"):
        adapted(small(kind), C.pfeiffer(5))


def test_parallel_after_the_output_layer_is_another_method():
    inputs = inputs_of("llama")
    outputs = []
    for position in ("heads", "output"):
        config = C(attn=Slot("adapter", modifies=position), ffn=Slot(), bottleneck=4)
        outputs.append(logits(adapted(small("llama"), config, 0.3), **inputs))
    assert not torch.allclose(*outputs)


def test_sequential_is_parallel_with_the_input_replaced_by_the_output():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8), torch.randn(3, 6)
    part = Bottleneck(Slot("adapter", init="bert", scale=3.0), 4, 8, 8, 0, "a")
    reading = Reading()
    reading.put(layer(x))
    assert torch.equal(OutputSide(part, reading)(x, layer), OutputSide(part, None)(x, layer))


# ---- LoRA ----------------------------------------------------------------------------------------


def copy_lora(model: peft.PeftModel, peft_lora: peft.PeftModel) -> None:
    for name, part in bottlenecks(model).items():
        layer = peft_lora.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(part.down)
        layer.lora_B["default"].weight.data.copy_(part.up)


@pytest.mark.parametrize(
    ("kind", "where", "layers"),
    [
        ("llama", "attn", ["q_proj", "v_proj"]),
        ("llama", "ffn", ["gate_proj", "up_proj", "down_proj"]),
        ("bart", "both", ["q_proj", "v_proj", "fc1", "fc2"]),
        ("bert", "attn", ["query", "value"]),
    ],
)
def test_lora_equals_that_of_peft_and_so_does_its_merge(kind, where, layers):
    base, inputs = small(kind), inputs_of(kind)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=10, target_modules=layers)
    ).eval()
    model = adapted(base, C.lora(4, 10, where), 0.3)
    copy_lora(model, theirs)
    expected = logits(theirs, **inputs)
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, **inputs), expected, rtol=1e-3, atol=1e-3)


def test_lora_on_a_fused_layer_leaves_the_keys_alone():
    model = adapted(small_gpt2(), C.lora(4), 0.3)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    change = layer.get_delta_weight("default")  # Conv1D: (inputs, outputs)
    query, key, value = change.split(32, dim=1)
    assert torch.equal(key, torch.zeros(32, 32))
    assert torch.linalg.matrix_rank(query) == torch.linalg.matrix_rank(value) == 4


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_an_adapter_without_relu_in_parallel_to_a_linear_layer_is_lora_with_alpha_s_r(scale):
    torch.manual_seed(0)
    layer, x, r = nn.Linear(6, 8), torch.randn(3, 6), 4
    part = Bottleneck(Slot("adapter", init="bert", scale=scale), r, 6, 8, 0, "a")
    part.rectified = False
    own = layer(x) + part(x)
    lora = peft.get_peft_model(
        nn.ModuleDict({"layer": layer}),
        peft.LoraConfig(r=r, lora_alpha=scale * r, target_modules=["layer"]),
    ).base_model.model["layer"]
    lora.lora_A["default"].weight.data.copy_(part.down)
    lora.lora_B["default"].weight.data.copy_(part.up)
    torch.testing.assert_close(own, lora(x), rtol=1e-5, atol=1e-5)


# ---- bottlenecks ---------------------------------------------------------------------------------


def test_lora_init_gives_no_gradient_to_w_down_and_some_to_w_up():
    model = adapted(small("bart"), C.scaled_parallel_adapter(4))
    model(**inputs_of("bart")).logits.square().mean().backward()
    for part in bottlenecks(model).values():
        assert part.down.grad.abs().max() == 0
        assert part.up.grad.abs().max() > 0


def test_bert_init_is_near_the_identity_but_not_the_identity():
    base, inputs = small("bert"), inputs_of("bert")
    before = logits(base, **inputs)
    after = logits(adapted(base, C.houlsby(4)), **inputs)
    assert 0 < (after - before).abs().max() < 0.05


@given(scale=st.floats(0.1, 8), width=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_a_scale_equals_a_scaled_w_up(scale, width, seed):
    def made(s: float) -> Bottleneck:
        return Bottleneck(Slot("adapter", init="bert", scale=s), width, 6, 8, seed, "a")

    scaled, plain, x = made(scale), made(1.0), torch.randn(3, 6)
    plain.up.data.mul_(scale)
    plain.up_bias.data.copy_(scaled.up_bias * scale)
    torch.testing.assert_close(scaled(x), plain(x))


def test_under_adam_a_scale_acts_like_a_larger_learning_rate_of_w_up():
    x, moves = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), {}
    for scale in (1.0, 4.0):
        part = Bottleneck(Slot("adapter", scale=scale), 4, 6, 8, 0, "a")
        optimizer = torch.optim.Adam(part.parameters(), lr=1e-3)
        part(x).sub(1).square().mean().backward()
        optimizer.step()
        moves[scale] = (part.scale.factor * part.up).detach()
    torch.testing.assert_close(moves[4.0], 4 * moves[1.0], rtol=1e-3, atol=1e-6)


def test_a_learned_scale_starts_at_its_value_and_gets_a_gradient():
    slot = Slot("adapter", composition="learned", scale=1.0, init="bert")
    part, x = Bottleneck(slot, 4, 6, 8, 0, "a"), torch.randn(3, 6)
    plain = Bottleneck(Slot("adapter", init="bert"), 4, 6, 8, 0, "a")
    assert torch.equal(part(x), plain(x))
    part(x).sum().backward()
    assert part.scale.factor.grad.abs() > 0


@pytest.mark.parametrize("layernorm", ["in", "out"])
def test_layer_norm_of_the_input_or_of_the_change(layernorm):
    slot = Slot("adapter", init="bert", layernorm=layernorm)
    part, x = Bottleneck(slot, 4, 6, 8, 0, "a"), torch.randn(3, 6)
    if layernorm == "in":
        expected = g(part, F.layer_norm(x, (6,)))
    else:
        expected = F.layer_norm(g(part, x), (8,))
    torch.testing.assert_close(part(x), expected)


def test_dropout_follows_the_relu_and_stops_in_evaluation():
    part = Bottleneck(Slot("adapter", init="bert", dropout=0.5), 64, 6, 8, 0, "a")
    plain = Bottleneck(Slot("adapter", init="bert"), 64, 6, 8, 0, "a")
    x = torch.randn(3, 6)
    assert not torch.allclose(part(x), plain(x))
    assert torch.equal(part.eval()(x), plain(x))


def test_multi_head_adapters_have_a_rank_of_heads_times_r():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=1,
        intermediate_size=8, vocab_size=8, head_dim=8,
    )  # fmt: skip
    (attention,) = attentions(transformers.LlamaForCausalLM(config))
    several = MultiHeadAdapter(Slot("mh_adapter", init="bert"), attention, 3, 0)
    single = Bottleneck(Slot("adapter", init="bert"), 3, 24, 24, 0, "a")
    x = torch.randn(1, 200, 24)
    heads = several.delta(x.view(1, 200, 3, 8).transpose(1, 2), 1.0).transpose(1, 2).flatten(2)
    assert sum(p.numel() for p in several.parameters()) == 2 * 3 * 24
    assert single.down.numel() + single.up.numel() == 2 * 3 * 24
    assert torch.linalg.matrix_rank(heads[0]) == 9
    assert torch.linalg.matrix_rank(single(x)[0]) == 3


# ---- BitFit and prompt tuning --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_bitfit_equals_changing_the_biases_themselves(kind):
    base, inputs = small(kind), inputs_of(kind)
    model = adapted(base, C.bitfit(), 0.2)
    by_hand = small(kind)
    changes = {
        name.removeprefix("base_model.model.").split(".unified_peft_")[0]: p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    owners = {
        name.replace("predictions.bias", "predictions.decoder.bias").removesuffix(".bias")
        for name, _ in by_hand.named_parameters()
        if name.endswith(".bias")
    }
    assert changes.keys() == owners
    with torch.no_grad():
        for name, change in changes.items():
            by_hand.get_submodule(name).bias.add_(change)
    expected = logits(by_hand, **inputs)
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, **inputs), expected, rtol=1e-4, atol=1e-4)


def test_bitfit_needs_biases():
    with pytest.raises(ConfigError, match="layers with a bias"):
        adapted(small_llama(), C.bitfit())


@pytest.mark.parametrize(("task", "count"), [("CAUSAL_LM", 5 * 32), ("SEQ_2_SEQ_LM", 5 * 32)])
def test_prompt_tuning_is_that_of_peft_before_the_first_input_only(task, count):
    base = small_llama() if task == "CAUSAL_LM" else small("bart")
    model = peft.get_peft_model(base, C.prompt(5, task_type=task))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# ---- counts --------------------------------------------------------------------------------------

BART_LARGE = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
}


@pytest.fixture(scope="module")
def bart_large() -> nn.Module:
    with torch.device("meta"):
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART_LARGE))


@pytest.mark.parametrize(
    ("config", "paper", "percent"),
    [
        (C.prefix(200, None), 14_745_600, 3.63),
        (C.parallel_adapter(512), 25_165_824, 6.19),
        (C.lora(102, where="ffn"), 25_067_520, 6.17),
        (C.mam(prefix_mlp_dim=None), 27_377_664, 6.74),
    ],
)
def test_counts_are_those_of_the_paper(bart_large, config, paper, percent):
    counts = parameter_counts(bart_large, config)
    assert counts.paper == paper
    total = sum(p.numel() for p in bart_large.parameters())
    assert round(100 * paper / total, 2) == percent


def test_biases_and_the_prefix_network_are_counted_apart(bart_large):
    mam = parameter_counts(bart_large, C.mam())
    assert mam.kept - mam.paper == 36_864
    assert parameter_counts(bart_large, C.prefix(30)).trained == 61_608_288


def test_counts_of_roberta_base():
    with torch.device("meta"):
        model = transformers.RobertaModel(transformers.RobertaConfig())
    assert parameter_counts(model, C.mam(16, 16, 2.0)).paper == 589_824
    assert parameter_counts(model, C.pfeiffer(600)).paper == 2 * 600 * 768 * 12


@pytest.mark.parametrize("kind", ["llama", "bart", "bert"])
@pytest.mark.parametrize("point", sorted(POINTS))
def test_counts_are_those_of_the_adapted_model(point, kind):
    counts = parameter_counts(small(kind), POINTS[point]())
    model = adapted(small(kind), POINTS[point]())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts.trained


@given(percent=st.floats(1, 30))
@settings(deadline=None, max_examples=15)
def test_a_matched_budget_is_the_largest_within(percent):
    model = small_llama()
    limit = percent / 100 * sum(p.numel() for p in model.parameters())
    for config in (C.parallel_adapter(7), C.lora(3, where="ffn"), C.mam(1, prefix_mlp_dim=16)):
        if parameter_counts(model, config.resized(1)).kept > limit:
            with pytest.raises(ConfigError, match="budget"):
                budget_match(config, model, percent)
            continue
        found = budget_match(config, model, percent)
        assert parameter_counts(model, found).kept <= limit
        assert parameter_counts(model, found.resized(found.bottleneck + 1)).kept > limit


# ---- selection and errors ------------------------------------------------------------------------


def test_a_sublayer_is_adapted_if_one_of_its_layers_is_named():
    model = adapted(small("llama"), C.houlsby(4, target_modules=["v_proj"]))
    assert {name.rsplit(".", 1)[-1] for name in bottlenecks(model)} == {"o_proj"}
    model = adapted(small("bart"), C.houlsby(4, target_modules=r".*decoder.*"))
    assert all("decoder" in name for name in bottlenecks(model))
    model = adapted(small("llama"), C.houlsby(4, layers_to_transform=[1]))
    assert all(".1." in name for name in bottlenecks(model))


def test_a_classification_head_trains():
    config = transformers.BertConfig(**ENCODER)
    model = peft.get_peft_model(
        transformers.BertForSequenceClassification(config), C.mam(3, 4, task_type="SEQ_CLS")
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("classifier" in name for name in trained)


@pytest.mark.parametrize("point", ["mam", "houlsby", "parallel adapter", "multi-head adapter"])
def test_merging_a_nonlinear_method_is_refused_before_anything_changes(point):
    model = adapted(small("llama"), POINTS[point](), 0.3)
    inputs = inputs_of("llama")
    before = logits(model, **inputs)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="depends on its input"):
            merge()
    assert torch.equal(logits(model, **inputs), before)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Slot("adapter", composition="gated"), "only a softmax has a gate"),
        (lambda: Slot("lora", "sequential"), "sequential LoRA"),
        (lambda: Slot("adapter", bottleneck=0), "at least 1"),
        (lambda: C.prefix(0), "at least 1"),
        (lambda: Slot("adaptor"), "one of 'none', 'adapter'"),
        (lambda: Slot("adapter", scale=0.0), "above 0"),
        (lambda: Slot("adapter", dropout=1.0), "below 1"),
        (lambda: Slot("prefix", dropout=0.1), "dropout of its own"),
        (lambda: Slot("lora", layernorm="in"), "Only adapters"),
        (lambda: C(ffn=Slot("prefix")), "needs attention heads"),
        (lambda: C(attn=Slot("adapter", "sequential", "norm")), "modifies as one of"),
        (lambda: C(ffn=Slot("adapter", modifies="heads")), "modifies as one of"),
        (lambda: C(attn=Slot("lora", projections=("querry",))), "Did you mean query"),
        (lambda: C(attn=Slot("adapter", projections=("query",))), "only with modifies='layers'"),
        (lambda: C(attn={"form": "lora", "botleneck": 2}), "Did you mean bottleneck"),
        (lambda: C(attn="lora"), "a Slot, or its options"),
        (lambda: C(prefix_mlp_dim=0), "None or an integer"),
        (lambda: C(attn=Slot(), ffn=Slot()), "if and only if"),
        (lambda: C(biases=True), "if and only if"),
        (lambda: C.adapter(4, "everywhere"), "'attn', 'ffn' or 'both'"),
    ],
)
def test_what_cannot_work_is_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_unknown_layers_are_refused_with_candidates():
    with pytest.raises(ConfigError, match="Did you mean q_proj"):
        adapted(small_llama(), C.houlsby(4, target_modules=["qproj"]))
    with pytest.raises(ConfigError, match="Known names: q_proj"):
        adapted(nn.ModuleDict({"a": nn.Linear(2, 2)}), C.houlsby(4))
