"""Self-tuning networks: responses, perturbations, the two kinds of steps, and folding."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from sparing.errors import CheckpointError, ConfigError, DataError
from sparing.train import DivergedError
from sparing.tune.stn import HParam, SelfTuningNetwork
from sparing.tune.stn.hparams import Hyperparameters
from sparing.tune.stn.layers import Responsive

H = 3
NAMES = ("one", "two", "three")


def knobs(*starts: float) -> list[HParam]:
    """Hyperparameters that only responses see."""
    starts = starts or (0.2, 0.3, 0.5)
    return [HParam(NAMES[i], start, (0.0, 0.9), None) for i, start in enumerate(starts)]


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Dropout(), nn.Linear(6, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 4, bias=False)
    )


class Words(nn.Module):
    """(rows, time) int -> logits (rows, 10, time), with a decoder tied to the embedding."""

    def __init__(self, layers: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 6, layers, batch_first=True, bidirectional=bidirectional)
        self.drop = nn.Dropout()
        self.decoder = nn.Linear(6 * (1 + bidirectional), 10)
        if not bidirectional:
            self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.drop(self.lstm(self.embedding(x))[0])).transpose(1, 2)


def image_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def batch_of(name: str, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "words":
        return torch.randint(0, 10, (rows, 7), generator=generator)
    shape = (rows, 2, 8, 8) if name == "images" else (rows, 6)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "images": image_network,
    "words": lambda: Words(layers=2),
}


def network(name: str = "perceptron", strong: bool = True, **options: object) -> SelfTuningNetwork:
    """In float64, with gates large enough to matter."""
    model = MODELS[name]().double()
    found = SelfTuningNetwork(model, options.pop("hparams", knobs()), **options).double()  # type: ignore[arg-type]
    if strong:
        with torch.no_grad():
            for gate in found.gates():
                gate.mul_(30)
            for key, parameter in found.model.named_parameters():
                if "factor" in key:
                    parameter.fill_(1.1)
    return found.eval()


def rows_of_h(count: int = 5) -> Tensor:
    return torch.randn(
        count, H, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )  # fmt: skip


def forward_at(stn: SelfTuningNetwork, rows: Tensor, x: Tensor) -> Tensor:
    with stn.setting.during(rows, None):
        return stn.model(x)


def labelled(rows: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    return x, torch.randint(0, 4, (rows,), generator=generator)


# What a layer computes.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 5])
def test_without_gates_the_network_is_the_plain_one(name: str, rows: int) -> None:
    """Oracle 1, for any λ, in both the path for shared rows and the one for single rows."""
    plain, x = MODELS[name]().double().eval(), batch_of(name)
    stn = network(name, strong=False)
    stn.freeze_response()
    found = forward_at(stn, 10 * rows_of_h(rows), x)
    if rows == 1:
        assert torch.equal(found, plain(x))
    torch.testing.assert_close(found, plain(x), rtol=0, atol=1e-14)


def test_without_gates_the_hypergradient_is_exactly_zero() -> None:
    """Oracle 1."""
    stn = SelfTuningNetwork(perceptron(), knobs(), tune_scales=False)
    stn.freeze_response()
    before = stn.hyper.raw.detach().clone()
    for seed in range(3):
        loss = stn.validation_loss(labelled(seed=seed))
        assert not torch.autograd.grad(loss, stn.hyper.raw)[0].any()
        stn.validation_step(labelled(seed=seed))
    assert torch.equal(stn.hyper.raw, before)
    assert set(stn.response_norms().values()) == {0.0}


def formed(layer: nn.Module, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """W + diag(Vλ) W' and β + (Cλ) ⊙ β', written out entry by entry."""
    weight, response = layer.weight.detach().clone(), layer.response_weight.detach()
    z = layer.gate.detach() @ h
    units = weight.shape[0]
    weight *= layer.factor.detach()
    for unit in range(units):
        weight[unit] += z[unit] * response[unit]
    if layer.bias is None:
        return weight, None
    return weight, layer.bias.detach() * layer.factor.detach() + (
        z[units:] * layer.response_bias.detach()
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_row_of_a_batch_equals_the_materialised_linear_layer(bias: bool) -> None:
    """Oracle 2, to 1e-12 in float64."""
    stn = network()
    layer, rows = stn.model[1 if bias else 4], rows_of_h()
    x = torch.randn(5, 7, layer.in_features, dtype=torch.float64)
    found = forward_at_layer(stn, layer, rows, x)
    for b in range(5):
        expected = F.linear(x[b], *formed(layer, rows[b]))
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)


def forward_at_layer(
    stn: SelfTuningNetwork, layer: nn.Module, rows: Tensor, *inputs: Tensor
) -> Tensor:
    with stn.setting.during(rows, None):
        return layer(*inputs)


def test_a_row_of_a_batch_equals_the_materialised_convolution() -> None:
    """Oracle 2, with stride, padding mode and groups."""
    stn, rows, x = network("images"), rows_of_h(), batch_of("images")
    for layer in (stn.model[0], stn.model[2]):
        found = forward_at_layer(stn, layer, rows, x)
        for b in range(5):
            weight, bias = formed(layer, rows[b])
            plain = copy.deepcopy(MODELS["images"]()[0 if layer is stn.model[0] else 2]).double()
            plain.weight.data, plain.bias.data = weight, bias
            torch.testing.assert_close(found[b : b + 1], plain(x[b : b + 1]), rtol=0, atol=1e-12)
        x = found


def test_an_embedding_gates_its_response_and_has_no_bias() -> None:
    """Eq. 6; padding stays zero."""
    stn, rows, x = network("words"), rows_of_h(), batch_of("words")
    layer = stn.model.embedding
    found = forward_at_layer(stn, layer, rows, x)
    for b in range(5):
        expected = layer.weight[x[b]] + layer.response_weight[x[b]] * (layer.gate @ rows[b])
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)
    assert not layer.response_weight[0].any()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_row_of_an_lstm_equals_torchs_lstm_with_materialised_weights(
    bidirectional: bool, with_state: bool
) -> None:
    """Oracle 2 and eq. 7: the loop over time, against torch's own LSTM with each row's weights."""
    model = Words(2, bidirectional).double()
    stn = SelfTuningNetwork(model, knobs()).double().eval()
    perturb(stn.model, 0.3)
    rows, x = rows_of_h(), torch.randn(5, 7, 6, dtype=torch.float64)
    states = 4 if bidirectional else 2
    hx = None
    if with_state:
        hx = tuple(torch.randn(states, 5, 6, dtype=torch.float64) for _ in range(2))
    with stn.setting.during(rows, None):
        found, (h, c) = stn.model.lstm(x, hx)
    for b in range(5):
        folded = copy.deepcopy(stn.model.lstm)
        folded.fold(rows[b : b + 1])
        assert type(folded) is nn.LSTM
        state = None if hx is None else tuple(s[:, b : b + 1] for s in hx)
        expected, (last_h, last_c) = folded(x[b : b + 1], state)
        torch.testing.assert_close(found[b : b + 1], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(h[:, b : b + 1], last_h, rtol=0, atol=1e-12)
        torch.testing.assert_close(c[:, b : b + 1], last_c, rtol=0, atol=1e-12)


def test_weights_of_the_lstm_are_gated_by_unit() -> None:
    """Eq. 7: what is materialised, written out."""
    stn = network("words")
    lstm, h = stn.model.lstm, rows_of_h(1)
    for part in ("ih", "hh"):
        weight, bias = lstm.materialised(part, "l1", h)
        z = getattr(lstm, f"gate_{part}_l1") @ h[0]
        factor = getattr(lstm, f"factor_{part}_l1")
        own = getattr(lstm, f"weight_{part}_l1")
        response = getattr(lstm, f"response_weight_{part}_l1")
        for unit in range(24):
            expected = factor * own[unit] + z[unit] * response[unit]
            torch.testing.assert_close(weight[unit], expected)
        biases = getattr(lstm, f"bias_{part}_l1"), getattr(lstm, f"response_bias_{part}_l1")
        torch.testing.assert_close(bias, factor * biases[0] + z[24:] * biases[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_row_gives_what_equal_rows_give(name: str) -> None:
    stn, x, h = network(name), batch_of(name), rows_of_h(1)
    one, each = forward_at(stn, h, x), forward_at(stn, h.expand(5, -1), x)
    torch.testing.assert_close(one, each, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"centre": True}, {"response_input": "squashed"},
                                     {"factor": False}])  # fmt: skip
def test_folding_reproduces_the_logits_with_plain_layers(name: str, options: dict) -> None:
    """Oracle 2."""
    stn, x = network(name, **options), batch_of(name)
    folded = stn.fold()
    assert not any(isinstance(module, Responsive) for module in folded.modules())
    assert set(folded.state_dict()) == set(MODELS[name]().state_dict())
    torch.testing.assert_close(folded(x), stn(x), rtol=0, atol=1e-12)
    assert any(isinstance(module, Responsive) for module in stn.modules())


def test_counts_of_parameters() -> None:
    """Oracle 7: 2(oi + o) + 2oh + 1, and the released code's network for CIFAR-10."""
    linear = nn.Sequential(nn.Linear(64, 128))
    SelfTuningNetwork(linear, knobs(), factor=False)
    assert sum(p.numel() for p in linear.parameters()) == 17_408
    channels, blocks = (3, 64, 192, 384, 256, 256), []
    with torch.device("meta"):
        for inputs, outputs in pairwise(channels):
            blocks.append(nn.Conv2d(inputs, outputs, 3))
        blocks += [nn.Linear(1024, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 10)]
        model = nn.Sequential(*blocks)
    assert sum(p.numel() for p in model.parameters()) == 23_272_266
    many = [HParam(f"h{i}", 0.05, apply=None) for i in range(15)]
    SelfTuningNetwork(model, many)
    assert sum(p.numel() for p in model.parameters()) == 46_825_160


def test_starting_values_of_a_response() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(100, 400), nn.Conv2d(4, 200, 5), nn.Embedding(500, 40))
    before = copy.deepcopy(model.state_dict())
    SelfTuningNetwork(model, knobs())
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    linear, convolution, embedding = model
    for layer, bound in ((linear, 0.1), (convolution, 0.1), (embedding, 0.1)):
        assert 0.98 * bound < layer.response_weight.abs().max() <= bound
        assert abs(layer.gate.std().item() - 0.01) < 1e-3
    assert linear.response_bias.abs().max() <= 0.1
    assert linear.gate.shape == (800, H)
    assert embedding.gate.shape == (40, H)


def test_responses_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = perceptron()
    torch.set_rng_state(before)
    one = SelfTuningNetwork(model, knobs(), seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    again = SelfTuningNetwork(perceptron(), knobs(), seed=5).state_dict()
    other = SelfTuningNetwork(perceptron(), knobs(), seed=6).state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["model.1.gate"], other["model.1.gate"])


# Hyperparameters.


@given(
    low=st.floats(-5, 5),
    width=st.floats(0.1, 20),
    share=st.floats(0.01, 0.99),
    bounds=st.sampled_from(["both", "low", "high", "none"]),
)
@settings(max_examples=60, deadline=None)
def test_projection_round_trips_and_stays_in_its_range(low, width, share, bounds) -> None:
    """Oracle 4."""
    high, start = low + width, low + share * width
    ends = {"both": (low, high), "low": (low, None), "high": (None, high), "none": (None, None)}
    hparam = HParam("x", start, ends[bounds], None)
    raw = torch.tensor(hparam.unproject(start), dtype=torch.float64)
    assert float(hparam.project(raw)) == pytest.approx(start, rel=1e-9, abs=1e-9)
    wild = hparam.project(torch.linspace(-1e3, 1e3, 101))
    least, most = hparam.range
    assert least is None or float(wild.min()) >= torch.tensor(least)
    assert most is None or float(wild.max()) <= torch.tensor(most)


def test_logit_of_a_twentieth() -> None:
    """Oracle 4."""
    assert HParam("x", 0.05, apply=None).unproject(0.05) == pytest.approx(-2.944, abs=5e-4)


@given(low=st.integers(-3, 3), count=st.integers(1, 30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_discrete_values_are_integers_of_the_range_and_start_exactly(low, count, data) -> None:
    """Oracle 4, in float32, where flooring [a, b] would start one too low."""
    start = data.draw(st.integers(low, low + count))
    hparam = HParam("x", start, (low, low + count), None, discrete=True)
    raw = torch.tensor(hparam.unproject(start), dtype=torch.float32)
    assert float(hparam.project(raw)) == start
    found = hparam.project(torch.linspace(-30, 30, 4001)).unique()
    assert found.tolist() == list(range(low, low + count + 1))


def test_entropy_and_its_gradient() -> None:
    """Oracle 5: 1.41894 h for unit scales; 1 / σ."""
    hyper = Hyperparameters(knobs(), perturbation=1.0).double()
    assert hyper.entropy().item() == pytest.approx(1.41894 * H, abs=1e-4)
    scale = hyper.scale
    (gradient,) = torch.autograd.grad(hyper.entropy(), hyper.raw_scale)
    slope = torch.sigmoid(hyper.raw_scale)  # of the softplus
    torch.testing.assert_close(gradient / slope, 1 / scale)


def test_perturbations_are_independent_by_row_unless_they_act_on_the_batch() -> None:
    """Oracle 6."""
    hparams = [
        HParam("row", 0.3, apply=None),
        HParam("batch", 0.3, apply="dropconnect", places=("1",)),
        HParam("asked", 0.3, apply=None, per_example=False),
    ]
    hyper = Hyperparameters(hparams, perturbation=0.7)
    drawn = hyper.sample(20_000, torch.Generator().manual_seed(0)).detach()
    assert (drawn[:, 1:] == drawn[0, 1:]).all()
    noise = drawn[:, 0] - hyper.raw[0].detach()
    assert noise.std().item() == pytest.approx(0.7, rel=0.03)
    assert abs(noise.mean().item()) < 0.02
    values = hyper.project(drawn)
    assert [values[name].dim() for name in ("row", "batch", "asked")] == [1, 0, 0]
    several = torch.stack([hyper.sample(1, torch.Generator().manual_seed(i))[0] for i in range(99)])
    assert several.std(0).min() > 0.5


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"name": "lr"}, "optimiser"),
        ({"name": "Batch_Size"}, "no best response"),
        ({"init": 0.0}, "strictly inside"),
        ({"init": 0.95}, "strictly inside"),
        ({"init": math.nan}, "strictly inside"),
        ({"range": (0.9, 0.1)}, "lower one first"),
        ({"range": (0.0, 1.5)}, "within 0 and 1"),
        ({"apply": "dropot"}, "dropout"),
        ({"apply": "dropconnect", "per_example": True}, "whole batch"),
        ({"apply": "weight-penalty", "range": (None, None)}, "lower bound"),
        ({"apply": None, "init": 1.5, "range": (0, 4), "discrete": True}, "integer"),
        ({"apply": None, "init": 1, "range": (0, 4.5), "discrete": True}, "integers"),
    ],
)
def test_a_hyperparameter_that_cannot_work_is_refused(options: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        HParam(**({"name": "rate", "init": 0.05, "range": (0.0, 0.9)} | options))


@pytest.mark.parametrize("hparams", [[], [*knobs(), *knobs()]])
def test_names_must_be_different_and_at_least_one(hparams: list[HParam]) -> None:
    with pytest.raises(ConfigError, match="hparams"):
        SelfTuningNetwork(perceptron(), hparams)


# The two steps.


def step_network(**options: object) -> tuple[SelfTuningNetwork, torch.optim.Optimizer]:
    hparams = [HParam("input", 0.1, (0.0, 0.9), places=("0",)), HParam("hidden", 0.2, (0.0, 0.9))]
    stn = SelfTuningNetwork(perceptron(), hparams, **options)  # type: ignore[arg-type]
    return stn, torch.optim.SGD(stn.parameter_groups(), lr=0.1, momentum=0.9)


def state_of(stn: SelfTuningNetwork) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stn.state_dict().items()}


def changed(stn: SelfTuningNetwork, before: dict[str, Tensor]) -> set[str]:
    return {name for name, t in stn.state_dict().items() if not torch.equal(t, before[name])}


@pytest.mark.parametrize("options", [{}, {"centre": True}, {"tune_scales": False}])
def test_each_step_leaves_the_others_numbers_bit_for_bit(options: dict) -> None:
    """Oracle 9."""
    stn, optimizer = step_network(**options)
    stn.train_step(labelled(), optimizer)
    before, moments = state_of(stn), copy.deepcopy(optimizer.state_dict())
    stn.validation_step(labelled(seed=1))
    scales = set() if options.get("tune_scales") is False else {"hyper.raw_scale"}
    assert changed(stn, before) == {"hyper.raw"} | scales
    for key, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], moments["state"][key]["momentum_buffer"])
    assert stn.hyper.raw.grad is None
    before = state_of(stn)
    stn.train_step(labelled(), optimizer)
    names = changed(stn, before)
    assert names
    assert not any(name.startswith("hyper") for name in names)
    assert all(p.grad is None for p in stn.hyper.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"centre": True}, {"response_input": "squashed"}])
@pytest.mark.parametrize("tune_scales", [False, True])
def test_hypergradients_are_those_of_finite_differences(
    name: str, options: dict, tune_scales: bool
) -> None:
    """Oracle 3, relative 1e-6 in float64; with fixed noise also in σ."""
    stn = network(name, tune_scales=tune_scales, **options)
    x = batch_of(name)
    stn.loss = lambda model, inputs: (model(inputs).sin() * torch.arange(1.0, 6).view(-1, *[1] * (
        2 if name == "words" else 1))).mean()  # fmt: skip
    anchor = stn.hyper.raw.detach().clone()
    frozen = lambda raw: (  # noqa: E731 - with `centre`, the point that is subtracted stays
        (stn.hyper.squash(raw) - stn.hyper.squash(anchor[None])) if stn.response_input == "squashed"
        else raw - anchor
    )  # fmt: skip
    if stn.centre:
        stn.response_rows = frozen  # type: ignore[method-assign]

    def loss() -> Tensor:
        stn.generator.manual_seed(4)
        return stn.validation_loss(x)

    parameters = [stn.hyper.raw] + ([stn.hyper.raw_scale] if tune_scales else [])
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(loss(), parameters), strict=True
    ):
        assert gradient.abs().min() > 1e-6
        for i in range(H):
            with torch.no_grad():
                parameter[i] += 1e-5
                above = loss()
                parameter[i] -= 2e-5
                below = loss()
                parameter[i] += 1e-5
            difference = float(above - below) / 2e-5
            assert difference == pytest.approx(float(gradient[i]), rel=1e-6, abs=1e-9)


def test_the_validation_loss_sees_no_regularisation() -> None:
    """Pitfall: dropout in validation would add an effect of λ of its own."""
    stn, _ = step_network(tune_scales=False)
    stn.train()
    x, y = labelled()
    expected = F.cross_entropy(stn.fold().eval()(x), y).item()
    seen = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append((model.training, stn.values))
        return F.cross_entropy(model(batch[0]), batch[1])

    stn.loss = loss
    assert stn.validation_step((x, y)) == pytest.approx(expected, rel=1e-6)
    assert seen == [(False, None)]
    assert stn.model.training


def test_the_entropy_pushes_scales_up_by_tau() -> None:
    """Eq. 3: the gradient of σ is that of L_V less τ / σ."""
    stn, _ = step_network(entropy_weight=0.5)
    stn.freeze_response()  # the loss then does not depend on σ
    before = stn.hyper.raw_scale.detach().clone()
    stn.validation_step(labelled())
    assert (stn.hyper.raw_scale > before).all()
    with pytest.warns(UserWarning, match="go to 0"):
        step_network(entropy_weight=0.0)


def test_a_hyperparameter_that_nothing_reads_is_found() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.linear = nn.Dropout(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    stn = SelfTuningNetwork(Skips(), [HParam("unused", 0.1, (0.0, 0.9))])
    with pytest.raises(ConfigError, match="nothing read"):
        stn.train_step(labelled(), torch.optim.SGD(stn.parameter_groups(), lr=0.1))


def test_a_loss_without_a_layer_that_responds_is_found() -> None:
    stn, _ = step_network(layers=["4"], tune_scales=False)
    stn.loss = lambda model, batch: model[1](batch[0]).square().mean()
    with pytest.raises(ConfigError, match="layer that responds"):
        stn.validation_step(labelled())


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_loss_that_is_not_finite_changes_nothing(kind: str) -> None:
    stn, optimizer = step_network()
    before = state_of(stn)
    x, y = labelled()
    steps = {"train": lambda b: stn.train_step(b, optimizer), "validation": stn.validation_step}
    with pytest.raises(DivergedError):
        steps[kind]((x * math.inf, y))
    assert not changed(stn, before)


def test_gates_are_kept_from_weight_decay() -> None:
    stn, _ = step_network()
    decayed, spared = stn.parameter_groups(weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in spared["params"]} == {id(p) for p in stn.gates()}
    everything = {id(p) for p in stn.model.parameters()}
    assert {id(p) for p in decayed["params"]} == everything - {id(p) for p in stn.gates()}


def test_reduced_precision_keeps_gates_and_hyperparameters_in_float32() -> None:
    """Pitfall: AMP."""
    stn = SelfTuningNetwork(perceptron().bfloat16(), knobs())
    assert stn.model[1].gate.dtype == stn.model[1].factor.dtype == torch.float32
    assert stn.model[1].response_weight.dtype == torch.bfloat16
    assert stn.hyper.raw.dtype == torch.float32
    x, y = labelled()
    loss = stn.validation_loss((x.bfloat16(), y))
    assert torch.autograd.grad(loss, stn.hyper.raw)[0].dtype == torch.float32
    stn = SelfTuningNetwork(perceptron(), knobs())
    with torch.autocast("cpu", torch.bfloat16):
        assert stn(x).dtype == torch.bfloat16
        assert forward_at(stn, stn.hyper.raw.expand(32, -1) + 0.0, x).dtype == torch.bfloat16


# Δ-STN.


def test_centred_weights_at_lambda_are_the_elementary_ones() -> None:
    stn, x = network(centre=True, factor=False), batch_of("perceptron")
    plain = perceptron().double().eval()
    torch.testing.assert_close(stn(x), plain(x), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(stn(x).sum(), stn.hyper.raw)
    assert gradient.all()


def test_the_linearised_forward_is_the_first_order_expansion_in_the_response() -> None:
    """Δ-STN: f(x, w₀) + J Δw, against torch.func.jvp on the weights themselves."""
    from sparing.tune.stn.linearized import Linearized

    stn, x, h = network(), batch_of("perceptron"), rows_of_h(1)
    plain = perceptron().double().eval()
    weights = {n: p.detach() * 1.1 for n, p in plain.named_parameters()}
    shift = {n: torch.zeros_like(p) for n, p in weights.items()}
    for i in (1, 4):
        layer = stn.model[i]
        weight, bias = formed(layer, h[0])
        shift[f"{i}.weight"] = weight - 1.1 * layer.weight.detach()
        if bias is not None:
            shift[f"{i}.bias"] = bias - 1.1 * layer.bias.detach()
    value, slope = torch.func.jvp(
        lambda w: torch.func.functional_call(plain, w, (x,)), (weights,), (shift,)
    )
    for rows in (h, h.expand(5, -1)):
        with stn.setting.during(rows, None):
            found = Linearized(stn.model, stn.setting)(x)
        torch.testing.assert_close(found, value + slope, rtol=0, atol=1e-12)
    assert not torch.allclose(found, forward_at(stn, h, x), atol=1e-3)


def test_a_linearised_step_trains_weights_and_response_apart() -> None:
    """W gets the gradient of the plain loss at λ, the response that of the linearised one."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    hparams = knobs()
    stn = SelfTuningNetwork(perceptron(), hparams, centre=True, linearize=True, loss=loss)
    for module in stn.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    stn._checked = True  # the knobs are read by nothing here
    plain = copy.deepcopy(perceptron())
    plain[0].p = plain[3].p = 0.0
    x, y = labelled()
    F.cross_entropy(plain(x), y).backward()
    optimizer = torch.optim.SGD(stn.parameter_groups(), lr=0.0)
    stn.train_step((x, y), optimizer)
    torch.testing.assert_close(stn.model[1].weight.grad, plain[1].weight.grad)
    assert stn.model[1].gate.grad.abs().sum() > 0
    assert stn.model[4].response_weight.grad.abs().sum() > 0
    before = state_of(stn)
    stn.validation_step((x, y))
    assert changed(stn, before) == {"hyper.raw", "hyper.raw_scale"}


@pytest.mark.parametrize(
    "options",
    [{"linearize": True}, {"linearize": True, "centre": True}, {"entropy_weight": -1.0},
     {"hyper_lr": 0.0}, {"scale_lr": -1.0}, {"response_input": "logits"}, {"perturbation": 0.0},
     {"layers": ["7"]}, {"layers": "nothing"}, {"layers": ["2"]}],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError):
        SelfTuningNetwork(perceptron(), knobs(), **options)


# The best response itself.


def ridge_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([2.0, 1.2, 0.8, 0.5, 0.3], dtype=torch.float64)
    w = torch.randn(5, generator=generator, dtype=torch.float64)
    y = x @ w + 2.0 * torch.randn(60, generator=generator, dtype=torch.float64)
    new = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    new = new * torch.tensor([2.0, 1.2, 0.8, 0.5, 0.3], dtype=torch.float64)
    return x, y, new, new @ w + 2.0 * torch.randn(400, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("log_decay", [-2.0, 1.0, 4.0])
def test_ridge_is_a_sigmoid_gate_in_the_basis_of_singular_vectors(log_decay: float) -> None:
    """Oracle 7: w_i*(λ) = σ(2 log s_i - λ) w_i^OLS."""
    x, y, _, _ = ridge_problem()
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    gate = torch.sigmoid(2 * s.log() - log_decay)
    found = v.T @ (gate * (u.T @ y) / s)
    ridge = Ridge(alpha=math.exp(log_decay), fit_intercept=False).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(found, torch.from_numpy(ridge.coef_), rtol=1e-9, atol=1e-12)


def test_a_trained_linear_response_has_the_slope_of_the_best_response() -> None:
    """Oracle 8: dŵ/dλ = -σ(1 - σ) w_OLS within 5 %, learned from perturbed losses alone (eq. 2)."""
    x, y, _, _ = ridge_problem()
    start, spread = 2.0, 0.1
    model = nn.Sequential(nn.Linear(5, 1, bias=False)).double()
    log_decay = HParam("log_decay", start, (None, None), None)
    stn = SelfTuningNetwork(
        model, [log_decay], perturbation=spread, centre=True, factor=False
    ).double()
    layer = stn.model[0]
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=1.0, max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    noise = spread * torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)  # Gauss-Hermite

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for shift, weight in zip(noise, weights, strict=True):
            rows = shift.expand(60, 1)
            with stn.setting.during(rows, None):
                squares = 0.5 * (y - model(x)[:, 0]).square().sum()
            decay = 0.5 * (start + shift).exp() * layer.squared_norms(rows[:1])[0]
            total = total + weight * (squares + decay)
        total.backward()
        return total

    for _ in range(3):
        optimizer.step(loss)
    slope = (layer.gate[0, 0] * layer.response_weight[0]).detach()
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    gate = torch.sigmoid(2 * s.log() - start)
    least_squares = v @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    expected = v.T @ (-gate * (1 - gate) * least_squares)
    assert (slope - expected).norm() < 0.05 * expected.norm()


def test_the_decay_found_on_validation_data_is_that_of_a_grid() -> None:
    """Oracle 8: λ within 0.2 of the grid's optimum, by alternating steps (eq. 3).

    From 4.5 below it, and after a warm-up that lets the response form.
    """
    x, y, new_x, new_y = ridge_problem(seed=4)
    grid, errors = torch.linspace(-3, 6, 181), []
    for value in grid.tolist():
        ridge = Ridge(alpha=math.exp(value), fit_intercept=False).fit(x.numpy(), y.numpy())
        errors.append((new_y - torch.from_numpy(ridge.predict(new_x.numpy()))).square().mean())
    best = float(grid[int(torch.stack(errors).argmin())])
    assert 3 < best < 4

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        if not model.training:
            return (targets - model(inputs)[:, 0]).square().mean()
        squares = 0.5 * (targets - model(inputs)[:, 0]).square()
        norms = model[0].squared_norms(stn.setting.rows)
        return (squares + 0.5 * stn.values["log_decay"].exp() * norms / 60).mean()

    torch.manual_seed(0)
    stn = SelfTuningNetwork(
        nn.Sequential(nn.Linear(5, 1, bias=False)).double(),
        [HParam("log_decay", -1.0, (None, None), None)],
        perturbation=0.6,
        hyper_lr=0.03,
        tune_scales=False,
        centre=True,
        factor=False,
        loss=loss,
    ).double()
    optimizer = torch.optim.SGD(stn.parameter_groups(), lr=0.1, momentum=0.9)
    copies, steps, found = (x.repeat(64, 1), y.repeat(64)), 1200, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        stn.train_step(copies, optimizer)
        if step > 400 and step % 2:
            stn.validation_step((new_x, new_y))
        found.append(stn.hyper.raw.item())
    assert sum(found[-200:]) / 200 == pytest.approx(best, abs=0.2)


# Real models.


def language_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


@pytest.mark.parametrize("build", [small_gpt2, small_llama])
def test_a_language_model_is_tuned_folded_and_reloaded(build: Callable, tmp_path) -> None:
    base = build()
    hparams = [HParam("weights", 1e-3, (0.0, None), "weight-penalty", ("lm_head",))]
    if build is small_gpt2:
        hparams = [HParam("dropout", 0.1, (0.0, 0.9), places=_mlp_dropouts(base))]
    stn = SelfTuningNetwork(base, hparams)
    ids = token_ids(4)
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.SGD(stn.parameter_groups(), lr=0.05)
    for _ in range(3):
        stn.train_step(batch, optimizer)
        stn.validation_step(batch)
    perturb(stn.model, 0.05)
    stn.eval()
    expected = stn(input_ids=ids).logits
    stn.fold().save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def _mlp_dropouts(model: nn.Module) -> tuple[str, ...]:
    return tuple(n for n, m in model.named_modules() if n.endswith("mlp.dropout"))


def test_fused_attention_that_ignores_its_dropout_is_found() -> None:
    base = small_gpt2()
    base.config._attn_implementation = "sdpa"
    places = ("transformer.h.0.attn.attn_dropout",)
    stn = SelfTuningNetwork(base, [HParam("attention", 0.1, (0.0, 0.9), places=places)])
    ids = token_ids(2)
    with pytest.raises(ConfigError, match="eager"):
        stn.train_step(
            {"input_ids": ids, "labels": ids}, torch.optim.SGD(stn.parameter_groups(), lr=0.1)
        )


def test_the_head_and_last_block_of_a_classifier_respond() -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        vocab_size=64, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    stn = SelfTuningNetwork(
        model,
        [HParam("head", 0.1, (0.0, 0.9), places=("dropout",))],
        layers=r".*(encoder\.layer\.1\..*dense|classifier)",
    )
    assert len(stn.response_layers) == 4
    batch = {"input_ids": token_ids(6), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    stn.train_step(batch, torch.optim.SGD(stn.parameter_groups(), lr=0.1))
    assert math.isfinite(stn.validation_step(batch))


def test_lora_responds_and_folds_into_a_lora(tmp_path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(small_llama(), config)
    places = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Dropout))
    stn = SelfTuningNetwork(
        model,
        [HParam("lora_dropout", 0.1, (0.0, 0.9), places=places)],
        layers=["lora_B.default"],
    )
    trained = [n for n, p in stn.model.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in trained)
    optimizer = torch.optim.SGD(stn.parameter_groups(), lr=0.5)
    ids = token_ids(4)
    for _ in range(3):
        stn.train_step({"input_ids": ids, "labels": ids}, optimizer)
        stn.validation_step({"input_ids": ids, "labels": ids})
    stn.eval()
    expected = stn(input_ids=ids).logits
    stn.fold().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, small_llama()(input_ids=ids).logits)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        base = small_gpt2()
        stn = SelfTuningNetwork(base, [HParam("d", 0.3, (0.0, 0.9), places=_mlp_dropouts(base))])
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        ids = token_ids(4)
        torch.manual_seed(0)
        stn.train_step(
            {"input_ids": ids, "labels": ids}, torch.optim.SGD(stn.parameter_groups(), lr=0.1)
        )
        found.append(stn.model.transformer.h[0].mlp.c_fc.weight.grad)
    torch.testing.assert_close(*found)


def test_a_decoder_stays_tied_to_the_elementary_embedding_alone() -> None:
    stn = SelfTuningNetwork(Words(), knobs(), layers=["embedding", "lstm"])
    perturb(stn.model, 0.1)
    assert stn.model.decoder.weight is stn.model.embedding.weight
    x = batch_of("words")
    folded = stn.fold()
    assert folded.decoder.weight is not folded.embedding.weight
    assert torch.equal(folded.decoder.weight, stn.model.embedding.weight)
    torch.testing.assert_close(folded.eval()(x), stn.eval()(x))


def test_torchs_own_transformer_is_refused_while_it_skips_forwards() -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    with pytest.raises(ConfigError, match="fast path"):
        SelfTuningNetwork(model, knobs())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        stn = SelfTuningNetwork(model, knobs())
        assert "self_attn.out_proj" not in stn.response_layers
        perturb(stn.model, 0.1)
        x = torch.randn(3, 4, 8)
        torch.testing.assert_close(stn.fold().eval()(x), stn.eval()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (nn.Sequential(nn.LSTM(3, 4)), "all"),
        (nn.Sequential(nn.LSTM(3, 4, proj_size=2, batch_first=True)), "all"),
        (nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), "all"),
        (nn.Sequential(nn.GRU(3, 4)), ["0"]),
    ],
)
def test_a_layer_that_cannot_respond_is_refused(model: nn.Module, layers: object) -> None:
    with pytest.raises(ConfigError):
        SelfTuningNetwork(model, knobs(), layers=layers)


def test_batch_normalisation_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="over the batch"):
        SelfTuningNetwork(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), knobs())


def test_rows_that_cannot_be_matched_are_refused() -> None:
    stn = network()
    with pytest.raises(DataError, match="5 rows"):
        forward_at(stn, rows_of_h(), torch.randn(10, 6, dtype=torch.float64))
    with pytest.raises(DataError, match="time"):
        forward_at(network("words"), rows_of_h(), torch.zeros(5, dtype=torch.int64))


# Files.


def test_a_saved_network_is_the_same_when_loaded(tmp_path) -> None:
    stn, optimizer = step_network()
    for seed in range(4):
        stn.train_step(labelled(seed=seed), optimizer)
        stn.validation_step(labelled(seed=9))
    stn.save(tmp_path / "stn")
    other, _ = step_network(seed=3)
    other.load(tmp_path / "stn")
    x = labelled()[0]
    assert torch.equal(other.eval()(x), stn.eval()(x))
    assert other.current() == stn.current()
    assert other.scales() == stn.scales()


def test_tied_weights_are_saved_once(tmp_path) -> None:
    stn = SelfTuningNetwork(Words(), knobs())
    perturb(stn.model)
    stn.save(tmp_path / "stn")
    other = SelfTuningNetwork(Words(), knobs()).load(tmp_path / "stn")
    x = batch_of("words")
    assert torch.equal(other.eval()(x), stn.eval()(x))
    assert other.model.decoder.weight is other.model.embedding.weight


@pytest.mark.parametrize("damage", ["missing", "truncated", "other options", "no json"])
def test_files_that_do_not_fit_are_refused(damage: str, tmp_path) -> None:
    stn, _ = step_network()
    stn.save(tmp_path / "stn")
    weights, options = tmp_path / "stn" / "stn.safetensors", {}
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "no json":
        (tmp_path / "stn" / "stn.json").write_text("{")
    else:
        options = {"centre": True}
    other, _ = step_network(**options)
    before = state_of(other)
    with pytest.raises(CheckpointError):
        other.load(tmp_path / "stn")
    assert not changed(other, before)


def test_a_copy_is_independent_and_whole() -> None:
    stn, _ = step_network()
    other = copy.deepcopy(stn)
    before = state_of(stn)
    optimizer = torch.optim.SGD(other.parameter_groups(), lr=0.1)
    other.train_step(labelled(), optimizer)
    other.validation_step(labelled())
    assert not changed(stn, before)
    assert {"hyper.raw", "model.1.weight"} <= changed(other, before)
