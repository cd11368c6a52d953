"""MoS: indices, gathered factors, their gradients, and the LoRA that they amount to."""

import copy
import dataclasses
import io
import itertools
import json
import math

import peft
import pytest
import torch
import transformers
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from sparing.adapt import MoSConfig, export_lora, selection_histogram
from sparing.adapt.mos import MoSAdapter, MoSTuner, ShardPool
from sparing.errors import CheckpointError, ConfigError
from sparing.tuners import TunerLayer

WIDTH = 8


class Blocks(nn.Module):
    """`widths` linear layers `blocks.<i>.proj` in a row, and a head that is not adapted."""

    def __init__(self, widths: tuple[int, ...] = (WIDTH,) * 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(i, o)}) for i, o in itertools.pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block["proj"](x))
        return self.head(x)


def config(**options: object) -> MoSConfig:
    chosen = {"r": 4, "budget_rank": 2, "shards": 2, "private_rank": 1, "target_modules": ["proj"]}
    return MoSConfig(**(chosen | options))  # type: ignore[arg-type]


def adapted(base: nn.Module | None = None, noise: float = 0.3, **options: object) -> peft.PeftModel:
    model = peft.get_peft_model(Blocks() if base is None else base, config(**options))
    perturb(model, noise)
    return model


def adapters(model: nn.Module) -> list[MoSAdapter]:
    return [m.adapters["default"] for m in model.modules() if isinstance(m, TunerLayer)]


def pools(model: peft.PeftModel) -> dict[str, ShardPool]:
    return dict(model.base_model.shared["default"].pools)


def only_pool(model: peft.PeftModel) -> ShardPool:
    (pool,) = pools(model).values()
    return pool


def inputs(rows: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, int]:
    """Valid combinations of e, L, l, p and r."""
    budget, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    private = draw(st.integers(0, budget))
    most = private + (budget - private) * blocks
    r = budget if private == budget else draw(st.integers(max(1, private), most))
    return {
        "budget_rank": budget,
        "blocks": blocks,
        "private_rank": private,
        "r": r,
        "shards": draw(st.sampled_from([1, 2, 4])),
        "seed": draw(st.integers(0, 2**31)),
    }


def maps_of(
    blocks: int, *, budget_rank: int, pair_dissociation: bool = True, **options: int
) -> tuple[ShardPool, Tensor]:
    """A pool and the shard maps (blocks, 2, r·l) of its layers, without a model."""
    chosen = config(
        budget_rank=budget_rank, pair_dissociation=pair_dissociation, lora_alpha=16, **options
    )
    pool = ShardPool(chosen, budget_rank, blocks, WIDTH, WIDTH, "proj")
    drawn = [pool.draw(chosen, k, f"blocks.{k}.proj") for k in range(blocks)]
    return pool, torch.stack(drawn).long().flatten(2)


# What it starts as, and how large it is.


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e6))
@settings(max_examples=20, deadline=None)
def test_a_new_adapter_adds_exactly_zero_whatever_the_input(seed: int, scale: float) -> None:
    """Oracle 1."""
    model = adapted(noise=0.0, seed=seed)
    for adapter in adapters(model):
        assert torch.equal(adapter.delta(scale * inputs()), torch.zeros(6, WIDTH))


@pytest.mark.parametrize(("budget", "expected"), [(1, 2_498_560), (2, 4_997_120), (8, 19_988_480)])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_llama2_7b_has_the_papers_number_of_parameters(budget, expected, low_cpu_mem_usage) -> None:
    """Oracle 2: 5.00 M and 19.99 M in the paper's tables; r, l and p do not matter."""
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    model = peft.get_peft_model(
        base,
        MoSConfig(r=2 * budget, budget_rank=budget, private_rank=0, target_modules="all-linear"),
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert model.get_nb_trainable_parameters()[0] == expected


def test_lora_of_rank_64_is_eight_times_larger_than_budget_8() -> None:
    """Oracle 2: the fourth count, from peft itself."""
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    lora = peft.get_peft_model(base, peft.LoraConfig(r=64, target_modules="all-linear"))
    assert lora.get_nb_trainable_parameters()[0] == 159_907_840 == 8 * 19_988_480


@given(recipe=recipes())
@settings(max_examples=25, deadline=None)
def test_the_size_is_that_of_a_lora_of_rank_budget(recipe: dict[str, int]) -> None:
    """Oracle 2: eq. 8."""
    blocks = recipe.pop("blocks")
    model = adapted(Blocks((WIDTH,) * (blocks + 1)), **recipe)
    expected = recipe["budget_rank"] * blocks * 2 * WIDTH
    assert model.get_nb_trainable_parameters()[0] == expected


def test_initial_bound_is_that_of_the_full_width_not_of_a_shard() -> None:
    pool = ShardPool(config(shards=4), 64, 8, 64, 64, "proj")
    assert pool.a.shape == (64 * 8 * 4, 16)
    assert 0.99 / math.sqrt(64) < pool.a.abs().max() <= 1 / math.sqrt(64)
    assert not pool.b.any()


# The two ends of the scale: LoRA, and one pair of factors for all.


def test_all_rows_private_is_lora() -> None:
    """Oracle 3: outputs and gradients equal those of peft's LoRA with the same weights."""
    model = adapted(r=2, private_rank=2, shards=1)
    lora = peft.get_peft_model(
        Blocks(), peft.LoraConfig(r=2, lora_alpha=16, target_modules=["proj"])
    )
    layers = [m for m in lora.modules() if isinstance(m, peft.tuners.lora.Linear)]
    pool, x = only_pool(model), inputs()
    for k, layer in enumerate(layers):
        layer.lora_A["default"].weight.data = pool.a[2 * k : 2 * k + 2].detach().clone()
        layer.lora_B["default"].weight.data = pool.b[2 * k : 2 * k + 2].detach().clone().t()
    torch.testing.assert_close(model(x), lora(x), rtol=1e-5, atol=1e-6)
    model(x).square().sum().backward()
    lora(x).square().sum().backward()
    for k, layer in enumerate(layers):
        rows = slice(2 * k, 2 * k + 2)
        a, b = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        torch.testing.assert_close(pool.a.grad[rows], a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pool.b.grad[rows], b.t(), rtol=1e-5, atol=1e-5)


def test_identity_indices_over_the_whole_pool_are_pure_sharing() -> None:
    """Oracle 4."""
    model = adapted(r=8, private_rank=0, shards=1)
    for adapter in adapters(model):
        adapter.shard_map.copy_(torch.arange(8).view(1, 8, 1).expand(2, 8, 1))
    first, *others = [adapter.factors() for adapter in adapters(model)]
    for a, b in others:
        assert torch.equal(a, first[0])
        assert torch.equal(b, first[1])


def test_pure_sharing_needs_no_special_option() -> None:
    """Oracle 4: with all shards, whole rows and one draw for both factors, order is immaterial."""
    model = adapted(r=8, private_rank=0, shards=1, pair_dissociation=False)
    pool = only_pool(model)
    for adapter in adapters(model):
        torch.testing.assert_close(adapter.delta_weight(), 16 / 8 * pool.b.t() @ pool.a)


# Indices.


@given(recipe=recipes(), dissociated=st.booleans())
@settings(max_examples=60, deadline=None)
def test_laws_of_the_indices(recipe: dict[str, int], dissociated: bool) -> None:
    """Oracle 7: no repeats; public ones below n_pub; private ones disjoint and exhaustive."""
    pool, maps = maps_of(**recipe, pair_dissociation=dissociated)
    pieces, blocks = recipe["shards"], recipe["blocks"]
    private = recipe["private_rank"] * pieces
    assert len(pool.a) == recipe["budget_rank"] * blocks * pieces
    assert pool.num_public == (recipe["budget_rank"] - recipe["private_rank"]) * blocks * pieces
    assert maps.shape == (blocks, 2, recipe["r"] * pieces)
    for row in maps.flatten(0, 1):
        assert len(row.unique()) == len(row)
    split = maps.shape[2] - private
    assert (maps[:, :, :split] < pool.num_public).all()
    everything = torch.arange(pool.num_public, len(pool.a))
    for factor in (0, 1):
        assert torch.equal(maps[:, factor, split:].flatten(), everything)
    if not dissociated:
        assert torch.equal(maps[:, 0], maps[:, 1])


def test_pair_dissociation_draws_the_factors_independently() -> None:
    """Oracle 7; the private shards stay paired."""
    _, maps = maps_of(blocks=32, budget_rank=2, r=8, private_rank=1)
    assert not (maps[:, 0] == maps[:, 1]).all(dim=1).any()
    assert torch.equal(maps[:, 0, -2:], maps[:, 1, -2:])
    assert len({tuple(row.tolist()) for row in maps[:, 0]}) == 32


def test_indices_depend_on_the_seed_alone_and_leave_the_global_generator_alone() -> None:
    """Oracle 7."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    pool, maps = maps_of(blocks=4, budget_rank=2, r=4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again_pool, again = maps_of(blocks=4, budget_rank=2, r=4, seed=5)
    assert torch.equal(maps, again)
    assert torch.equal(pool.a, again_pool.a)
    assert not torch.equal(maps, maps_of(blocks=4, budget_rank=2, r=4, seed=6)[1])


@pytest.mark.parametrize(("blocks", "r", "seeds"), [(32, 8, 300), (8, 4, 200)])
def test_share_of_shards_that_no_layer_uses(blocks: int, r: int, seeds: int) -> None:
    """Oracle 11, within four standard deviations of (1 - (r-p)/((e-p)L))^L."""
    unused = total = 0
    for seed in range(seeds):
        pool, maps = maps_of(blocks, budget_rank=2, r=r, private_rank=1, seed=seed)
        for factor in (0, 1):
            counts = torch.bincount(maps[:, factor].flatten(), minlength=len(pool.a))
            unused += int((counts[: pool.num_public] == 0).sum())
            total += pool.num_public
    expected = (1 - (r - 1) / blocks) ** blocks
    assert abs(unused / total - expected) < 4 * math.sqrt(expected / total)


def test_overlap_of_two_layers_is_hypergeometric() -> None:
    """Oracle 12: mean ((r-p) l)² / n_pub = 3.06."""
    overlaps = []
    for seed in range(60):
        _, maps = maps_of(32, budget_rank=2, r=8, private_rank=1, seed=seed)
        public = maps[:, 0, :14].tolist()
        overlaps += [len(set(one) & set(two)) for one, two in itertools.pairwise(public)]
    assert abs(sum(overlaps) / len(overlaps) - 14**2 / 64) < 0.15


def test_pair_dissociation_multiplies_the_distinct_pairs() -> None:
    """Oracle 13."""

    def distinct(dissociated: bool) -> int:
        _, maps = maps_of(32, budget_rank=2, r=8, private_rank=1, pair_dissociation=dissociated)
        public = maps[:, :, :14].transpose(1, 2).flatten(0, 1)
        return len(public.unique(dim=0))

    assert distinct(False) <= 64
    assert distinct(True) > 0.9 * 14 * 32


def test_histogram_counts_every_use_of_a_public_shard() -> None:
    model = adapted()
    (counts,) = selection_histogram(model).values()
    for factor, count in enumerate(counts):
        expected = torch.zeros(8, dtype=torch.int64)
        for adapter in adapters(model):
            for shard in adapter.shard_map[factor, :3].flatten().tolist():
                expected[shard] += 1
        assert torch.equal(count, expected)
        assert count.sum() == (4 - 1) * 2 * 4


# Factors, update and gradients.


@given(recipe=recipes())
@settings(max_examples=25, deadline=None)
def test_gathering_equals_concatenating_shards_row_by_row(recipe: dict[str, int]) -> None:
    """Oracle 8, and 15: the update is α / r times the product."""
    blocks, pieces, r = recipe.pop("blocks"), recipe["shards"], recipe["r"]
    model = adapted(Blocks((WIDTH,) * (blocks + 1)), **recipe)
    pool = only_pool(model)
    for adapter in adapters(model):
        factors = []
        for shards, indices in zip((pool.a, pool.b), adapter.shard_map.long(), strict=True):
            rows = []
            for j in range(r):
                pieces_of_row = [shards[indices[j][piece]] for piece in range(pieces)]
                rows.append(torch.cat(pieces_of_row))
            factors.append(torch.stack(rows))
        a, b = adapter.factors()
        assert torch.equal(a, factors[0])
        assert torch.equal(b, factors[1] * (16 / r))
        expected = sum(torch.outer(factors[1][j], factors[0][j]) for j in range(r)) * 16 / r
        torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-4, atol=1e-5)


def test_doubling_alpha_doubles_the_update() -> None:
    """Oracle 15."""
    once, twice = adapted(), adapted(lora_alpha=32)
    for one, two in zip(adapters(once), adapters(twice), strict=True):
        torch.testing.assert_close(two.delta_weight(), 2 * one.delta_weight())


def test_update_has_rank_r_above_its_budget() -> None:
    """Oracle 14."""
    for r in (3, 5, 8):
        for adapter in adapters(adapted(noise=1.0, r=r, private_rank=0).double()):
            assert torch.linalg.matrix_rank(adapter.delta_weight()) == r > 2


def test_pool_gradient_is_the_scatter_sum_of_dense_gradients() -> None:
    """Oracle 9; shards that no layer holds get exactly zero."""
    model = adapted(r=2).double()
    pool, x = only_pool(model), inputs().double()
    dense: list[list[Tensor]] = []
    for adapter in adapters(model):
        original = adapter._gather

        def watched(dtype, original=original):
            factors = original(dtype)
            for factor in factors:
                factor.retain_grad()
            dense.append(list(factors))
            return factors

        adapter._gather = watched
    model(x).square().sum().backward()
    expected_a, expected_b = torch.zeros_like(pool.a), torch.zeros_like(pool.b)
    for (a, b), adapter in zip(dense, adapters(model), strict=True):
        for shard, row in zip(adapter.shard_map[0].flatten(), a.grad.view(4, -1), strict=True):
            expected_a[shard.long()] += row
        for shard, row in zip(adapter.shard_map[1].flatten(), b.grad.view(4, -1), strict=True):
            expected_b[shard.long()] += row * adapter.scaling
    torch.testing.assert_close(pool.a.grad, expected_a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pool.b.grad, expected_b, rtol=1e-12, atol=1e-12)
    counts_a, counts_b = next(iter(selection_histogram(model).values()))
    assert (counts_a == 0).any()
    assert not pool.a.grad[: pool.num_public][counts_a == 0].any()
    assert not pool.b.grad[: pool.num_public][counts_b == 0].any()
    assert pool.a.grad[: pool.num_public][counts_a > 0].any(dim=1).all()


def test_private_shards_learn_from_their_own_layer_only() -> None:
    """Oracle 9."""
    for cut in range(4):
        model = adapted()
        for k, adapter in enumerate(adapters(model)):
            if k == cut:
                adapter.register_forward_hook(lambda module, args, output: output.detach())
        x = inputs().requires_grad_()
        total = sum(adapter(x, nn.Identity()).square().sum() for adapter in adapters(model))
        total.backward()
        pool = only_pool(model)
        for shards in (pool.a, pool.b):
            private = shards.grad[pool.num_public :].view(4, 2, -1).any(dim=2).any(dim=1)
            assert private.tolist() == [k != cut for k in range(4)]


def test_first_step_moves_only_the_second_factors() -> None:
    """Oracle 10."""
    model = adapted(noise=0.0)
    model(inputs()).square().sum().backward()
    pool = only_pool(model)
    assert not pool.a.grad.any()
    assert pool.b.grad.any()


def test_merging_is_exact_in_float64() -> None:
    """Oracle 5."""
    model, x = adapted().double(), inputs().double()
    with torch.no_grad():
        before = model(x)
        weights = [m.get_base_layer().weight.clone() for m in model.modules() if is_layer(m)]
        model.merge_adapter()
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
        model.unmerge_adapter()
        assert torch.equal(model(x), before)
        after = [m.get_base_layer().weight for m in model.modules() if is_layer(m)]
        assert all(torch.equal(one, two) for one, two in zip(weights, after, strict=True))


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, TunerLayer)


def test_dropout_acts_in_training_only() -> None:
    model, x = adapted(lora_dropout=0.5), inputs()
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


# Kept factors.


def test_factors_are_kept_outside_training_until_the_pool_changes() -> None:
    model, x = adapted().eval(), inputs()
    adapter, pool = adapters(model)[0], only_pool(model)
    with torch.no_grad():
        before = model(x)
        assert adapter.factors()[0] is adapter.factors()[0]
        pool.b.add_(1.0)
        after = model(x)
        pool.b.data = pool.b.data - 1.0
        torch.testing.assert_close(model(x), before)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_renews_the_factors(assign: bool) -> None:
    model, x = adapted().eval(), inputs()
    other = adapted(seed=4).eval()
    with torch.no_grad():
        assert not torch.allclose(model(x), other(x))
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert torch.equal(model(x), other(x))


def test_an_optimiser_step_between_evaluations_is_seen() -> None:
    model, x = adapted(), inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    outputs = []
    for _ in range(3):
        with torch.no_grad():
            outputs.append(model.eval()(x))
            assert torch.equal(copy.deepcopy(model)(x), outputs[-1])
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_gradients_flow_in_evaluation_mode_after_factors_were_kept() -> None:
    model, x = adapted().eval(), inputs().requires_grad_()
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    pool = only_pool(model)
    assert pool.a.grad.any()
    pool.requires_grad_(False)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()  # kept inference tensors could not be saved for this


def test_training_keeps_no_factors() -> None:
    model, x = adapted().eval(), inputs()
    with torch.no_grad():
        model(x)
        assert adapters(model)[0]._kept._state is not None
        assert adapters(copy.deepcopy(model))[0]._kept._state is None
        model.train()(x)
    assert adapters(model)[0]._kept._state is None


def test_switching_modes_renews_factors_after_a_write_that_leaves_no_trace() -> None:
    model, x = adapted().eval(), inputs()
    with torch.no_grad():
        before = model(x)
        only_pool(model).b.data.zero_()
        after = model.eval()(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, Blocks()(x))


def test_a_pool_made_in_inference_mode_works() -> None:
    with torch.inference_mode():
        model = peft.get_peft_model(Blocks(), config()).eval()
        assert torch.equal(model(inputs()), Blocks()(inputs()))


def test_compiles_without_graph_breaks() -> None:
    model, x = adapted().eval(), inputs()
    expected = model(x)
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


# Pools are held once.


def test_pools_are_registered_once_and_copies_keep_the_tie() -> None:
    model = adapted()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        trainable = [n for n, p in one.named_parameters(remove_duplicate=False) if p.requires_grad]
        assert len(trainable) == 2
        assert sum("mos_shared.default.pools" in key for key in one.state_dict()) == 2
        pool = only_pool(one)
        assert all(adapter.pool is pool for adapter in adapters(one))


def test_casting_the_model_leaves_indices_alone() -> None:
    model = adapted()
    before = [adapter.shard_map.clone() for adapter in adapters(model)]
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model.to(cast)
        for adapter, indices in zip(adapters(model), before, strict=True):
            assert torch.equal(adapter.shard_map, indices)
            assert adapter.shard_map.dtype == torch.uint8
    assert not any("shard_map" in name for name, _ in model.named_parameters())


def test_many_shards_need_wider_indices() -> None:
    pool, maps = maps_of(40, budget_rank=4, r=16, private_rank=0)
    chosen = config(budget_rank=4, r=16, private_rank=0)
    assert pool.draw(chosen, 0, "x").dtype == torch.int32
    assert maps.max() > 255


def test_type_names_and_widths_group_the_pools() -> None:
    """Types never share; GPT-2's two kinds of c_proj have different widths."""
    llama = peft.get_peft_model(small_llama(), config(r=3, target_modules="all-linear"))
    assert set(pools(llama)) == {
        "q_proj_32x32",
        "k_proj_32x16",
        "v_proj_32x16",
        "o_proj_32x32",
        "gate_proj_32x48",
        "up_proj_32x48",
        "down_proj_48x32",
    }
    gpt2 = peft.get_peft_model(small_gpt2(), config(r=3, target_modules="all-linear"))
    assert {"c_proj_32x32", "c_proj_128x32"} < set(pools(gpt2))
    mixed = adapted(Blocks((8, 8, 8, 4, 4, 4)), r=2)
    assert {name: len(pool.a) for name, pool in pools(mixed).items()} == {
        "proj_8x8": 2 * 2 * 2,
        "proj_8x4": 2 * 1 * 2,
        "proj_4x4": 2 * 2 * 2,
    }


def test_only_adapted_layers_count_as_blocks() -> None:
    options = {"layers_to_transform": [1, 3], "layers_pattern": "blocks"}
    model = adapted(r=3, **options)
    assert len(adapters(model)) == 2
    assert len(only_pool(model).a) == 2 * 2 * 2
    with pytest.raises(ConfigError, match=r"at most .* 2 = 3"):
        adapted(r=4, **options)


def test_without_sharing_every_layer_has_its_own_pool() -> None:
    model = adapted(sharing="none", r=2, private_rank=0)
    assert len(pools(model)) == 4
    assert len({id(adapter.pool) for adapter in adapters(model)}) == 4
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * 2 * WIDTH
    with pytest.raises(ConfigError, match=r"blocks\.0\.proj"):
        adapted(sharing="none", r=3, private_rank=0)


def test_budget_pattern_sets_one_types_size() -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "r": 3}
    model = peft.get_peft_model(small_llama(), config(budget_rank_pattern={"v_proj": 4}, **options))
    expected = 2 * 2 * (32 + 32) + 4 * 2 * (32 + 16)
    assert model.get_nb_trainable_parameters()[0] == expected
    with pytest.raises(ConfigError, match="v_proj"):
        peft.get_peft_model(small_llama(), config(budget_rank_pattern={"v_proj": 1}, **options))
    with pytest.raises(ConfigError, match="one budget"):
        adapted(budget_rank_pattern={"blocks.1.proj": 3})


def test_the_default_private_rank_leaves_a_budget_of_one_usable() -> None:
    one = adapted(budget_rank=1, private_rank=None, r=4)
    assert only_pool(one).num_private == 0
    assert only_pool(adapted(private_rank=None)).num_private == 2


def test_random_scaling_is_fixed_and_tells_layers_apart() -> None:
    pure = {"r": 8, "private_rank": 0, "shards": 1, "pair_dissociation": False}
    model = adapted(random_scaling=0.5, noise=0.0, **pure)
    assert torch.equal(model(inputs()), Blocks()(inputs()))
    perturb(model, 0.3)
    scales = [adapter.row_scale for adapter in adapters(model)]
    assert not torch.equal(scales[0], scales[1])
    assert not any("row_scale" in name for name, _ in model.named_parameters())
    updates = [adapter.delta_weight() for adapter in adapters(model)]
    assert not torch.allclose(updates[0], updates[1])
    plain = adapted(random_scaling=0.0, **pure)
    assert torch.equal(plain(inputs()), adapted(**pure)(inputs()))


# Files.


def test_compact_file_holds_pools_once_and_comes_back_bit_by_bit(tmp_path) -> None:
    """Oracle 6."""
    model = adapted(seed=9)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Blocks(), tmp_path)
    before, after = (peft.get_peft_model_state_dict(m) for m in (model, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    floats = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert floats == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_exported_lora_loads_in_stock_peft(make, tmp_path) -> None:
    """Oracle 6."""
    model = peft.get_peft_model(
        make(), config(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    perturb(model)
    export_lora(model, tmp_path / "lora")
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert (written["r"], written["lora_alpha"]) == (3, 16)
    lora = peft.PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    assert {type(m).__module__ for m in lora.modules() if hasattr(m, "lora_A")} == {
        "peft.tuners.lora.layer"
    }
    torch.testing.assert_close(
        lora(token_ids()).logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5
    )


def test_export_carries_fully_trained_modules_and_scaled_rows(tmp_path) -> None:
    model = adapted(modules_to_save=["head"], random_scaling=0.5, lora_alpha=3).eval()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").touch()
    export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out" / "stale").exists()
    lora = peft.PeftModel.from_pretrained(Blocks(), tmp_path / "out").eval()
    torch.testing.assert_close(lora(inputs()), model(inputs()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(lora(inputs()), Blocks()(inputs()))


def test_export_and_histogram_refuse_other_models(tmp_path) -> None:
    with pytest.raises(ConfigError, match="'other'"):
        export_lora(adapted(), tmp_path / "out", "other")
    lora = peft.get_peft_model(Blocks(), peft.LoraConfig(target_modules=["proj"]))
    with pytest.raises(ConfigError, match="none"):
        export_lora(lora, tmp_path / "out")
    with pytest.raises(ConfigError, match="none"):
        selection_histogram(lora)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3},
        {"shards": 4},
        {"private_rank": 0},
        {"private_rank": None},
        {"seed": 1},
        {"pair_dissociation": False},
        {"budget_rank": 3},
    ],
)
def test_loading_with_other_options_than_saved_is_refused(options, tmp_path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        peft.PeftModel.from_pretrained(Blocks(), tmp_path, config=config(**options))


def test_loading_on_other_layers_is_refused(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="proj_4x4"):
        peft.PeftModel.from_pretrained(Blocks((4,) * 5), tmp_path)
    with pytest.raises(CheckpointError):
        peft.PeftModel.from_pretrained(Blocks((WIDTH,) * 8), tmp_path)


# What cannot work is said so.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "MoSConfig.r"),
        ({"budget_rank": 0}, "MoSConfig.budget_rank"),
        ({"shards": 0}, "MoSConfig.shards"),
        ({"budget_rank_pattern": {"proj": 0}}, "MoSConfig.budget_rank_pattern"),
        ({"private_rank": -1}, "MoSConfig.private_rank"),
        ({"lora_alpha": 0}, "MoSConfig.lora_alpha"),
        ({"lora_dropout": 1.0}, "MoSConfig.lora_dropout"),
        ({"sharing": "all"}, "MoSConfig.sharing"),
        ({"random_scaling": -0.1}, "MoSConfig.random_scaling"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 3}, r"blocks\.0\.proj.*8 inputs"),
        ({"r": 6}, "at most .* = 5"),
        ({"private_rank": 2, "r": 4}, "r = 2"),
        ({"private_rank": 3, "r": 4}, "private_rank"),
        ({"private_rank": 2, "r": 1}, "private_rank"),
    ],
)
def test_options_that_do_not_suit_the_layers_are_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(**options)


def test_other_kinds_of_layer_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 8))
    with pytest.raises(ConfigError, match="Embedding"):
        peft.get_peft_model(model, config(target_modules=["0"]))


def test_config_names_its_tuner() -> None:
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config().peft_type] is MoSTuner
    assert {field.name for field in dataclasses.fields(MoSConfig)} >= {
        MoSConfig.size_option,
        MoSConfig.size_pattern_option,
    }
