"""Bi-Adapter: what few levels a weight compute, and how they are trained."""

import copy
import inspect
import math

import peft
import pytest
import test_contract as contract
import torch
import torch.nn.functional as F
from _bi_adapter import KINDS, adapted, adapters, config, images, of, small_vit
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import saved_base  # noqa: F401
from torch import Tensor, nn

from sparing.adapt import relative_noise, round_weights
from sparing.adapt._bi_adapter_matrix import QuantizedMatrix
from sparing.adapt.bi_adapter import BiAdapterTuner, matrices
from sparing.errors import ConfigError
from sparing.quantizers import NormalQuantizer
from sparing.tuners import TunerLayer

# What PEFT promises, for the kind that the contract's own example is not.

PROMISES = [
    test
    for name, test in vars(contract).items()
    if name.startswith("test_")
    # The width of the network's inside is nothing that AdaptFormer could see.
    and test is not contract.test_another_architecture_is_refused_by_name
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda test: test.__name__)
def test_adaptformer_keeps(promise, request, monkeypatch) -> None:
    monkeypatch.setitem(contract.EXAMPLES, "bi_adapter", {"h": 3, "dropout": 0.0})
    given = {"method": "bi_adapter", "base_model": small_llama(), "make": small_gpt2}
    given |= {"low_cpu_mem_usage": True, "bits": 4}
    names = inspect.signature(promise).parameters
    promise(**{n: given[n] if n in given else request.getfixturevalue(n) for n in names})


# Matrices of few levels.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_what_is_multiplied_has_no_more_values_than_levels(kind, bits) -> None:
    """Oracle 2."""
    for matrix in of(adapted(kind=kind, bits=bits)):
        values = matrix.weight().unique()
        assert len(values) <= 2**bits
        if bits == 1:
            w = matrix.latent
            expected = torch.stack([w.mean() - 0.67449 * w.std(), w.mean() + 0.67449 * w.std()])
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("codebook", ["k-median", "lloyd-max", "uniform", "sign"])
@pytest.mark.parametrize("granularity", ["matrix", "row"])
def test_variants_are_the_quantisers_of_these_names(codebook, granularity) -> None:
    model = adapted(codebook=codebook, granularity=granularity, kind="lora")
    quantizer = NormalQuantizer(1, codebook, granularity)
    for matrix in of(model):
        w = matrix.latent
        torch.testing.assert_close(matrix.weight(), quantizer.decode(quantizer.encode(w)))


def test_a_new_adapter_starts_as_the_paper_says() -> None:
    for model in (adapted(noise=0.0, h=32), adapted(noise=0.0, h=32, kind="lora")):
        found = of(model)
        for down, up in zip(found[::2], found[1::2], strict=True):
            bound = down.latent.shape[1] ** -0.5
            assert 0.95 * bound < down.latent.abs().max() <= bound
            assert 1.8e-3 < up.latent.abs().max() <= 2e-3
            assert up.latent.std().item() == pytest.approx(0.88e-3, rel=0.05)
    ids = token_ids()
    plain, near = small_llama()(ids).logits, adapted(noise=0.0)(ids).logits
    assert 0 < (near - plain).abs().max() < 0.05


def test_without_quantisation_it_starts_as_the_identity() -> None:
    ids = token_ids()
    assert torch.equal(adapted(noise=0.0, bits=32)(ids).logits, small_llama()(ids).logits)


def test_half_precision_products_do_not_reach_the_quantiser() -> None:
    """μ and σ of small weights would be rounded away."""
    for matrix in of(adapted(noise=0.0)):
        expected = matrix.weight()
        matrix.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(matrix.weight(), expected)


def test_adapters_may_be_named_like_parts_of_each_other() -> None:
    model = adapted(kind="lora")
    model.add_adapter("bottlenecks", config(kind="lora", h=2))
    ranks = {m.latent.shape[0] for n, m in matrices(model, "bottlenecks") if n.endswith("down")}
    assert ranks == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_the_frozen_model(kind) -> None:
    """Oracle 9."""
    ids = token_ids()
    assert torch.equal(adapted(kind=kind, scale=0.0)(ids).logits, small_llama()(ids).logits)


@given(scale=st.floats(0.01, 100), bits=st.sampled_from([1, 4, 32]))
@settings(max_examples=10, deadline=None)
def test_scale_multiplies_what_is_added(scale, bits) -> None:
    one, scaled = (adapted(kind="lora", scale=s, bits=bits) for s in (1.0, scale))
    x = torch.randn(3, 32)
    torch.testing.assert_close(
        adapters(scaled)[0].delta(x), scale * adapters(one)[0].delta(x), rtol=1e-4, atol=1e-6
    )


# What the two kinds compute.


def test_32_bits_is_pefts_lora() -> None:
    """Oracle 8."""
    options = {"target_modules": ["q_proj", "v_proj"]}
    model = adapted(bits=32, kind="lora", scale=0.5, **options)
    lora = peft.get_peft_model(small_llama(), peft.LoraConfig(r=8, lora_alpha=4, **options))
    layers = [m for m in lora.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for adapter, layer in zip(adapters(model), layers, strict=True):
        (part, _), *_ = adapter.parts()
        layer.lora_A["default"].weight.data = part.down.latent.detach().clone()
        layer.lora_B["default"].weight.data = part.up.latent.detach().clone()
    ids = token_ids()
    torch.testing.assert_close(model(ids).logits, lora(ids).logits, rtol=1e-5, atol=1e-6)


class AdaptFormerLlamaLayer(nn.Module):
    """A block of Llama with the adapter written out."""

    def __init__(self, block: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.block, self.down, self.up, self.scale = block, down, up, scale

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        attended, _ = self.block.self_attn(
            hidden_states=self.block.input_layernorm(hidden), **kwargs
        )
        x = hidden + attended
        branch = self.scale * F.relu(x @ self.down.T) @ self.up.T
        return x + self.block.mlp(self.block.post_attention_layernorm(x)) + branch


@pytest.mark.parametrize("bits", [1, 32])
def test_adaptformer_reads_the_sub_layers_input_before_its_norm(bits) -> None:
    """Oracle 8, and the first of the usual mistakes: reading LN(x)."""
    model, written_out = adapted(bits=bits, scale=2.0), small_llama()
    pairs = [
        (a.bottleneck.down.weight().detach(), a.bottleneck.up.weight().detach())
        for a in adapters(model)
    ]
    for i, (down, up) in enumerate(pairs):
        block = written_out.model.layers[i]
        written_out.model.layers[i] = AdaptFormerLlamaLayer(block, down, up, 2.0)
    ids = token_ids()
    torch.testing.assert_close(model(ids).logits, written_out(ids).logits, rtol=1e-5, atol=1e-5)


def test_adaptformer_on_a_vision_transformer() -> None:
    model, seen = adapted(small_vit(), scale=3.0), {}
    block = model.base_model.model.vit.layers[1]
    adapter = adapters(model)[1]
    block.layernorm_after.register_forward_hook(lambda m, a, o: seen.update(x=a[0], normed=o))
    block.register_forward_hook(lambda m, a, o: seen.update(y=o))
    model(pixel_values=images())
    down, up = adapter.bottleneck.factors()
    mlp = block.mlp
    network = mlp.fc2.base_layer(mlp.activation_fn(mlp.fc1(seen["normed"])))
    expected = seen["x"] + network + F.relu(seen["x"] @ down.T) @ up.T
    torch.testing.assert_close(seen["y"], expected)


def test_the_papers_places_are_the_default() -> None:
    names = [n for n, m in adapted().named_modules() if isinstance(m, TunerLayer)]
    assert [name.rpartition(".")[2] for name in names] == ["down_proj"] * 2
    names = [n for n, m in adapted(kind="lora").named_modules() if isinstance(m, TunerLayer)]
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "v_proj"] * 2
    names = [
        n for n, m in adapted(small_vit(), kind="lora").named_modules() if isinstance(m, TunerLayer)
    ]
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "v_proj"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_layers_to_transform_chooses_among_the_default_places(kind) -> None:
    model = adapted(kind=kind, layers_to_transform=[1])
    names = [n for n, m in model.named_modules() if isinstance(m, TunerLayer)]
    assert names
    assert all(".layers.1." in name for name in names)


def test_a_kind_can_be_added_to_a_model_that_has_the_other() -> None:
    model, ids = adapted(kind="lora", target_modules="all-linear"), token_ids()
    model.add_adapter("second", config())
    model.set_adapter("second")
    perturb(model)
    torch.testing.assert_close(model(ids).logits, adapted()(ids).logits)


class TimmAttention(nn.Module):
    """Queries, keys and values at once, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 2, 4).unbind(-3)
        y = F.scaled_dot_product_attention(*(t.transpose(-2, -3) for t in (q, k, v)))
        return self.proj(y.transpose(-2, -3).flatten(-2))


class TimmLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(nn.ModuleDict({"attn": TimmAttention()}) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["attn"](x)
        return x


@pytest.mark.parametrize(("make", "width"), [(small_gpt2, 32), (TimmLike, 8)])
def test_fused_layers_get_queries_and_values_but_no_keys(make, width) -> None:
    """Oracle 10: merging adds s W_u W_d to the rows of q and of v."""
    base = make()
    model = adapted(copy.deepcopy(base), kind="lora", scale=2.0, h=4)
    x = token_ids() if make is small_gpt2 else torch.randn(2, 5, 8)
    before = model(x)
    adapter = adapters(model)[0]
    (query, _), (value, _) = adapter.parts()
    change = adapter.delta_weight()
    for part, rows in ((query, slice(0, width)), (value, slice(2 * width, 3 * width))):
        torch.testing.assert_close(change[rows], 2.0 * part.up.weight() @ part.down.weight())
    assert not change[width : 2 * width].any()
    merged = model.merge_and_unload()(x)
    if make is small_gpt2:
        before, merged = before.logits, merged.logits
    torch.testing.assert_close(merged, before, rtol=1e-5, atol=1e-5)


def test_dropout_acts_between_the_matrices_and_only_in_training() -> None:
    model = adapted(kind="lora", dropout=0.5, h=64)
    adapter, x = adapters(model)[0], torch.randn(4, 32)
    (part, _), *_ = adapter.parts()
    plain = adapter.delta(x)
    assert torch.equal(plain, adapter.delta(x))
    adapter.train()
    torch.manual_seed(0)
    dropped = adapter.delta(x)
    torch.manual_seed(0)
    expected = F.dropout(x @ part.down.weight().T, 0.5) @ part.up.weight().T
    torch.testing.assert_close(dropped, expected)
    assert not torch.allclose(dropped, plain)


# Training.


def test_training_changes_the_adapter_and_nothing_else() -> None:
    """Oracle 11."""
    model = adapted(small_vit(), binary_head=["classifier"], noise=0.0).train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(f".{BiAdapterTuner.prefix}" in name for name in trainable)
    assert len(trainable) == 2 * 2 + 1
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(pixel_values=images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name


def test_gradient_has_the_papers_second_term() -> None:
    """Oracle 5 on a whole model: plain straight-through, G alone, is not it."""
    model = adapted(kind="lora").double()
    for matrix in of(model):
        matrix.quantizer = NormalQuantizer(1, epsilon=0.0)
    weights, original = [], QuantizedMatrix.weight

    def watched(self: QuantizedMatrix) -> Tensor:
        weight = original(self)
        weight.retain_grad()
        weights.append((self, weight))
        return weight

    QuantizedMatrix.weight = watched
    try:
        model(token_ids(), labels=token_ids()).loss.backward()
    finally:
        QuantizedMatrix.weight = original
    assert len(weights) == len(of(model))
    for matrix, weight in weights:
        w, g = matrix.latent.detach(), weight.grad
        normal = (w - w.mean()) / w.std()
        q = 0.6744897501960817 * normal.sign()
        second = ((q - normal) * g).sum() * normal / (w.numel() - 1)
        torch.testing.assert_close(matrix.latent.grad, g + second, rtol=1e-9, atol=1e-15)
        assert second.norm() > 1e-5 * g.norm()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_kept_matrices_follow_the_optimiser(options) -> None:
    model = adapted(kind="lora").train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, **options
    )
    ids = token_ids()
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        for matrix in of(model):
            quantizer, w = matrix.quantizer, matrix.latent.detach()
            assert torch.equal(matrix.weight(), quantizer.decode(quantizer.encode(w)))


def test_between_two_steps_matrices_are_quantised_once(monkeypatch) -> None:
    model = adapted(kind="lora").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls, encode = [], NormalQuantizer._encode
    monkeypatch.setattr(
        NormalQuantizer, "_encode", lambda self, w: calls.append(1) or encode(self, w)
    )
    ids = token_ids()
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
    assert len(calls) == len(of(model))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with torch.no_grad():
        model(ids)
        model(ids)
    assert len(calls) == 3 * len(of(model))


def test_width_pattern_and_count() -> None:
    model = adapted(kind="lora", h=2, h_pattern={"v_proj": 5})
    expected = 2 * (2 * (32 + 32) + 5 * (32 + 16))
    assert model.get_nb_trainable_parameters()[0] == expected


# The classifier of one bit.


def test_a_binary_head_replaces_the_classifier() -> None:
    model, seen = adapted(small_vit(), binary_head=["classifier"], bits=4), {}
    layer = model.base_model.model.classifier
    layer.register_forward_hook(lambda m, a, o: seen.update(x=a[0], y=o))
    model(pixel_values=images())
    weight = layer.adapters["default"].matrix.weight()
    assert weight.shape == (5, 32)
    assert len(weight.unique()) == 2
    torch.testing.assert_close(seen["y"], seen["x"] @ weight.T)
    with model.disable_adapter():
        expected = small_vit()(pixel_values=images()).logits
        assert torch.equal(model(pixel_values=images()).logits, expected)


def test_a_binary_head_merges_and_is_saved(tmp_path) -> None:
    model = adapted(small_vit(), binary_head=["classifier"], kind="lora")
    expected = model(pixel_values=images()).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_vit(), tmp_path).eval()
    assert torch.equal(loaded(pixel_values=images()).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(pixel_values=images()).logits, expected, rtol=1e-5, atol=1e-5)
    assert merged.classifier.bias is None


# What the paper looks at.


def test_rounding_after_training_gives_the_quantised_matrices() -> None:
    model = adapted(bits=32)
    before = [m.latent.detach().clone() for m in of(model)]
    round_weights(model, 2)
    quantizer = NormalQuantizer(2)
    for matrix, w in zip(of(model), before, strict=True):
        torch.testing.assert_close(matrix.weight(), quantizer.decode(quantizer.encode(w)))
    with pytest.raises(ConfigError, match="bits=32"):
        round_weights(adapted(), 2)
    with pytest.raises(ConfigError, match="none"):
        round_weights(model, 2, "other")


def test_noise_is_relative_reproducible_and_taken_back() -> None:
    model = adapted(bits=32, h=32)
    before = [m.latent.detach().clone() for m in of(model)]
    found = []
    for _ in range(2):
        with relative_noise(model, 0.5, seed=3):
            found.append([m.latent.detach() - w for m, w in zip(of(model), before, strict=True)])
        assert all(torch.equal(m.latent, w) for m, w in zip(of(model), before, strict=True))
    for one, two, w in zip(*found, before, strict=True):
        assert torch.equal(one, two)
        assert (one.std() / w.std()).item() == pytest.approx(0.5, rel=0.1)


# What cannot work is said so.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vera"}, "BiAdapterConfig.kind"),
        ({"h": 0}, "BiAdapterConfig.h"),
        ({"h_pattern": {"v_proj": 0}}, "BiAdapterConfig.h_pattern"),
        ({"bits": 3}, "1, 2, 4, 8, 32, found 3"),
        ({"scale": math.nan}, "BiAdapterConfig.scale"),
        ({"dropout": 1.0}, "BiAdapterConfig.dropout"),
        ({"codebook": "random"}, "BiAdapterConfig.codebook"),
        ({"codebook": "sign", "bits": 2}, "BiAdapterConfig.codebook"),
        ({"granularity": "column"}, "BiAdapterConfig.granularity"),
        ({"granularity": "row", "h": 1}, "a row of one number"),
        ({"binary_head": ["classifier"], "task_type": "SEQ_CLS"}, "BiAdapterConfig.binary_head"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"q_proj.*last layer of a feed-forward network"),
        ({"binary_head": ["head"]}, "binary_head.*'head'"),
    ],
)
def test_options_that_do_not_suit_the_model_are_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(**options)


@pytest.mark.parametrize(("kind", "missing"), [("adaptformer", "feed-forward"), ("lora", "attent")])
def test_a_model_without_the_papers_places_is_refused(kind, missing) -> None:
    with pytest.raises(ConfigError, match=missing):
        adapted(nn.Sequential(nn.Linear(4, 4)), kind=kind)


def test_unloading_leaves_no_hook() -> None:
    base = small_llama()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in base.modules()]
    plain = adapted(base).unload()
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in plain.modules()] == hooks


class Block(nn.Module):
    """x + FFN(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.activation, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


def feed_forward_blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


@pytest.mark.parametrize("options", [{}, {"kind": "lora", "target_modules": ["up"]}])
def test_compiles_without_graph_breaks(options, tmp_path) -> None:
    model, x = adapted(feed_forward_blocks(), **options), torch.randn(2, 8)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(feed_forward_blocks(), tmp_path).eval()
    for one in (model, loaded):
        expected = one(x)
        compiled = torch.compile(one.base_model.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        assert not torch.allclose(expected, feed_forward_blocks()(x), atol=1e-3)
