"""Self-tuning networks: regularisers, augmentations, the alternating loop, and schedules."""

import colorsys
import copy
import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stn import Words, labelled, perceptron
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from sparing.errors import CheckpointError, ConfigError, DataError
from sparing.tune.stn import (
    ColourJitter,
    Cutout,
    HParam,
    PixelDropout,
    Plan,
    Record,
    RegularizedNetwork,
    ScaleNoise,
    Schedule,
    SelfTuningNetwork,
    constant,
    draw_schedule,
    fit,
    gaussian,
    image_hparams,
    replay,
    sinusoid,
)
from sparing.tune.stn.augmentation import turn_hue


def regularized(module: nn.Module, *hparams: HParam) -> RegularizedNetwork:
    network = RegularizedNetwork(nn.Sequential(module), hparams)
    network.train()
    return network


def under(network: RegularizedNetwork, x: Tensor, **values: object) -> Tensor:
    """The output in training with given values."""
    told = {name: torch.as_tensor(value) for name, value in values.items()}
    with network.setting.during(None, told):
        return network.model(x)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Dropout.


@pytest.mark.parametrize("kind", ["dropout", "locked-dropout"])
@given(rates=st.lists(st.floats(0.0, 0.9), min_size=2, max_size=4), seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_every_row_is_dropped_at_its_own_rate(kind: str, rates: list[float], seed: int) -> None:
    """Oracle 10: 1 - p_b of the units are kept, and expectations are preserved."""
    network = regularized(nn.Dropout(), HParam("p", 0.1, (0.0, 0.9), kind, ("0",)))
    torch.manual_seed(seed)
    units = 4000
    y = under(network, torch.ones(len(rates), 3, units), p=rates)
    for row, rate in zip(y, rates, strict=True):
        kept = (row != 0).float()
        noise = 5 * math.sqrt(rate * (1 - rate) / units) + 1e-6
        assert abs(kept[0].mean().item() - (1 - rate)) < noise
        assert abs(row[0].mean().item() - 1) < noise / (1 - rate)
        values = row[kept.bool()]
        torch.testing.assert_close(values, torch.full_like(values, 1 / (1 - rate)))


def test_a_locked_mask_is_the_same_at_all_times_and_differs_by_row() -> None:
    network = regularized(nn.Dropout(), HParam("p", 0.5, (0.0, 0.9), "locked-dropout", ("0",)))
    for rate in (0.5, [0.5, 0.5, 0.5]):
        y = under(network, torch.ones(3, 6, 50), p=rate)
        assert (y == y[:, :1]).all()
        assert not torch.equal(y[0], y[1])


def test_channels_are_dropped_whole() -> None:
    network = regularized(nn.Dropout2d(), HParam("p", 0.5, (0.0, 0.9)))
    for rate in (0.5, [0.2, 0.5, 0.7]):
        y = under(network, torch.ones(3, 40, 4, 4), p=rate)
        assert (y == y[:, :, :1, :1]).all()
        assert 0 < (y[:, :, 0, 0] == 0).sum() < 120


def test_a_shared_rate_is_torchs_own_dropout_with_its_random_numbers() -> None:
    network = regularized(nn.Dropout(), HParam("p", 0.3, (0.0, 0.9)))
    x = torch.randn(4, 50)
    torch.manual_seed(0)
    found = under(network, x, p=0.3)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, float(torch.tensor(0.3))))


def test_a_rate_of_one_drops_everything_without_a_nan() -> None:
    network = regularized(nn.Dropout(), HParam("p", 0.3))
    y = under(network, torch.ones(2, 9), p=[1.0, 0.0])
    assert not y[0].any()
    assert (y[1] == 1).all()


def test_nothing_is_dropped_in_evaluation() -> None:
    network = regularized(nn.Dropout(), HParam("p", 0.5, (0.0, 0.9)))
    network.eval()
    x = torch.randn(2, 9)
    assert torch.equal(under(network, x, p=[0.9, 0.9]), x)


# Weights, words and activations.


def test_dropconnect_masks_both_parts_alike() -> None:
    hparam = HParam("p", 0.5, (0.0, 0.9), "dropconnect", ("0",))
    stn = SelfTuningNetwork(nn.Sequential(nn.Linear(30, 30, bias=False)), [hparam])
    layer = stn.model[0]
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.response_weight.fill_(1.0)
        layer.gate.fill_(1.0)
    stn.train()
    eye = torch.eye(30)
    for rows in (torch.full((1, 1), 2.0), torch.full((30, 1), 2.0)):
        with stn.setting.during(rows, {"p": torch.tensor(0.5)}):
            found = stn.model(eye)
        assert set(found.unique().tolist()) == {0.0, 6.0}  # (1 + 2 · 1) / 0.5, or neither
        assert 300 < (found == 0).sum() < 600
    stn.eval()
    with stn.setting.during(rows, {"p": torch.tensor(0.5)}):
        assert (stn.model(eye) == 3).all()


def test_dropconnect_of_an_lstm_masks_hidden_weights_alone() -> None:
    model = Words()
    plain = copy.deepcopy(model.lstm)
    network = RegularizedNetwork(model, [HParam("p", 0.5, (0.0, 0.9), "dropconnect", ("lstm",))])
    network.train()
    x = torch.randn(3, 5, 6)
    with network.setting.during(None, {"p": torch.tensor(0.5)}):
        torch.manual_seed(0)
        found, _ = model.lstm(x)
    torch.manual_seed(0)
    plain.weight_hh_l0.data *= F.dropout(torch.ones_like(plain.weight_hh_l0), 0.5)
    torch.testing.assert_close(found, plain(x)[0])


def test_embedding_dropout_drops_whole_words() -> None:
    hparam = HParam("p", 0.5, (0.0, 0.9), "embedding-dropout", ("0",))
    stn = SelfTuningNetwork(nn.Sequential(nn.Embedding(40, 7)), [hparam])
    stn.train()
    ids = torch.arange(40).repeat(3, 1)
    rows = torch.full((3, 1), 5.0)
    with stn.setting.during(rows, {"p": torch.tensor(0.5)}):
        found = stn.model(ids)
    with stn.setting.during(rows, None):
        full = stn.model(ids)
    dropped = (found == 0).all(-1)
    assert 5 < dropped[0].sum() < 35
    assert (dropped == dropped[0]).all()
    torch.testing.assert_close(found[~dropped], 2 * full[~dropped])


def test_penalties_of_activations_are_added_to_the_training_loss_alone() -> None:
    hparams = [
        HParam("alpha", 2.0, (0.0, None), "activation-penalty", ("drop",)),
        HParam("beta", 1.0, (0.0, None), "temporal-penalty", ("lstm",)),
    ]
    model = Words()
    model.drop.p = 0.0
    x = torch.randint(0, 10, (4, 7), generator=generator())
    states = model.lstm(model.embedding(x))[0].detach()
    plain = F.cross_entropy(model(x), x).item()
    stn = SelfTuningNetwork(model, hparams, tune=False)
    optimizer = torch.optim.SGD(stn.parameter_groups(), lr=0.0)
    steps = (states[:, 1:] - states[:, :-1]).square().mean().item()
    expected = plain + 2.0 * states.square().mean().item() + 1.0 * steps
    assert stn.train_step((x, x), optimizer) == pytest.approx(expected, rel=1e-5)
    assert stn.evaluate([(x, x)]) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", ["1", "lstm", "embedding"])
def test_a_weight_penalty_is_that_of_each_rows_own_weights(name: str) -> None:
    model = perceptron() if name == "1" else Words(layers=2)
    hparam = HParam("decay", 0.5, (0.0, None), "weight-penalty", (name,))
    stn = SelfTuningNetwork(model, [hparam]).double()
    with torch.no_grad():
        for gate in stn.gates():
            gate.mul_(50)
    layer = model.get_submodule(name)
    rows = torch.randn(4, 1, generator=generator(), dtype=torch.float64)
    found = layer.squared_norms(rows)
    for b in range(4):
        folded = copy.deepcopy(layer)
        folded.fold(rows[b : b + 1])
        weights = [p for key, p in folded.named_parameters() if "weight" in key]
        expected = sum(p.square().sum() for p in weights)
        torch.testing.assert_close(found[b], expected)


@pytest.mark.parametrize(
    ("hparam", "word"),
    [
        (HParam("p", 0.1, places=("nowhere",)), "name of a module"),
        (HParam("p", 0.1, places=("1",)), "dropout module"),
        (HParam("p", 0.1, apply="dropconnect"), "places"),
        (HParam("p", 0.1, apply="dropconnect", places=("0",)), "Linear"),
        (HParam("p", 0.1, apply="embedding-dropout", places=("1",)), "an embedding"),
    ],
)
def test_a_place_that_does_not_suit_is_refused(hparam: HParam, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        SelfTuningNetwork(perceptron(), [hparam])


def test_two_hyperparameters_cannot_share_a_dropout_module() -> None:
    hparams = [HParam("p", 0.1, places=("0",)), HParam("q", 0.1, places=("0",))]
    with pytest.raises(ConfigError, match="dropout module"):
        SelfTuningNetwork(perceptron(), hparams)


# Augmentations.


def images(rows: int = 6, size: int = 16) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=generator(7))


@pytest.mark.parametrize("change", [PixelDropout(), ScaleNoise(), ColourJitter(), Cutout()])
def test_an_augmentation_of_strength_zero_changes_nothing(change) -> None:
    names = ("input_dropout", "input_scale", "hue", "contrast", "saturation", "brightness")
    values = {name: torch.zeros(6) for name in (*names, "cutout_length", "cutout_holes")}
    x, y = images(), torch.arange(6)
    found, labels = change((x, y), values, generator())
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    assert labels is y
    as_mapping = change({"pixel_values": x, "labels": y}, values, generator())
    assert torch.equal(as_mapping["pixel_values"], found)


@pytest.mark.parametrize("part", ["hue", "contrast", "saturation", "brightness"])
def test_colours_change_in_the_rows_that_say_so(part: str) -> None:
    strength = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.5])
    names = {name: name if name == part else None for name in ("brightness", "contrast",
                                                               "saturation", "hue")}  # fmt: skip
    x = images()
    found, _ = ColourJitter(**names)((x, None), {part: strength}, generator())
    moved = (found - x).abs().flatten(1).amax(1) > 1e-3
    assert moved.tolist() == [False, True] * 3
    assert found.min() >= 0
    assert found.max() <= 1


@given(rgb=st.tuples(*[st.floats(0, 1)] * 3), turn=st.floats(-0.5, 0.5))
@settings(max_examples=100, deadline=None)
def test_turning_hue_is_that_of_the_standard_library(rgb, turn: float) -> None:
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    expected = colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)
    pixel = torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)
    found = turn_hue(pixel, torch.tensor(turn, dtype=torch.float64).view(1, 1, 1, 1))
    torch.testing.assert_close(found.flatten().tolist(), list(expected), rtol=0, atol=1e-6)


def test_cutout_has_the_length_and_number_of_its_row() -> None:
    values = {"cutout_length": torch.tensor([0.0, 3.0, 3.0, 40.0]),
              "cutout_holes": torch.tensor([4.0, 1.0, 0.0, 1.0])}  # fmt: skip
    x = torch.ones(4, 3, 32, 32)
    cut = [0, 0, 0, 0]
    for seed in range(20):
        found, _ = Cutout()((x, None), values, generator(seed))
        holes = (found == 0).sum(dim=(1, 2, 3)) // 3
        assert ((found == 0).all(1) == (found == 0).any(1)).all()
        cut = [max(a, int(b)) for a, b in zip(cut, holes, strict=True)]
    assert cut[0] == cut[2] == 0
    assert cut[1] == 9
    assert cut[3] > 32 * 16


def test_scale_noise_lies_between_its_bounds() -> None:
    x = torch.ones(4000, 1, 1, 1)
    found, _ = ScaleNoise()((x, None), {"input_scale": torch.tensor(0.25)}, generator())
    assert 0.8 <= found.min() < 0.805
    assert 1.245 < found.max() <= 1.25


def test_the_papers_fifteen_hyperparameters_start_where_it_starts_them() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 4), (4, 4), (4, 4), (4, 4), (4, 4)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Dropout()]
    layers += [nn.Flatten(), nn.Linear(4 * 32 * 32, 8), nn.Dropout(), nn.Linear(8, 8),
               nn.Dropout(), nn.Linear(8, 10)]  # fmt: skip
    model = nn.Sequential(*layers)
    drops = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout)]
    hparams = [HParam(f"drop{n}", 0.05, (0.0, 0.9), places=(n,)) for n in drops] + image_hparams()
    stn = SelfTuningNetwork(model, hparams)
    assert len(hparams) == 15
    start = stn.current()
    assert start["cutout_length"] == 4
    assert start["cutout_holes"] == 1
    assert all(v == pytest.approx(0.05) for n, v in start.items() if "cutout" not in n)
    batch = images(8, 32), torch.arange(8)
    stn.train_step(batch, torch.optim.SGD(stn.parameter_groups(), lr=0.01))
    before = stn.hyper.raw.detach().clone()
    stn.validation_step(batch)
    assert (stn.hyper.raw != before).all()  # the discrete ones too
    assert [p.name for p in image_hparams(["contrast"])] == ["contrast"]


def test_augmentation_of_something_else_is_refused() -> None:
    with pytest.raises(DataError, match="images"):
        PixelDropout()((torch.zeros(3, 4), None), {"input_dropout": torch.tensor(0.1)}, generator())


# The loop.


def rates() -> list[HParam]:
    return [HParam("input", 0.1, (0.0, 0.9), places=("0",)), HParam("hidden", 0.2, (0.0, 0.9))]


def loaders(seed: int = 0) -> tuple[DataLoader, DataLoader]:
    data = TensorDataset(*labelled(96))
    train, valid = Subset(data, range(64)), Subset(data, range(64, 96))
    return (
        DataLoader(train, 16, shuffle=True, generator=generator(seed)),
        DataLoader(valid, 8, shuffle=True),
    )


def built(**options: object) -> tuple[SelfTuningNetwork, torch.optim.Optimizer]:
    stn = SelfTuningNetwork(perceptron(), rates(), **options)  # type: ignore[arg-type]
    return stn, torch.optim.SGD(stn.parameter_groups(), lr=0.1, momentum=0.9)


def test_without_tuning_a_run_is_a_plain_training_loop_bit_for_bit() -> None:
    """Oracle 11, with the same random numbers in the same order."""
    stn, optimizer = built(tune=False, factor=False)
    train, valid = loaders()
    fit(stn, train, valid, optimizer, Plan(steps=12, seed=3))
    plain = perceptron()
    plain[0].p, plain[3].p = stn.current()["input"], stn.current()["hidden"]
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    train, _ = loaders()
    torch.manual_seed(3)
    for _ in range(3):
        for x, y in train:
            plain_optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            plain_optimizer.step()
    for name, parameter in plain.named_parameters():
        assert torch.equal(stn.model.get_parameter(name), parameter), name


def test_training_and_validation_alternate_after_the_warm_up(monkeypatch) -> None:
    stn, optimizer = built()
    calls = ""

    def note(letter: str, step):
        def noted(*args, **kwargs):
            nonlocal calls
            calls += letter
            return step(*args, **kwargs)

        return noted

    monkeypatch.setattr(stn, "train_step", note("t", stn.train_step))
    monkeypatch.setattr(stn, "validation_step", note("v", stn.validation_step))
    run = fit(stn, *loaders(), optimizer, Plan(9, warmup=3, train_steps=2, valid_steps=1))
    assert calls == "ttt" + "ttv" * 3
    assert [record.step for record in run.schedule.records] == [0, 5, 7, 9]
    assert len(run.losses) == 9
    calls = ""
    fit(stn, *loaders(), optimizer, Plan(4, train_steps=1, valid_steps=3))
    assert calls == "tvvv" * 4


def test_the_global_random_state_is_left_as_it_was() -> None:
    stn, optimizer = built()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    fit(stn, *loaders(), optimizer, Plan(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for seed in (0, 0, 1):
        stn, optimizer = built()
        runs.append(fit(stn, *loaders(), optimizer, Plan(6, seed=seed)).schedule)
    assert repr(runs[0]) == repr(runs[1])
    assert repr(runs[0]) != repr(runs[2])


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    plan = Plan(14, warmup=2, evaluate_every=5, seed=2)
    whole, optimizer = built()
    expected = fit(whole, *loaders(), optimizer, plan)

    class KilledError(Exception):
        pass

    def stop(record: Record) -> None:
        if record.step >= 8:
            raise KilledError

    file = tmp_path / "run.pt"
    first, optimizer = built()
    with pytest.raises(KilledError):
        fit(first, *loaders(), optimizer, plan, checkpoint=file, checkpoint_seconds=0,
            on_cycle=stop)  # fmt: skip
    again, optimizer = built(seed=5)
    found = fit(again, *loaders(9), optimizer, plan, checkpoint=file)
    assert repr(found.schedule) == repr(expected.schedule)
    assert (found.losses, found.evaluations) == (expected.losses, expected.evaluations)
    assert found.best_step == expected.best_step
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(found.best[name], expected.best[name])


@pytest.mark.parametrize("damage", ["truncated", "other plan", "other network"])
def test_a_checkpoint_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    stn, optimizer = built()
    fit(stn, *loaders(), optimizer, Plan(4), checkpoint=file, checkpoint_seconds=0)
    plan = Plan(4)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif damage == "other plan":
        plan = Plan(4, seed=1)
    else:
        stn, optimizer = built(factor=False)
    with pytest.raises(CheckpointError):
        fit(stn, *loaders(), optimizer, plan, checkpoint=file)


def test_evaluations_lower_the_rate_keep_the_best_and_stop(monkeypatch) -> None:
    stn, optimizer = built()
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.6, 2.7, 9.0])
    monkeypatch.setattr(stn, "evaluate", lambda batches: next(losses))
    plan = Plan(100, evaluate_every=2, decay=0.1, nonmono=1, patience=4)
    run = fit(stn, *loaders(), optimizer, plan)
    assert [loss for _, loss in run.evaluations] == [3.0, 2.0, 2.5, 2.4, 2.6, 2.7]
    assert (run.best_step, len(run.losses)) == (4, 12)
    assert "no better" in run.stopped
    # After 2.4, 2.6 and 2.7, all above the best but one evaluation ago; 2.5 is compared with 3.0.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**3)
    assert not torch.equal(run.best["model.1.weight"], stn.state_dict()["model.1.weight"])


def test_a_run_stops_at_its_least_learning_rate(monkeypatch) -> None:
    stn, optimizer = built()
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(stn, "evaluate", lambda batches: next(losses))
    plan = Plan(100, evaluate_every=1, decay=0.1, nonmono=0, min_lr=0.05)
    assert "learning rate" in fit(stn, *loaders(), optimizer, plan).stopped


def test_the_evaluation_is_the_mean_over_rows_at_lambda() -> None:
    stn, _ = built()
    x, y = labelled(30)
    whole = F.cross_entropy(stn.fold().eval()(x), y).item()
    stn.train()
    assert stn.evaluate([(x[:20], y[:20]), (x[20:], y[20:])]) == pytest.approx(whole, rel=1e-5)
    assert stn.model.training


@pytest.mark.parametrize("case", ["loader", "data set", "items"])
def test_validation_on_training_data_is_refused(case: str) -> None:
    stn, optimizer = built()
    train, _ = loaders()
    data = train.dataset.dataset
    valid = {
        "loader": train,
        "data set": DataLoader(train.dataset, 4),
        "items": DataLoader(Subset(data, range(60, 96)), 4),
    }[case]
    with pytest.raises(DataError, match="not trained on"):
        fit(stn, train, valid, optimizer, Plan(2))


@pytest.mark.parametrize("train", [[], iter([]), [("text",)]])
def test_data_without_rows_are_refused(train: object) -> None:
    stn, optimizer = built()
    with pytest.raises(DataError):
        fit(stn, train, loaders()[1], optimizer, Plan(2))


def test_an_optimiser_of_hyperparameters_or_without_responses_is_refused() -> None:
    stn, _ = built()
    everything = torch.optim.SGD(stn.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="without λ"):
        fit(stn, *loaders(), everything, Plan(2))
    part = torch.optim.SGD([stn.model[1].weight], lr=0.1)
    with pytest.raises(ConfigError, match="missing"):
        fit(stn, *loaders(), part, Plan(2))


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"warmup": -1}, {"train_steps": 0}, {"valid_steps": 0}, {"clip": 0.0},
     {"decay": 0.1}, {"decay": 2.0, "evaluate_every": 1}, {"patience": 3}, {"evaluate_every": 0},
     {"patience": 0, "evaluate_every": 1}],
)  # fmt: skip
def test_plans_that_cannot_work_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="Plan"):
        Plan(**({"steps": 4} | options))


def test_a_step_on_hyperparameters_needs_tuning() -> None:
    with pytest.raises(ConfigError, match="tune"):
        built(tune=False)[0].validation_step(labelled())


def test_gradients_are_clipped() -> None:
    stn, optimizer = built()
    stn.train_step(labelled(), optimizer, clip=1e-3)
    slopes = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = torch.stack([g.norm() for g in slopes if g is not None]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


# Schedules.


def test_a_replayed_schedule_gives_a_plain_network_the_same_values(tmp_path: Path) -> None:
    """Oracle 12, through a file, at every training step."""
    stn, optimizer = built(hyper_lr=0.1)
    in_force = []
    original = stn.train_step

    def train_step(*args, **kwargs) -> float:
        in_force.append(stn.current())
        return original(*args, **kwargs)

    stn.train_step = train_step
    run = fit(stn, *loaders(), optimizer, Plan(11, warmup=2))
    run.schedule.save(tmp_path / "schedule.csv")
    schedule = Schedule.load(tmp_path / "schedule.csv")
    assert repr(schedule) == repr(run.schedule)

    seen = []
    plain = RegularizedNetwork(perceptron(), rates())
    plain.model[1].register_forward_hook(
        lambda *_: seen.append({name: value.item() for name, value in plain.values.items()})
    )
    weights = torch.optim.SGD(plain.parameters(), lr=0.1)
    replay(plain, loaders()[0], weights, schedule, 11)
    assert seen == in_force
    assert len({tuple(values.values()) for values in seen}) == 5
    assert {type(m).__name__ for m in plain.plain(schedule(11)).modules()} == {
        "Sequential", "Dropout", "Linear", "Tanh"
    }  # fmt: skip
    assert plain.plain(schedule(11))[0].p == schedule(11)["input"]


def test_other_schedules() -> None:
    start = {"input": 0.1, "hidden": 0.2}
    assert constant(start)(7) == start
    swing = sinusoid(rates(), start, amplitude=0.15, period=1200)
    assert swing(0) == start
    assert swing(300) == pytest.approx({"input": 0.25, "hidden": 0.35})
    assert swing(900) == pytest.approx({"input": 0.0, "hidden": 0.05})  # cut to the range
    noisy = gaussian(rates(), {"input": 0.5, "hidden": 0.5}, std=0.05, seed=1)
    drawn = torch.tensor([list(noisy(step).values()) for step in range(500)])
    assert drawn.std(0).tolist() == pytest.approx([0.05, 0.05], rel=0.15)
    assert noisy(3) == noisy(3) != noisy(4)
    discrete = [HParam("length", 4, (0, 24), None, discrete=True)]
    assert sinusoid(discrete, {"length": 4}, amplitude=1.5, period=4)(1) == {"length": 5}


@pytest.mark.parametrize("content", [None, "", "step,train_loss\n1,2\n", "a,b\nx,y\n"])
def test_a_file_that_is_no_schedule_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CheckpointError, match=r"schedule\.csv"):
        Schedule.load(file)


def test_an_empty_schedule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one record"):
        Schedule()(0)
    with pytest.raises(ConfigError, match="at least one record"):
        draw_schedule(Schedule(), tmp_path / "none.png")


def test_a_schedule_is_replayed_on_plain_networks_with_its_names_alone() -> None:
    stn, optimizer = built()
    with pytest.raises(ConfigError, match="RegularizedNetwork"):
        replay(stn, loaders()[0], optimizer, constant(stn.current()), 2)
    plain = RegularizedNetwork(perceptron(), rates())
    weights = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="hidden"):
        replay(plain, loaders()[0], weights, constant({"input": 0.1}), 2)


def test_a_schedule_is_drawn_and_its_table_is_complete(tmp_path: Path) -> None:
    hparams = (*rates(), HParam("length", 4, (0, 24), None, discrete=True))
    scales = {"input": 0.5, "hidden": 0.4, "length": 0.3}
    records = [
        Record(step, {"input": 0.1 + step / 100, "hidden": 0.2, "length": 4.0 + step}, scales)
        for step in range(5)
    ]
    draw_schedule(Schedule(records), tmp_path / "schedule.png", hparams)
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    Schedule(records).save(tmp_path / "schedule.csv")
    with (tmp_path / "schedule.csv").open(newline="") as lines:
        header = next(csv.reader(lines))
    assert header == ["step", "train_loss", "validation_loss", "input", "hidden", "length",
                      "scale input", "scale hidden", "scale length"]  # fmt: skip
