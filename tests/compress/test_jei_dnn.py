"""JEI-DNN: exits follow the gates, levels do not touch each other, and rows really leave."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sparing.compress.jei_dnn import EarlyExitNetwork, attach, load_addon
from sparing.compress.jei_gates import (
    ConfidenceThresholds,
    Heads,
    LearnedGates,
    exit_probabilities,
    gate_features,
    simulate,
)
from sparing.compress.jei_objective import (
    best_exits,
    class_weights,
    classifier_loss,
    cross_entropies,
    expected_loss,
    gate_loss,
    gate_targets,
    hard_probabilities,
    warm_up_loss,
)
from sparing.compress.jei_report import evaluate, measure, serve_bench, write_curve
from sparing.compress.jei_thresholds import geometric_shares, threshold_sweep, thresholds_for
from sparing.compress.jei_training import JEIOptions, cached_features, fit, fit_path
from sparing.compress.jei_uncertainty import (
    Conformal,
    calibration_error,
    conformal_level,
    conformal_quantile,
    risk_coverage_area,
)
from sparing.errors import CheckpointError, ConfigError, DataError

CLASSES = 3


def vit(depth: int = 4) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    return ViTForImageClassification(config).eval()


def images(rows: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labelled(rows: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = images(rows, seed)
    return x, vit()(x).logits.argmax(-1)


def text(rows: int = 12) -> dict[str, Tensor]:
    """Rows of several lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (rows, 10), generator=generator)
    lengths = torch.randint(3, 11, (rows, 1), generator=generator)
    mask = (torch.arange(10) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=64,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).eval()


def _llama(kind: type[Any], **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        pad_token_id=0,
        initializer_range=0.3,
        **more,
    )
    return kind(config).eval()


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config).eval()


def _networks() -> dict[str, tuple[EarlyExitNetwork, Any]]:
    pictures = images(12)
    larger = F.interpolate(pictures, size=32)
    resnet_blocks = [f"resnet.encoder.stages.{number}" for number in range(4)]
    classifier = _llama(LlamaForSequenceClassification, num_labels=CLASSES)
    return {
        "vit": (attach(vit(), pictures), pictures),
        "vit-mean": (attach(vit(), pictures, pool="mean", exits=[0, 2]), pictures),
        "bert": (attach(_bert(), text(), norm=None), text()),
        "llama": (attach(classifier, text(), pool="last"), text()),
        "next-token": (attach(_llama(LlamaForCausalLM), text(), pool="last"), text()),
        "resnet": (attach(_resnet(), larger, norm=None, blocks=resnet_blocks), larger),
    }


@pytest.fixture(params=["vit", "vit-mean", "bert", "llama", "next-token", "resnet"])
def network_and_inputs(request: pytest.FixtureRequest) -> tuple[EarlyExitNetwork, Any]:
    network, inputs = _networks()[request.param]
    spread(network, inputs)
    return network, inputs


def spread(network: EarlyExitNetwork, inputs: Any) -> None:
    """Gates that send a row away where its confidence is above the exit's median."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for classifier in network.heads.classifiers:
            classifier.weight.normal_(std=0.7, generator=generator)
        confidence = network.all_logits(inputs).softmax(-1).amax(-1).quantile(0.5, dim=1)
        for gate, middle in zip(network.heads.gates, confidence, strict=False):
            gate.weight.copy_(torch.tensor([[40.0, 0.0, 0.0, 0.0]]))
            gate.bias.fill_(-40 * float(middle))


def set_gates(network: EarlyExitNetwork, biases: list[float]) -> None:
    with torch.no_grad():
        for gate, bias in zip(network.heads.gates, biases, strict=True):
            gate.weight.zero_()
            gate.bias.fill_(bias)


def part(inputs: Any, row: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[row : row + 1]
    return {name: value[row : row + 1] for name, value in inputs.items()}


gates_of_a_row = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8)


# Exit probabilities


@given(gates_of_a_row)
def test_probabilities_sum_to_one_and_factor_into_conditionals(values: list[float]) -> None:
    gates = torch.tensor(values)[:, None]
    P, c = exit_probabilities(gates)
    assert (P >= 0).all()
    torch.testing.assert_close(P.sum(0), torch.ones(1))
    assert ((c >= 0) & (c <= 1)).all()
    stay = torch.ones(1)
    for exit in range(len(values)):
        torch.testing.assert_close(stay * c[exit], P[exit], atol=1e-6, rtol=1e-5)
        stay = stay * (1 - c[exit])
    budget = 1 - torch.cat([torch.zeros(1, 1), gates.cumsum(0)[:-1]])
    torch.testing.assert_close(P[:-1], torch.minimum(gates, budget).clamp_min(0))


def test_probabilities_of_the_golden_gates() -> None:
    P, c = exit_probabilities(torch.tensor([0.2, 0.3, 0.6, 0.9])[:, None])
    torch.testing.assert_close(P[:, 0], torch.tensor([0.2, 0.3, 0.5, 0.0, 0.0]))
    torch.testing.assert_close(c[:3, 0], torch.tensor([0.2, 0.375, 1.0]))
    P, _ = exit_probabilities(torch.full((4, 1), 0.1))
    torch.testing.assert_close(P[-1, 0], torch.tensor(0.6))


def gates_at(values: list[float]) -> LearnedGates:
    heads = Heads([2] * len(values), CLASSES)
    with torch.no_grad():
        for gate, value in zip(heads.gates, values, strict=True):
            gate.weight.zero_()
            gate.bias.fill_(math.log(value / (1 - value)))
    return LearnedGates(heads)


@pytest.mark.parametrize(
    ("gates", "exit"), [([0.2, 0.3, 0.6, 0.9], 2), ([0.4, 0.35, 0.1], 1), ([0.1] * 4, 4)]
)
def test_rows_leave_by_the_conditional_probability_not_by_the_gate(
    gates: list[float], exit: int
) -> None:
    logits = torch.randn(len(gates) + 1, 5, CLASSES)
    assert simulate(logits, gates_at(gates)).tolist() == [exit] * 5


def test_sampled_exits_follow_the_probabilities() -> None:
    gates, rows = [0.2, 0.3, 0.4], 20_000
    policy = LearnedGates(gates_at(gates).heads, generator=torch.Generator().manual_seed(0))
    exits = simulate(torch.randn(1, 1, CLASSES).expand(4, rows, CLASSES), policy)
    P, _ = exit_probabilities(torch.tensor(gates)[:, None])
    shares = torch.bincount(exits, minlength=4) / rows
    assert (shares - P[:, 0]).abs().max() < 4 * math.sqrt(0.25 / rows)


# Features of gates


def test_features_of_a_certain_and_of_an_even_prediction() -> None:
    certain = gate_features(
        torch.tensor([[1e4, 0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf, -1e9]])
    )
    torch.testing.assert_close(certain, torch.tensor([[1.0, 0.0, 1.0, 0.0]]).expand(2, 4))
    even = gate_features(torch.zeros(1, 4, dtype=torch.bfloat16))
    expected = torch.tensor([[0.25, math.log(4), 0.0, math.log(4)]])
    torch.testing.assert_close(even, expected)


@given(st.lists(st.floats(-6, 6), min_size=2, max_size=6))
def test_features_are_those_of_their_definition(values: list[float]) -> None:
    q = torch.tensor(values, dtype=torch.float64).softmax(-1)
    squares = q**2 / (q**2).sum()
    first, second = q.sort(descending=True).values[:2]
    expected = torch.stack(
        [first, -(q * q.log()).sum(), first - second, -(squares * squares.log()).sum()]
    )
    torch.testing.assert_close(gate_features(torch.tensor(values, dtype=torch.float64)), expected)


# The two levels


def random_logits(exits: int = 4, rows: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(exits + 1, rows, CLASSES, generator=generator)
    return logits, torch.randint(0, CLASSES, (rows,), generator=generator)


def test_free_compute_targets_the_least_loss_and_dear_compute_the_first_exit() -> None:
    logits, labels = random_logits()
    costs = torch.linspace(0.2, 1, 5)
    assert torch.equal(
        best_exits(logits, labels, costs, 0.0), cross_entropies(logits, labels).argmin(0)
    )
    assert (best_exits(logits, labels, costs, 1e6) == 0).all()
    assert (best_exits(logits[:1].expand(5, -1, -1), labels, costs, 0.0) == 0).all()  # ties


@given(st.integers(0, 1000), st.floats(0, 5), st.floats(0, 5))
def test_a_higher_price_never_raises_the_cost_of_targets(seed: int, a: float, b: float) -> None:
    logits, labels = random_logits(seed=seed)
    costs = torch.linspace(0.2, 1, 5)
    cheap, dear = (costs[best_exits(logits, labels, costs, lam)].mean() for lam in sorted((a, b)))
    assert dear <= cheap + 1e-6


@pytest.mark.parametrize("kind", ["error", "probability"])
def test_other_targets_by_hand(kind: Any) -> None:
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]], [[0.0, 3.0]]])  # wrong, right, surer
    costs = torch.tensor([0.1, 0.5, 1.0])
    expected = {"error": 1, "probability": 2}[kind]
    assert best_exits(logits, torch.tensor([1]), costs, 0.1, kind).item() == expected
    assert best_exits(logits, torch.tensor([1]), costs, 10.0, kind).item() == 0


def test_targets_stay_one_once_they_are() -> None:
    targets = gate_targets(torch.tensor([0, 2, 4]), 4)
    assert targets.T.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_gate_loss_weighs_positives_only() -> None:
    scores, targets = torch.tensor([[0.3, -1.0]]), torch.tensor([[1.0, 0.0]])
    plain = -F.logsigmoid(torch.tensor([0.3, 1.0]))
    expected = (3 * plain[0] + plain[1]) / 2
    torch.testing.assert_close(gate_loss(scores, targets, torch.tensor([3.0])), expected)


def test_class_weights_balance_shares() -> None:
    best = torch.tensor([0, 0, 2, 2])
    assert class_weights(best, 2, "share").tolist() == [1, 5]
    assert class_weights(best, 3, "cumulative").tolist() == pytest.approx([1, 1, 0.2])
    assert class_weights(best, 2, "none").tolist() == [1, 1]


def test_one_hot_probabilities_train_one_classifier() -> None:
    logits, labels = random_logits()
    P = F.one_hot(torch.full((40,), 2), 5).T.float()
    expected = F.cross_entropy(logits[2], labels)
    torch.testing.assert_close(classifier_loss(logits[:-1], labels, P), expected)


def _gradients(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of the loss, of the unweighted sum, and of the sum weighted by P."""
    logits, labels = random_logits()
    P, _ = exit_probabilities(torch.rand(4, 40, generator=torch.Generator().manual_seed(1)))
    results = []
    for loss in (
        lambda a: classifier_loss(a, labels, P, **options),
        lambda a: cross_entropies(a, labels).sum(0).mean(),
        lambda a: (P[:-1] * cross_entropies(a, labels)).sum(0).mean(),
    ):
        leaf = logits[:-1].clone().requires_grad_()
        results.append(torch.autograd.grad(loss(leaf), leaf)[0])
    return results[0], results[1], results[2]


def test_classifiers_learn_from_the_samples_that_leave_with_them() -> None:
    ours, unweighted, weighted = _gradients()
    torch.testing.assert_close(ours, weighted)
    assert not torch.allclose(ours, unweighted, rtol=0.1)


def test_the_released_rescaling_undoes_the_weights() -> None:
    released, unweighted, _ = _gradients(rescale="released")
    torch.testing.assert_close(released, unweighted, atol=1e-6, rtol=1e-4)


def test_single_trains_only_the_exit_that_inference_takes() -> None:
    gates = torch.tensor([[0.4, 0.1, 0.9], [0.35, 0.1, 0.9]])
    P, _ = exit_probabilities(gates)
    assert hard_probabilities(P[:-1]).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_early_classifiers_weigh_more_in_the_warm_up() -> None:
    ce = torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 5.0]])
    assert warm_up_loss(ce, torch.tensor([True, True, False])).item() == 4 * 2 + 3 * 2


def test_expected_loss_of_certain_exits_is_their_loss_and_price() -> None:
    P = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    ce, costs = torch.tensor([[1.0, 9.0], [9.0, 2.0]]), torch.tensor([0.5, 1.0])
    assert expected_loss(P, ce, costs, 2.0).item() == pytest.approx(((1 + 1) + (2 + 2)) / 2)


def _train(network: EarlyExitNetwork, **options: Any) -> Any:
    settings = {"epochs": 2, "warmup_epochs": 1, "period": 1, "batch_size": 32} | options
    x, y = labelled()
    return fit(network, [(x, y)], [(x, y)], lam=0.2, options=JEIOptions(**settings))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_changes_heads_and_never_the_backbone(optimizer: str) -> None:
    network = attach(vit(), images())
    model = copy.deepcopy(network.model.state_dict())
    heads = copy.deepcopy(network.heads.state_dict())
    _train(network, optimizer=optimizer)
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, model[name])
    for name, tensor in network.heads.state_dict().items():
        assert not torch.equal(tensor, heads[name]), name
    assert all(parameter.grad is None for parameter in network.model.parameters())


def test_a_resting_level_is_not_moved_by_decay_or_momentum() -> None:
    network = attach(vit(), images())
    heads = copy.deepcopy(network.heads.state_dict())
    _train(network, warmup_epochs=0, joint=False, weight_decay=0.1)
    for name, tensor in network.heads.state_dict().items():
        assert torch.equal(tensor, heads[name]) == name.startswith("classifiers"), name


def test_levels_have_no_gradient_to_each_other() -> None:
    heads = Heads([6, 6], CLASSES)
    pooled = list(torch.randn(2, 8, 6))
    logits = heads.classify(pooled)
    gate_loss(heads.scores(logits), torch.ones(2, 8), torch.ones(2)).backward()
    assert all(p.grad is None for p in heads.classifiers.parameters())
    assert all(p.grad is not None for p in heads.gates.parameters())
    heads.zero_grad()
    logits = heads.classify(pooled)
    P, _ = exit_probabilities(heads.scores(logits).sigmoid())
    classifier_loss(logits, torch.zeros(8, dtype=torch.int64), P).backward()
    assert all(p.grad is None for p in heads.gates.parameters())


def test_training_lowers_the_loss_and_repeats_itself() -> None:
    results = []
    for _ in range(2):
        network = attach(vit(), images())
        results.append(_train(network, epochs=12, optimizer="adamw", lr=0.02))
    history = results[0].history
    assert history[-1]["gate loss"] < history[0]["gate loss"]
    assert history[-1]["classifier loss"] < history[0]["classifier loss"]
    for name, tensor in results[0].heads.items():
        assert torch.equal(tensor, results[1].heads[name])


def test_a_path_of_prices_starts_from_one_warm_up() -> None:
    data = [labelled()]
    options = JEIOptions(epochs=8, warmup_epochs=1, period=2, optimizer="adamw", batch_size=32)
    network = attach(vit(), images())
    alone = fit(attach(vit(), images()), data, data, lam=3.0, options=options)
    path = fit_path(network, data, data, lams=[0.0, 3.0], options=options)
    for name, tensor in path[1].heads.items():
        assert torch.equal(tensor, alone.heads[name])
    costs = []
    for fitted in path:
        fitted.install(network)
        costs.append(evaluate(network, data).cost)
    assert costs[1] < costs[0]


def test_features_without_a_cache_give_the_same_network() -> None:
    x, y = labelled()
    batches = [(x[:48], y[:48]), (x[48:], y[48:])]
    results = []
    for data, cache in ((batches, False), ([(x, y)], False)):
        options = JEIOptions(epochs=1, warmup_epochs=1, cache=cache)
        results.append(fit(attach(vit(), x), data, lam=0.2, options=options))
    assert all(result.conformal is None for result in results)
    mapped = [{"pixel_values": x, "labels": y}]
    again = fit(attach(vit(), x), mapped, lam=0.2, options=JEIOptions(1, 1, cache=False))
    for name, tensor in results[1].heads.items():
        assert torch.equal(tensor, again.heads[name])


# Inference that stops


def test_rows_that_leave_get_the_logits_of_their_exit(
    network_and_inputs: tuple[EarlyExitNetwork, Any],
) -> None:
    network, inputs = network_and_inputs
    batched = network.predict(inputs)
    everything = network.all_logits(inputs)
    simulated = simulate(everything, LearnedGates(network.heads))
    assert len(simulated.unique()) > 1
    assert torch.equal(batched.exit, simulated)
    rows = torch.arange(len(simulated))
    torch.testing.assert_close(batched.logits, everything[simulated, rows], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batched.cost, network.costs[simulated])
    for row in range(len(simulated)):
        alone = network.predict(part(inputs, row))
        assert alone.exit.item() == simulated[row]
        torch.testing.assert_close(alone.logits[0], batched.logits[row], atol=1e-5, rtol=1e-4)


def test_shut_gates_leave_the_backbone_bit_by_bit(
    network_and_inputs: tuple[EarlyExitNetwork, Any],
) -> None:
    network, inputs = network_and_inputs
    set_gates(network, [-1e4] * network.exits)
    output = network.predict(inputs)
    assert (output.exit == network.exits).all()
    assert torch.equal(output.logits, network.backbone.call(inputs))


def _rows_computed(network: EarlyExitNetwork, inputs: Any) -> list[int]:
    counts: list[int] = []
    handles = [
        network.model.get_submodule(name).register_forward_hook(
            lambda module, args, output: counts.append(
                len(output if isinstance(output, Tensor) else output[0])
            )
        )
        for name in network.backbone.blocks
    ]
    network.predict(inputs)
    for handle in handles:
        handle.remove()
    return counts


def test_no_block_runs_after_everyone_left() -> None:
    network = attach(vit(), images())
    set_gates(network, [1e4, 0.0, 0.0])
    assert (network.predict(images()).exit == 0).all()
    assert _rows_computed(network, images()) == [24]


def test_blocks_compute_only_the_rows_that_stay() -> None:
    network = attach(vit(), images())
    spread(network, images())
    exits = network.predict(images()).exit
    staying = [24] + [int((exits > exit).sum()) for exit in range(3)]
    counts = _rows_computed(network, images())
    for computed, needed, before in zip(counts, staying, [24, *counts], strict=False):
        gathered = needed <= 0.9 * before
        assert computed == (needed if gathered else before)
    assert counts[-1] < 24


def test_hooks_are_gone_after_an_error() -> None:
    network = attach(vit(), images())
    with pytest.raises(ValueError, match="size"):
        network.predict(torch.randn(2, 3, 12, 12))
    assert all(not module._forward_hooks for module in network.model.modules())


# Cost


def test_costs_count_the_heads_passed() -> None:
    network = attach(vit(), images(2))
    D, T, hidden, heads = 16, 5, 32, 16 * CLASSES + 9 * CLASSES + 6
    stem = 4 * 3 * 4 * 4 * D
    block = T * (4 * D * D + 2 * D * hidden) + 2 * T * T * D
    counts = [stem + (n + 1) * (block + heads) for n in range(3)]
    final = stem + 4 * block + D * CLASSES + 3 * heads
    torch.testing.assert_close(network.costs, torch.tensor([*counts, final]) / final)
    assert (network.costs.diff() > 0).all()
    assert network.costs[-1] == 1


@pytest.mark.parametrize(
    ("width", "exits", "classes", "classifiers"),
    [(256, 6, 10, 15_420), (256, 6, 100, 154_200), (384, 13, 100, 500_500)],
)
def test_heads_have_as_many_parameters_as_the_paper_says(
    width: int, exits: int, classes: int, classifiers: int
) -> None:
    heads = Heads([width] * exits, classes)
    assert sum(p.numel() for p in heads.classifiers.parameters()) == classifiers
    assert sum(p.numel() for p in heads.gates.parameters()) == 5 * exits


# Uncertainty


def test_calibration_error_by_hand() -> None:
    probabilities = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    labels = torch.tensor([0, 1, 0, 0])
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx(0.1)
    assert calibration_error(torch.eye(2), torch.tensor([0, 1])) == 0


def test_risk_ranking_is_best_when_errors_are_least_confident() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    assert risk_coverage_area(probabilities, torch.tensor([0, 0, 1])) == pytest.approx(1 / 9)
    assert risk_coverage_area(probabilities, torch.tensor([1, 0, 0])) == pytest.approx(11 / 18)


@given(st.integers(1, 300), st.sampled_from([0.01, 0.015, 0.05, 0.3]), st.integers(0, 99))
def test_conformal_quantiles_are_numpys_higher(n: int, alpha: float, seed: int) -> None:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    level = float(conformal_level(n, alpha))
    expected = np.quantile(scores.numpy(), level, method="higher")
    assert conformal_quantile(scores, alpha) == pytest.approx(float(expected))


def test_few_samples_need_the_largest_score() -> None:
    assert conformal_level(20, 0.05) == 1
    assert conformal_level(10, 0.05) == 1


def test_conformal_sets_cover() -> None:
    generator = torch.Generator().manual_seed(0)
    coverages = []
    for _ in range(60):
        logits = 1.5 * torch.randn(3, 800, 5, generator=generator)
        labels = torch.multinomial(logits[0].softmax(-1), 1, generator=generator)[:, 0]
        exits = torch.randint(0, 3, (800,), generator=generator)
        known = slice(0, 400)
        conformal = Conformal.of(logits[:, known], labels[known], exits[known])
        taken = logits[exits[400:], torch.arange(400, 800)]
        for variant in ("exit", "general", "strict"):
            sets = conformal.sets(taken, exits[400:], 0.05, variant)
            coverages.append(sets[torch.arange(400), labels[400:]].float().mean())
    mean = torch.stack(coverages).mean().item()
    spread_of_mean = torch.stack(coverages).std().item() / math.sqrt(60)
    assert mean >= 0.95 - 2 * spread_of_mean


def test_an_exit_that_few_take_uses_all_samples() -> None:
    logits, labels = random_logits(exits=1, rows=60)
    exits = torch.tensor([0] * 5 + [1] * 55)
    quantiles = Conformal.of(logits, labels, exits).quantiles
    own, everyone, strict = quantiles[0], quantiles[2], quantiles[3]
    assert torch.equal(own[:, 0], everyone[:, 0])
    assert torch.equal(own[:, 1], strict[:, 1])


# Thresholds


def test_extreme_thresholds_let_all_or_none_leave() -> None:
    logits, _ = random_logits()
    assert (simulate(logits, ConfidenceThresholds([0.0] * 4)) == 0).all()
    assert (simulate(logits, ConfidenceThresholds([1.1] * 4)) == 4).all()


def test_thresholds_are_gates_with_a_hard_step_on_the_confidence() -> None:
    logits, _ = random_logits(rows=200)
    heads = Heads([2] * 4, CLASSES)
    taus = [0.9, 0.8, 0.7, 0.6]
    with torch.no_grad():
        for gate, tau in zip(heads.gates, taus, strict=True):
            gate.weight.copy_(torch.tensor([[1e7, 0.0, 0.0, 0.0]]))
            gate.bias.fill_(-1e7 * tau)
    exits = simulate(logits, LearnedGates(heads))
    assert torch.equal(exits, simulate(logits, ConfidenceThresholds(taus)))
    assert len(exits.unique()) == 5


def test_geometric_budgets_are_met_on_validation_data() -> None:
    logits, _ = random_logits(rows=1000)
    shares = geometric_shares(4, 0.5)
    torch.testing.assert_close(shares[:-1] / shares[1:], torch.full((4,), 2.0).double())
    exits = simulate(logits, thresholds_for(logits, shares))
    measured = torch.bincount(exits, minlength=5) / 1000
    torch.testing.assert_close(measured.double(), shares, atol=2e-3, rtol=0)
    assert len(list(threshold_sweep(logits))) == 39


def test_thresholds_can_really_stop_too() -> None:
    network = attach(vit(), images())
    spread(network, images())
    policy = ConfidenceThresholds([0.9, 0.7, 0.5])
    expected = simulate(network.all_logits(images()), policy)
    assert torch.equal(network.predict(images(), policy).exit, expected)


# Files and reports


def test_a_saved_addon_gives_the_same_answers(tmp_path: Path) -> None:
    network = attach(vit(), images(), exits=[0, 2])
    _train(network)
    network.save_addon(tmp_path / "addon")
    loaded = load_addon(vit(), tmp_path / "addon")
    before, after = network.predict(images()), loaded.predict(images())
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.exit, after.exit)
    assert torch.equal(before.cost, after.cost)
    assert loaded.lam == 0.2
    sets = network.prediction_sets(before)
    assert torch.equal(sets, loaded.prediction_sets(after))
    assert sets.shape == (24, CLASSES)


def test_an_addon_is_under_a_hundredth_of_its_backbone(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=7,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=8,
        patch_size=4,
        num_labels=10,
    )
    network = attach(ViTForImageClassification(config).eval(), images(2))
    network.save_addon(tmp_path / "addon")
    size = sum(file.stat().st_size for file in (tmp_path / "addon").iterdir())
    assert size < 0.01 * sum(4 * p.numel() for p in network.model.parameters())


def test_an_addon_refuses_another_backbone(tmp_path: Path) -> None:
    attach(vit(), images()).save_addon(tmp_path / "addon")
    changed = vit()
    with torch.no_grad():
        changed.classifier.bias.add_(0.5)
    with pytest.raises(CheckpointError, match="fingerprint"):
        load_addon(changed, tmp_path / "addon")


def test_a_damaged_addon_is_refused(tmp_path: Path) -> None:
    attach(vit(), images()).save_addon(tmp_path / "addon")
    file = tmp_path / "addon" / "heads.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="heads"):
        load_addon(vit(), tmp_path / "addon")
    with pytest.raises(CheckpointError):
        load_addon(vit(), tmp_path / "nothing")


def test_a_curve_is_written_with_a_row_a_price(tmp_path: Path) -> None:
    logits, labels = random_logits()
    exits = torch.zeros(40, dtype=torch.int64)
    point = measure(logits, labels, exits, torch.linspace(0.2, 1, 5))
    assert point.cost == pytest.approx(0.2)
    assert point.shares == (1, 0, 0, 0, 0)
    assert point.nll == pytest.approx(F.cross_entropy(logits[0], labels).item())
    write_curve(tmp_path / "curve.csv", [(0.2, point), (0.5, point)])
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0].startswith("lam,cost,accuracy,nll,ece,aurc")
    assert len(lines) == 3


def test_serving_is_measured_at_every_batch_size() -> None:
    network = attach(vit(), images())
    served = serve_bench(network, images(), batch_sizes=(1, 8), repeats=1)
    assert [row.batch for row in served] == [1, 8]
    assert all(row.seconds > 0 and row.plain_seconds > 0 for row in served)


# Bad input


def _one_class() -> nn.Module:
    config = vit().config
    config.num_labels = 1
    return ViTForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: vit().train(), {}, "eval"),
        (_one_class, {}, "2 classes"),
        (vit, {"exits": [3]}, "behind the last"),
        (vit, {"exits": []}, "exits"),
        (vit, {"exits": [-1]}, "exits"),
        (vit, {"pool": "max"}, "pool"),
        (vit, {"norm": "vit.layernorms"}, "layernorm"),
        (vit, {"blocks": ["vit.layers.0"]}, "two blocks"),
        (vit, {"blocks": ["vit.layers.0", "vit.layers.9"]}, "layers"),
    ],
)
def test_exits_that_cannot_be_put_on(make: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(make(), images(2), **options)


def test_bert_has_no_final_norm() -> None:
    with pytest.raises(ConfigError, match="norm=None"):
        attach(_bert(), text())


def test_a_norm_of_another_width_is_named() -> None:
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 8)])
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    with pytest.raises(ConfigError, match="as wide as every exit"):
        attach(Widening().eval(), torch.randn(2, 6), blocks=["blocks.0", "blocks.1"])


def test_a_backbone_in_train_mode_is_refused_later_too() -> None:
    network = attach(vit(), images())
    network.train()
    assert not network.model.training
    network.model.train()
    with pytest.raises(ConfigError, match="eval"):
        network.predict(images())


@pytest.mark.parametrize("lam", [-0.1, math.nan, math.inf])
def test_a_price_below_nothing_is_refused(lam: float) -> None:
    with pytest.raises(ConfigError, match="lam"):
        fit(attach(vit(), images()), [labelled()], lam=lam)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([images(4)], "without labels"),
        ([{"pixel_values": images(4)}], "without labels"),
        ([(images(4), torch.tensor([0, 1, 2, 3]))], "0 to 2"),
        ([], "none"),
    ],
)
def test_data_without_usable_labels_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cached_features(attach(vit(), images(2)), data)


def test_without_validation_data_there_are_neither_weights_nor_sets() -> None:
    network = attach(vit(), images())
    options = JEIOptions(epochs=1, warmup_epochs=1, class_weights="share")
    with pytest.warns(UserWarning, match="class weights"):
        fit(network, [labelled()], lam=0.2, options=options)
    with pytest.raises(ConfigError, match="val_loader"):
        network.prediction_sets(network.predict(images()))


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"lr": 0.0}, {"optimizer": "lion"}, {"rescale": "yes"}]
)
def test_options_that_cannot_work(options: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        JEIOptions(**options)
