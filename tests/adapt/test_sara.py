"""SaRA: the smallest weights are trained in place, everything else stays as it was."""

import copy
import gc
import io
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparing.adapt import (
    DIFFUSERS_UNET_TARGETS,
    SaRAConfig,
    default_learning_rate,
    probe,
    set_scale,
    theta_for,
)
from sparing.adapt._sara_selection import nth_lowest, proportional
from sparing.adapt._sara_tensors import MaskedTensor, polar_factor
from sparing.adapt.callback import TunerCallback
from sparing.errors import CheckpointError, ConfigError
from sparing.sparsity import Pattern

THETA = 0.05


class Net(nn.Module):
    """Linear, convolution and linear, with biases: (batch, 66) -> (batch, 8)."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter = nn.Linear(66, 72)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.leave = nn.Linear(144, 8)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.enter(x)).view(-1, 2, 6, 6)
        return self.leave(F.silu(self.conv(h)).flatten(1))


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 66, generator=generator, dtype=torch.float64)
    y = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def tuned(base: nn.Module, **options: object) -> peft.PeftModel:
    chosen = {"target_modules": r"enter|conv|leave", "lambda_rank": 0.0} | options
    if "n_params" not in chosen:
        chosen = {"theta": THETA} | chosen
    return peft.get_peft_model(base, SaRAConfig(**chosen))


def parts(model: peft.PeftModel, adapter: str = "default") -> dict[str, MaskedTensor]:
    return {
        f"{name}.{part.name}": part
        for name, _, found in model.base_model._on_layers(adapter)
        for part in found.parts()
    }


def leaves(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(leaves(model), lr=lr, weight_decay=1e-2)


def train(
    model: peft.PeftModel,
    optimizer: torch.optim.Optimizer,
    steps: range,
    total: int,
) -> None:
    """The steps of a run, numbered from 1, with the tuner's hooks."""
    x, y = data(leaves(model)[0].dtype)
    for step in steps:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        model.base_model.before_step()
        optimizer.step()
        model.base_model.after_step(step, total, optimizer)


# --- the mask and the forward pass ------------------------------------------------------------


@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_step_zero_is_bitwise_the_base(train_bias, dtype):
    """Oracle 1; the released code starts from absolute values."""
    base, (x, _) = Net(dtype=dtype), data(dtype)
    before = base(x)
    assert torch.equal(tuned(base, train_bias=train_bias)(x), before)


def test_exactly_the_entries_strictly_below_theta_are_trained():
    """Eq. 1, with one global threshold; an entry at θ is not trained."""
    base = Net()
    with torch.no_grad():
        base.enter.weight[0, :3] = torch.tensor([THETA, -THETA, 0.0])
    original = copy.deepcopy(base)
    for name, part in parts(tuned(base, train_bias=True)).items():
        tensor = original.get_parameter(name)
        view = tensor.flatten(1) if name.endswith("weight") else tensor[None]
        assert torch.equal(part.pattern.mask(), view.abs() < torch.tensor(THETA))
        assert part.values.dtype == torch.float32
        assert torch.equal(part.values.detach(), view[part.pattern.mask()].detach())


@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("progressive_at", [None, 0.5])
def test_larger_weights_are_bit_identical_after_training(train_bias, progressive_at):
    """Oracle 2, in both stages; also nothing outside the targets moves."""
    base = Net()
    original = copy.deepcopy(base).state_dict()
    model = tuned(base, train_bias=train_bias, progressive_at=progressive_at)
    train(model, adamw(model), range(1, 21), 20)
    moved = 0
    for name, tensor in model.merge_and_unload().state_dict().items():
        large = original[name].abs() >= THETA
        assert torch.equal(tensor[large], original[name][large])
        moved += int((tensor != original[name]).sum())
    assert moved > 100


def test_infinite_theta_is_adamw_on_all_weights_and_biases():
    """Oracle 3."""
    base = Net(dtype=torch.float64)
    reference = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="meant for the smallest"):
        model = tuned(base, theta=math.inf, train_bias=True, progressive_at=None)
    train(model, adamw(model), range(1, 11), 10)
    optimizer, (x, y) = adamw(reference), data(torch.float64)
    for _ in range(10):
        optimizer.zero_grad()
        F.mse_loss(reference(x), y).backward()
        optimizer.step()
    found = model.merge_and_unload().state_dict()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-7)


def test_compact_and_dense_mask_training_agree():
    """Oracle 5: AdamW on the entries equals AdamW on whole weights with the rest put back, through
    the second stage with its fresh moments."""
    base = Net(dtype=torch.float64)
    dense = copy.deepcopy(base)
    weights = [dense.enter.weight, dense.conv.weight, dense.leave.weight]
    start = [w.detach().clone() for w in weights]
    masks = [w.detach().float().abs() < torch.tensor(THETA) for w in weights]
    model = tuned(base)
    train(model, adamw(model), range(1, 21), 20)
    x, y = data(torch.float64)
    for stage in (1, 2):
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(dense(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                for w, mask, kept in zip(weights, masks, start, strict=True):
                    w.copy_(torch.where(mask, w, kept))
        start = [w.detach().clone() for w in weights]
        masks = [m & (w.float().abs() < THETA) for w, m in zip(start, masks, strict=True)]
        assert stage == 2 or any(m.any() for m in masks)
    merged = model.merge_and_unload()
    for found, expected in zip((merged.enter, merged.conv, merged.leave), weights, strict=True):
        torch.testing.assert_close(found.weight, expected, rtol=1e-7, atol=1e-7)


CONVOLUTIONS = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 2]),
        "stride": st.sampled_from([1, 2, (2, 1)]),
        "dilation": st.sampled_from([1, 2]),
        "padding": st.sampled_from([0, 1, (2, 1)]),
        "padding_mode": st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
        "bias": st.booleans(),
        "kernel_size": st.sampled_from([1, 2, 3, (3, 2)]),
    }
) | st.fixed_dictionaries(
    {
        "padding": st.sampled_from(["same", "valid"]),
        "kernel_size": st.sampled_from([2, 3]),
        "dilation": st.sampled_from([1, 2]),
    }
)


@settings(max_examples=40, deadline=None)
@given(CONVOLUTIONS, st.booleans())
def test_entry_gradients_are_the_masked_dense_gradient_of_any_convolution(options, train_bias):
    """Oracles 1 and 6."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, **options).double())
    dense = copy.deepcopy(base)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    config = SaRAConfig(target_modules=["0"], n_params=10, train_bias=train_bias)
    model = peft.get_peft_model(base, config)
    y = model(x)
    torch.testing.assert_close(y, dense(x), rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    y.backward(upstream)
    (expected_x,) = torch.autograd.grad(dense(x), x, upstream)
    torch.testing.assert_close(grad_x, expected_x)
    dense(x).backward(upstream)
    for name, part in parts(model).items():
        gradient = dense.get_parameter(name).grad
        view = gradient.flatten(1) if name.endswith("weight") else gradient[None]
        torch.testing.assert_close(part.values.grad, part.pattern.gather(view))


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_entry_gradients_are_the_masked_dense_gradient_of_a_language_model(make):
    """Oracle 6, `Linear` and `Conv1D`."""
    base, ids = make(), token_ids()
    dense = copy.deepcopy(base)
    model = tuned(base, target_modules="all-linear", n_params=500)
    model(ids, labels=ids).loss.backward()
    dense(ids, labels=ids).loss.backward()
    for name, part in parts(model).items():
        gradient = dense.get_parameter(name).grad
        gradient = gradient.t() if make is small_gpt2 else gradient
        torch.testing.assert_close(part.values.grad, part.pattern.gather(gradient))


def test_autocast_and_compiling_give_the_same_gradients():
    """Also through the convolution's own backward."""
    x, _ = data()
    gradients = []
    for way in ("plain", "compiled", "autocast"):
        model = tuned(Net(), n_params=500, train_bias=True)
        call = torch.compile(model, backend="aot_eager") if way == "compiled" else model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
            y = call(x)
        y.float().square().mean().backward()
        gradients.append([p.grad for p in leaves(model)])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0.1, atol=1e-3)


# --- the size and the threshold ---------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30), min_size=1, max_size=4),
    st.data(),
)
def test_the_order_statistic_is_that_of_sorting(groups, draw):
    tensors = [torch.tensor(group, dtype=torch.int32) for group in groups]
    flat = sorted(value for group in groups for value in group)
    n = draw.draw(st.integers(1, len(flat)))
    level, below = nth_lowest(lambda: tensors, n)
    assert level == flat[n - 1]
    assert below == sum(value < level for value in flat)


@pytest.mark.filterwarnings("ignore:SaRA trains")
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5976), st.booleans(), st.booleans())
def test_n_params_is_met_exactly_and_ties_go_by_position(n, coarse, train_bias):
    """Oracle 14; rounding the weights to a grid makes hundreds of ties."""
    base = Net()
    if coarse:
        with torch.no_grad():
            for p in base.parameters():
                p.copy_((p * 50).round() / 50)
    original = copy.deepcopy(base)
    found = parts(tuned(base, n_params=n, train_bias=train_bias))
    assert sum(len(part.pattern) for part in found.values()) == n
    magnitudes = torch.cat([original.get_parameter(name).detach().flatten() for name in found])
    expected = torch.zeros(len(magnitudes), dtype=torch.bool)
    expected[magnitudes.abs().argsort(stable=True)[:n]] = True
    assert torch.equal(torch.cat([p.pattern.mask().flatten() for p in found.values()]), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000))
def test_theta_for_selects_exactly_n(n):
    """Oracle 14, over all parameters of a model without ties."""
    model = Net()
    theta = torch.tensor(theta_for(model, n))
    assert sum(int((p.abs() < theta).sum()) for p in model.parameters()) == n


def test_theta_for_includes_all_ties():
    """Oracle 14: zero-initialised biases tie at zero."""
    model = Net()
    nn.init.zeros_(model.enter.bias)
    theta = theta_for(model, 5)
    assert sum(int((p.abs() < theta).sum()) for p in model.parameters()) == 72
    with pytest.raises(ConfigError, match="n_params"):
        theta_for(model, 10**9)


def test_share_of_gaussian_weights_below_theta():
    """Oracle 12: erf(θ / (σ √2))."""
    base = nn.Sequential(nn.Linear(500, 400))
    nn.init.normal_(base[0].weight, std=0.02, generator=torch.Generator().manual_seed(0))
    part = parts(tuned(base, target_modules=["0"], theta=2e-3))["0.weight"]
    share = len(part.pattern) / 200_000
    assert share == pytest.approx(math.erf(2e-3 / (0.02 * math.sqrt(2))), abs=2e-3)


def test_the_default_threshold_is_the_papers():
    assert SaRAConfig().threshold == 2e-3
    assert SaRAConfig(n_params=5).threshold is None


def test_default_learning_rate_follows_the_table_and_falls():
    """Oracle 9, eq. 4."""
    for theta, rate in ((2e-3, 4.966e-4), (8e-4, 7.558e-4), (2e-4, 9.324e-4)):
        assert default_learning_rate(theta) == pytest.approx(rate, rel=1e-3)
    rates = [default_learning_rate(i * 1e-4) for i in range(40)]
    assert rates == sorted(rates, reverse=True)


def test_counting_on_the_meta_device_is_exact():
    with torch.device("meta"):
        base = Net()
    model = tuned(base, n_params=1000)
    assert sum(p.numel() for p in leaves(model)) == 1000
    with torch.device("meta"):
        base = Net()
    with pytest.raises(ConfigError, match="meta device"):
        tuned(base)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.floats(0, 1))
def test_proportional_shares_add_up_and_fit(sizes, share):
    named = {str(i): size for i, size in enumerate([*sizes, 1])}
    n = int(share * sum(named.values()))
    shares = proportional(named, n)
    assert sum(shares.values()) == n
    assert all(shares[name] <= size for name, size in named.items())


@pytest.mark.parametrize("select", ["largest", "random"])
def test_control_selections_are_exact_and_differ_from_the_smallest(select):
    original = Net()
    model = tuned(Net(), n_params=400, select=select, progressive_at=None, seed=1)
    chosen = [
        original.get_parameter(name).flatten(1)[part.pattern.mask()].abs()
        for name, part in parts(model).items()
    ]
    chosen = torch.cat(chosen)
    everything = torch.cat([p.flatten().abs() for p in original.parameters() if p.dim() > 1])
    assert len(chosen) == 400
    if select == "largest":
        assert torch.equal(chosen.sort().values, everything.sort().values[-400:])
    else:
        assert 0.8 < (chosen.mean() / everything.mean()).item() < 1.2
        again = tuned(Net(), n_params=400, select=select, progressive_at=None, seed=2)
        masks = [parts(m)["enter.weight"].pattern.mask() for m in (model, again)]
        assert (masks[0] & masks[1]).sum() < 0.2 * masks[0].sum()


def test_counts_list_every_tensor():
    base = Net()
    nn.init.zeros_(base.enter.bias)
    counts = tuned(base, train_bias=True).base_model.counts()
    assert counts["enter.bias"] == 72
    assert set(counts) == {
        f"{layer}.{tensor}" for layer in ("enter", "conv", "leave") for tensor in ("weight", "bias")
    }


# --- the second stage -------------------------------------------------------------------------


def test_grown_entries_are_frozen_and_the_saved_mask_stays(tmp_path):
    """Oracle 7, under AdamW with weight decay."""
    model = tuned(Net(), train_bias=True)
    optimizer = adamw(model, 3e-3)
    train(model, optimizer, range(1, 11), 20)
    masks = {name: part.pattern.mask() for name, part in parts(model).items()}
    at_switch = {name: part.trained().detach().clone() for name, part in parts(model).items()}
    for name, part in parts(model).items():
        assert torch.equal(part.grown, at_switch[name].abs() >= THETA)
    free = sum(part.free() for part in parts(model).values())
    assert 0 < free < sum(len(values) for values in at_switch.values())
    train(model, optimizer, range(11, 21), 20)
    moved = 0
    for name, part in parts(model).items():
        frozen = part.grown
        assert torch.equal(part.trained()[frozen], at_switch[name][frozen])
        assert (part.values.grad[frozen] == 0).all()
        moved += int((part.trained() != at_switch[name]).sum())
        assert torch.equal(part.pattern.mask(), masks[name])
    assert moved > 0.9 * free
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    saved = tensors["base_model.model.enter.sara_adapter.weight.values"]
    assert torch.equal(saved, parts(model)["enter.weight"].trained())


def test_a_checkpoint_of_the_second_stage_resumes_exactly(tmp_path):
    """Oracle 7: the frozen entries are known again, with and without the hooks."""
    straight = tuned(Net())
    optimizer = adamw(straight, 3e-3)
    train(straight, optimizer, range(1, 16), 20)
    straight.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    frozen = {n: (p.grown, p.trained().detach().clone()) for n, p in parts(straight).items()}
    train(straight, optimizer, range(16, 21), 20)

    resumed = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    for name, part in parts(resumed).items():
        assert torch.equal(part.grown, frozen[name][0])
        assert torch.equal(part.trained(), frozen[name][1])
    optimizer = adamw(resumed, 3e-3)
    optimizer.load_state_dict(saved)
    x, y = data()
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(resumed(x), y).backward()
        optimizer.step()
    for name, part in parts(resumed).items():
        assert torch.equal(part.trained(), parts(straight)[name].trained())
        grown, values = frozen[name]
        assert torch.equal(part.trained()[grown], values[grown])


def test_moments_restart_at_the_switch_unless_kept():
    for keep in (False, True):
        model = tuned(Net(), keep_moments=keep)
        optimizer = adamw(model)
        train(model, optimizer, range(1, 11), 20)
        assert len(optimizer.state) == (3 if keep else 0)


def test_the_second_stage_uses_the_implied_threshold_of_n_params():
    """Untouched entries, ties at the threshold included, stay free."""
    base = Net()
    with torch.no_grad():
        for p in base.parameters():
            p.copy_((p * 50).round() / 50)
    model = tuned(base, n_params=1500)
    optimizer = adamw(model)
    model.base_model.after_step(10, 20, optimizer)
    assert sum(part.free() for part in parts(model).values()) == 1500
    with torch.no_grad():
        part = parts(model)["enter.weight"]
        part.values[0] = 1.0
    model.base_model.after_step(10, 20, optimizer)
    assert sum(part.free() for part in parts(model).values()) == 1499


def test_reselection_again_never_frees_a_frozen_entry():
    """M' ⊆ M."""
    model = tuned(Net())
    part = parts(model)["enter.weight"]
    with torch.no_grad():
        part.values[0] = 1.0
    part.freeze_grown(THETA)
    part.freeze_grown(2.0)
    assert part.grown[0]
    assert part.free() == len(part.pattern) - 1


def test_too_few_steps_or_nothing_left_are_reported():
    model = tuned(Net(), progressive_at=0.9)
    with pytest.warns(UserWarning, match="too few"):
        model.base_model.after_step(1, 1, adamw(model))
    model = tuned(Net())
    perturb(model, scale=0.0)
    with torch.no_grad():
        for leaf in leaves(model):
            leaf.fill_(1.0)
    with pytest.warns(UserWarning, match="nothing is left"):
        model.base_model.after_step(10, 20, adamw(model))


class Keep(TrainerCallback):
    """Saves in the middle of the second stage."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 6


def test_trainer_switches_at_half_time_and_resumes(tmp_path):
    def trainer(model: nn.Module, **options: object) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=8,
            learning_rate=3e-2,
            per_device_train_batch_size=8,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        ids = token_ids(rows=16)
        items = [{"input_ids": row, "labels": row} for row in ids]
        callbacks = [TunerCallback(), Keep()]
        return Trainer(model=model, args=arguments, train_dataset=items, callbacks=callbacks)

    def fresh() -> peft.PeftModel:
        return tuned(small_llama(), target_modules="all-linear", n_params=400)

    straight = fresh()
    trainer(straight).train()
    free = sum(part.free() for part in parts(straight).values())
    assert free < 400
    resumed = fresh()
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, part in parts(resumed).items():
        assert torch.equal(part.trained(), parts(straight)[name].trained())


# --- the nuclear-norm term --------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100))
def test_the_polar_factor_is_the_gradient_of_the_nuclear_norm(height, width, seed):
    """Oracle 8: against finite differences, on full-rank matrices."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(height, width, generator=generator, dtype=torch.float64)
    A += 3 * torch.eye(height, width, dtype=torch.float64)
    direction = torch.randn(height, width, generator=generator, dtype=torch.float64)
    for solver in ("svd", "newton-schulz"):
        factor = polar_factor(A, solver)
        step = 1e-5 * direction
        if torch.linalg.svdvals(A)[-1] < 0.05:
            continue
        rise = torch.linalg.matrix_norm(A + step, "nuc") - torch.linalg.matrix_norm(A - step, "nuc")
        assert rise.item() / 2e-5 == pytest.approx((factor * direction).sum().item(), abs=1e-4)
        assert torch.linalg.matrix_norm(factor, 2).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("solver", ["svd", "newton-schulz"])
def test_the_polar_factor_of_zero_is_zero_and_leaves_null_directions_alone(solver):
    """Oracle 8."""
    assert (polar_factor(torch.zeros(4, 7), solver) == 0).all()
    A = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 8))
    factor = polar_factor(A, solver)
    torch.testing.assert_close(factor, A / torch.linalg.matrix_norm(A), rtol=0, atol=1e-3)


def rank_gradient(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """What `before_step` adds to gradients of zero."""
    for part in parts(model).values():
        part.values.grad = torch.zeros_like(part.values)
    model.base_model.before_step()
    return {name: part.values.grad for name, part in parts(model).items()}


@pytest.mark.parametrize("of", ["values", "delta"])
def test_the_term_is_the_gradient_of_lambda_times_the_nuclear_norm(of):
    """Eq. 5; unlike the released term, which nobody reads. Every third step, three times it."""
    options = {"lambda_rank": 0.1, "rank_every": 3, "rank_of": of, "n_params": 2500}
    model = tuned(Net(dtype=torch.float64), **options)
    perturb(model)
    found = rank_gradient(model)
    part = parts(model)["enter.weight"]
    leaf = part.values.detach().clone().requires_grad_()
    matrix = part.pattern.dense(leaf - part.start if of == "delta" else leaf)
    (0.3 * torch.linalg.matrix_norm(matrix, "nuc")).backward()
    torch.testing.assert_close(found["enter.weight"], leaf.grad)
    assert all((g == 0).all() for name, g in found.items() if name != "enter.weight")


def wide() -> nn.Module:
    torch.manual_seed(0)
    linear = {f"l{i}": nn.Linear(65, 66) for i in range(3)}
    return nn.ModuleDict(linear | {"c": nn.Conv2d(8, 65, 3)})


def test_one_matrix_a_step_or_all_and_convolutions_only_if_asked():
    """Eq. 5: j is drawn anew every step, among matrices whose sides exceed 64."""
    options = {"target_modules": r"l\d|c", "n_params": 3000, "lambda_rank": 1.0, "rank_every": 1}
    touched = [
        tuple(name for name, g in rank_gradient(model).items() if g.any())
        for model in [tuned(wide(), **options)]
        for _ in range(12)
    ]
    assert all(len(names) == 1 for names in touched)
    assert {names[0] for names in touched} == {f"l{i}.weight" for i in range(3)}
    everywhere = rank_gradient(
        tuned(wide(), rank_matrices="all", rank_convolutions=True, **options)
    )
    assert all(g.any() for g in everywhere.values())
    linear = rank_gradient(tuned(wide(), rank_matrices="all", **options))
    assert [name for name, g in linear.items() if not g.any()] == ["c.weight"]


def test_the_term_acts_every_so_many_steps_and_is_reproducible():
    options = {"target_modules": r"l\d", "n_params": 3000, "lambda_rank": 1.0, "rank_every": 3}
    runs = []
    for seed in (0, 0):
        model = tuned(wide(), seed=seed, **options)
        runs.append(
            [tuple(g.any().item() for g in rank_gradient(model).values()) for _ in range(9)]
        )
    assert [any(step) for step in runs[0]] == [True, False, False] * 3
    assert runs[0] == runs[1]


def test_the_term_lowers_the_nuclear_norm_and_skips_frozen_entries():
    norms = []
    for strength in (0.0, 0.1):
        options = {"lambda_rank": strength, "rank_every": 1, "progressive_at": None}
        model = tuned(Net(), n_params=2500, **options)
        train(model, adamw(model, 3e-3), range(1, 31), 30)
        part = parts(model)["enter.weight"]
        norms.append(torch.linalg.matrix_norm(part.pattern.dense(part.trained()), "nuc").item())
    assert norms[1] < 0.9 * norms[0]
    part.freeze_grown(part.trained().abs().median().item())
    gradient = rank_gradient(model)["enter.weight"]
    assert (gradient[part.grown] == 0).all()
    assert gradient[~part.grown].any()


# --- memory -----------------------------------------------------------------------------------


def test_gradients_and_optimiser_state_are_as_small_as_the_entries():
    """Oracle 13: 4m and 8m bytes and a step count per tensor; no base parameter has a gradient."""
    model = tuned(Net(), n_params=600, progressive_at=None)
    optimizer = adamw(model)
    train(model, optimizer, range(1, 3), 2)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert sum(g.nbytes for g in gradients) == 4 * 600
    states = [t for state in optimizer.state.values() for t in state.values()]
    assert sum(t.nbytes for t in states if t.dim()) == 8 * 600
    assert sum(t.nbytes for t in states if not t.dim()) == 4 * 3


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_no_patched_weight_is_kept_for_backward_and_no_dense_gradient_after_it(share):
    """The unstructural backpropagation (eq. 3), below and above the share for dense products."""
    base = Net()
    weights = {p.untyped_storage().data_ptr() for p in base.parameters()}
    shapes = {tuple(m.weight.shape) for m in (base.enter, base.conv, base.leave)}
    shapes |= {(4, 18)}
    total = sum(m.weight.numel() for m in (base.enter, base.conv, base.leave))
    model = tuned(base, n_params=int(share * total))
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tuple(tensor.shape), tensor.untyped_storage().data_ptr()))
        return tensor

    def alive() -> list[torch.Tensor]:
        gc.collect()
        kinds = (torch.Tensor, nn.Parameter)
        tensors = [found for found in gc.get_objects() if type(found) in kinds]
        return [tensor for tensor in tensors if tuple(tensor.shape) in shapes]

    (x, y), before = data(), alive()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.mse_loss(model(x), y)
    assert {shape for shape, _ in kept} & shapes
    assert all(pointer in weights for shape, pointer in kept if shape in shapes)
    loss.backward()
    del loss
    assert not [tensor for tensor in alive() if not any(tensor is known for known in before)]


def test_clipping_acts_on_the_compact_leaves():
    model = tuned(Net())
    x, y = data()
    F.mse_loss(model(x), 100 * y).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1
    assert math.sqrt(sum(p.grad.square().sum() for p in leaves(model))) == pytest.approx(1e-3, 1e-3)


# --- files, scale, merging --------------------------------------------------------------------


def test_saved_and_loaded_on_a_fresh_base_is_bitwise_and_refused_on_another(tmp_path):
    """Oracle 10."""
    model = tuned(Net(), train_bias=True)
    train(model, adamw(model), range(1, 21), 20)
    model.save_pretrained(tmp_path)
    x, _ = data()
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="fingerprint"):
        peft.PeftModel.from_pretrained(Net(seed=1), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_trained_in_float32_loads_on_the_bfloat16_base(tmp_path, low_cpu_mem_usage):
    """The saved mask counts, not the one that bfloat16 would give."""
    theta = 0.03114

    def base(dtype: torch.dtype) -> Net:
        net = Net()
        net.enter.weight.data[::2, 0] = theta + 1e-5  # rounds to 0.03113
        return net.to(dtype)

    model = tuned(base(torch.float32), theta=theta)
    train(model, adamw(model), range(1, 11), 20)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="bfloat16"):
        loaded = peft.PeftModel.from_pretrained(
            base(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
    with pytest.warns(UserWarning, match="bfloat16"):
        rounded = tuned(base(torch.bfloat16), theta=theta)
    sizes = [len(parts(m)["enter.weight"].pattern) for m in (model, rounded)]
    assert sizes[1] >= sizes[0] + 36
    for name, part in parts(loaded).items():
        assert torch.equal(part.trained(), parts(model)[name].trained())
        assert torch.equal(part.pattern.mask(), parts(model)[name].pattern.mask())
    x, _ = data()
    exact = model(x)
    torch.testing.assert_close(loaded(x.bfloat16()).float(), exact, rtol=0.05, atol=0.05)
    set_scale(loaded, 0.0)
    assert torch.equal(loaded(x.bfloat16()), base(torch.bfloat16)(x.bfloat16()))


def test_scale_goes_linearly_from_base_to_tuned():
    """Oracle 11."""
    model, (x, _) = tuned(Net(), train_bias=True), data()
    train(model, adamw(model), range(1, 21), 20)
    full = model(x)
    part = parts(model)["enter.weight"]
    trained = part.trained().detach()
    for s in (0.25, 0.5, 2.0):
        set_scale(model, s)
        torch.testing.assert_close(part.entries(), part.start + s * (trained - part.start))
    set_scale(model, 0.0)
    assert torch.equal(model(x), Net()(x))
    set_scale(model, 1.0)
    assert torch.equal(model(x), full)
    set_scale(model, 0.0, adapter_name="another")
    assert torch.equal(model(x), full)
    set_scale(model, 0.5)
    halfway = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), halfway)


def test_merging_replaces_the_entries_exactly():
    model = tuned(Net(), train_bias=True)
    train(model, adamw(model), range(1, 21), 20)
    expected = {name: (p.pattern.mask(), p.trained().detach()) for name, p in parts(model).items()}
    merged = model.merge_and_unload()
    for name, (mask, values) in expected.items():
        tensor = merged.get_parameter(name).detach()
        assert torch.equal((tensor.flatten(1) if tensor.dim() > 1 else tensor[None])[mask], values)


def test_copies_and_pickles_in_the_second_stage_are_independent():
    model, (x, _) = tuned(Net()), data()
    train(model, adamw(model, 3e-3), range(1, 8), 10)
    expected, file = model(x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
        train(twin, adamw(twin), range(8, 10), 10)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)


def test_two_active_adapters_add_their_changes():
    model = tuned(Net(dtype=torch.float64))
    model.add_adapter("second", SaRAConfig(target_modules=r"enter|conv|leave", theta=2 * THETA))
    original = copy.deepcopy(model.base_model.model.conv.base_layer.weight)
    for name in ("default", "second"):
        model.set_adapter(name)
        perturb(model, seed=len(name))
    change = sum(
        part.pattern.dense(part.trained() - part.start)
        for part in (parts(model, name)["conv.weight"] for name in ("default", "second"))
    )
    model.base_model.set_adapter(["default", "second"])
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    expected = original.flatten(1) + change
    torch.testing.assert_close(merged.conv.weight.flatten(1), expected)


def test_probe_zeroes_the_smallest_and_puts_them_back():
    model, (x, y) = Net(), data()
    before = copy.deepcopy(model).state_dict()

    def zeros(model: nn.Module) -> int:
        F.mse_loss(model(x), y)
        return sum(int((p == 0).sum()) for p in model.parameters())

    assert probe(model, theta_for(model, 700), zeros) == 700

    def fails(model: nn.Module) -> None:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        probe(model, THETA, fails)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# --- what is refused or reported --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"theta": 0.0}, "theta"),
        ({"theta": -1.0}, "theta"),
        ({"n_params": 0}, "n_params"),
        ({"theta": 1e-3, "n_params": 5}, "theta"),
        ({"progressive_at": 1.0}, "progressive_at"),
        ({"lambda_rank": -1.0}, "lambda_rank"),
        ({"lambda_rank": math.nan}, "lambda_rank"),
        ({"rank_every": 0}, "rank_every"),
        ({"rank_of": "weights"}, "rank_of"),
        ({"select": "largest"}, "select"),
        ({"select": "random", "n_params": 5}, "select"),
    ],
)
def test_impossible_options_are_refused_by_name(options, named):
    """Oracle 4 among them: θ = 0 would train nothing."""
    with pytest.raises(ConfigError, match=rf"SaRAConfig\.{named}"):
        SaRAConfig(**options)


def test_no_weight_below_theta_and_too_many_are_refused():
    """Oracle 4."""
    with pytest.raises(ConfigError, match=r"none below 1e-30"):
        tuned(Net(), theta=1e-30)
    with pytest.raises(ConfigError, match=r"n_params.*5,976"):
        tuned(Net(), n_params=10**6)


def test_a_quantised_weight_is_refused_by_name():
    base = Net()
    base.enter.weight = nn.Parameter(base.enter.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'enter'.*quantised"):
        tuned(base)


def test_targets_that_share_a_weight_are_refused_by_name():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base[1].weight = base[0].weight
    with pytest.raises(ConfigError, match=r"module '1'.*weight of '0'"):
        tuned(base, target_modules=["0", "1"], n_params=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases_are_reported(dtype):
    with pytest.warns(UserWarning, match=str(dtype)):
        tuned(Net(dtype=dtype))


def test_half_of_all_weights_is_reported():
    with pytest.warns(UserWarning, match="meant for the smallest"):
        tuned(Net(), n_params=5000)


def test_an_other_layer_type_is_refused_by_name():
    base = nn.ModuleDict({"l": nn.Linear(4, 4), "e": nn.Embedding(4, 4)})
    with pytest.raises(ConfigError, match=r"'e'.*Embedding"):
        tuned(base, target_modules=["l", "e"], n_params=4)


def test_a_damaged_mask_is_refused():
    part = MaskedTensor(Pattern(torch.eye(4, dtype=torch.bool)), nn.Linear(4, 4), "weight")
    state = part.state_dict()
    state["pattern.stored_columns"] = torch.tensor([0, 1, 2, 9], dtype=torch.int32)
    with pytest.raises(CheckpointError, match="4 x 4"):
        part.load_state_dict(state)


# --- diffusers --------------------------------------------------------------------------------


def unet(conditional: bool) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    common = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    if not conditional:
        return diffusers.UNet2DModel(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **common,
        )
    return diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        **common,
    )


@pytest.mark.parametrize("conditional", [False, True])
def test_a_unet_trains_saves_loads_and_merges(conditional, tmp_path):
    base = unet(conditional)
    layers = {n for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    weights = sum(base.get_submodule(name).weight.numel() for name in layers)
    config = SaRAConfig(
        target_modules=DIFFUSERS_UNET_TARGETS, n_params=weights // 10, train_bias=True
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    inputs = {"timestep": torch.tensor(10)}
    if conditional:
        inputs["encoder_hidden_states"] = torch.randn(4, 3, 16, generator=generator)
    before = base(x, **inputs).sample
    model = peft.get_peft_model(base, config)
    assert {name for name, _, _ in model.base_model._on_layers("default")} == layers
    assert torch.equal(model(x, **inputs).sample, before)
    optimizer, losses = adamw(model, 3e-3), []
    for step in range(1, 7):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x, **inputs).sample, x)
        loss.backward()
        losses.append(loss.item())
        model.base_model.before_step()
        optimizer.step()
        model.base_model.after_step(step, 6, optimizer)
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        after = model(x, **inputs).sample
        loaded = peft.PeftModel.from_pretrained(unet(conditional), tmp_path)
        mine, theirs = (peft.get_peft_model_state_dict(m) for m in (model, loaded))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() | theirs.keys())
        # With several threads the convolutions of the two may run in other memory layouts.
        torch.testing.assert_close(loaded(x, **inputs).sample, after, rtol=1e-5, atol=1e-6)
        merged = model.merge_and_unload()
        assert type(merged) is type(base)
        torch.testing.assert_close(merged(x, **inputs).sample, after, rtol=1e-4, atol=1e-5)
