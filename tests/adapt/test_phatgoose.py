"""PHATGOOSE: scores, weights and mixtures of experts, against a loop over tokens and experts."""

import copy
import math

import peft
import pytest
import torch
from conftest import perturb, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from sparing.adapt import PhatgooseConfig
from sparing.adapt._phatgoose_dispatch import Stack, dense, grouped, mixture, narrowed
from sparing.adapt._phatgoose_keys import arrow_key, mean_row_key
from sparing.adapt.phatgoose import PhatgooseAdapter
from sparing.errors import ConfigError

INPUTS, OUTPUTS = 12, 7


def layer(
    ranks: list[int] | None = None, *, inputs: int = INPUTS, seed: int = 0, **options: object
) -> PhatgooseAdapter:
    """Random experts with random keys on one layer, in float64."""
    ranks = [3, 2, 4, 3] if ranks is None else ranks
    config = PhatgooseConfig(
        experts=[f"e{z}" for z in range(len(ranks))],
        ranks={"layer": ranks},
        **({"key": "gate", "mode": "routed", "top_k": min(2, len(ranks))} | options),
    )
    adapter = PhatgooseAdapter(config, inputs, OUTPUTS, "layer").double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (adapter.a, adapter.b, adapter.keys):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        adapter.scales.copy_(0.5 + torch.rand(len(ranks), generator=generator))
    return adapter


def tokens(count: int = 9, inputs: int = INPUTS, seed: int = 1) -> Tensor:
    return torch.randn(
        count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def factors(adapter: PhatgooseAdapter, z: int) -> tuple[Tensor, Tensor]:
    """A (r, i) and B (o, r) of an expert, found without the code under test."""
    start = sum(adapter.ranks[:z])
    rows = slice(start, start + adapter.ranks[z])
    return adapter.a[rows], adapter.b[rows].t()


def expert_output(adapter: PhatgooseAdapter, z: int, u: Tensor) -> Tensor:
    a, b = factors(adapter, z)
    return adapter.scales[z] * (b @ (a @ u))


def by_the_book(adapter: PhatgooseAdapter, x: Tensor, k: int, eps: float = 1e-6) -> Tensor:
    """Eqs. 3 to 6, one token and one expert at a time."""
    outputs = []
    for u in x:
        scores = {}
        for z, rank in enumerate(adapter.ranks):
            if rank:
                u_hat = (u - u.mean()) / torch.sqrt(u.var(unbiased=False) + 1e-5)
                v = adapter.keys[z]
                v_hat = (v - v.mean()) / torch.sqrt(v.var(unbiased=False) + 1e-5)
                scores[z] = float(u_hat @ v_hat) / math.sqrt(len(u))
        total = sum(math.exp(s) for s in scores.values())
        p = {z: math.exp(s) / total for z, s in scores.items()}
        top = sorted(p, key=lambda z: -p[z])[:k]
        norm = sum(p[z] for z in top) + eps
        outputs.append(sum(p[z] / norm * expert_output(adapter, z, u) for z in top))
    return torch.stack(outputs)


# Routing (eqs. 3 to 6).


@given(
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any),
    k=st.integers(1, 6),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_routed_output_is_the_loop_over_tokens_and_experts(ranks, k, seed) -> None:
    """Oracles 4 and 10, with experts absent (rank 0) and of different ranks."""
    adapter = layer(ranks, seed=seed, top_k=min(k, len(ranks)))
    x = tokens(seed=seed + 1)
    found = adapter.delta(x)
    torch.testing.assert_close(found, by_the_book(adapter, x, k, eps=0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, by_the_book(adapter, x, k), rtol=1e-4, atol=1e-4)


@given(
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=9).filter(any),
    count=st.integers(1, 12),
    k=st.integers(1, 4),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_every_way_to_dispatch_is_the_naive_loop(ranks, count, k, seed) -> None:
    """Oracle 10."""
    adapter, x = layer(ranks, seed=seed), tokens(count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, len(ranks), generator=generator, dtype=torch.float64)
    dropped = torch.rand(weights.shape, generator=generator).argsort(dim=1)[:, k:]
    weights.scatter_(1, dropped, 0.0)
    naive = torch.stack(
        [
            sum(
                w[z] * (factors(adapter, z)[1] @ (factors(adapter, z)[0] @ u))
                for z in range(len(ranks))
            )
            for u, w in zip(x, weights, strict=True)
        ]
    )
    for way in (dense, grouped, narrowed):
        found = way(x, adapter.stack, weights)
        torch.testing.assert_close(found, naive, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", [dense, grouped, narrowed])
def test_every_way_to_dispatch_has_the_same_gradients(way) -> None:
    adapter, x = layer(), tokens().requires_grad_()
    weights = adapter.routing_weights(x) * adapter.scales
    found = torch.autograd.grad(way(x, adapter.stack, weights).square().sum(), x)[0]
    x2 = x.detach().requires_grad_()
    expected = torch.autograd.grad(by_the_book_differentiable(adapter, x2).square().sum(), x2)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def by_the_book_differentiable(adapter: PhatgooseAdapter, x: Tensor) -> Tensor:
    def norm(t: Tensor) -> Tensor:
        return nn.functional.layer_norm(t, t.shape[-1:], eps=1e-5)

    scores = norm(x) @ norm(adapter.keys).t() / math.sqrt(x.shape[-1])
    best = scores.topk(adapter.config.top_k)
    weights = torch.zeros_like(scores).scatter(1, best.indices, best.values.softmax(dim=1))
    outputs = torch.stack(
        [
            adapter.scales[z] * (x @ factors(adapter, z)[0].t() @ factors(adapter, z)[1].t())
            for z in range(len(adapter.ranks))
        ],
        dim=1,
    )
    return (weights[..., None] * outputs).sum(dim=1)


def test_the_way_follows_from_the_sizes_and_does_not_change_the_result() -> None:
    """Few tokens among many experts, many tokens among many, few experts: three ways."""
    from sparing.adapt import _phatgoose_dispatch as dispatch

    chosen = set()
    for count, experts in ((1, 200), (1200, 200), (3, 4)):
        rank, width = 8, 320
        a, b = torch.randn(experts * rank, width), torch.randn(experts * rank, width)
        owner = torch.arange(experts).repeat_interleave(rank)
        stack = Stack(a, b, owner, [rank] * experts)
        x = torch.randn(count, width)
        weights = torch.zeros(count, experts)
        weights.scatter_(1, torch.rand(count, experts).topk(2).indices, 0.5)
        chosen.add(dispatch._cheapest(x, stack, 2).__name__)
        expected = dense(x, stack, weights)
        torch.testing.assert_close(mixture(x, stack, weights, 2), expected, rtol=1e-4, atol=1e-3)
    assert chosen == {"narrowed", "grouped", "dense"}


@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_a_lone_expert_is_applied_in_full_whatever_its_key(seed: int, scale: float) -> None:
    """Oracle 1."""
    adapter, x = layer([3], seed=seed, top_k=1), tokens(seed=seed)
    adapter.keys.mul_(scale)
    assert torch.equal(adapter.routing_weights(x), torch.ones(len(x), 1, dtype=torch.float64))
    alone = torch.stack([expert_output(adapter, 0, u) for u in x])
    torch.testing.assert_close(adapter.delta(x), alone, rtol=0, atol=1e-12)


def test_all_experts_share_by_softmax_and_one_alone_gets_everything() -> None:
    """Oracle 3."""
    x = tokens()
    everyone = layer(top_k=4)
    torch.testing.assert_close(everyone.routing_weights(x), everyone.scores(x).softmax(dim=-1))
    weights = layer(top_k=1).routing_weights(x)
    assert torch.equal(weights.sum(dim=1), torch.ones(len(x), dtype=torch.float64))
    assert set(weights.flatten().tolist()) == {0.0, 1.0}


def test_weights_are_the_renormalised_probabilities_of_the_chosen() -> None:
    """Oracle 4."""
    adapter, x = layer(top_k=2), tokens()
    p = adapter.scores(x).softmax(dim=-1)
    top = p.topk(2)
    expected = torch.zeros_like(p).scatter(1, top.indices, top.values)
    expected = expected / (expected.sum(dim=1, keepdim=True) + 1e-6)
    torch.testing.assert_close(adapter.routing_weights(x), expected, rtol=0, atol=1e-5)


@given(a=st.floats(0.1, 50), b=st.floats(-5, 5), c=st.floats(0.1, 50), d=st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_scores_forget_scale_and_shift_of_token_and_gate(a, b, c, d) -> None:
    """Oracle 5, up to the eps of the norm; so the size of a gate does not matter."""
    adapter, x = layer(), tokens()
    before = adapter.scores(x)
    adapter.keys.mul_(c).add_(d)
    torch.testing.assert_close(adapter.scores(a * x + b), before, rtol=0, atol=2e-2)


def test_the_sigmoid_of_gate_training_does_see_the_size_of_a_gate() -> None:
    """Oracle 5, the other half: it is not what routes."""
    adapter, x = layer(), tokens()
    before, weights = adapter._gate(x), adapter.routing_weights(x)
    adapter.keys.mul_(10)
    assert not torch.allclose(adapter._gate(x), before, atol=0.1)
    torch.testing.assert_close(adapter.routing_weights(x), weights, rtol=0, atol=1e-4)


def test_scores_are_at_most_the_root_of_the_width_and_reach_it() -> None:
    """Oracle 6."""
    adapter = layer()
    x = torch.cat([1e3 * tokens(50), 1e3 * adapter.keys])
    adapter.keys.mul_(1e3)
    scores = adapter.scores(x)
    assert scores.abs().max() <= math.sqrt(INPUTS)
    torch.testing.assert_close(
        scores[-4:].diagonal(), torch.full((4,), math.sqrt(INPUTS), dtype=torch.float64)
    )


def test_saturated_scores_in_bfloat16_stay_finite_and_in_float32() -> None:
    """Oracle 6: at width 2,048 the best score is √2048 = 45, beyond e^11 = float16's largest."""
    adapter = layer(inputs=2048).float()
    x = adapter.keys.bfloat16()
    weights = adapter.routing_weights(x)
    assert weights.dtype == torch.float32
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights.diagonal(), torch.ones(4))
    torch.testing.assert_close(
        adapter.scores(x).diagonal(), torch.full((4,), 45.2548), rtol=1e-3, atol=0
    )


def test_an_expert_there_twice_counts_once() -> None:
    """Oracle 7: both copies win, with half the weight each."""
    once, twice = layer([3, 2]), layer([3, 3, 2])
    with torch.no_grad():
        for z, source in enumerate((0, 0, 1)):
            a, b = twice.stack.only(z)
            a.copy_(factors(once, source)[0])
            b.copy_(factors(once, source)[1].t())
            twice.keys[z] = once.keys[source]
            twice.scales[z] = once.scales[source]
    x = once.keys[:1].clone()
    alone = expert_output(once, 0, x[0])[None]
    torch.testing.assert_close(twice.delta(x), alone, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_order_of_experts_does_not_matter(seed: int) -> None:
    """Oracle 8."""
    adapter = layer([3, 3, 3, 3], seed=seed)
    shuffled = copy.deepcopy(adapter)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        shuffled.keys.copy_(adapter.keys[order])
        shuffled.scales.copy_(adapter.scales[order])
        for name in ("a", "b"):
            rows = getattr(adapter, name).view(4, 3, -1)[order]
            getattr(shuffled, name).copy_(rows.flatten(0, 1))
    x = tokens(seed=seed)
    torch.testing.assert_close(shuffled.delta(x), adapter.delta(x), rtol=0, atol=1e-12)


def test_a_gate_of_zeros_scores_0() -> None:
    """Oracle 9."""
    adapter = layer()
    adapter.keys[1].zero_()
    scores = adapter.scores(tokens())
    assert torch.isfinite(scores).all()
    assert scores[:, 1].abs().max() == 0


def test_one_more_expert_leaves_the_scores_of_the_others() -> None:
    """Oracle 14."""
    few, many = layer([3, 2, 4]), layer([3, 2, 4, 3])
    many.keys[:3] = few.keys
    x = tokens()
    torch.testing.assert_close(many.scores(x)[:, :3], few.scores(x), rtol=0, atol=1e-14)


def test_tokens_of_one_sequence_go_to_different_experts() -> None:
    adapter = layer(top_k=1)
    weights = adapter.routing_weights(adapter.keys[None])
    assert torch.equal(weights[0], torch.eye(4, dtype=torch.float64))


def test_an_absent_expert_never_takes_part() -> None:
    adapter = layer([0, 3, 2], top_k=3)
    adapter.keys[0] = 100 * tokens(1)[0]
    x = tokens(1).expand(5, -1)
    assert adapter.routing_weights(x)[:, 0].abs().max() == 0
    assert torch.isfinite(adapter.delta(x)).all()


# Variants.


def test_variants_of_the_score() -> None:
    x, root = tokens(), math.sqrt(INPUTS)
    v = layer().keys
    torch.testing.assert_close(layer(score="dot").scores(x), x @ v.t() / root)
    cosine = nn.functional.cosine_similarity(x[:, None], v[None], dim=-1)
    torch.testing.assert_close(layer(score="cosine").scores(x), cosine / root)
    arrow = layer(key="arrow", temperature=0.5)
    assert arrow.config.score == "arrow"
    torch.testing.assert_close(arrow.scores(x), (x @ v.t()).abs() / 0.5)


def test_top1_weighs_the_best_expert_by_its_probability_among_all() -> None:
    adapter, x = layer(router="top1"), tokens()
    p = adapter.scores(x).softmax(dim=-1)
    weights = adapter.routing_weights(x)
    torch.testing.assert_close(weights.sum(dim=1), p.max(dim=1).values)
    assert torch.equal(weights.argmax(dim=1), p.argmax(dim=1))
    assert int((weights > 0).sum(dim=1).max()) == 1


def test_the_input_gate_multiplies_each_expert() -> None:
    adapter, x = layer(use_input_gate=True), tokens()
    plain = layer().routing_weights(x)
    expected = plain * torch.sigmoid(x @ adapter.keys.t())
    torch.testing.assert_close(adapter.routing_weights(x), expected)


@given(rank=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_arrow_is_the_direction_that_the_expert_magnifies_most(rank: int, seed: int) -> None:
    a, b = tokens(rank, seed=seed).float(), tokens(OUTPUTS, rank, seed=seed + 1).float()
    key = arrow_key(a, b)
    product = b.double() @ a.double()
    torch.testing.assert_close(
        (product @ key.double()).norm(), torch.linalg.matrix_norm(product, 2), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(key.norm(), torch.tensor(1.0))
    assert key[key.abs().argmax()] > 0
    torch.testing.assert_close(arrow_key(-a, b), key, rtol=1e-4, atol=1e-5)


def test_keys_of_an_expert_that_does_nothing() -> None:
    a = tokens(2).float()
    assert torch.equal(arrow_key(a, torch.zeros(OUTPUTS, 2)), torch.zeros(INPUTS))
    torch.testing.assert_close(mean_row_key(a), (a[0] + a[1]) / 2)


# Gates (eq. 2).


def gated(seed: int = 0, **options: object) -> PhatgooseAdapter:
    adapter = layer([3], seed=seed, mode="gate_train", **options)
    with torch.no_grad():
        adapter.keys.zero_()
    return adapter


def test_a_new_gate_lets_half_of_the_expert_through_and_alone_learns() -> None:
    """Oracle 2."""
    adapter, x = gated(), tokens()
    half = torch.stack([0.5 * expert_output(adapter, 0, u) for u in x])
    found = adapter.delta(x)
    torch.testing.assert_close(found, half, rtol=0, atol=1e-12)
    assert [name for name, _ in adapter.named_parameters()] == ["keys"]
    found.square().sum().backward()
    assert adapter.keys.grad.abs().max() > 0
    assert not adapter.a.requires_grad
    assert not adapter.b.requires_grad


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_gating_the_output_is_gating_the_input(seed: int) -> None:
    """As LoRA has no bias; and the gate sees the raw token, not the standardised one."""
    adapter, x = gated(seed), tokens(seed=seed)
    v = tokens(1, seed=seed + 2)[0]
    with torch.no_grad():
        adapter.keys[0] = v
    expected = [expert_output(adapter, 0, torch.sigmoid(v @ u) * u) for u in x]
    torch.testing.assert_close(adapter.delta(x), torch.stack(expected), rtol=0, atol=1e-12)


def test_a_gate_learns_where_its_expert_helps_not_what_the_data_looks_like() -> None:
    """The reason for gates: useful and useless tokens share a style, which so cancels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = 24
    style, content, other = 2 * draw(width), draw(width), draw(width)
    adapter = layer([2], inputs=width, mode="gate_train")
    with torch.no_grad():
        adapter.keys.zero_()
        adapter.scales.fill_(1.0)
    optimizer = torch.optim.AdamW([adapter.keys], lr=5e-3, weight_decay=0.0)
    for _ in range(150):
        x = (
            style
            + torch.cat([content.expand(32, -1), other.expand(32, -1)])
            + 0.5 * draw(64, width)
        )
        with torch.no_grad():
            target = torch.stack([expert_output(adapter, 0, u) for u in x])
        target[32:] = 0.0
        loss = (adapter.delta(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter.config.mode = "routed"
    with torch.no_grad():
        helped, hindered, elsewhere = adapter.scores(
            torch.stack([style + content, style + other, draw(width) + content])
        )[:, 0]
    assert helped > hindered + 0.5
    assert elsewhere > hindered


def test_gate_noise_is_drawn_each_step_cools_down_and_is_off_in_evaluation() -> None:
    adapter, x = gated(gate_noise=True), tokens()
    noisy = adapter.train().delta(x)
    half = torch.stack([0.5 * expert_output(adapter, 0, u) for u in x])
    assert not torch.allclose(noisy, half)
    assert torch.equal(adapter.delta(x), noisy)  # a checkpointed block that runs again
    other = gated(gate_noise=True)
    other.config.seed = 1
    assert not torch.allclose(other.train().delta(x), noisy)
    adapter.cool(1, 100)
    later = adapter.delta(x)
    assert not torch.allclose(later, noisy)
    adapter.cool(0, 100)
    assert torch.equal(adapter.delta(x), noisy)
    torch.testing.assert_close(adapter.eval().delta(x), half, rtol=0, atol=1e-12)

    base = nn.ModuleDict({"proj": nn.Linear(INPUTS, OUTPUTS)})
    config = PhatgooseConfig(
        key="gate", mode="gate_train", gate_noise=True, target_modules=["proj"]
    )
    model = peft.get_peft_model(base, config)
    (mine,) = [m for m in model.modules() if isinstance(m, PhatgooseAdapter)]
    assert mine.gate_temperature == 10.0
    temperatures = []
    for step in (50, 100):
        model.base_model.after_step(step, 100, None)
        temperatures.append(mine.gate_temperature)
    assert temperatures == pytest.approx([math.sqrt(5), 0.5])


# Without routing.


def test_merged_is_the_mean_of_the_products_not_the_product_of_the_means() -> None:
    """Oracle 12."""
    adapter, x = layer([3, 3, 3], mode="merged"), tokens()
    mean = torch.stack([expert_output(adapter, z, x.t()) for z in range(3)]).mean(dim=0).t()
    torch.testing.assert_close(adapter.delta(x), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(x @ adapter.delta_weight().t(), mean, rtol=0, atol=1e-12)
    all_factors = [factors(adapter, z) for z in range(3)]
    mean_a = torch.stack([a for a, _ in all_factors]).mean(dim=0)
    mean_b = torch.stack([s * b for s, (_, b) in zip(adapter.scales, all_factors, strict=True)])
    assert not torch.allclose(mean_b.mean(dim=0) @ mean_a, adapter.delta_weight(), atol=0.1)


def test_merged_has_at_most_the_rank_of_all_experts_together() -> None:
    """Oracle 12."""
    adapter = layer([2, 1], mode="merged")
    assert int(torch.linalg.matrix_rank(adapter.delta_weight())) == 3


def test_an_expert_absent_from_a_module_counts_as_0_when_merged() -> None:
    adapter, x = layer([3, 0], mode="merged"), tokens()
    expected = torch.stack([expert_output(adapter, 0, u) / 2 for u in x])
    torch.testing.assert_close(adapter.delta(x), expected, rtol=0, atol=1e-12)
    adapter.config.mode, adapter.config.expert = "single", "e1"
    assert adapter.delta(x).abs().max() == 0


def test_a_routed_layer_has_no_weight_of_its_own() -> None:
    adapter = layer()
    assert not adapter.mergeable
    with pytest.raises(ConfigError, match="chosen for each token"):
        adapter.delta_weight()
    assert layer([3], top_k=1).mergeable
    assert not layer([3], top_k=1, use_input_gate=True).mergeable
    assert not gated().mergeable


# Step 1, and sizes.


def test_a_new_expert_is_a_lora_of_rank_16_scaled_by_one_sixteenth() -> None:
    """Eq. 1: A normal with deviation 0.01, B zero, alpha 1."""
    adapter = PhatgooseAdapter(PhatgooseConfig(), 400, OUTPUTS, "layer")
    assert adapter.a.shape == (16, 400)
    assert adapter.a.std().item() == pytest.approx(0.01, rel=0.05)
    assert adapter.b.abs().max() == 0
    assert adapter.scales.tolist() == [1 / 16]
    assert {name for name, _ in adapter.named_parameters()} == {"a", "b"}
    assert {"a", "b"} == set(adapter.state_dict())


def test_t5_xl_has_the_papers_numbers_of_parameters() -> None:
    """Oracle 13: 432 modules; 35,389,440 numbers of LoRA and 1,032,192 of gates an expert."""
    config = T5Config(
        d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", vocab_size=32128, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        base = T5ForConditionalGeneration(config)
    names = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    model = peft.get_peft_model(
        base, PhatgooseConfig(key="gate", mode="gate_train", target_modules=names)
    )
    adapters = [m for m in model.modules() if isinstance(m, PhatgooseAdapter)]
    assert len(adapters) == 432
    assert sum(m.a.numel() + m.b.numel() for m in adapters) == 35_389_440
    assert sum(m.keys.numel() for m in adapters) == 1_032_192
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 1_032_192


def test_stacked_experts_can_be_stored_in_16_bits() -> None:
    adapter = layer(expert_dtype="bfloat16")
    config = adapter.config
    small = PhatgooseAdapter(config, INPUTS, OUTPUTS, "layer")
    assert small.a.dtype == small.b.dtype == torch.bfloat16
    assert small.keys.dtype == small.scales.dtype == torch.float32
    assert small.delta(tokens().bfloat16()).dtype == torch.bfloat16
    assert small.delta(tokens().float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"r": 0}, "r"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"experts": []}, "experts"),
        ({"experts": ["x", "x"], "key": "gate"}, "experts"),
        ({"experts": ["x", "y"]}, "key"),
        ({"key": "colour"}, "key"),
        ({"mode": "routed"}, "key"),
        ({"key": "gate", "experts": ["x", "y"], "top_k": 3, "mode": "routed"}, "top_k"),
        ({"key": "gate", "experts": ["x", "y"], "top_k": 0, "mode": "routed"}, "top_k"),
        ({"key": "gate", "experts": ["x", "y"], "mode": "gate_train"}, "mode"),
        ({"key": "arrow", "experts": ["x", "y"], "use_input_gate": True}, "use_input_gate"),
        ({"score": "taste"}, "score"),
        ({"router": "hard"}, "router"),
        ({"temperature": 0.0}, "temperature"),
        ({"ranks": {"layer": [0]}}, "ranks"),
        ({"ranks": {"layer": [1, 2]}}, "ranks"),
        ({"expert": "nobody"}, "expert"),
        ({"expert_dtype": "int4"}, "expert_dtype"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options, option) -> None:
    with pytest.raises(ConfigError, match=rf"PhatgooseConfig\.{option}: expected"):
        PhatgooseConfig(**options)


def test_a_config_for_several_experts_starts_as_the_identity_and_trains_nothing() -> None:
    base, ids = small_llama(), token_ids()
    before = base(ids).logits
    config = PhatgooseConfig(
        experts=["x", "y", "z"], key="random", mode="routed", r=2, target_modules="all-linear"
    )
    model = peft.get_peft_model(base, config).eval()
    assert torch.equal(model(ids).logits, before)
    assert not any(p.requires_grad for p in model.parameters())
    perturb(model)  # finds nothing to perturb
    assert torch.equal(model(ids).logits, before)
