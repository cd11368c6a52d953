"""NeuroAda trains a few entries of every neuron's row, and nothing else."""

import copy
import itertools

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.quantization_utils import QuantizationBackend
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparing.adapt.neuroada as neuroada_module
import sparing.adapt.neuroada_gradients as gradients_module
from sparing.adapt import NeuroAdaConfig, gradient_scores, lost_to_rounding, select_by_gradient
from sparing.adapt.neuroada import NeuroAdaAdapter
from sparing.errors import CheckpointError, ConfigError
from sparing.tuners import TunerLayer, layers, matrices, matrix_view, tuner


class Net(nn.Module):
    """Two blocks of two layers and a head; `bias` is for the blocks' layers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 8, bias=bias), "down": nn.Linear(8, 6, bias=bias)})
            for _ in range(2)
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](self.dropout(torch.tanh(block["up"](x))))
        return self.head(x)


def net(seed: int = 0, bias: bool = True) -> Net:
    torch.manual_seed(seed)
    return Net(bias).double().eval()


def config(**options: object) -> NeuroAdaConfig:
    return NeuroAdaConfig(**{"target_modules": ["up", "down"], **options})


def adapters(model: nn.Module) -> dict[str, tuple[nn.Module, NeuroAdaAdapter]]:
    """Base layer and adapter by module name in the base model."""
    return {
        name.removeprefix("base_model.model."): (layer.get_base_layer(), layer.adapters["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, TunerLayer)
    }


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: adapter.pattern.mask() for name, (_, adapter) in adapters(model).items()}


def data(items: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(items, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (items,), generator=generator)


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_zero_bypasses_change_no_bit(make, dtype):
    """Oracle 1."""
    base, ids = make(dtype), token_ids()
    before = base(ids).logits
    for options in ({"k": 3}, {"scope": "global"}, {"structured": True}):
        model = peft.get_peft_model(
            copy.deepcopy(base), NeuroAdaConfig(target_modules="all-linear", **options)
        )
        assert torch.equal(model.eval()(ids).logits, before)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_output_and_gradients_equal_a_dense_scatter(k):
    """Oracles 2 and 8: eq. 3 and 4, on both sides of the dense-gradient share."""
    model = peft.get_peft_model(net(), config(k=k, tune_bias=True)).double()
    perturb(model, scale=0.3)
    x, y = data()
    dense = copy.deepcopy(model.base_model.model)
    reference = net()
    changes = {}
    for name, (layer, adapter) in adapters(model).items():
        plain = reference.get_submodule(name)
        full = torch.zeros_like(layer.weight)
        rows = torch.arange(len(full)).repeat_interleave(min(k, full.shape[1]))
        full[rows, adapter.pattern.columns] = adapter.bypass.detach()
        plain.weight = nn.Parameter(layer.weight.detach() + full)
        plain.bias = nn.Parameter(layer.bias + adapter.bias_bypass.detach())
        changes[name] = plain
    loss_of(model, (x, y)).backward()
    loss_of(reference, (x, y)).backward()
    torch.testing.assert_close(dense(x), reference(x), rtol=1e-12, atol=1e-13)
    for name, (layer, adapter) in adapters(model).items():
        expected = changes[name].weight.grad[adapter.pattern.mask()]
        torch.testing.assert_close(adapter.bypass.grad, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(adapter.bias_bypass.grad, changes[name].bias.grad)
        assert layer.weight.grad is None


def test_gradcheck_through_an_adapted_layer():
    """Oracle 2."""
    model = peft.get_peft_model(net(), config(k=2)).double()
    layer, adapter = adapters(model)["blocks.0.up"]
    x = data(3)[0].requires_grad_()

    def output(x: Tensor, bypass: Tensor) -> Tensor:
        return torch.func.functional_call(adapter, {"bypass": bypass}, (x, layer))

    bypass = torch.randn(len(adapter.pattern), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(output, (x, bypass))


@pytest.mark.parametrize(
    ("hidden", "mlp", "kv", "blocks", "vocab", "per_k"),
    [
        (4096, 11008, 32, 32, 32000, 1_359_872),
        (5120, 13824, 40, 40, 32000, 2_129_920),
        (4096, 14336, 8, 32, 128256, 1_376_256),
    ],
    ids=["LLaMA-7B", "LLaMA-13B", "LLaMA3-8B"],
)
def test_counts_of_the_papers_models_without_their_weights(hidden, mlp, kv, blocks, vocab, per_k):
    """Oracle 3: eq. 6."""
    shape = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=hidden // 128,
        num_key_value_heads=kv,
        num_hidden_layers=blocks,
        vocab_size=vocab,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(shape)
    model = peft.get_peft_model(base, NeuroAdaConfig(k=20, target_modules="all-linear"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20 * per_k


@pytest.mark.parametrize(
    "options", [{"scope": "global"}, {"score": "random"}, {"score": "gradient"}, {"scope": "layer"}]
)
def test_every_selection_can_be_counted_without_weights(options):
    with torch.device("meta"):
        base = Net()
    model = peft.get_peft_model(base, config(k=2, **options))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * (8 + 6)


def train(
    model: nn.Module,
    parameters: list[nn.Parameter],
    steps: int,
    clip: float | None,
    decay: float = 0.0,
    after_backward=lambda: None,
) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay)
    losses = []
    for batch in itertools.islice(itertools.cycle(batches()), steps):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        after_backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_all_connections_equal_full_fine_tuning():
    """Oracle 4."""
    reference = net()
    weights = []
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_("blocks" in name and "weight" in name)
        if parameter.requires_grad:
            weights.append(parameter)
    model = peft.get_peft_model(net(), config(k=99)).double().eval()
    bypasses = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in bypasses) == sum(p.numel() for p in weights)
    found, expected = train(model, bypasses, 30, None), train(reference, weights, 30, None)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_masked_training_of_the_weight_is_the_same_without_decay_only(clip, decay):
    """Oracle 5: the dense mask baseline, built here because it trains the base weights."""
    model = peft.get_peft_model(net(), config(k=2)).double().eval()
    chosen = masks(model)
    baseline, before = net(), net()
    baseline.requires_grad_(False)
    weights = {name: baseline.get_submodule(name).weight.requires_grad_() for name in chosen}

    def zero_outside() -> None:
        for name, weight in weights.items():
            weight.grad.mul_(chosen[name])

    bypasses = [p for p in model.parameters() if p.requires_grad]
    found = train(model, bypasses, 60, clip, decay)
    expected = train(baseline, list(weights.values()), 60, clip, decay, zero_outside)
    outside = max(
        (weight - before.get_submodule(name).weight)[~chosen[name]].abs().max().item()
        for name, weight in weights.items()
    )
    if decay == 0:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=0)
        assert outside == 0
    else:
        assert outside > 1e-3
        assert abs(found[-1] - expected[-1]) > 1e-6


@given(k=st.integers(1, 9), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_every_neuron_has_its_k_largest_weights(k, seed):
    """Oracles 6 and 7: eq. 1."""
    model = peft.get_peft_model(net(seed), config(k=k))
    for layer, adapter in adapters(model).values():
        cut = min(k, layer.in_features)
        mask = adapter.pattern.mask()
        assert (mask.sum(dim=1) == cut).all()
        expected = torch.topk(layer.weight.abs(), cut, dim=1).indices.sort(dim=1).values
        assert torch.equal(mask.nonzero()[:, 1].view(-1, cut), expected)


def test_ties_go_to_the_lowest_column():
    """Oracle 7."""
    base = net()
    base.blocks[0]["up"].weight.data.fill_(-0.5)
    mask = masks(peft.get_peft_model(base, config(k=2)))["blocks.0.up"]
    assert mask[:, :2].all()
    assert not mask[:, 2:].any()


@pytest.mark.parametrize("scope", ["layer", "block", "global"])
def test_wider_scopes_choose_as_many_but_the_strongest_of_all(scope):
    """Oracle 6: neurons may be left out."""
    base = net()
    base.blocks[1]["up"].weight.data *= 3
    model = peft.get_peft_model(base, config(k=2, scope=scope, k_pattern={"1.down": 1}))
    chosen = masks(model)
    pools = {
        "layer": [[name] for name in chosen],
        "block": [[n for n in chosen if n.startswith(f"blocks.{b}.")] for b in range(2)],
        "global": [list(chosen)],
    }[scope]
    sizes = {name: (1 if name == "blocks.1.down" else 2) * len(m) for name, m in chosen.items()}
    for names in pools:
        magnitude = torch.cat([model.get_submodule(n).weight.abs().flatten() for n in names])
        taken = torch.cat([chosen[n].flatten() for n in names])
        assert taken.sum() == sum(sizes[n] for n in names)
        assert magnitude[taken].min() > magnitude[~taken].max()
    assert any(not mask.any(dim=1).all() for mask in chosen.values())


def test_scaling_a_row_leaves_its_choice_and_scaling_a_column_does_not():
    """Oracle 10."""
    before = masks(peft.get_peft_model(net(), config(k=2)))["blocks.0.up"]
    rows, columns = net(), net()
    rows.blocks[0]["up"].weight.data *= torch.logspace(-3, 3, 8, dtype=torch.float64)[:, None]
    columns.blocks[0]["up"].weight.data[:, 4] *= 100
    assert torch.equal(masks(peft.get_peft_model(rows, config(k=2)))["blocks.0.up"], before)
    changed = masks(peft.get_peft_model(columns, config(k=2)))["blocks.0.up"]
    assert changed[:, 4].all()
    assert not before[:, 4].all()


def test_conv1d_is_chosen_from_over_its_input_axis():
    """Oracle 11, and the pitfall of the wrong axis."""
    model = peft.get_peft_model(
        small_gpt2(), NeuroAdaConfig(k=2, target_modules=["c_attn", "mlp.c_proj"])
    )
    for name, (layer, adapter) in adapters(model).items():
        inputs, outputs = layer.weight.shape
        assert adapter.pattern.shape == (outputs, inputs), name
        expected = torch.topk(layer.weight.abs(), 2, dim=0).indices.sort(dim=0).values.t()
        assert torch.equal(adapter.pattern.mask().nonzero()[:, 1].view(-1, 2), expected)


def test_structured_shares_the_most_frequent_inputs():
    """Oracle 12."""
    base = net()
    chosen = masks(peft.get_peft_model(net(), config(k=2)))
    shared = masks(peft.get_peft_model(net(), config(k=2, structured=True)))
    for name, mask in shared.items():
        assert (mask == mask[0]).all()
        frequency = chosen[name].sum(dim=0)
        assert frequency[mask[0]].min() >= frequency[~mask[0]].max()
    everything = masks(peft.get_peft_model(net(), config(k=99, structured=True)))
    assert all(mask.all() for mask in everything.values())
    for block in base.blocks:
        for layer in block.values():
            layer.weight.data = layer.weight.data[:1] * torch.rand(len(layer.weight), 1).add(0.1)
    same_order = masks(peft.get_peft_model(copy.deepcopy(base), config(k=2)))
    structured = masks(peft.get_peft_model(base, config(k=2, structured=True)))
    assert all(torch.equal(structured[name], same_order[name]) for name in structured)


def test_one_bypass_a_neuron_can_have_full_rank():
    """Oracle 13: unlike LoRA's, the rank is not bounded by the count."""
    base = nn.Sequential(nn.Linear(6, 6)).double()
    base[0].weight.data = (
        0.1 * torch.rand(6, 6, dtype=torch.float64) + torch.eye(6)[[3, 1, 0, 5, 4, 2]]
    )
    model = peft.get_peft_model(base, NeuroAdaConfig(k=1, target_modules=["0"]))
    perturb(model)
    adapter = adapters(model)["0"][1]
    assert torch.linalg.matrix_rank(adapter.delta_weight()) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_touches_only_the_bypassed_weights_and_unmerging_restores_them(dtype):
    """Oracle 9: eq. 5, and the merged weight keeps its type."""
    base, ids = small_llama(dtype), token_ids()
    model = peft.get_peft_model(base, NeuroAdaConfig(k=2, target_modules="all-linear")).eval()
    before = {name: layer.weight.clone() for name, (layer, _) in adapters(model).items()}
    perturb(model)
    expected = model(ids).logits
    lost = lost_to_rounding(model, dtype)
    model.merge_adapter()
    for name, (layer, adapter) in adapters(model).items():
        assert layer.weight.dtype == dtype
        changed = layer.weight != before[name]
        assert not changed[~adapter.pattern.mask()].any()
        kept = 1 - lost[f"base_model.model.{name}"]
        assert changed.sum().item() == pytest.approx(kept * len(adapter.pattern))
        assert kept > 0.9
    assert torch.equal(model(ids).logits, expected)
    model.unmerge_adapter()
    assert all(torch.equal(layer.weight, before[n]) for n, (layer, _) in adapters(model).items())


def test_rounding_loses_the_bypasses_that_are_small_beside_their_weight():
    """Pitfall: the strongest weights have the coarsest rounding."""
    model = peft.get_peft_model(small_llama(), NeuroAdaConfig(k=2, target_modules=["q_proj"]))
    assert set(lost_to_rounding(model).values()) == {0.0}
    for layer, adapter in adapters(model).values():
        layer.weight.data = layer.weight.data.bfloat16().float()
        entries = adapter.pattern.gather(layer.weight)
        adapter.bypass.data = entries.detach() * torch.where(
            torch.arange(len(entries)) % 4 == 0, 2.0**-10, 2.0**-6
        )
        adapter.bypass.data[2] = 0
    shares = lost_to_rounding(model)
    entries = len(adapter.pattern)
    assert list(shares) == [f"base_model.model.{name}" for name in adapters(model)]
    assert set(shares.values()) == {(entries // 4) / (entries - 1)}
    assert set(lost_to_rounding(model, torch.float32).values()) == {0.0}
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge"):
        lost_to_rounding(model)


def test_reverse_random_and_a_share_of_neurons():
    smallest = peft.get_peft_model(net(), config(k=2, score="reverse"))
    for layer, adapter in adapters(smallest).values():
        size = layer.weight.abs()
        mask = adapter.pattern.mask()
        expected = torch.zeros_like(mask).scatter_(1, size.topk(2, 1, largest=False).indices, True)
        assert torch.equal(mask, expected)
    first, again, other = (
        masks(peft.get_peft_model(net(), config(k=2, score="random", seed=seed)))
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[n], again[n]) and first[n].sum(1).eq(2).all() for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    assert not torch.equal(first["blocks.0.up"], first["blocks.1.up"])
    half = masks(peft.get_peft_model(net(), config(k=2, neuron_ratio=0.5)))
    for mask in half.values():
        assert sorted(mask.sum(dim=1).tolist()) == [0] * (len(mask) // 2) + [2] * (len(mask) // 2)


def test_gradient_scores_are_sums_over_batches():
    """Pitfall: |Σ g| is not Σ |g|; both are offered by name."""
    base = net()
    base.dropout.p = 0.0
    names = ["blocks.0.up", "blocks.1.down"]
    by_hand: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches():
        base.zero_grad()
        loss_of(base, batch).backward()
        for name in names:
            by_hand[name].append(base.get_submodule(name).weight.grad.clone())
    base.zero_grad()
    base.requires_grad_(False)
    for at_once in (1, 8):
        found = dict(gradient_scores(base, batches(), names, loss=loss_of, layers_at_once=at_once))
        assert list(found) == names
        for name in names:
            torch.testing.assert_close(found[name].signed.double(), sum(by_hand[name]))
            torch.testing.assert_close(
                found[name].absolute.double(), sum(g.abs() for g in by_hand[name])
            )
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())
    assert not base.training


@pytest.mark.parametrize("score", ["gradient", "gradient_abs"])
@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_gradient_selection_is_repeatable_and_comes_back_from_a_file(
    score, scope, low_cpu_mem_usage, tmp_path
):
    chosen = config(k=2, score=score, scope=scope)
    state = torch.get_rng_state()
    model = select_by_gradient(net(), chosen, batches(), loss=loss_of)
    again = select_by_gradient(net(), chosen, batches(), loss=loss_of, layers_at_once=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(masks(model)[n], masks(again)[n]) for n in masks(model))
    by_magnitude = masks(peft.get_peft_model(net(), config(k=2, scope=scope)))
    assert any(not torch.equal(masks(model)[n], by_magnitude[n]) for n in by_magnitude)
    assert not chosen.selected
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        net(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    x = data()[0]
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert sum(p.requires_grad for p in loaded.parameters()) == len(masks(model))


def test_gradient_scores_need_calibration():
    with pytest.raises(ConfigError, match=r"score.*select_by_gradient"):
        peft.get_peft_model(net(), config(score="gradient"))
    with pytest.raises(ConfigError, match="no batches"):
        select_by_gradient(net(), config(score="gradient"), [], loss=loss_of)
    with pytest.raises(ConfigError, match="only once"):
        select_by_gradient(
            net(), config(score="gradient"), iter(batches()), loss=loss_of, layers_at_once=2
        )


def test_a_selected_config_without_its_file_is_refused_when_used():
    model = select_by_gradient(net(), config(score="gradient"), batches(), loss=loss_of)
    reused = peft.get_peft_model(net(), model.peft_config["default"])
    with pytest.raises(ConfigError, match="saved adapter"):
        reused(data()[0])


def test_the_file_holds_bypasses_and_small_indices(tmp_path):
    base = small_llama()
    model = peft.get_peft_model(base, NeuroAdaConfig(k=3, target_modules=["down_proj"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {name.rsplit("neuroada_adapter.")[1]: t for name, t in tensors.items()}
    assert kinds.keys() == {"bypass", "pattern.stored_columns"}
    assert kinds["pattern.stored_columns"].dtype == torch.uint16
    assert kinds["bypass"].dtype == torch.float32
    assert len(kinds["bypass"]) == len(kinds["pattern.stored_columns"]) == 3 * 32


def test_an_adapter_is_bound_to_its_base(tmp_path):
    peft.get_peft_model(net(), config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="base model"):
        peft.PeftModel.from_pretrained(net(seed=1), tmp_path)


def test_block_scope_comes_back_from_a_file(tmp_path):
    model = peft.get_peft_model(net(), config(k=2, scope="block"))
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert all(torch.equal(masks(loaded)[n], masks(model)[n]) for n in masks(model))
    assert torch.equal(loaded(data()[0]), model(data()[0]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"k": 0}, "k"),
        ({"k": 1.5}, "k"),
        ({"k_pattern": {"up": 0}}, "k_pattern"),
        ({"score": "size"}, "score"),
        ({"scope": "model"}, "scope"),
        ({"neuron_ratio": 0.0}, "neuron_ratio"),
        ({"neuron_ratio": 1.5}, "neuron_ratio"),
        ({"neuron_ratio": 0.5, "scope": "layer"}, "neuron_ratio"),
        ({"structured": True, "scope": "global"}, "structured"),
    ],
)
def test_impossible_options_are_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=f"NeuroAdaConfig.{named}:"):
        config(**options)


def test_layers_that_cannot_be_adapted_are_refused_by_name():
    for target in ("embed_tokens", "input_layernorm"):
        with pytest.raises(ConfigError, match=target):
            peft.get_peft_model(small_llama(), NeuroAdaConfig(target_modules=[target]))
    with pytest.raises(ConfigError, match=r"lm_head.*embed_tokens"):
        peft.get_peft_model(small_llama(), NeuroAdaConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match="tune_bias"):
        peft.get_peft_model(net(bias=False), config(tune_bias=True))
    broken = net()
    broken.blocks[1]["up"].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"blocks\.1\.up.*finite"):
        peft.get_peft_model(broken, config())


def test_k_for_some_modules_and_blocks_left_out():
    model = peft.get_peft_model(
        net(), config(k=1, k_pattern={"up": 3}, exclude_modules=r"blocks\.0\..*")
    )
    counts = {name: int(mask.sum()) for name, mask in masks(model).items()}
    assert counts == {"blocks.1.up": 24, "blocks.1.down": 6}


def test_two_active_adapters_add_up():
    """Composition is the sum of both Δ."""
    model = peft.get_peft_model(net(), config(k=1)).double()
    model.add_adapter("second", config(k=2, score="reverse"))
    model = model.double()
    for name in ("default", "second"):
        model.set_adapter(name)
        perturb(model, seed=len(name))
    model.base_model.set_adapter(["default", "second"])
    x, layer = data()[0], model.base_model.model.blocks[0]["up"]
    both = layer.adapters["default"].delta_weight() + layer.adapters["second"].delta_weight()
    expected = F.linear(x, layer.weight + both, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


class PackedLinear(nn.Module):
    """An 8-bit layer as a quantisation library has it: codes with one scale a row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.flatten(), requires_grad=False)
        self.bias = layer.bias

    def dequantised(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised(), self.bias)


class PackedBackend(QuantizationBackend):
    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.dequantised()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Net:
    def resolve(layer: nn.Module) -> QuantizationBackend | None:
        return PackedBackend() if isinstance(layer, PackedLinear) else None

    for module in (neuroada_module, gradients_module, layers, matrices, tuner):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
    model = net()
    for block in model.blocks:
        for name in ("up", "down"):
            block[name] = PackedLinear(block[name])
    return model


def test_packed_weights_are_chosen_and_trained_as_their_dequantised_values(packed):
    """Pitfall: the largest codes are not the largest weights, with scales per input or block."""
    x, before = data()[0], packed(data()[0])
    model = peft.get_peft_model(packed, config(k=2, tune_bias=True)).double()
    assert torch.equal(model(x), before)
    perturb(model)
    layer, adapter = adapters(model)["blocks.0.up"]
    best = layer.dequantised().abs().topk(2, dim=1).indices
    assert torch.equal(
        adapter.pattern.mask(), torch.zeros(8, 6, dtype=torch.bool).scatter_(1, best, True)
    )
    expected = F.linear(
        x, layer.dequantised() + adapter.delta_weight(), layer.bias + adapter.bias_bypass
    )
    torch.testing.assert_close(model.base_model.model.blocks[0]["up"](x), expected)
    loss_of(model, data()).backward()
    assert adapter.bypass.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="quantised"):
        model.merge_adapter()


def test_gradients_of_packed_weights_are_refused(packed):
    with pytest.raises(ConfigError, match="quantised"):
        select_by_gradient(packed, config(score="gradient"), batches(), loss=loss_of)


def test_a_compiled_model_is_one_graph():
    model = peft.get_peft_model(net().float(), config(k=2)).eval()
    perturb(model)
    x = data()[0].float()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_matrix_view_is_what_selection_sees():
    layer = small_gpt2().transformer.h[0].mlp.c_fc
    assert matrix_view(layer, layer.weight).shape == (layer.nf, layer.nx)
