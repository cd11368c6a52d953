"""HyperP: matrices stay on their spheres, the law and its counts are exact, √g keeps variances."""

import copy
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.errors import ConfigError
from sparing.routing import balance_loss, sparse_softmax, sqrt_gate
from sparing.scale.hyperp import (
    HyperP,
    hyperp_param_groups,
    hyperp_plan,
    ladder_flops_per_token,
    ladder_parameters,
    ladder_tokens,
)
from sparing.scale.matrix_optimizer import NotFiniteError
from sparing.scale.muon import Muon
from sparing.scale.muon_h import AdamH, MuonH, sphere_step
from sparing.scale.sqrt_gate import install_sqrt_gate

DEPTHS = (8, 12, 16, 20, 24)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(tensor.detach().double())


def llama(width: int = 32, layers: int = 2, tied: bool = False) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=19, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def mixtral() -> transformers.MixtralForCausalLM:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=19, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip


# The law and the ladder


def test_the_laws_table():
    found = [HyperP(1.0).lr(depth=d, tokens=ladder_tokens(d)) for d in DEPTHS]
    assert found == pytest.approx([1, 0.591439, 0.399621, 0.292647, 0.226109], abs=1e-6)


def test_the_ladders_counts():
    assert [ladder_parameters(d) for d in DEPTHS] == [
        208_142_336, 570_163_200, 1_238_368_256, 2_313_420_800, 3_895_984_128,
    ]  # fmt: skip
    assert [int(ladder_tokens(d)) for d in DEPTHS[1:]] == [
        28_488_664_987, 61_876_070_528, 115_591_939_546, 194_665_994_962,
    ]  # fmt: skip
    assert ladder_flops_per_token(8) * ladder_tokens(8) == pytest.approx(2.136e19, rel=1e-3)
    assert ladder_flops_per_token(24) * ladder_tokens(24) == pytest.approx(5.961e21, rel=1e-3)


def test_each_factor_of_the_law():
    law = HyperP(0.01)
    assert law.lr(batch=4 * law.batch) == pytest.approx(0.02)
    assert law.lr(depth=4 * law.depth) == pytest.approx(0.005)
    assert law.lr(tokens=10 * law.tokens) == pytest.approx(0.01 * 10**-0.32)
    paper = HyperP(0.01, token_exponent_aux=0.0)
    assert paper.lr(tokens=10 * law.tokens, aux=True) == pytest.approx(0.01)


@pytest.mark.parametrize("option", ["eta0", "depth", "tokens", "batch"])
def test_a_run_without_size_is_refused(option):
    with pytest.raises(ConfigError, match=option):
        HyperP(**({"eta0": 1.0} | {option: 0}))


# The plan


def test_the_plan_of_a_llama():
    plan = hyperp_plan(llama(layers=2), HyperP(0.02, depth=2))
    rows = {row.info.name: row for row in plan.parameters}
    up, down = (rows[f"model.layers.1.mlp.{end}_proj.weight"] for end in ("up", "down"))
    assert (up.algorithm, up.lr, up.weight_decay) == ("matrix", 0.02, 0.0)
    assert up.init_std == pytest.approx(1 / math.sqrt(3 * 32))
    assert down.init_std == pytest.approx(1 / math.sqrt(3 * 64) / math.sqrt(4))
    assert rows["lm_head.weight"].algorithm == "adam_sphere"
    assert rows["model.embed_tokens.weight"].algorithm == "adamw"
    assert rows["model.norm.weight"].algorithm == "adamw"
    tied = hyperp_plan(llama(tied=True), HyperP(0.02))
    assert any("tied" in note for note in tied.notes)


def test_experts_and_routers_are_on_spheres():
    rows = {row.info.name: row for row in hyperp_plan(mixtral(), HyperP(0.02)).parameters}
    assert rows["model.layers.0.mlp.gate.weight"].algorithm == "matrix"
    assert rows["model.layers.0.mlp.experts.down_proj"].algorithm == "matrix"


def test_initialisation_is_kaiming_uniform_and_never_zero():
    model = llama(width=64)
    hyperp_plan(model, HyperP(0.02)).initialize(model)
    up = model.model.layers[0].mlp.up_proj.weight
    assert up.abs().max() <= 1 / math.sqrt(64)
    assert up.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    assert norm(up).item() == pytest.approx(math.sqrt(128 / 3), rel=0.05)
    assert norm(model.lm_head.weight) > 0


@pytest.mark.parametrize("make", [llama, mixtral])
def test_training_keeps_every_matrix_on_its_sphere(make):
    model = make()
    plan = hyperp_plan(model, HyperP(0.02))
    plan.initialize(model)
    spheres = [row.info.name for row in plan.parameters if row.algorithm != "adamw"]
    named = dict(model.named_parameters())
    before = {name: norm(named[name]) for name in spheres}
    optimizer = MuonH(plan.param_groups(model))
    ids = torch.randint(0, 19, (4, 12), generator=torch.Generator().manual_seed(0))
    first = model(ids, labels=ids).loss.item()
    for _ in range(12):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=ids).loss.item() < first - 0.1
    for name in spheres:
        torch.testing.assert_close(norm(named[name]), before[name], rtol=1e-6, atol=0)


def test_the_residual_multiplier_folds_into_the_radius():
    """α f(W x) with W on the sphere of radius R, and f' with W' = αW on that of radius αR."""
    alpha = 0.25
    one, other = (nn.Parameter(scale * numbers(5, 7)) for scale in (1.0, alpha))
    optimizers = [MuonH([each], lr=0.05) for each in (one, other)]
    for seed in range(4):
        x, upstream = numbers(3, 7, seed=seed), numbers(3, 5, seed=seed + 9)
        (alpha * (x @ one.t()) * upstream).sum().backward()
        ((x @ other.t()) * upstream).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(other, alpha * one, rtol=1e-4, atol=1e-6)


# The step


def test_a_thousand_steps_do_not_change_the_norm():
    weight = nn.Parameter(numbers(12, 20))
    radius = norm(weight)
    optimizer = MuonH([weight], lr=0.05)
    for seed in range(1000):
        weight.grad = numbers(12, 20, seed=seed)
        optimizer.step()
    torch.testing.assert_close(norm(weight), radius, rtol=1e-6, atol=0)


@given(lr=st.floats(1e-4, 0.9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_an_orthogonal_direction_turns_by_exactly_arctan_lr(lr, seed):
    weight = numbers(4, 6, seed=seed, dtype=torch.float64)
    direction = numbers(4, 6, seed=seed + 1, dtype=torch.float64)
    direction -= weight * (weight * direction).sum() / weight.square().sum()
    moved = weight.clone()
    sphere_step(moved, direction, lr, norm(weight))
    cosine = (weight * moved).sum() / norm(weight) / norm(moved)
    assert math.acos(min(1.0, cosine.item())) == pytest.approx(math.atan(lr), abs=1e-7)


@given(lr=st.floats(1e-3, 0.9), inward=st.floats(0.0, 1.0), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_step_turns_by_at_most_arcsin_lr(lr, inward, seed):
    """The specification says ‖ΔW‖ <= η‖W‖; a direction that points a little inwards exceeds that,
    and reaches the chord of arcsin η when W̃ is tangent to it."""
    weight = numbers(4, 6, seed=seed, dtype=torch.float64)
    across = numbers(4, 6, seed=seed + 1, dtype=torch.float64)
    across -= weight * (weight * across).sum() / weight.square().sum()
    direction = inward * weight / norm(weight) + (1 - inward**2) ** 0.5 * across / norm(across)
    moved = weight.clone()
    sphere_step(moved, direction, lr, norm(weight))
    chord = 2 * math.sin(math.asin(lr) / 2)
    assert norm(moved - weight) <= chord * norm(weight) * (1 + 1e-9) + 1e-9


def test_the_bound_is_reached_by_the_direction_tangent_to_the_result():
    weight = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    moved = weight.clone()
    sphere_step(moved, torch.tensor([[0.5, 0.75**0.5]], dtype=torch.float64), 0.5, norm(weight))
    length = norm(moved - weight).item()
    assert length == pytest.approx(2 * math.sin(math.asin(0.5) / 2))
    assert length > 0.5


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_size_of_the_gradient_changes_no_bit(scale):
    weights = [nn.Parameter(numbers(6, 8)) for _ in range(2)]
    for weight, factor in zip(weights, (1.0, scale), strict=True):
        optimizer = MuonH([weight], lr=0.1)
        for seed in range(3):
            weight.grad = factor * numbers(6, 8, seed=seed)
            optimizer.step()
    assert torch.equal(*weights)


def test_weight_decay_would_only_be_another_learning_rate():
    """normalise((1 - ηλ)W - ηRÛ) = normalise(W - η/(1 - ηλ) RÛ)  (HyperP, eq. 10)."""
    lr, decay = 0.1, 0.3
    weight, direction = (numbers(4, 6, seed=s, dtype=torch.float64) for s in (0, 1))
    radius = norm(weight)
    decayed = (1 - lr * decay) * weight - lr * radius * direction / norm(direction)
    moved = weight.clone()
    sphere_step(moved, direction, lr / (1 - lr * decay), radius)
    torch.testing.assert_close(decayed * radius / norm(decayed), moved)
    with pytest.raises(ConfigError, match="weight_decay"):
        MuonH([nn.Parameter(weight)], weight_decay=0.1)


def test_equals_muon_and_rescaling_up_to_the_square_of_the_rate():
    gaps = []
    for lr in (1e-2, 1e-3):
        sphere, plain = (nn.Parameter(numbers(6, 6, dtype=torch.float64)) for _ in range(2))
        radius, grad = norm(sphere), numbers(6, 6, seed=1, dtype=torch.float64)
        sphere.grad = grad.clone()
        plain.grad = grad.clone()
        MuonH([sphere], lr=lr, orthogonalizer="svd").step()
        # An orthogonal 6×6 matrix has Frobenius norm √6.
        rate = lr * radius.item() / math.sqrt(6)
        Muon([plain], lr=rate, weight_decay=0.0, orthogonalizer="svd").step()
        gaps.append(norm(sphere - plain * radius / norm(plain)).item())
    assert gaps[0] < 1e-9  # the same step, then the same rescaling
    assert gaps[1] < 1e-9


def test_adam_h_takes_adams_direction_on_the_sphere():
    weight = nn.Parameter(numbers(5, 4))
    expected, grad = weight.detach().clone(), numbers(5, 4, seed=1)
    sphere_step(expected, grad / (grad.abs() + 1e-8), 0.1, norm(expected).float())
    weight.grad = grad.clone()
    AdamH([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("joint", [False, True])
def test_experts_have_spheres_of_their_own_unless_joint(joint):
    experts = nn.Parameter(numbers(4, 6, 8))
    each, together = norm(experts), experts.detach().norm()
    optimizer = MuonH([experts], lr=0.2, joint=joint)
    for seed in range(30):
        experts.grad = numbers(4, 6, 8, seed=seed) * torch.tensor([1.0, 0, 0, 0])[:, None, None]
        optimizer.step()
    if joint:
        torch.testing.assert_close(experts.detach().norm(), together)
        assert not torch.allclose(norm(experts), each, rtol=1e-2)
    else:
        torch.testing.assert_close(norm(experts), each, rtol=1e-5, atol=0)


def test_logits_are_bounded_by_the_radius():
    weight = numbers(30, 64) / math.sqrt(3 * 64)
    x = numbers(50, 64, seed=1)
    assert bool(((x @ weight.t()).norm(dim=1) <= norm(weight) * x.norm(dim=1)).all())


def test_resuming_takes_the_same_steps_and_keeps_the_radius():
    weight = nn.Parameter(numbers(6, 8))
    optimizer = MuonH([weight], lr=0.1)
    radius = norm(weight)

    def steps(weight, optimizer, seeds):
        for seed in seeds:
            weight.grad = numbers(6, 8, seed=seed)
            optimizer.step()

    steps(weight, optimizer, range(3))
    rounded = nn.Parameter(weight.detach().clone())
    again = MuonH([rounded], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(weight, optimizer, range(3, 6))
    steps(rounded, again, range(3, 6))
    assert torch.equal(weight, rounded)
    drifted = nn.Parameter(1.01 * weight.detach())
    restored = MuonH([drifted], lr=0.1)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(drifted, restored, [9])
    torch.testing.assert_close(norm(drifted), radius, rtol=1e-6, atol=0)


def test_a_zero_matrix_is_named():
    with pytest.raises(ConfigError, match="lora_B"):
        MuonH([{"params": [("lora_B", nn.Parameter(torch.zeros(4, 2)))]}])


def test_a_zero_gradient_changes_nothing():
    weight = nn.Parameter(numbers(4, 6))
    before = weight.detach().clone()
    weight.grad = torch.zeros(4, 6)
    MuonH([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), before)


def test_nan_does_not_poison_the_momentum():
    weight = nn.Parameter(numbers(4, 6))
    optimizer = MuonH([weight], lr=0.1)
    weight.grad = torch.full((4, 6), torch.nan)
    with pytest.raises(NotFiniteError):
        optimizer.step()
    weight.grad = numbers(4, 6, seed=1)
    optimizer.step()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("kind", [MuonH, AdamH])
def test_a_trainer_trains_saves_and_resumes_to_the_same_bits(kind, tmp_path):
    ids = torch.randint(0, 19, (16, 12), generator=torch.Generator().manual_seed(0))

    def trained(resume: str | None) -> transformers.LlamaForCausalLM:
        model = llama()
        optimizer = kind(hyperp_param_groups(model, HyperP(0.03, depth=2)))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, report_to=[],
            save_strategy="steps", save_steps=6, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            optimizers=(optimizer, schedule),
        ).train(resume_from_checkpoint=resume)
        return model

    before = llama()(ids, labels=ids).loss.item()
    straight = trained(None)
    assert straight(ids, labels=ids).loss.item() < before - 0.1
    resumed = trained(str(tmp_path / "checkpoint-6"))
    for name, parameter in straight.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name


def test_construction_keeps_no_state_of_parameters_that_fsdp_will_replace():
    weights = [nn.Parameter(numbers(4, 6).to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert not MuonH(weights, lr=0.1).state


# SqrtGate


@pytest.mark.parametrize("k", [2, 4, 8, 16, 32, 64])
def test_the_root_keeps_the_variance_of_uncorrelated_experts(k):
    weights = sparse_softmax(0.1 * numbers(4000, 64, dtype=torch.float64), k)
    outputs = numbers(4000, 64, 16, seed=1, dtype=torch.float64)
    mixed = {
        name: (gate.unsqueeze(-1) * outputs).sum(1).square().mean().item()
        for name, gate in (("root", sqrt_gate(weights)), ("plain", weights))
    }
    assert mixed["root"] == pytest.approx(1.0, abs=0.02)
    assert mixed["plain"] == pytest.approx(1 / k, rel=0.05)
    torch.testing.assert_close(
        sqrt_gate(weights).square().sum(-1), torch.ones(4000, dtype=torch.float64)
    )


def test_one_expert_has_weight_one_with_and_without_the_root():
    weights = sparse_softmax(numbers(5, 8), 1)
    torch.testing.assert_close(sqrt_gate(weights), weights)


def test_gradients_stay_finite_when_a_weight_underflows():
    logits = torch.tensor([[0.0, -200.0, 1.0]], requires_grad=True)
    sqrt_gate(sparse_softmax(logits, 3)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    exact = numbers(1, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sqrt_gate(sparse_softmax(x, 6)), (exact,))


def test_it_is_installed_in_a_model_of_transformers_and_removed_again():
    model = mixtral().eval()
    ids = torch.arange(12).view(1, 12)
    before = model(ids).logits
    routed = []
    handles = install_sqrt_gate(model)
    model.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, out: routed.append(out[1]))
    assert not torch.allclose(model(ids).logits, before)
    torch.testing.assert_close(routed[0].square().sum(-1), torch.ones(12))
    for handle in handles:
        handle.remove()
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ConfigError, match="TopKRouter"):
        install_sqrt_gate(llama())


# Balance


def test_switch_loss_is_one_when_even_and_the_number_of_experts_when_collapsed():
    even = torch.eye(4).repeat(8, 1) * 50
    assert balance_loss(even, 1).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1)
    assert balance_loss(collapsed, 1).item() == pytest.approx(4.0)
    assert balance_loss(even, 1, "entropy").item() == pytest.approx(0.0, abs=1e-6)
    assert balance_loss(collapsed, 1, "entropy").item() == pytest.approx(math.log(4), abs=1e-6)


def test_a_sequence_may_be_uneven_though_the_batch_is_even():
    rows = (torch.eye(4) * 50).unsqueeze(1).repeat(1, 8, 1)  # every sequence has its own expert
    assert balance_loss(rows, 1).item() == pytest.approx(1.0)
    assert balance_loss(rows, 1, "sequence").item() == pytest.approx(4.0)


def test_the_loss_pushes_towards_balance():
    logits = nn.Parameter(torch.tensor([[2.0, 0, 0, 0]]).repeat(16, 1))
    balance_loss(logits, 1).backward()
    assert bool((logits.grad[:, 0] > 0).all())
    assert bool((logits.grad[:, 1:] < 0).all())
