"""What is true of MADE-IT: subspaces, thresholds, evolution and routing, in memory."""

import copy
import json
import math
import statistics
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.linalg import subspace_angles
from torch import Tensor, nn

from sparing.errors import CheckpointError, ConfigError
from sparing.merge import MadeIt, Routing, set_routing
from sparing.merge.ledger import Adaptive, Ledger, ModuleLedger, Task
from sparing.merge.made_it import MadeItOptions
from sparing.merge.routed import routed_layers
from sparing.merge.subspaces import (
    Factors,
    Truncation,
    affinity,
    cosine,
    factorize,
    factorize_product,
    merged,
    null_affinity,
)
from sparing.routing import entropy

ALL = Truncation(rank=None, energy=1.0, router_rank=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def reading(basis: Tensor, seed: int, outputs: int = 20) -> Tensor:
    """A change (outputs, i) that reads only the span of `basis`, (r, i)."""
    return noise(outputs, len(basis), seed=seed) @ basis


def subspace(rank: int, inputs: int, seed: int) -> Tensor:
    """Orthonormal rows (rank, inputs)."""
    return torch.linalg.qr(noise(inputs, rank, seed=seed)).Q.mT


def with_basis(basis: Tensor) -> Factors:
    return Factors(torch.zeros(1, 3, dtype=basis.dtype), basis, len(basis))


def factors(delta: Tensor, cut: Truncation = ALL) -> Factors:
    found = factorize(delta, cut)
    assert found is not None
    return found


class Net(nn.Module):
    """Three linear layers of 12 -> 16 -> 16 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 16, bias=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


WHOLE: dict[str, Any] = {"rank": None, "energy": 1.0, "router_rank": 4}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def tuned(seed: int, scale: float = 0.1) -> Net:
    model = net()
    perturb(model, scale, seed=seed)
    return model


def bank(*seeds: int, **options: Any) -> MadeIt:
    found = MadeIt(net(), **{**WHOLE, **options})
    for seed in seeds:
        found.add(tuned(seed), f"t{seed}")
    return found


def inputs(rows: int = 6) -> Tensor:
    return noise(rows, 12, seed=99)


# Subspaces


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_affinity_is_the_mean_squared_cosine_of_principal_angles(p: int, q: int, seed: int) -> None:
    first, second = subspace(p, 12, seed), subspace(q, 12, seed + 1)
    found = affinity(with_basis(first), with_basis(second))
    angles = subspace_angles(first.mT.numpy(), second.mT.numpy())
    assert found == pytest.approx(float((torch.from_numpy(angles).cos() ** 2).mean()), abs=1e-9)
    assert -1e-12 <= found <= 1 + 1e-12
    assert affinity(with_basis(second), with_basis(first)) == pytest.approx(found)


def test_affinity_is_one_minus_the_projection_distance() -> None:
    first, second = subspace(4, 12, 0), subspace(4, 12, 1)
    distance = (first.mT @ first - second.mT @ second).square().sum() / 2
    found = affinity(with_basis(first), with_basis(second))
    assert found == pytest.approx(1 - float(distance) / 4)


def test_affinity_of_a_subspace_with_itself_and_with_its_complement() -> None:
    whole = subspace(8, 8, 0)
    rotation = subspace(4, 4, 1)
    assert affinity(with_basis(whole[:4]), with_basis(whole[:4])) == pytest.approx(1)
    assert affinity(with_basis(rotation @ whole[:4]), with_basis(whole[:4])) == pytest.approx(1)
    assert affinity(with_basis(whole[:4]), with_basis(whole[4:])) == pytest.approx(0)


def test_the_routing_basis_is_in_input_space() -> None:
    """Left singular vectors would tell nothing: here both tasks write the same outputs."""
    here, there = subspace(4, 12, 0), subspace(4, 12, 1)
    outputs = subspace(4, 20, 2).mT
    first, second = factors(outputs @ here), factors(outputs @ there)
    assert torch.allclose(first.basis.mT @ first.basis, here.mT @ here)
    assert affinity(first, second) < 0.8
    assert affinity(first, factors(noise(20, 4, seed=5) @ here)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("i", "r", "mean", "sd"), [(96, 16, 0.167, 0.012), (768, 64, 0.083, 0.002)]
)
def test_the_null_level_is_the_specification_s(i: int, r: int, mean: float, sd: float) -> None:
    found = null_affinity(i, r)
    assert found == pytest.approx((mean, sd), abs=5e-4)


def test_the_null_level_is_that_of_random_subspaces() -> None:
    values = [
        affinity(with_basis(subspace(4, 24, 2 * s)), with_basis(subspace(4, 24, 2 * s + 1)))
        for s in range(400)
    ]
    mean, sd = null_affinity(24, 4)
    assert abs(statistics.fmean(values) - mean) < 3 * sd / math.sqrt(400)
    assert statistics.pstdev(values) == pytest.approx(sd, rel=3 / math.sqrt(800))


def test_full_rank_factors_are_the_change() -> None:
    delta = noise(20, 12)
    assert torch.allclose(factors(delta).matrix(), delta)
    assert factorize(torch.zeros(3, 4), ALL) is None


def test_rank_is_the_least_with_the_energy_and_capped() -> None:
    left, right = subspace(6, 20, 0).mT, subspace(6, 12, 1)
    delta = left @ torch.diag(torch.tensor([4.0, 3, 2, 1, 1, 1]).double()) @ right  # energy 32
    for energy, rank in ((0.5, 1), (0.51, 2), (0.9, 3), (0.91, 4), (1.0, 6)):
        assert factors(delta, Truncation(None, energy, 2)).rank == rank
    assert factors(delta, Truncation(2, 0.9, 2)).rank == 2


def test_r_is_reduced_to_the_rank_of_the_change() -> None:
    found = factors(reading(subspace(3, 12, 0), 1), Truncation(2, 1.0, 8))
    assert (found.rank, found.router_rank, found.inputs.shape) == (2, 3, (3, 12))
    assert affinity(found, found) == pytest.approx(1)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_a_product_needs_no_dense_svd(m: int, seed: int) -> None:
    left, right = noise(20, m, seed=seed), noise(m, 12, seed=seed + 1)
    found = factorize_product(left, right, ALL)
    assert found is not None
    assert found.rank == m
    assert torch.allclose(found.matrix(), left @ right)
    dense = factors(left @ right)
    assert torch.allclose(found.basis.mT @ found.basis, dense.basis.mT @ dense.basis)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10_000))
def test_factored_merge_is_the_dense_mean_truncated(n: int, rank: int, seed: int) -> None:
    old, new = noise(20, 12, seed=seed), noise(20, 12, seed=seed + 1)
    cut = Truncation(rank, 1.0, 4)
    found = merged(factors(old), n, factors(new), cut)
    mean = (n * old + new) / (n + 1)
    expected = factors(mean, cut)
    assert torch.allclose(found.matrix(), expected.matrix(), rtol=1e-5, atol=1e-7)
    assert affinity(found, expected) == pytest.approx(1, abs=1e-6)


def test_merging_opposites_keeps_the_subspace() -> None:
    delta = reading(subspace(3, 12, 0), 1)
    found = merged(factors(delta), 1, factors(-delta), ALL)
    assert found.matrix().abs().max() < 1e-12
    assert affinity(found, factors(delta)) == pytest.approx(1)


def test_the_randomised_svd_finds_the_leading_subspace_and_is_seeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparing.merge import subspaces

    left, right = subspace(60, 60, 0), subspace(50, 50, 1)[:, :]
    values = torch.zeros(60, 50, dtype=torch.float64)
    values[range(50), range(50)] = 0.7 ** torch.arange(50).double()
    delta = left.mT @ values @ right
    exact = factors(delta, Truncation(6, 1.0, 4))
    monkeypatch.setattr(subspaces, "_LARGE", 32)
    found = factors(delta, Truncation(6, 1.0, 4))
    again = factors(delta, Truncation(6, 1.0, 4))
    assert torch.allclose(found.matrix(), exact.matrix(), atol=1e-4)
    assert affinity(found, exact) == pytest.approx(1, abs=1e-6)
    assert torch.equal(found.inputs, again.inputs)
    other = factors(delta, Truncation(6, 1.0, 4, seed=1))
    assert not torch.equal(found.inputs, other.inputs)


def test_the_cosine_ablation_is_that_of_the_flat_changes() -> None:
    first, second = noise(20, 12, seed=0), noise(20, 12, seed=1) + noise(20, 12, seed=0)
    expected = torch.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    assert cosine(factors(first), factors(second)) == pytest.approx(float(expected))
    assert cosine(factors(first), factors(-first)) == 0


# Threshold and evolution


def test_the_threshold_is_mean_plus_kappa_sd_clipped() -> None:
    rule = Adaptive(kappa=2.0, tau_min=0.2, tau_max=0.9)
    assert rule.threshold([]) == rule.threshold([0.8]) == 0.2
    assert rule.threshold([0.3, 0.5]) == pytest.approx(0.4 + 2 * 0.1)
    assert rule.threshold([0.01, 0.01]) == 0.2
    assert rule.threshold([0.8, 0.9]) == 0.9
    assert Adaptive(tau_min=0.7, tau_max=0.7).threshold([0.1, 0.9]) == 0.7


def test_one_pool_over_all_modules_and_the_order_of_modules_does_not_matter() -> None:
    names = ("a", "b", "c")
    values = {"a": 0.95, "b": 0.3, "c": 0.1}
    outcomes = []
    for order in permutations(names):
        ledger = Ledger({name: ModuleLedger(4, 4, False) for name in order})
        ledger.arrive(Task("x", "1"), {name: [] for name in order}, Adaptive())
        found = ledger.arrive(Task("y", "2"), {n: [values[n]] for n in order}, Adaptive(kappa=1))
        level = statistics.fmean(values.values()) + statistics.pstdev(values.values())
        for module in ledger.modules.values():
            assert module.arrivals[1].threshold == pytest.approx(level)
        outcomes.append(sorted(found.items()))
    assert outcomes == [[("a", 0), ("b", 1), ("c", 1)]] * 6


def test_a_pool_of_each_module_splits_everywhere_alike() -> None:
    """The pitfall: a module-wise threshold hides that one module has more in common."""
    rule = Adaptive(kappa=0.0, tau_min=0.0, tau_max=1.0, pool="module")
    ledger = Ledger({name: ModuleLedger(4, 4, False) for name in ("early", "late")})
    ledger.arrive(Task("x", "1"), {"early": [], "late": []}, rule)
    ledger.arrive(Task("y", "2"), {"early": [0.9], "late": [0.1]}, rule)
    found = ledger.arrive(Task("z", "3"), {"early": [0.8], "late": [0.02]}, rule)
    assert found == {"early": 1, "late": 1}
    common = Adaptive(kappa=0.0, tau_min=0.0, tau_max=1.0)
    ledger = Ledger({name: ModuleLedger(4, 4, False) for name in ("early", "late")})
    ledger.arrive(Task("x", "1"), {"early": [], "late": []}, common)
    found = ledger.arrive(Task("y", "2"), {"early": [0.8], "late": [0.02]}, common)
    assert found == {"early": 0, "late": 1}


def test_an_empty_bank_is_the_base() -> None:
    assert torch.equal(bank().module()(inputs()), net()(inputs()))


def test_one_arrival_at_full_rank_is_that_fine_tune() -> None:
    found = bank(1).module()(inputs())
    assert torch.allclose(found, tuned(1)(inputs()), atol=1e-5)


def test_always_merging_is_the_running_average() -> None:
    """τ = 0: one expert a module, as task arithmetic with λ = 1/n."""
    made = bank(1, 2, 3, tau_min=0.0, tau_max=0.0)
    assert all(layer.experts == 1 for layer in made.report().layers)
    mean = net()
    states = [tuned(seed).state_dict() for seed in (1, 2, 3)]
    mean.load_state_dict({n: sum(s[n] for s in states) / 3 for n in states[0]})
    assert torch.allclose(made.module()(inputs()), mean(inputs()), atol=1e-5)


def test_never_merging_is_one_expert_a_task() -> None:
    made = bank(1, 2, 3, tau_min=1.5, tau_max=1.5)
    assert [layer.members for layer in made.report().layers] == [(("t1",), ("t2",), ("t3",))] * 3


def test_the_same_weights_twice_change_nothing() -> None:
    for options in ({}, {"tau_min": 1.5, "tau_max": 1.5}):
        made = bank(1, 2, **options)
        before = made.module()(inputs())
        assert not made.add(tuned(1), "again")
        assert torch.equal(made.module()(inputs()), before)
        assert [len(layer.arrivals) for layer in made.report().layers] == [2, 2, 2]
        assert "again is t1 once more" in made.report().notes[-1]


def test_the_same_change_twice_joins_its_expert_and_leaves_it() -> None:
    """Without help from the digest: the mathematics alone."""
    model = tuned(1)
    almost = copy.deepcopy(model)
    almost.norm.bias.data += 1e-9
    made = bank()
    made.add(model)
    before = made.expert("first", 0).factors.matrix()
    assert made.add(almost)
    assert [layer.experts for layer in made.report().layers] == [1, 1, 1]
    assert torch.allclose(made.expert("first", 0).factors.matrix(), before, atol=1e-5)


def clusters() -> list[dict[str, Tensor]]:
    """Six state dicts of one layer in three clear clusters of input subspaces."""
    base = nn.Linear(24, 20).double().state_dict()
    spans = [subspace(24, 24, 3)[4 * c : 4 * c + 4] for c in range(3)]
    states = []
    for cluster, seed in ((0, 1), (1, 2), (2, 3), (0, 4), (1, 5), (0, 6)):
        weight = base["weight"] + reading(spans[cluster], seed)
        states.append({"weight": weight, "bias": base["bias"]})
    return [base, *states]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (3, 1, 5, 0, 2, 4)])
def test_clear_clusters_are_found_in_any_order(order: tuple[int, ...]) -> None:
    base, *states = clusters()

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 20).double()

    model = One()
    model.load_state_dict({f"layer.{n}": t for n, t in base.items()})
    made = MadeIt(model, rank=None, energy=1.0, router_rank=4, storage="float32")
    for number in order:
        made.add({f"layer.{n}": t for n, t in states[number].items()}, str(number))
    groups = made.report().layers[0].members
    assert sorted(sorted(group) for group in groups) == [["0", "3", "5"], ["1", "4"], ["2"]]
    for expert, group in enumerate(groups):
        mean = sum(states[int(n)]["weight"] - base["weight"] for n in group) / len(group)
        found = made.expert("layer", expert).factors.matrix().double()
        assert torch.allclose(found, mean, atol=1e-5)


def test_every_task_is_in_one_expert_of_every_module_and_counts_add_up() -> None:
    made = bank(1, 2, 3, 4, tau_min=0.3, tau_max=0.4)
    report = made.report()
    for layer in report.layers:
        assert sorted(sum(layer.members, ())) == ["t1", "t2", "t3", "t4"]
    assert report.experts == sum(layer.experts for layer in report.layers)
    stored = sum(
        sum(t.numel() for t in (e.inputs, e.outputs, e.biases) if t is not None)
        for _, e in routed_layers(made.module())
    )
    assert report.numbers == stored
    assert "4 tasks" in str(report)
    assert "second: " in str(report)


def test_no_change_in_a_module_is_no_expert_and_a_note() -> None:
    made, model = bank(), net()
    with torch.no_grad():
        model.first.weight.add_(0.1)
        model.head.bias.add_(1.0)
    made.add(model, "part")
    assert [layer.experts for layer in made.report().layers] == [1, 0, 0]
    assert "part leaves as they are 2 modules: second, head" in made.report().notes
    assert torch.allclose(made.module()(inputs()), model(inputs()), atol=1e-5)


def test_a_bias_without_its_weight_is_averaged_over_all_tasks() -> None:
    made, model = bank(), net()
    with torch.no_grad():
        model.head.bias.add_(1.0)
    made.add(model)
    made.add(tuned(2))
    found = made.module().state_dict()["head.bias"] - net().head.bias
    assert torch.allclose(found, torch.full((5,), 0.5, dtype=torch.float64), atol=1e-6)


def test_other_parameters_are_the_running_mean() -> None:
    made = bank(1, 2, 3)
    mean = sum(tuned(s).norm.weight for s in (1, 2, 3)) / 3
    assert torch.allclose(made.module().norm.weight, mean, atol=1e-6)
    assert torch.equal(made.module().first.weight, net().first.weight)


def test_a_reduced_r_is_noted() -> None:
    made = bank(1, router_rank=14)
    note = "t1 changes in 5 to 12 directions, which is r there, 2 modules: first, head"
    assert made.report().notes == (note,)


# Routing


def stack(rank: int = 4, tasks: int = 3, **options: Any) -> tuple[MadeIt, Any, Any]:
    """A bank of one layer with disjoint input subspaces; its routed copy and the layer's bank."""
    whole = subspace(rank * tasks, rank * tasks, 7)
    layer = nn.Sequential(nn.Linear(rank * tasks, 20)).double()
    made = MadeIt(layer, rank=None, energy=1.0, router_rank=rank, storage="float32", **options)
    for task in range(tasks):
        state = {n: t.clone() for n, t in layer.state_dict().items()}
        state["0.weight"] += reading(whole[rank * task : rank * (task + 1)], task)
        state["0.bias"] += task + 1
        made.add(state)
    model = made.module()
    return made, model, model[0].experts


def test_scores_of_a_complete_set_add_up_to_one() -> None:
    _, _, experts = stack()
    scores = experts.scores(noise(50, 12))
    assert torch.allclose(scores.sum(-1), torch.ones(50, dtype=scores.dtype), atol=1e-5)
    assert scores.max() <= 1 + 1e-6


def test_a_feature_in_an_expert_s_subspace_scores_one() -> None:
    made, _, experts = stack()
    for number in range(3):
        x = noise(5, 4, seed=number) @ made.expert("0", number).factors.basis.double()
        assert torch.allclose(experts.scores(x)[:, number], torch.ones(5).double(), atol=1e-5)


def test_weights_on_a_task_s_own_features_are_nearly_one_hot() -> None:
    """The pitfall: with little contrast the sum of experts is plain averaging."""
    made, _, experts = stack()
    x = noise(30, 4) @ made.expert("0", 1).factors.basis.double()
    weights = experts.router.weights(experts.scores(x), experts)
    assert entropy(weights).max() < 0.01 * math.log(3)
    experts.router.routing = Routing(temperature=1.0)
    assert entropy(experts.router.weights(experts.scores(x), experts)).min() > 0.7 * math.log(3)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_scaling_features_changes_no_routing(factor: float) -> None:
    _, _, experts = stack()
    x = noise(20, 12)
    assert torch.allclose(experts.scores(x), experts.scores(factor * x))


def test_scaling_a_change_scales_the_output_and_no_decision() -> None:
    def change(factor: float) -> tuple[list[Any], Tensor, Tensor]:
        made = MadeIt(net(), **WHOLE)
        for seed in (1, 2):
            base, state = net().state_dict(), tuned(seed).state_dict()
            made.add({n: base[n] + factor * (state[n] - base[n]) for n in base})
        model = made.module()
        x = inputs()
        layer: Any = model.first
        return made.report().layers[0].arrivals, layer.experts.scores(x), layer.experts(x)

    one, two = change(1.0), change(3.0)
    for first, second in zip(one[0], two[0], strict=True):
        assert first.expert == second.expert
        assert first.affinities == pytest.approx(second.affinities, abs=1e-6)
    assert torch.allclose(one[1], two[1], atol=1e-6)
    assert torch.allclose(3 * one[2], two[2], atol=1e-4)


def test_temperature_goes_from_one_hot_to_uniform() -> None:
    _, model, experts = stack()
    x = noise(20, 12)
    scores = experts.scores(x)
    for temperature in (1e-6, 0.05, 1.0, 1e9):
        set_routing(model, Routing(temperature=temperature))
        weights = experts.router.weights(scores, experts)
        assert torch.allclose(weights.sum(-1), torch.ones(20).to(weights))
        if temperature == 1e-6:
            assert torch.equal(weights.argmax(-1), scores.argmax(-1))
            assert torch.allclose(weights.amax(-1), torch.ones(20).to(weights))
        if temperature == 1e9:
            assert torch.allclose(weights, torch.full_like(weights, 1 / 3))


def test_the_output_is_the_base_plus_the_weighted_experts() -> None:
    """Equation 9, expert by expert, against the stacked computation."""
    made, model, experts = stack()
    x = noise(20, 12)
    weights = (experts.scores(x) / 0.05).softmax(-1)
    expected = made.base(x)
    for number in range(3):
        one = made.expert("0", number)
        assert one.bias is not None
        own = x @ one.factors.matrix().double().mT + one.bias.double()
        expected = expected + weights[:, number, None] * own
    assert torch.allclose(model(x), expected, atol=1e-8)


@pytest.mark.parametrize("top_k", [1, 2])
def test_grouped_by_expert_is_the_same_as_all_at_once(top_k: int) -> None:
    _, model, experts = stack()
    x = noise(2, 10, 12)
    set_routing(model, Routing(top_k=top_k))
    grouped = experts(x)
    weights = experts.router.weights(experts.scores(x), experts)
    assert ((weights > 0).sum(-1) == top_k).all()
    experts._grouped = None  # only with fewer than all experts
    set_routing(model, Routing(top_k=3))
    experts.router.weights = lambda scores, bank: weights
    assert torch.allclose(experts(x), grouped)


def test_rank_below_r_routes_by_r_and_computes_with_k() -> None:
    made = bank(1, 2, rank=2, router_rank=6)
    experts: Any = made.module().first.experts
    assert experts.inputs.shape == (12, 12)
    assert experts.outputs.shape == (4, 16)
    x = inputs()
    weights = (experts.scores(x) / 0.05).softmax(-1)
    expected = sum(
        weights[:, e, None]
        * (
            x @ made.expert("first", e).factors.matrix().double().mT
            + made.expert("first", e).bias.double()
        )  # type: ignore[union-attr]
        for e in range(2)
    )
    assert torch.allclose(experts(x), expected, atol=1e-8)


def test_features_that_nobody_claims_get_the_base() -> None:
    whole = subspace(16, 16, 7)
    layer = nn.Sequential(nn.Linear(16, 20)).double()
    made = MadeIt(layer, rank=None, energy=1.0, router_rank=4, ood="base")
    for task in range(2):
        state = {n: t.clone() for n, t in layer.state_dict().items()}
        state["0.weight"] += reading(whole[4 * task : 4 * task + 4], task)
        made.add(state)
    unknown, known = noise(5, 8) @ whole[8:], noise(5, 4) @ whole[:4]
    model = made.module()
    assert torch.allclose(model(unknown), layer(unknown))
    assert not torch.allclose(model(known), layer(known))
    set_routing(model, Routing())
    assert not torch.allclose(model(unknown + 0.01 * known), layer(unknown + 0.01 * known))


def test_a_direction_that_all_share_can_be_left_out_of_scores() -> None:
    """The pitfall: an outlier direction in every basis makes all scores nearly equal."""
    whole = subspace(9, 9, 7)
    shared, own = whole[:1], (whole[1:4], whole[4:7])
    layer = nn.Sequential(nn.Linear(9, 20)).double()
    made = MadeIt(layer, rank=None, energy=1.0, router_rank=4)
    for task, span in enumerate(own):
        state = {n: t.clone() for n, t in layer.state_dict().items()}
        state["0.weight"] += reading(torch.cat((shared, span)), task)
        made.add(state)
    model = made.module()
    experts: Any = model[0].experts
    x = 30 * shared + noise(8, 3) @ own[0]
    plain = experts.scores(x)
    assert (plain[:, 0] - plain[:, 1]).max() < 0.05
    set_routing(model, Routing(drop_common=0.9))
    scores = experts.scores(x)
    assert torch.allclose(scores[:, 0], torch.ones(8).double(), atol=1e-4)
    assert scores[:, 1].max() < 1e-4


def test_a_row_is_routed_as_one_without_its_padding() -> None:
    _, _, experts = stack(granularity="sample")
    x = noise(2, 6, 12)
    weights = experts.router.weights(experts.scores(x), experts)
    assert weights.shape == (2, 1, 3)
    assert torch.allclose(weights[:, 0], (experts.scores(x).mean(1) / 0.05).softmax(-1))
    from sparing.forward_pass import ForwardPass

    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    with experts.router.passes.during(ForwardPass(attention_mask=mask)):
        masked = experts.router.weights(experts.scores(x), experts)
    expected = (experts.scores(x)[1, :4].mean(0) / 0.05).softmax(-1)
    assert torch.allclose(masked[1, 0], expected)


def test_a_model_wide_choice_sums_the_scores_of_tasks_over_layers() -> None:
    made = bank(1, 2, tau_min=1.5, tau_max=1.5, granularity="model", temperature=0.1)
    model: Any = made.module()
    seen: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for name, experts in routed_layers(model):

        def spy(x: Tensor, bank: Any = experts, of: str = name) -> Tensor:
            scores[of] = type(bank).scores(bank, x)
            seen[of] = bank.router.weights(scores[of], bank)
            change = torch.zeros(())
            return change

        experts.forward = spy
    model(inputs())
    total = torch.zeros(6, 2, dtype=torch.float64)
    for number, name in enumerate(("first", "second", "head"), 1):
        total = total + scores[name]
        assert torch.allclose(seen[name], (total / number / 0.1).softmax(-1), atol=1e-6)


def test_routing_reads_conv1d_on_its_input_side(tmp_path: Path) -> None:
    base = small_gpt2()
    made = MadeIt(base, **WHOLE)
    assert made.ledger.modules["transformer.h.0.attn.c_attn"].inputs == 32
    assert made.ledger.modules["transformer.h.0.attn.c_attn"].outputs == 96
    model = small_gpt2()
    perturb(model, 0.05, seed=1)
    made.add(model)
    ids = token_ids()
    assert torch.allclose(made.module()(ids).logits, model(ids).logits, atol=1e-5)


# Files and bad input


def test_a_saved_bank_is_bit_identical_and_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    straight = bank(1, 2, 3, rank=6, energy=0.8)
    stopped = bank(1, 2, rank=6, energy=0.8)
    stopped.save(tmp_path / "bank")
    again = MadeIt.load(tmp_path / "bank", net())
    assert torch.equal(again.module()(inputs()), stopped.module()(inputs()))
    again.add(tuned(3), "t3")
    assert again.ledger == straight.ledger
    assert torch.equal(again.module()(inputs()), straight.module()(inputs()))


def test_without_the_pool_the_next_decision_would_differ() -> None:
    rule = Adaptive(kappa=1.5, tau_min=0.1, tau_max=0.98)
    ledger = Ledger({"a": ModuleLedger(4, 4, False)})
    for number, values in enumerate(([], [0.05], [0.05, 0.06])):
        ledger.arrive(Task(str(number), str(number)), {"a": values}, rule)
    forgetful = copy.deepcopy(ledger)
    forgetful.modules["a"].arrivals = []
    coming = {"a": [0.11, 0.15, 0.5]}
    assert ledger.arrive(Task("x", "x"), coming, rule) == {"a": 2}
    assert forgetful.arrive(Task("x", "x"), coming, rule) == {"a": 3}


def test_a_file_can_arrive(tmp_path: Path) -> None:
    state = tuned(1).state_dict()
    save_file(state, tmp_path / "one.safetensors")
    made = bank()
    made.add(tmp_path / "one.safetensors")
    assert torch.equal(made.module()(inputs()), bank(1).module()(inputs()))


def test_a_bank_of_another_base_is_refused(tmp_path: Path) -> None:
    bank(1).save(tmp_path / "bank")
    with pytest.raises(CheckpointError, match="a bank of this base"):
        MadeIt.load(tmp_path / "bank", tuned(5))


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    bank(1).save(tmp_path / "bank")
    content = json.loads((tmp_path / "bank" / "bank.json").read_text())
    content["version"] = 99
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"bank\.json.*version 99"):
        MadeIt.load(tmp_path / "bank", net())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("first.weight"), r"tensor 'first.weight' of bad: .* found none"),
        (lambda s: s.update(more=torch.ones(1)), r"tensor 'more' of bad"),
        (lambda s: s.update({"head.bias": torch.ones(6)}), r"shape \(5,\), found shape \(6,\)"),
        (lambda s: s["norm.bias"].fill_(math.nan), r"'norm.bias' of bad: .* NaN"),
        (lambda s: s["first.weight"].fill_(math.inf), r"'first.weight' of bad"),
    ],
)
def test_what_is_no_fine_tune_is_refused_by_name(change: Any, words: str) -> None:
    state = {name: tensor.clone() for name, tensor in tuned(1).state_dict().items()}
    change(state)
    made = bank(2)
    before = copy.deepcopy(made.ledger)
    with pytest.raises(CheckpointError, match=words):
        made.add(state, "bad")
    assert made.ledger == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "'rank'"),
        ({"energy": 0.0}, "'energy'"),
        ({"router_rank": 0}, "'router_rank'"),
        ({"tau_min": 0.99}, "'tau_max'.*set both"),
        ({"pool": "layer"}, "'pool'"),
        ({"affinity": "left"}, "'affinity'"),
        ({"temperature": 0}, "'temperature'"),
        ({"top_k": 0}, "'top_k'"),
        ({"granularity": "word"}, "'granularity'"),
        ({"ood": "raise"}, "'ood'"),
        ({"drop_common": 2.0}, "'drop_common'"),
        ({"storage": "int8"}, "'storage'"),
        ({"target_modules": []}, "'target_modules'"),
        ({"rnk": 3}, "Did you mean rank"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MadeIt(net(), **options)


def test_affinity_by_cosine_compares_the_changes() -> None:
    """Same input subspace, unrelated outputs: merged by projection, kept apart by cosine."""
    span = subspace(4, 24, 3)
    layer = nn.Sequential(nn.Linear(24, 40)).double()
    counts = {}
    for kind in ("projection", "cosine"):
        made = MadeIt(layer, rank=None, energy=1.0, router_rank=4, affinity=kind)
        for seed in (1, 2):
            state = {n: t.clone() for n, t in layer.state_dict().items()}
            state["0.weight"] += reading(span, seed, outputs=40)
            made.add(state)
        counts[kind] = made.report().experts
    assert counts == {"projection": 1, "cosine": 2}


def test_layers_can_be_chosen_by_name() -> None:
    made = MadeIt(net(), target_modules=["first", "s*d"])
    assert list(made.ledger.modules) == ["first", "second"]
    with pytest.raises(ConfigError, match="The model has first, second, head"):
        MadeIt(net(), target_modules=["q_proj"])
    assert len(MadeIt(small_llama()).ledger.modules) == 14  # not the output embedding


def test_granularity_is_by_token_for_models_that_generate() -> None:
    options = MadeItOptions()
    assert options.routing(generates=True).granularity == "token"
    assert options.routing(generates=False).granularity == "sample"
