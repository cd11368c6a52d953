"""Muon++: steps have exactly the spectral size of μP, and decay bounds weights at every step."""

import copy
import itertools
import json
import math
import multiprocessing
import warnings

import _muon_mup_processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.errors import ConfigError
from sparing.scale import MuonPlusPlus
from sparing.scale.alignment import alignment
from sparing.scale.matrix_optimizer import NotFiniteError
from sparing.scale.muon_mup import SpectralWarning, noise_floor, norm_bound, spectral_unit
from sparing.scale.orthogonalize import NS5, SHARP, orthogonalize, spectral_norm

SHAPES = ((12, 12), (8, 24), (24, 8))
# The largest σ₁ that each orthogonaliser can have, whatever its input.
SIZES = {"svd": 1.0 + 1e-6, "sharp": 1.001, "ns5": 1.21}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), ord=2))


def reduced(matrix: torch.Tensor) -> float:
    return norm(matrix) / spectral_unit(*matrix.shape)


def start(outputs: int, inputs: int, w: float = 0.5, seed: int = 0) -> nn.Parameter:
    """A matrix of reduced norm w."""
    matrix = numbers(outputs, inputs, seed=seed)
    return nn.Parameter(matrix * (w / reduced(matrix)))


def gradients(kind: str, *shape: int, seed: int, count: int):
    for step in range(count):
        if kind == "random":
            yield numbers(*shape, seed=1000 * seed + step)
        elif kind == "rank one":
            left, right = (numbers(side, seed=1000 * seed + step) for side in shape)
            yield torch.outer(left, right)
        else:
            yield (-1) ** step * numbers(*shape, seed=seed)


def take(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, grads) -> None:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()


# The bound


@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(["random", "rank one", "flipping"]),
    orthogonalizer=st.sampled_from(sorted(SIZES)),
    decay=st.sampled_from([0.0, 0.5, 4.0]),
    w0=st.floats(0.01, 3.0),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_at_every_step(shape, kind, orthogonalizer, decay, w0, seed):
    weight = start(*shape, w0, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralWarning)
        optimizer = MuonPlusPlus(
            [weight], lr=0.1, weight_decay=decay, orthogonalizer=orthogonalizer
        )
    for step, grad in enumerate(gradients(kind, *shape, seed=seed, count=25), 1):
        take(weight, optimizer, [grad])
        bound = norm_bound(step, start=w0, lr=0.1, weight_decay=decay, size=SIZES[orthogonalizer])
        assert reduced(weight) <= bound * (1 + 1e-4)


def test_the_bound_is_reached_and_the_radius_is_a_constant_of_the_width():
    for shape in SHAPES:
        weight, grad = start(*shape), numbers(*shape, seed=1)
        optimizer = MuonPlusPlus([weight], lr=0.1, radius=2.0, orthogonalizer="svd")
        take(weight, optimizer, [grad] * 200)
        assert reduced(weight) == pytest.approx(2.0, abs=1e-3)
        limit = -2.0 * spectral_unit(*shape) * orthogonalize(grad, "svd")
        torch.testing.assert_close(weight.detach(), limit, rtol=1e-3, atol=1e-3)


def test_without_decay_the_norm_grows_by_the_rate_at_every_step():
    weight, grad = nn.Parameter(torch.zeros(8, 24)), numbers(8, 24)
    optimizer = MuonPlusPlus([weight], lr=0.1, radius=math.inf, orthogonalizer="svd")
    for step in range(1, 20):
        take(weight, optimizer, [grad])
        assert reduced(weight) == pytest.approx(0.1 * step, rel=1e-5)
    assert norm_bound(19, start=0.0, lr=0.1, weight_decay=0.0) == pytest.approx(1.9)


def test_a_schedule_to_zero_freezes_the_band():
    weight, grad = start(8, 24, 0.5), numbers(8, 24)
    optimizer = MuonPlusPlus([weight], lr=0.1, radius=2.0)
    take(weight, optimizer, [grad] * 10)
    before = reduced(weight)
    optimizer.param_groups[0]["lr"] = 0.0
    take(weight, optimizer, [numbers(8, 24, seed=9)] * 5)
    assert reduced(weight) == pytest.approx(before)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (256, 64), (64, 256)])
def test_uncorrelated_updates_leave_the_noise_floor(shape):
    weight = start(*shape, 0.3)
    optimizer = MuonPlusPlus([weight], lr=0.05, radius=1.0, momentum=0.0, nesterov=False)
    take(weight, optimizer, gradients("random", *shape, seed=1, count=150))
    assert reduced(weight) == pytest.approx(
        noise_floor(*shape, lr=0.05, weight_decay=1.0), rel=0.08
    )


# The size of a step


def steps_of(optimizer, weight, grads):
    for grad in grads:
        before = weight.detach().clone()
        take(weight, optimizer, [grad])
        yield reduced(weight.detach() - before)


@pytest.mark.parametrize(("shape", "expected"), [((8, 32), 0.05), ((32, 8), 0.2), ((8, 8), 0.1)])
def test_a_step_has_norm_lr_times_the_root_of_outputs_over_inputs(shape, expected):
    weight = nn.Parameter(torch.zeros(shape))
    take(weight, MuonPlusPlus([weight], lr=0.1, orthogonalizer="svd"), [numbers(*shape)])
    assert norm(weight) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "rank one", "flipping"])
def test_every_step_has_the_size_that_was_asked_for(shape, kind):
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = MuonPlusPlus([weight], lr=1.0, radius=math.inf)
    for size in steps_of(optimizer, weight, gradients(kind, *shape, seed=3, count=8)):
        assert size == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_rough_orthogonalisation_is_up_to_a_fifth_off_until_it_is_divided_by_its_norm(shape):
    grad = numbers(*shape, seed=2)
    for exact in (False, True):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = MuonPlusPlus(
            [weight], lr=1.0, radius=math.inf, orthogonalizer="ns5", exact_update=exact
        )
        sizes = list(steps_of(optimizer, weight, [grad] * 150))
        if exact:
            assert sizes[-1] == pytest.approx(1.0, abs=1e-3)
        else:
            assert 0.9 < sizes[-1] < 1.21
            assert abs(sizes[-1] - 1) > 2e-3


def test_two_power_iterations_fall_short_on_noise_where_the_sharp_schedule_does_not():
    """The specification has them divide "ns5" to 1 ± 1e-3; its singular values are too near."""
    worst = {}
    for name, options in {
        "power": {"orthogonalizer": "ns5", "exact_update": True},
        "sharp": {"orthogonalizer": "sharp"},
    }.items():
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = MuonPlusPlus([weight], lr=1.0, radius=math.inf, **options)
        grads = gradients("random", 64, 64, seed=5, count=12)
        worst[name] = max(abs(size - 1) for size in steps_of(optimizer, weight, grads))
    assert worst["power"] > 0.02
    assert worst["sharp"] < 1e-3


def polynomial(schedule, x: torch.Tensor) -> torch.Tensor:
    for a, b, c in schedule:
        x = a * x + b * x**3 + c * x**5
    return x


def test_sizes_of_the_schedules():
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    assert polynomial(NS5, x).max() < SIZES["ns5"]
    assert polynomial(SHARP, x).max() < 1 + 1e-4
    assert polynomial(SHARP, x[x > 0.02]).min() > 1 - 1e-3


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_the_sharp_schedule_is_odd_scale_free_and_turns_with_its_input(rows, columns, seed):
    x = numbers(rows, columns, seed=seed, dtype=torch.float64)
    turn = torch.linalg.qr(numbers(columns, columns, seed=1, dtype=torch.float64)).Q
    found = orthogonalize(x, "sharp")
    torch.testing.assert_close(orthogonalize(-7.0 * x, "sharp"), -found)
    torch.testing.assert_close(orthogonalize(x.mT, "sharp"), found.mT)
    torch.testing.assert_close(orthogonalize(x @ turn, "sharp"), found @ turn)
    assert norm(found) == pytest.approx(1.0, abs=1e-3)
    assert orthogonalize(torch.zeros(3, 4), "sharp").abs().max() == 0


def test_a_zero_gradient_moves_nothing_and_a_tiny_one_does_not_blow_up():
    for exact in (False, True):
        weight = start(8, 24)
        before = weight.detach().clone()
        optimizer = MuonPlusPlus([weight], lr=0.1, radius=math.inf, exact_update=exact)
        take(weight, optimizer, [torch.zeros(8, 24)])
        assert torch.equal(weight, before)
        take(weight, optimizer, [1e-30 * numbers(8, 24)])
        assert reduced(weight.detach() - before) <= 0.1 * 1.01
        take(weight, optimizer, [numbers(8, 24, seed=4)])  # and then it goes on
        assert reduced(weight.detach() - before) > 0.09


def test_a_power_iteration_outlives_a_zero_matrix():
    _, vector = spectral_norm(torch.zeros(4, 6), numbers(6), steps=2, tolerance=None)
    value, _ = spectral_norm(numbers(4, 6, seed=1), vector, steps=200)
    assert float(value) == pytest.approx(norm(numbers(4, 6, seed=1)), rel=1e-4)


# Other Muons


def test_square_matrices_follow_torchs_muon_and_wide_ones_by_the_root_of_the_ratio():
    for outputs, inputs, ratio in ((16, 16, 1.0), (8, 32, 0.5), (32, 8, 1.0)):
        mine, theirs = (nn.Parameter(torch.zeros(outputs, inputs)) for _ in range(2))
        grads = list(gradients("random", outputs, inputs, seed=1, count=6))
        options = {"lr": 0.02, "weight_decay": 0.0}
        take(mine, MuonPlusPlus([mine], **options, orthogonalizer="ns5"), grads)
        take(theirs, torch.optim.Muon([theirs], **options, adjust_lr_fn="original"), grads)
        # Theirs computes in bfloat16.
        torch.testing.assert_close(mine.detach(), ratio * theirs.detach(), rtol=0.05, atol=2e-3)


def test_moonlights_factor_is_another_rate_and_decay_at_one_shape():
    lr, decay = 0.02, 0.3
    for shape in SHAPES:
        ours, other = start(*shape), start(*shape)
        factor = spectral_unit(*shape) / (0.2 * math.sqrt(max(shape)))
        grads = list(gradients("random", *shape, seed=2, count=10))
        take(ours, MuonPlusPlus([ours], lr=lr, weight_decay=decay), grads)
        moonlight = MuonPlusPlus(
            [other], lr=lr * factor, weight_decay=decay / factor, rule="moonlight"
        )
        take(other, moonlight, grads)
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_the_wrong_convention_turns_the_unit_over():
    """The negative control: a matrix taken for its transpose."""
    right, wrong = (nn.Parameter(torch.zeros(8, 32)) for _ in range(2))
    grad = numbers(8, 32)
    take(right, MuonPlusPlus([right], lr=0.1), [grad])
    take(wrong, MuonPlusPlus([{"params": [wrong], "transposed": True}], lr=0.1), [grad])
    torch.testing.assert_close(wrong.detach(), 4 * right.detach())


# Width and composition


def test_doubling_the_width_changes_no_norm():
    """With gradients of one spectrum: G and G ⊗ I."""
    narrow = nn.Parameter(0.1 * numbers(6, 9, dtype=torch.float64))
    wide = nn.Parameter(torch.kron(narrow.detach(), torch.eye(2, dtype=torch.float64)))
    both = [MuonPlusPlus([w], lr=0.1, radius=2.0, orthogonalizer="svd") for w in (narrow, wide)]
    for seed in range(10):
        grad = numbers(6, 9, seed=seed, dtype=torch.float64)
        take(narrow, both[0], [grad])
        take(wide, both[1], [torch.kron(grad, torch.eye(2, dtype=torch.float64))])
        assert reduced(wide) == pytest.approx(reduced(narrow), rel=1e-6)


@given(sides=st.tuples(*[st.integers(1, 20)] * 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_reduced_norms_bound_the_size_of_features_layer_by_layer(sides, seed):
    first, second = numbers(sides[1], sides[0], seed=seed), numbers(sides[2], sides[1], seed=seed)
    assert reduced(second @ first) <= reduced(second) * reduced(first) * (1 + 1e-5)
    x = numbers(50, sides[0], seed=seed + 1)
    rms = lambda y: y.square().mean(-1).sqrt()  # noqa: E731
    assert bool((rms(x @ first.t()) <= reduced(first) * rms(x) * (1 + 1e-5)).all())
    top = torch.linalg.svd(first).Vh[0]
    assert rms(first @ top) / rms(top) == pytest.approx(reduced(first), rel=1e-4)


@given(channels=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_a_kernel_of_reduced_norm_one_does_not_expand_images(channels, seed):
    outputs, inputs = channels
    kernel = nn.Parameter(torch.zeros(outputs, inputs, 3, 3))
    optimizer = MuonPlusPlus([kernel], lr=1.0, radius=math.inf)
    take(kernel, optimizer, [numbers(outputs, inputs, 3, 3, seed=seed)])
    flat = kernel.detach().flatten(1)
    assert norm(flat) == pytest.approx(math.sqrt(outputs / inputs) / 9, rel=2e-3)
    image = numbers(1, inputs, 12, 12, seed=seed + 1)
    out = torch.conv2d(image, kernel.detach(), padding=1)
    assert out.square().mean().sqrt() <= image.square().mean().sqrt()


def test_a_kernel_stored_channels_last_takes_the_same_step():
    kernels = [nn.Parameter(0.01 * numbers(4, 3, 3, 3)) for _ in range(2)]
    kernels[1].data = kernels[1].data.to(memory_format=torch.channels_last)
    for kernel in kernels:
        take(kernel, MuonPlusPlus([kernel], lr=0.1), [numbers(4, 3, 3, 3, seed=1)])
    torch.testing.assert_close(kernels[0].detach(), kernels[1].detach())
    assert not torch.equal(kernels[1], 0.01 * numbers(4, 3, 3, 3))


# Fused matrices and experts


@pytest.mark.parametrize("exact", [False, True])
def test_split_matrices_move_as_if_they_were_apart(exact):
    sizes = [12, 4, 4]  # grouped queries: keys and values are smaller
    fused = nn.Parameter(numbers(20, 9))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split(sizes)]
    options = {"lr": 0.1, "exact_update": exact, "orthogonalizer": "ns5"}
    together = MuonPlusPlus([{"params": [fused], "split": sizes}], **options)
    apart = MuonPlusPlus(parts, **options)
    for grad in gradients("random", 20, 9, seed=1, count=4):
        take(fused, together, [grad])
        for part, piece in zip(parts, grad.split(sizes), strict=True):
            part.grad = piece.clone()
        apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]))
    one = nn.Parameter(numbers(20, 9))
    take(one, MuonPlusPlus([one], **options), gradients("random", 20, 9, seed=1, count=4))
    assert not torch.allclose(one, fused, atol=1e-2)


def test_a_fused_conv1d_is_three_matrices():
    fused = nn.Parameter(numbers(6, 9))  # 6 inputs, q, k and v of 3 outputs each
    parts = [nn.Parameter(block.clone()) for block in fused.detach().t().split(3)]
    grad = numbers(6, 9, seed=1)
    take(fused, MuonPlusPlus([{"params": [fused], "transposed": True, "blocks": 3}]), [grad])
    for part, piece in zip(parts, grad.t().split(3), strict=True):
        take(part, MuonPlusPlus([part]), [piece])
    torch.testing.assert_close(fused.detach().t(), torch.cat([p.detach() for p in parts]))


def test_experts_are_matrices_of_their_own():
    experts = nn.Parameter(torch.zeros(3, 8, 6))
    grad = numbers(3, 8, 6)
    grad[1] = 0  # no token went there
    take(experts, MuonPlusPlus([experts], lr=0.1), [grad])
    sizes = [reduced(expert) for expert in experts]
    assert sizes == pytest.approx([0.1, 0.0, 0.1], abs=1e-4)


# Variants


def test_decay_towards_the_start_bounds_the_distance_from_it():
    """For fine-tuning: a weight far outside the radius stays where it is."""
    weight = start(8, 24, w=30.0)
    before = weight.detach().clone()
    optimizer = MuonPlusPlus([weight], lr=0.1, radius=1.0, reference="init")
    take(weight, optimizer, [torch.zeros(8, 24)] * 5)
    torch.testing.assert_close(weight.detach(), before)
    for seed in range(60):
        take(weight, optimizer, [numbers(8, 24, seed=seed % 2)])
        assert reduced(weight.detach() - before) <= 1.001
    assert reduced(weight.detach() - before) > 0.3


def test_a_model_outside_the_radius_is_warned_about():
    weight = start(8, 24, w=30.0)
    with pytest.warns(
        SpectralWarning, match=r'deep\.weight with reduced norm 30.*reference="init"'
    ):
        MuonPlusPlus([("deep.weight", weight)], radius=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MuonPlusPlus([weight], radius=math.inf)
        MuonPlusPlus([weight], radius=2.0, reference="init")
        MuonPlusPlus([start(8, 24, w=1.0)], radius=2.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_baseline_that_normalises_weights_keeps_them_at_one_norm(shape):
    weight = start(*shape, w=3.0)
    optimizer = MuonPlusPlus([weight], lr=0.1, radius=math.inf, weight_norm=1.5)
    for grad in gradients("random", *shape, seed=1, count=15):
        take(weight, optimizer, [grad])
        assert reduced(weight) == pytest.approx(1.5, rel=1e-3)


def test_the_radius_is_the_inverse_of_the_decay_in_every_way_of_saying_it():
    weight = nn.Parameter(torch.zeros(2, 2))
    said = [
        MuonPlusPlus([weight]),
        MuonPlusPlus([weight], radius=10.0),
        MuonPlusPlus([weight], weight_decay=0.1),
        MuonPlusPlus([{"params": [weight], "radius": 10.0}]),
    ]
    assert [o.param_groups[0]["weight_decay"] for o in said] == pytest.approx([0.1] * 4)
    assert MuonPlusPlus([weight], radius=math.inf).param_groups[0]["weight_decay"] == 0


# Adaptive steps


def test_alignment_is_one_for_features_that_the_update_acts_on():
    tall = orthogonalize(numbers(32, 8), "svd")
    assert alignment(tall, numbers(100, 8, seed=1)).item() == pytest.approx(1.0, abs=1e-5)
    wide = orthogonalize(numbers(8, 32), "svd")
    aligned = numbers(100, 8, seed=1) @ wide
    assert alignment(wide, aligned).item() == pytest.approx(1.0, abs=1e-5)
    isotropic = numbers(4000, 32, seed=2)
    assert alignment(wide, isotropic).item() == pytest.approx(math.sqrt(8 / 32), rel=0.02)
    stack = torch.stack([wide, 0 * wide])
    assert alignment(stack, aligned).tolist() == pytest.approx([1.0, 0.0], abs=1e-5)


def adaptive(**options):
    torch.manual_seed(0)
    layer = nn.Linear(32, 8, bias=False)
    optimizer = MuonPlusPlus(layer.parameters(), lr=0.1, radius=math.inf, adaptive=True, **options)
    return layer, optimizer


def backward(layer: nn.Module, seed: int, rows: int = 500) -> torch.Tensor:
    x = numbers(rows, 32, seed=seed)
    (layer(x) * numbers(rows, 8, seed=seed + 1)).mean().backward()
    return x


def test_an_adaptive_step_changes_features_by_the_rate():
    layer, optimizer = adaptive()
    optimizer.watch(layer, tokens=500)
    x, before = backward(layer, 0), layer.weight.detach().clone()
    optimizer.step()
    change = x @ (layer.weight.detach() - before).t()
    relative = change.norm() / x.norm() / math.sqrt(8 / 32)
    assert relative.item() == pytest.approx(0.1, rel=1e-3)
    assert optimizer.state[layer.weight]["alignment_0"].item() == pytest.approx(0.5, rel=0.1)


def test_alignments_are_averaged_slowly():
    layer, optimizer = adaptive(momentum=0.0, nesterov=False)
    optimizer.watch(layer, tokens=500, every=1)
    found = []
    for seed in (0, 5, 9):
        x = backward(layer, seed)
        found.append(alignment(orthogonalize(layer.weight.grad, "sharp"), x).item())
        optimizer.step()
        optimizer.zero_grad()
    mean = 0.99 * (0.99 * found[0] + 0.01 * found[1]) + 0.01 * found[2]
    assert optimizer.state[layer.weight]["alignment_0"].item() == pytest.approx(mean, rel=1e-5)
    assert abs(mean - found[2]) > 1e-4


def test_no_adaptive_step_is_longer_than_the_largest_gain():
    layer, optimizer = adaptive(max_gain=1.5)
    optimizer.watch(layer)
    before = layer.weight.detach().clone()
    backward(layer, 0)
    optimizer.step()
    assert reduced(layer.weight.detach() - before) == pytest.approx(0.15, rel=1e-2)


def test_features_are_kept_when_due_few_and_in_training_only():
    layer, optimizer = adaptive()
    probe = optimizer.watch(layer, tokens=64, every=3)
    seen = []
    for step in range(7):
        backward(layer, step)
        seen.append({key.shape: len(value) for key, value in probe.features.items()})
        optimizer.step()
        assert not probe.features
    few = {layer.weight.shape: 63}
    assert seen == [few, {}, {}, few, {}, {}, few]
    layer.eval()
    optimizer.param_groups[0]["steps"] = 0
    layer(numbers(5, 32))
    assert not probe.features
    probe.remove()
    layer.train()
    layer(numbers(5, 32))
    assert not probe.features


def test_adaptive_steps_need_a_model_that_is_watched():
    layer, optimizer = adaptive()
    backward(layer, 0)
    with pytest.raises(ConfigError, match=r"optimizer\.watch"):
        optimizer.step()
    with pytest.raises(ConfigError, match="none"):
        optimizer.watch(nn.Linear(4, 4))


# State


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"orthogonalizer": "ns5", "exact_update": True},
        {"reference": "init"},
        {"weight_norm": 1.0},
        {"adaptive": True},
    ],
)
def test_a_resumed_optimizer_takes_the_same_steps_bit_for_bit(dtype, options):
    def begin():
        layer = nn.Linear(32, 8, bias=False)
        layer.weight.data = numbers(8, 32).to(dtype) / 8
        optimizer = MuonPlusPlus(layer.parameters(), lr=0.1, **options)
        if options.get("adaptive"):
            optimizer.watch(layer, every=2)
        return layer, optimizer

    def steps(layer, optimizer, seeds):
        for seed in seeds:
            layer(numbers(10, 32, seed=seed).to(dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    layer, optimizer = begin()
    steps(layer, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other, again = begin()
    other.load_state_dict(layer.state_dict())
    again.load_state_dict(saved)
    for each in ((layer, optimizer), (other, again)):
        steps(*each, range(3, 7))
    assert torch.equal(layer.weight, other.weight)


def test_two_processes_take_the_steps_of_one(tmp_path):
    fork = multiprocessing.get_context("fork")
    arguments = [(rank, tmp_path) for rank in (0, 1)]
    running = [fork.Process(target=_muon_mup_processes.main, args=each) for each in arguments]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=100)
        assert process.exitcode == 0
    for rank, way in itertools.product((0, 1), ("ddp", "fsdp")):
        found = json.loads((tmp_path / f"{rank}.json").read_text())[way]
        for name, values in _muon_mup_processes.alone().items():
            torch.testing.assert_close(
                torch.tensor(found[name]), values, rtol=1e-4, atol=1e-5, msg=f"{way} {name}"
            )


# Bad input


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad):
    weight = start(8, 24)
    optimizer = MuonPlusPlus([weight], lr=0.1)
    take(weight, optimizer, [numbers(8, 24)])
    kept, before = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    take(weight, optimizer, [torch.full((8, 24), bad)])
    assert optimizer.skipped == 1
    assert torch.equal(weight, before)
    now = optimizer.state_dict()
    assert now["param_groups"] == kept["param_groups"]
    assert torch.equal(now["state"][0]["momentum"], kept["state"][0]["momentum"])
    optimizer.on_nan = "raise"
    with pytest.raises(NotFiniteError):
        take(weight, optimizer, [torch.full((8, 24), bad)])


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused(kind):
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64 if kind == "complex" else None))
    optimizer = MuonPlusPlus([("odd", weight)], radius=math.inf)
    weight.grad = torch.zeros_like(weight).to_sparse() if kind == "sparse" else weight.detach()
    with pytest.raises(ConfigError, match="odd"):
        optimizer.step()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "transformer.wte.weight"])
def test_an_embedding_among_matrices_is_named_unless_it_is_said_to_be_one(name):
    table = nn.Parameter(numbers(9, 4))
    with pytest.raises(ConfigError, match=name):
        MuonPlusPlus([(name, table)])
    with pytest.raises(ConfigError, match="role embedding"):
        MuonPlusPlus([{"params": [("table", table)], "role": "embedding"}])
    MuonPlusPlus([{"params": [(name, table)], "role": "matrix"}])


def test_a_vector_among_matrices_is_named():
    with pytest.raises(ConfigError, match="gain"):
        MuonPlusPlus([("gain", nn.Parameter(torch.zeros(4)))])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"radius": 0.0}, "radius"),
        ({"radius": -1.0}, "radius"),
        ({"radius": math.nan}, "radius"),
        ({"radius": 5.0, "weight_decay": 0.2}, "both"),
        ({"lr": 1.0, "radius": 0.5}, "lr times weight_decay"),
        ({"rule": "kj"}, "rule"),
        ({"reference": "start"}, "reference"),
        ({"power_iterations": 0}, "power_iterations"),
        ({"max_gain": 0.5}, "max_gain"),
        ({"weight_norm": 0.0}, "weight_norm"),
        ({"weight_norm": 1.0}, "norm 0"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        MuonPlusPlus([nn.Parameter(torch.zeros(2, 2))], **options)


def test_a_split_that_does_not_add_up_is_named():
    with pytest.raises(ConfigError, match="add up to its 6 outputs"):
        MuonPlusPlus([{"params": [nn.Parameter(torch.zeros(6, 2))], "split": [2, 2]}])
