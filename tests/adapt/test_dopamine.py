"""TauGate: the gate's algebra and gradients, modes, training, and where the gates sit."""

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sparing.adapt import (
    DopamineConfig,
    TunerCallback,
    calibrate_thresholds,
    hardening_gap,
    mode_vectors,
    set_gate,
)
from sparing.adapt._dopamine_gate import gated, soft_gate
from sparing.adapt.dopamine import GatedActivation, NeuronGate
from sparing.errors import ConfigError, DataError
from sparing.tuners import register_tuner  # noqa: F401  (PEFT knows our methods)

NEURONS = 12
numbers = st.floats(-6, 6, width=32)


def mlp(seed: int = 0, width: int = NEURONS) -> nn.Sequential:
    """The paper's kind of network: linear, ReLU, linear, ReLU, linear."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


def lively(model: nn.Module, scale: float = 12.0) -> nn.Module:
    """The model with feed-forward weights that matter, as in a trained one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name and parameter.dim() == 2:
                parameter.mul_(scale)
    return model


def relu_gpt2() -> nn.Module:
    model = small_gpt2()
    for block in model.transformer.h:
        block.mlp.act = nn.ReLU()
    return lively(model)


def adapted(base: nn.Module, noise: float = 0.0, **options: object) -> peft.PeftModel:
    if not hasattr(base, "config"):
        options = {"target_modules": ["1", "3"]} | options
    base.eval()
    model = peft.get_peft_model(base, DopamineConfig(**options))  # type: ignore[arg-type]
    perturb(model, noise)
    return model.eval()


def gate_of(model: nn.Module, place: int = 0, mode: str = "default") -> NeuronGate:
    return [m for m in model.modules() if isinstance(m, GatedActivation)][place].adapters[mode]


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one(value: float, neurons: int = NEURONS) -> Tensor:
    return torch.full((neurons,), value)


def shaped(
    z: Tensor, phi: nn.Module, tau: Tensor, gain: Tensor, s: float, hard: bool = False
) -> Tensor:
    return gated(z, phi(z), tau, gain, torch.tensor(s), hard=hard)


# The algebra of one gate.


@given(tau=st.floats(-5, 0), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_hard_gate_below_zero_leaves_relu_as_it_is(tau: float, seed: int) -> None:
    """Oracle 1, on one activation."""
    z = draw(5, NEURONS, seed=seed)
    y = shaped(z, nn.ReLU(), one(tau), one(1.0), 5.0, hard=True)
    assert torch.equal(y, F.relu(z))


@pytest.mark.parametrize("base", [mlp, relu_gpt2])
def test_a_new_hard_mode_on_relu_is_the_base_network_bit_by_bit(base) -> None:
    """Oracle 1, on whole networks."""
    network = base().eval()
    x = token_ids() if hasattr(network, "config") else draw(9, 6)
    before = network(x)
    after = adapted(network)(x)
    before, after = (getattr(y, "logits", y) for y in (before, after))
    assert torch.equal(before, after)


@given(s=st.floats(0.01, 100), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_far_thresholds_leave_gains_alone(s: float, seed: int) -> None:
    """Oracle 2: a = γ φ(z)."""
    z, gain = draw(5, NEURONS, seed=seed), draw(NEURONS, seed=seed + 1)
    for hard in (False, True):
        y = shaped(z, nn.SiLU(), one(-1e4), gain, s, hard)
        torch.testing.assert_close(y, gain * F.silu(z))


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_with_far_thresholds_it_is_ia3_on_the_feed_forward_network(make) -> None:
    """Oracle 2: peft's IA³ scales the input of the last layer."""
    last = "down_proj" if make is small_llama else "mlp.c_proj"
    ia3 = peft.get_peft_model(
        lively(make()), peft.IA3Config(target_modules=[last], feedforward_modules=[last])
    ).eval()
    model = adapted(lively(make()), tau_init=-1e4, learn="gain")
    perturb(model, 0.5)
    scales = [p for name, p in ia3.named_parameters() if "ia3_l" in name]
    with torch.no_grad():
        for place, scale in enumerate(scales):
            scale.copy_(gate_of(model, place).gain.view_as(scale))
    ids = token_ids()
    base = make()
    torch.testing.assert_close(model(ids).logits, ia3(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits, lively(base)(ids).logits, atol=1e-2)


def test_without_steepness_every_gate_is_half_open() -> None:
    """Oracle 3."""
    z, tau, gain = draw(5, NEURONS), draw(NEURONS, seed=1), draw(NEURONS, seed=2)
    y = shaped(z, nn.GELU(), tau, gain, 0.0)
    torch.testing.assert_close(y, 0.5 * gain * F.gelu(z))


@given(z=numbers, tau=numbers, s=st.floats(0.1, 200))
@settings(max_examples=100, deadline=None)
def test_soft_gates_near_hard_ones_exponentially(z: float, tau: float, s: float) -> None:
    """Oracle 4: |g - ĝ| <= exp(-s |z - τ|)."""
    z64, tau64 = torch.tensor([z]).double(), torch.tensor([tau]).double()
    gap = (soft_gate(z64, tau64, s) - (z64 > tau64).double()).abs().item()
    assert gap <= math.exp(-s * abs(z - tau)) + 1e-12


def test_a_threshold_is_not_a_bias() -> None:
    """Oracle 5: 1[z > τ] relu(z) is above relu(z - τ) by exactly τ on open units."""
    z, tau = draw(200, NEURONS).double(), draw(NEURONS, seed=1).abs().double()
    gate = shaped(z, nn.ReLU(), tau, one(1.0).double(), 5.0, hard=True)
    moved = (gate - F.relu(z - tau)).where(z > tau, 0.0)
    torch.testing.assert_close(moved, tau.expand_as(z).where(z > tau, 0.0))
    assert (moved > 0).any()


def test_gating_the_identity_at_zero_is_silu() -> None:
    """Oracle 6."""
    z = draw(50, NEURONS).double()
    y = shaped(z, nn.Identity(), one(0.0).double(), one(1.0).double(), 1.0)
    torch.testing.assert_close(y, F.silu(z), rtol=1e-14, atol=1e-15)


@given(low=numbers, rise=st.floats(0, 6, width=32), s=st.floats(0.1, 50), z=numbers)
@settings(max_examples=100, deadline=None)
def test_raising_a_threshold_never_opens_a_gate(low, rise, s, z) -> None:
    """Oracle 7."""
    at, lower = torch.tensor([z]), torch.tensor([low])
    higher = lower + rise
    assert soft_gate(at, higher, s) <= soft_gate(at, lower, s)
    assert (at > higher).item() <= (at > lower).item()


@pytest.mark.parametrize("hard", [False, True])
def test_gradients_are_those_of_the_formulas(hard: bool) -> None:
    """Oracle 10, and those for γ, z and φ(z); straight through the hard gate."""
    z, a, tau, gain = (
        draw(*shape, seed=seed).double().requires_grad_()
        for seed, shape in enumerate([(2, 3, NEURONS), (2, 3, NEURONS), (NEURONS,), (NEURONS,)])
    )
    s = torch.tensor(1.5).double()
    upstream = draw(2, 3, NEURONS, seed=9).double()
    gated(z, a, tau, gain, s, hard=hard).backward(upstream)
    with torch.no_grad():
        g = torch.sigmoid(s * (z - tau))
        passed = (z > tau).double() if hard else g
        through = s * g * (1 - g) * gain * a * upstream
        torch.testing.assert_close(tau.grad, -through.sum(dim=(0, 1)))
        torch.testing.assert_close(z.grad, through)
        torch.testing.assert_close(gain.grad, (passed * a * upstream).sum(dim=(0, 1)))
        torch.testing.assert_close(a.grad, passed * gain * upstream)


def test_gradients_of_the_soft_gate_are_autograds() -> None:
    """Oracle 10 against plain autograd through a whole network."""
    model = adapted(mlp().double(), 0.2, eval_gate="soft")
    x = draw(7, 6).double()
    model(x).square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    numbers = [(v[0].requires_grad_(), v[1].requires_grad_()) for v in mode_vectors(model).values()]
    base = mlp().double()
    h = x
    for layer, (tau, gain) in zip((base[0], base[2]), numbers, strict=True):
        z = layer(h)
        h = gain * torch.sigmoid(5.0 * (z - tau)) * F.relu(z)
    base[4](h).square().sum().backward()
    plain = [t.grad for pair in numbers for t in pair]
    for one_of_ours, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(one_of_ours, expected, rtol=1e-5, atol=1e-6)


def test_a_normalised_and_clipped_gate_could_not_learn_on_relu() -> None:
    """Why the specification's exact soft start, g / σ(-s τ0) clipped at 1, is not an option: each
    threshold's gradient is exactly zero, where `ste` starts exactly and learns."""
    z = draw(100, NEURONS)
    tau = one(-0.5).requires_grad_()
    clipped = (soft_gate(z, tau, 5.0) / torch.sigmoid(torch.tensor(2.5))).clamp(max=1.0)
    (clipped * F.relu(z)).sum().backward()
    assert not tau.grad.any()
    model = adapted(mlp(), train_gate="ste").train()
    assert torch.equal(model(draw(9, 6)), mlp()(draw(9, 6)))
    model(draw(9, 6)).sum().backward()
    assert gate_of(model).tau_change.grad.any()


def test_a_gate_does_not_hide_nan() -> None:
    z = torch.full((1, NEURONS), math.nan)
    for hard in (False, True):
        assert shaped(z, nn.ReLU(), one(0.0), one(1.0), 5.0, hard).isnan().all()


def test_16_bit_activations_are_gated_in_float32() -> None:
    """In bfloat16 z - τ would be rounded to a multiple of 1/64 here."""
    tau = one(2.0)
    z = (tau + torch.linspace(-0.03, 0.03, NEURONS)).to(torch.bfloat16)
    y = gated(z, z, tau + 1e-4, one(1.0), torch.tensor(50.0), hard=False)
    exact = soft_gate(z.double(), tau.double() + 1e-4, 50.0) * z.double()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.to(torch.bfloat16))


def test_gains_before_relu_are_gains_after_it_if_positive() -> None:
    """The two readings of the paper, equal by homogeneity, and not for GELU."""
    for phi, same in ((nn.ReLU(), True), (nn.GELU(), False)):
        ys = []
        for position in ("after", "before"):
            config = DopamineConfig(gain_position=position, tau_init=-0.5, eval_gate="soft")
            gate = NeuronGate(config, phi, NEURONS, "act").eval()
            with torch.no_grad():
                gate.gain_change.copy_(draw(NEURONS).abs())
            ys.append(gate(phi, draw(5, NEURONS, seed=1)))
        assert torch.allclose(*ys) is same


# Where the gates sit, and what they cost.


def test_llama_7b_needs_704512_numbers_a_mode() -> None:
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig())
        model = peft.get_peft_model(base, DopamineConfig())
    assert model.get_nb_trainable_parameters()[0] == 704_512 == 2 * 32 * 11_008


@pytest.mark.parametrize(("learn", "share"), [("both", 2), ("tau", 1), ("gain", 1)])
def test_trainable_are_two_numbers_a_neuron(learn: str, share: int) -> None:
    """Oracle 11: 2Σh."""
    model = adapted(small_llama(), learn=learn)
    assert model.get_nb_trainable_parameters()[0] == share * 2 * 48


def test_in_swiglu_the_gate_covers_both_paths() -> None:
    """a = γ ⊙ σ(s (z - τ)) ⊙ silu(z) ⊙ up(x), with z = gate_proj(x)."""
    model = adapted(lively(small_llama()), 0.3, eval_gate="soft")
    block = model.get_base_model().model.layers[0].mlp
    tau, gain = next(iter(mode_vectors(model).values()))
    x = draw(2, 5, 32)
    z = block.gate_proj(x)
    hidden = gain * torch.sigmoid(2.0 * (z - tau)) * F.silu(z) * block.up_proj(x)
    torch.testing.assert_close(block(x), block.down_proj(hidden), rtol=1e-4, atol=1e-5)


BERT = transformers.BertConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=64
)
VIT = transformers.ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8,
    patch_size=4,
)  # fmt: skip
QWEN = transformers.Qwen2Config(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=24, vocab_size=64,
)  # fmt: skip


@pytest.mark.parametrize("config", [BERT, VIT, QWEN], ids=lambda c: c.model_type)
def test_other_transformers_are_gated_too(config) -> None:
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(config).eval()
    given = {"pixel_values": draw(2, 3, 8, 8)}
    given = given if config is VIT else {"input_ids": token_ids()}
    before = base(**given).last_hidden_state
    model = adapted(lively(base, 1.0))
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 24
    torch.testing.assert_close(model(**given).last_hidden_state, before, rtol=1e-4, atol=1e-4)
    perturb(model, 1.0)
    assert not torch.allclose(model(**given).last_hidden_state, before, atol=1e-4)


def test_layers_gates_the_last_ones() -> None:
    model = adapted(small_llama(), layers=1)
    assert list(mode_vectors(model)) == ["model.layers.1.mlp.act_fn"]
    assert adapted(small_llama(), layers_to_transform=[0]).peft_config[
        "default"
    ].target_modules == {"model.layers.0.mlp.act_fn"}
    with pytest.raises(ConfigError, match="at most 2"):
        adapted(small_llama(), layers=3)


def test_defaults_follow_the_activation() -> None:
    relu, silu = gate_of(adapted(mlp())), gate_of(adapted(small_llama()))
    assert (relu.tau_init, relu.first_steepness) == (-0.5, 5.0)
    assert (silu.tau_init, silu.first_steepness) == (-4.0, 2.0)


def test_a_model_without_a_feed_forward_activation_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)  # its activation is a function
    with pytest.raises(ConfigError, match="feed-forward"):
        peft.get_peft_model(nn.TransformerEncoder(layer, 2), DopamineConfig())


def test_only_activations_are_gated() -> None:
    with pytest.raises(ConfigError, match="up_proj"):
        adapted(small_llama(), target_modules=["up_proj"])


class OneReLU(nn.Module):
    """A network whose layers are not in the order of their use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 6), nn.Linear(6, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


def test_a_width_that_cannot_be_told_is_named_by_the_error_and_can_be_given() -> None:
    model = adapted(OneReLU(), target_modules=["act"])
    with pytest.raises(ConfigError, match=r"widths=\{'act': 6\}"):
        model(draw(2, 4))
    model = adapted(OneReLU(), target_modules=["act"], widths={"act": 6})
    assert torch.equal(model(draw(2, 4)), model.get_base_model()(draw(2, 4)))
    assert gate_of(model).neurons == 6
    with pytest.raises(ConfigError, match="width"):
        adapted(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), target_modules=["0"])


@pytest.mark.parametrize(
    "options",
    [
        {"train_gate": "hard"},
        {"eval_gate": "ste"},
        {"learn": "bias"},
        {"tau_scale": "mean"},
        {"gain_position": "inside"},
        {"steepness": 0.0},
        {"final_steepness": -1.0},
        {"tau_init": -math.inf},
        {"sparsity": -0.1},
        {"max_gain": 0.0},
        {"layers": 0},
        {"widths": {"act": 0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_refused_by_name(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"DopamineConfig.{next(iter(options))}"):
        DopamineConfig(**options)


# Modes.


def two_modes(base: nn.Module, **options: object) -> peft.PeftModel:
    model = adapted(base, 0.4, **options)
    targets = model.peft_config["default"].target_modules
    model.add_adapter("other", DopamineConfig(target_modules=targets, **options))
    model.set_adapter("other")
    perturb(model, 0.4, seed=1)
    model.set_adapter("default")
    return model


def test_switching_to_another_mode_and_back_restores_the_outputs() -> None:
    """Oracle 12."""
    model, ids = two_modes(lively(small_llama())), token_ids()
    first = model(ids).logits
    model.set_adapter("other")
    second = model(ids).logits
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_a_mode_for_each_row_equals_each_mode_alone(gate: str) -> None:
    """Oracle 14, "__base__" included."""
    model, ids = two_modes(lively(small_llama()), eval_gate=gate), token_ids(rows=3)
    names = ["other", "__base__", "default"]
    mixed = model(ids, adapter_names=names).logits
    with torch.no_grad():
        for row, name in enumerate(names):
            model.set_adapter(name if name != "__base__" else "default")
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(ids).logits
            else:
                alone = model(ids).logits
            assert torch.equal(mixed[row], alone[row])
    assert not torch.allclose(model(ids).logits, mixed, atol=1e-3)


def test_rows_of_a_plain_network_and_beams_find_their_modes() -> None:
    model = two_modes(mlp())
    x = draw(4, 6)
    mixed = model(x, adapter_names=["default", "default", "other", "other"])
    assert torch.equal(mixed[:2], model(x)[:2])
    language = two_modes(lively(small_llama()))
    ids = token_ids(rows=2)
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    mixed = language.generate(input_ids=ids, adapter_names=["default", "other"], **options)
    alone = language.generate(input_ids=ids, **options)
    assert torch.equal(mixed[0, :17], alone[0, :17])


@pytest.mark.parametrize(
    ("names", "message"),
    [(["default", "othr"], "other"), (["default"] * 3, "3 names for 4 rows")],
)
def test_bad_modes_of_rows_are_refused(names: list[str], message: str) -> None:
    model = two_modes(mlp())
    with pytest.raises(ConfigError, match=message):
        model(draw(4, 6), adapter_names=names)
    assert model(draw(4, 6)).shape == (4, 3)  # and leave nothing behind


def test_modes_of_rows_have_one_kind_of_gate_and_do_not_train() -> None:
    model = two_modes(mlp())
    set_gate(model, "soft", "other")
    with pytest.raises(ConfigError, match="set_gate"):
        model(draw(2, 6), adapter_names=["default", "other"])
    with pytest.raises(ConfigError, match="training"):
        model.train()(draw(2, 6), adapter_names=["default", "default"])


def test_an_unknown_mode_is_refused_with_the_nearest_name() -> None:
    model = two_modes(mlp())
    for ask in (lambda: mode_vectors(model, "othr"), lambda: set_gate(model, "soft", "othr")):
        with pytest.raises(ConfigError, match="Did you mean other"):
            ask()


def test_several_active_modes_multiply() -> None:
    model = two_modes(mlp(), eval_gate="soft")
    (tau, gain), (tau2, gain2) = (
        next(iter(mode_vectors(model, name).values())) for name in ("default", "other")
    )
    model.base_model.set_adapter(["default", "other"])
    wrapper = next(m for m in model.modules() if isinstance(m, GatedActivation))
    z = draw(5, NEURONS)
    expected = gain * gain2 * soft_gate(z, tau, 5.0) * soft_gate(z, tau2, 5.0) * F.relu(z)
    torch.testing.assert_close(wrapper(z), expected)


# Hard and soft.


def test_training_is_soft_and_evaluation_hard_by_default() -> None:
    model = adapted(mlp(), 0.5)
    x = draw(9, 6)
    tau, gain = next(iter(mode_vectors(model).values()))
    z = model.get_base_model()[0](x)
    wrapper = next(m for m in model.modules() if isinstance(m, GatedActivation))
    torch.testing.assert_close(wrapper(z), gain * (z > tau) * F.relu(z))
    model.train()
    torch.testing.assert_close(wrapper(z), gain * soft_gate(z, tau, 5.0) * F.relu(z))


def test_a_mode_added_to_a_model_in_evaluation_is_in_evaluation() -> None:
    model = two_modes(mlp())
    assert not gate_of(model, mode="other").training


def test_the_kind_of_gate_is_saved(tmp_path) -> None:
    model = adapted(lively(small_llama()), 0.4)
    set_gate(model, "soft")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(lively(small_llama()), tmp_path).eval()
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_hard_gates_are_refused_in_training_unless_straight_through() -> None:
    model = adapted(mlp()).train()
    with pytest.raises(ConfigError, match="no gradient"):
        set_gate(model, "hard")
    set_gate(adapted(mlp(), train_gate="ste").train(), "hard")
    with pytest.raises(ConfigError, match="'hard' or 'soft'"):
        set_gate(model, "firm")  # type: ignore[arg-type]


def test_the_gap_of_hardening_closes_with_steepness() -> None:
    model, x = adapted(mlp(), 0.5), [draw(64, 6)]
    gaps = []
    for s in (1.0, 5.0, 1000.0):
        for place in (0, 1):
            gate_of(model, place).steepness.fill_(s)
        gaps.append(hardening_gap(model, x))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.01
    assert gate_of(model).eval_gate == "hard"
    with pytest.raises(DataError):
        hardening_gap(model, [])
    with pytest.raises(DataError, match="tuple"):
        hardening_gap(model, [(x[0], x[0])])


# Training.


def fit(model: nn.Module, steps: int = 60, lr: float = 0.03, decay: float = 0.0) -> list[float]:
    torch.manual_seed(0)
    x, target = draw(64, 6, scale=1.0), draw(64, 3, seed=3)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
    losses = []
    model.train()
    for step in range(steps):
        loss = F.mse_loss(model(x), target)
        extra = model.base_model.auxiliary_loss()
        total = loss if extra is None else loss + extra
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        model.base_model.after_step(step + 1, steps, optimizer)
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("train_gate", ["soft", "ste"])
def test_training_leaves_the_base_alone_bit_by_bit(train_gate: str) -> None:
    """Oracle 11."""
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    model = adapted(base, train_gate=train_gate)
    losses = fit(model)
    assert losses[-1] < losses[0] - 0.05
    after = model.unload().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_strong_penalty_closes_everything_but_the_biases() -> None:
    """Oracle 13."""
    model = adapted(mlp(), sparsity=100.0)
    fit(model, steps=400, lr=0.1)
    x = draw(64, 6, scale=1.0)
    biases = model.get_base_model()[4].bias
    torch.testing.assert_close(model(x), biases.expand(64, 3))
    soft = model.train()(x)
    torch.testing.assert_close(soft, biases.expand(64, 3), rtol=0, atol=0.02)


def test_the_penalty_is_the_mean_gate_summed_over_layers_without_padding() -> None:
    """Eq. 5."""
    model = adapted(lively(small_llama()), 0.5, sparsity=0.3, task_type="CAUSAL_LM").train()
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    seen = []
    for wrapper in (m for m in model.modules() if isinstance(m, GatedActivation)):
        gate = wrapper.adapters["default"]
        wrapper.register_forward_hook(
            lambda module, inputs, output, gate=gate: seen.append(
                soft_gate(inputs[0], gate.tau, gate.steepness)[mask.bool()].mean()
            )
        )
    loss = model(ids, attention_mask=mask, labels=ids).loss
    extra = model.base_model.auxiliary_loss()
    torch.testing.assert_close(extra, 0.3 * sum(seen))
    plain = adapted(lively(small_llama()), 0.5, task_type="CAUSAL_LM").train()
    torch.testing.assert_close(
        loss, plain(ids, attention_mask=mask, labels=ids).loss + extra, rtol=1e-5, atol=1e-5
    )
    assert model.eval()(ids, labels=ids).loss is not None
    assert model.base_model.auxiliary_loss() is None


def test_annealing_ends_at_the_final_steepness_which_is_saved(tmp_path) -> None:
    """Eq. 6: s_t = s (s_T / s)^(t/T)."""
    model = adapted(lively(small_llama()), 0.4, final_steepness=32.0, eval_gate="soft")
    model.base_model.after_step(5, 10, None)
    assert gate_of(model).steepness.item() == pytest.approx(math.sqrt(2.0 * 32.0))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(lively(small_llama()), tmp_path).eval()
    assert torch.equal(gate_of(loaded).steepness, gate_of(model).steepness)
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    model.base_model.after_step(10, 10, None)
    assert gate_of(model, 1).steepness.item() == pytest.approx(32.0)


def test_weight_decay_pulls_to_the_base_and_not_to_zero() -> None:
    model = adapted(mlp(), 0.3)
    away = sum((g - 1).abs().sum() + (t + 0.5).abs().sum() for t, g in mode_vectors(model).values())
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=1.0)
    for parameter in weights:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = sum(
        (g - 1).abs().sum() + (t + 0.5).abs().sum() for t, g in mode_vectors(model).values()
    )
    assert after.item() == pytest.approx(0.9 * away.item(), rel=1e-4)


def test_gains_can_be_kept_in_a_range() -> None:
    model = adapted(mlp(), 5.0, max_gain=2.0)
    model.base_model.after_step(1, 10, None)
    gains = torch.cat([gain for _, gain in mode_vectors(model).values()])
    assert gains.min() == 0
    assert gains.max() == 2


def test_a_saturated_gate_has_no_gradient_and_the_default_does() -> None:
    """A pitfall: |s (z - τ)| > 8 everywhere is a dead threshold."""
    x = draw(64, 6)
    for tau_init, alive in ((-50.0, False), (None, True)):
        model = adapted(mlp(), tau_init=tau_init).train()
        model(x).sum().backward()
        gradient = gate_of(model).tau_change.grad.abs().max().item()
        assert (gradient > 1e-6) is alive


def test_trainer_trains_and_anneals_a_language_model(tmp_path) -> None:
    model = adapted(lively(small_llama()), final_steepness=20.0, task_type="CAUSAL_LM")
    ids = token_ids(rows=16)
    items = [{"input_ids": row, "labels": row} for row in ids]
    before = model(ids, labels=ids).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=8, learning_rate=3e-2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=items, callbacks=[TunerCallback()]).train()
    assert model.eval()(ids, labels=ids).loss.item() < before - 0.01
    assert gate_of(model).steepness.item() == pytest.approx(20.0)


# Calibration.


def test_calibrated_thresholds_are_in_units_of_the_neurons_spread() -> None:
    model = adapted(mlp(), tau_scale="std", tau_init=-1.0)
    x = draw(600, 6)
    with pytest.raises(ConfigError, match="calibrate_thresholds"):
        model(x)
    calibrate_thresholds(model, [x[:300], x[300:]], samples=600)
    spread = model.get_base_model()[0](x).std(dim=0, correction=0)
    tau, _ = mode_vectors(model)["1"]
    torch.testing.assert_close(tau, -spread, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), mlp()(x))


def test_calibration_is_saved_with_the_mode(tmp_path) -> None:
    model = adapted(lively(small_llama()), 0.3, tau_scale="std")
    calibrate_thresholds(model, [token_ids(rows=8)], samples=50)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(lively(small_llama()), tmp_path).eval()
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_calibration_needs_its_option_and_data() -> None:
    with pytest.raises(ConfigError, match="tau_scale"):
        calibrate_thresholds(adapted(mlp()), [draw(9, 6)])
    with pytest.raises(DataError, match="two samples"):
        calibrate_thresholds(adapted(mlp(), tau_scale="std"), [draw(1, 6)])
