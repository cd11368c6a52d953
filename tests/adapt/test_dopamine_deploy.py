"""TauGate after training: which neurons a mode uses, and what it becomes without PEFT."""

import csv
import json
import math

import peft
import pytest
import torch
from conftest import perturb, small_gpt2, small_llama, token_ids
from test_dopamine import adapted, draw, gate_of, lively, mlp, two_modes
from torch import Tensor, nn

from sparing.adapt import (
    close_neurons,
    fold_gains,
    hard_model,
    load_hard_model,
    mode_vectors,
    neuron_attribution,
    prune_neurons,
    save_hard_model,
    set_gate,
    skip_closed_neurons,
)
from sparing.adapt.dopamine import GatedActivation
from sparing.adapt.dopamine_hard_model import HardGate
from sparing.errors import CheckpointError, ConfigError, DataError

MODELS = [small_llama, small_gpt2]


def language(make, noise: float = 0.3, closed: int = 7, **options: object) -> peft.PeftModel:
    """A model with a mode whose thresholds cut into the data, and some closed neurons."""
    model = adapted(lively(make()).double(), noise, **{"tau_init": -0.3, **options})
    with torch.no_grad():
        for place in (0, 1):
            change = gate_of(model, place).tau_change
            if change is not None:
                change[:closed] = math.inf
    return model


# Attribution.


def test_participation_and_strength_are_what_eq_7_says() -> None:
    model, x = adapted(mlp(), 0.5), draw(40, 6)
    found = neuron_attribution(model, [x[:10], x[10:]])
    (tau, gain), _ = mode_vectors(model).values()
    z = model.get_base_model()[0](x)
    usage = found.of("default")["1"]
    open_ = (z > tau).double()
    torch.testing.assert_close(usage.participation, open_.mean(0))
    strength = (gain * open_ * z.relu()).abs().mean(0)
    torch.testing.assert_close(usage.strength, strength.double(), rtol=1e-5, atol=1e-6)
    soft = torch.sigmoid(5.0 * (z - tau)).double().mean(0)
    torch.testing.assert_close(usage.gate, soft, rtol=1e-5, atol=1e-6)
    assert found.samples == 40
    shares = torch.cat([u.participation for u in found.of("default").values()])
    assert found.open_share("default") == pytest.approx(shares.mean().item())


def test_a_threshold_of_one_half_is_the_hard_gate_and_a_higher_one_counts_less() -> None:
    model, x = adapted(mlp(), 0.5), [draw(40, 6)]
    half, most = (
        neuron_attribution(model, x, threshold=t).open_share("default") for t in (0.5, 0.9)
    )
    assert most < half
    for wrong in (0.0, 1.0):
        with pytest.raises(ConfigError, match="threshold"):
            neuron_attribution(model, x, threshold=wrong)


def test_the_base_is_counted_with_fresh_thresholds_and_without_gates() -> None:
    model, x = adapted(mlp(), 0.5), draw(40, 6)
    found = neuron_attribution(model, [x])
    second = mlp()[:3](x)
    expected = (second > -0.5).double().mean(0)
    torch.testing.assert_close(found.of("__base__")["3"].participation, expected)
    change = found.change("default")["3"]
    torch.testing.assert_close(change, found.of("default")["3"].participation - expected)
    fresh = neuron_attribution(adapted(mlp()), [x])
    assert not any(values.any() for values in fresh.change("default").values())


def test_padding_does_not_count() -> None:
    model = adapted(lively(small_llama()), 0.5)
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    padded = neuron_attribution(model, [{"input_ids": ids, "attention_mask": mask}])
    plain = neuron_attribution(model, [ids[:, :8]])
    assert padded.samples == plain.samples == 16
    for layer, usage in plain.of("default").items():
        torch.testing.assert_close(usage.participation, padded.of("default")[layer].participation)


def test_attribution_leaves_the_model_as_it_was() -> None:
    model, x = two_modes(mlp()), draw(9, 6)
    set_gate(model, "soft")
    model.train()
    before = model(x)
    neuron_attribution(model, [x], ["other", "default"])
    assert model.training
    assert torch.equal(model(x), before)
    assert gate_of(model).eval_gate == "soft"


def test_the_table_names_every_neuron_once(tmp_path) -> None:
    model = two_modes(mlp())
    with torch.no_grad():
        gate_of(model).tau_change[0] = math.inf
    found = neuron_attribution(model, [draw(30, 6)], ["default", "other"])
    found.write_csv(tmp_path / "neurons.csv")
    found.write_json(tmp_path / "neurons.json")
    rows = list(csv.DictReader((tmp_path / "neurons.csv").open()))
    assert len({(row["mode"], row["layer"], row["neuron"]) for row in rows}) == len(rows) == 72
    content = json.loads((tmp_path / "neurons.json").read_text())
    assert content["threshold"] == 0.5
    assert content["samples"] == 30
    assert content["neurons"][24]["tau"] == "inf"
    assert [float(row["participation"]) for row in rows] == [
        neuron["participation"] for neuron in content["neurons"]
    ]


def test_the_neurons_that_differ_most_come_first() -> None:
    model = adapted(mlp())
    with torch.no_grad():
        gate_of(model, 1).tau_change[4] = math.inf
    first, *_ = neuron_attribution(model, [draw(30, 6)]).differences("default")
    assert (first.layer, first.neuron) == ("3", 4)
    assert first.change < 0


def test_heat_maps_are_drawn_for_modes_and_for_changes(tmp_path) -> None:
    from matplotlib.image import imread

    found = neuron_attribution(adapted(mlp(width=700), 0.5), [draw(30, 6)])
    found.write_heat_map(tmp_path / "mode.png", "default")
    found.write_heat_map(tmp_path / "change.png", "default", "__base__")
    pictures = [imread(tmp_path / name) for name in ("mode.png", "change.png")]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


def test_bad_requests_for_an_attribution_are_refused() -> None:
    model = adapted(mlp())
    with pytest.raises(ConfigError, match="default"):
        neuron_attribution(model, [draw(4, 6)], ["defalt"])
    with pytest.raises(DataError, match="at least one"):
        neuron_attribution(model, [])
    with pytest.raises(ConfigError, match="default"):
        neuron_attribution(model, [draw(4, 6)]).of("other")


# Gains into the weights.


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("make", MODELS)
def test_folded_gains_give_the_same_logits(make, gate: str) -> None:
    """Oracle 8, in float64."""
    model, ids = language(make, closed=0, eval_gate=gate), token_ids()
    before = model(ids).logits
    old = model.get_base_model().state_dict()
    old = {key: tensor.clone() for key, tensor in old.items()}
    fold_gains(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)
    assert all((gain == 1).all() for _, gain in mode_vectors(model).values())
    new = model.get_base_model().state_dict()
    changed = {key for key in old if "dopamine" not in key and not torch.equal(old[key], new[key])}
    assert len(changed) == 2
    assert all("down_proj" in key or "c_proj" in key for key in changed)


def test_gains_fold_through_dropout_but_not_through_normalisation() -> None:
    """The specification counts dropout among what stops a gain; but it acts on each neuron alone,
    so that W (m ⊙ γ ⊙ a) = W diag(γ) (m ⊙ a) for every mask m, in training too."""

    def network(between: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), between, nn.Linear(8, 2)).double()

    model = adapted(network(nn.Dropout(0.5)), 0.4, target_modules=["1"]).train()
    x = draw(50, 6).double()
    torch.manual_seed(1)
    before = model(x)
    fold_gains(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="LayerNorm"):
        fold_gains(adapted(network(nn.LayerNorm(8)), 0.4, target_modules=["1"]))


class Named(nn.Module):
    """A network without blocks whose reader of the neurons has to be named."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


def test_the_reader_of_the_neurons_can_be_named() -> None:
    model, x = adapted(Named().double(), 0.4, target_modules=["act"]), draw(9, 6).double()
    before = model(x)
    with pytest.raises(ConfigError, match="into="):
        fold_gains(model)
    fold_gains(model, into={"act": "second"})
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_gains_before_gelu_do_not_fold_and_before_relu_do() -> None:
    gelu = adapted(lively(small_gpt2()), 0.1, gain_position="before")
    with pytest.raises(ConfigError, match="gain_position"):
        fold_gains(gelu)
    relu, x = adapted(mlp().double(), 0.1, gain_position="before"), draw(9, 6).double()
    before = relu(x)
    fold_gains(relu)
    torch.testing.assert_close(relu(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", [fold_gains, prune_neurons, hard_model])
def test_weights_that_several_modes_share_are_not_changed(act) -> None:
    with pytest.raises(ConfigError, match="default, other"):
        act(two_modes(mlp()))


def test_merging_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(ConfigError, match=r"depends on its input.*fold_gains.*prune_neurons"):
        adapted(mlp()).merge_and_unload()


# Closed neurons.


@pytest.mark.parametrize("learn", ["both", "tau", "gain"])
@pytest.mark.parametrize("make", MODELS)
def test_closing_neurons_that_never_fire_changes_no_bit(make, learn: str) -> None:
    """Oracle 9."""
    model = language(make, closed=0, learn=learn, tau_init=2.5)
    batches = [token_ids(seed=seed) for seed in (0, 1)]
    before = [model(ids).logits for ids in batches]
    counts = close_neurons(model, neuron_attribution(model, batches))
    assert sum(counts.values()) > 5
    for ids, logits in zip(batches, before, strict=True):
        assert torch.equal(model(ids).logits, logits)


def test_only_shares_below_one_are_closed() -> None:
    model = adapted(mlp(), 0.5)
    with pytest.raises(ConfigError, match="at_most"):
        close_neurons(model, neuron_attribution(model, [draw(9, 6)]), at_most=1.0)


@pytest.mark.parametrize("make", MODELS)
def test_pruning_takes_closed_neurons_out_of_all_layers_around(make) -> None:
    model, ids = language(make), token_ids()
    before, total = model(ids).logits, model.num_parameters()
    hidden = 48 if make is small_llama else 128
    left = prune_neurons(model)
    assert set(left.values()) == {hidden - 7}
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)
    biases = 0 if make is small_llama else 1
    matrices = 3 if make is small_llama else 2
    assert total - model.num_parameters() == 2 * 7 * (32 * matrices + biases + 2)
    model.train()(ids).logits.sum().backward()  # and it can still be trained
    assert gate_of(model).tau_change.grad.shape == (hidden - 7,)


def test_a_layer_whose_neurons_are_all_closed_keeps_one_that_stays_closed() -> None:
    model, x = adapted(mlp(), 0.5), draw(9, 6)
    with torch.no_grad():
        gate_of(model, 1).tau_change.fill_(math.inf)
    before = model(x)
    assert prune_neurons(model) == {"1": 12, "3": 1}
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(hard_model(model)(x), before)


# A plain model.


@pytest.mark.parametrize("make", MODELS)
def test_a_hard_model_is_plain_computes_the_same_and_survives_a_file(make, tmp_path) -> None:
    model, ids = language(make), token_ids()
    before = model(ids).logits
    plain = hard_model(model)
    assert type(plain) is type(make())
    assert not [m for m in plain.modules() if isinstance(m, GatedActivation)]
    torch.testing.assert_close(plain(ids).logits, before, rtol=1e-6, atol=1e-6)
    save_hard_model(plain, tmp_path / "hard.safetensors")
    loaded = load_hard_model(make().double(), tmp_path / "hard.safetensors").eval()
    assert torch.equal(loaded(ids).logits, plain(ids).logits)


def test_thresholds_below_zero_vanish_with_relu() -> None:
    model, x = adapted(mlp(), 0.1), draw(9, 6)
    before = model(x)
    plain = hard_model(model)
    assert [type(m) for m in plain] == [type(m) for m in mlp()]
    torch.testing.assert_close(plain(x), before)


def test_a_damaged_or_foreign_file_is_refused(tmp_path) -> None:
    file = tmp_path / "hard.safetensors"
    save_hard_model(hard_model(language(small_llama)), file)
    with pytest.raises(CheckpointError, match="GPT2"):
        load_hard_model(small_gpt2(), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="safetensors"):
        load_hard_model(small_llama(), file)
    with pytest.raises(CheckpointError, match="hard"):
        load_hard_model(small_llama(), tmp_path / "not_hard")


# Conditional computation.


def reading(model: nn.Module) -> list[int]:
    """How many rows and columns of weights the sparse products of a forward read."""
    counts: list[int] = []
    plain = torch.nn.functional.embedding_bag
    sampled = torch.sparse.sampled_addmm

    def counted_bag(columns: Tensor, *args: object, **kwargs: object) -> Tensor:
        counts.append(len(columns))
        return plain(columns, *args, **kwargs)

    def counted_sampled(pattern: Tensor, *args: object, **kwargs: object) -> Tensor:
        counts.append(pattern._nnz())
        return sampled(pattern, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "embedding_bag", counted_bag)
        patch.setattr(torch.sparse, "sampled_addmm", counted_sampled)
        model(token_ids(rows=1, length=2))
    return counts


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_skipping_reads_open_neurons_only_and_gives_equal_outputs(make, plain: bool) -> None:
    model = language(make, closed=20, tau_init=0.2)
    if plain:
        model = hard_model(model)
    ids = token_ids(rows=1, length=2)
    with torch.no_grad():
        before = model(ids).logits
        with skip_closed_neurons(model, most_open=1.0):
            after = model(ids).logits
            counts = reading(model)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    opens = []
    for module in model.modules():
        if isinstance(module, GatedActivation | HardGate):
            module.register_forward_hook(lambda m, i, o: opens.append(int((o != 0).sum())))
    model(ids)
    each = 2 if make is small_llama else 1  # rows of up_proj, then columns of down_proj
    assert counts == [count for count in opens for _ in range(each)]


def test_skipping_leaves_the_model_as_it_was() -> None:
    model, ids = language(small_llama), token_ids(rows=1, length=2)
    with torch.no_grad():
        before = model(ids).logits
        weights = {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
        with skip_closed_neurons(model):
            model(ids)
        assert torch.equal(model(ids).logits, before)
        assert reading(model) == []
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key][0])
        assert tensor.stride() == weights[key][1]


def test_skipping_generates_the_same_tokens() -> None:
    model = language(small_llama, closed=30)
    options = {"max_new_tokens": 8, "do_sample": False, "input_ids": token_ids(rows=1)}
    dense = model.generate(**options)
    with skip_closed_neurons(model, most_open=1.0):
        assert torch.equal(model.generate(**options), dense)


def test_large_inputs_full_ones_and_gradients_are_multiplied_as_ever() -> None:
    model = language(small_llama, closed=48)  # nothing is open
    small = token_ids(rows=1, length=2)
    with skip_closed_neurons(model):
        assert reading(model) == [0, 0, 0, 0]
        model(small).logits.sum().backward()
    with skip_closed_neurons(model, tokens=1):
        assert reading(model) == []
    full = language(small_llama, closed=0, tau_init=-1e4)
    with skip_closed_neurons(full):
        assert reading(full) == []


def test_bad_requests_for_skipping_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokens"), skip_closed_neurons(language(small_llama), 0):
        pass
    with pytest.raises(ConfigError, match="gated activations"), skip_closed_neurons(small_llama()):
        pass


def test_perturbed_modes_in_these_tests_differ_from_the_base() -> None:
    """The oracles above would hold for gates that do nothing."""
    model, ids = language(small_llama), token_ids()
    perturb(model, 0.0)
    with torch.no_grad():
        changed = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(changed, model(ids).logits, atol=1e-2)
