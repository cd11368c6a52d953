"""What weight decay does to matrices under AdamW: the steady state, and the conventions."""

import math
from functools import cache, partial

import pytest
import torch
from torch import nn

from sparing.errors import ConfigError, DataError
from sparing.scale import Muon, SteadyState, decay_convention
from sparing.scale.decay import (
    is_stationary,
    lost_to_rounding,
    to_decoupled,
    to_independent,
)
from sparing.scale.singular import largest_singular_values
from sparing.scale.spectra import ks_distance


@cache
def noise_run(
    lr: float, weight_decay: float, steps: int, width: int = 64, seed: int = 0
) -> tuple[torch.Tensor, list[float]]:
    """A matrix after AdamW steps along independent normal gradients, and its RMS on the way."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.zeros(width, width))
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95))
    sizes = []
    for step in range(steps):
        weight.grad = torch.randn(width, width, generator=generator)
        optimizer.step()
        if (step + 1) % (steps // 20) == 0:
            sizes.append(rms(weight))
    return weight.detach(), sizes


def rms(weight: torch.Tensor) -> float:
    return weight.detach().square().mean().sqrt().item()


# The steady state


@pytest.mark.parametrize(("lr", "weight_decay"), [(0.01, 0.5), (0.02, 1.0), (0.002, 4.0)])
def test_noise_settles_at_its_steady_rms(lr, weight_decay):
    weight, _ = noise_run(lr, weight_decay, 1200)
    assert rms(weight) == pytest.approx(SteadyState(lr, weight_decay).noise_rms(), rel=0.03)


def test_the_specifications_share_of_the_steady_rms_holds_at_its_own_rate_only():
    at_its_rate, _ = noise_run(0.008, 1.0, 1200)
    assert rms(at_its_rate) / SteadyState(0.008, 1.0).rms == pytest.approx(0.945, abs=0.01)
    faster, _ = noise_run(0.04, 1.0, 600)
    assert rms(faster) / SteadyState(0.04, 1.0).rms < 0.9  # where the specification has 0.945


def test_the_largest_singular_value_of_noise_is_at_its_edge():
    weight, _ = noise_run(0.01, 0.5, 1200)
    sigma = largest_singular_values(weight).values.item()
    assert 0.93 < sigma / (2 * math.sqrt(64) * rms(weight)) < 1.0


def test_one_ratio_of_rate_and_decay_makes_one_norm_and_one_spectrum():
    first, _ = noise_run(0.01, 0.5, 1200)
    second, _ = noise_run(0.008, 0.4, 1500, seed=1)
    assert rms(first) == pytest.approx(rms(second), rel=0.02)
    spectra = [torch.linalg.svdvals(w) / math.sqrt(0.02) for w in (first, second)]
    assert ks_distance(*spectra) < 0.05
    other, _ = noise_run(0.02, 0.25, 1200)
    assert ks_distance(spectra[0], torch.linalg.svdvals(other) / math.sqrt(0.02)) > 0.3


def test_spectra_keep_their_shape_when_the_ratio_changes():
    first, _ = noise_run(0.01, 0.5, 1200)
    second, _ = noise_run(0.002, 4.0, 1200)
    one = torch.linalg.svdvals(first) / math.sqrt(0.01 / 0.5)
    two = torch.linalg.svdvals(second) / math.sqrt(0.002 / 4.0)
    assert ks_distance(one, two) < 0.05


def test_a_constant_gradient_settles_at_one_over_the_decay():
    weight = nn.Parameter(torch.zeros(8, 8))
    signs = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).sign()
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=10.0)
    for _ in range(300):
        weight.grad = 0.3 * signs
        optimizer.step()
    torch.testing.assert_close(weight.detach(), -signs / 10, atol=1e-4, rtol=0)
    rank_one = nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.AdamW([rank_one], lr=0.01, weight_decay=10.0)
    for _ in range(300):
        rank_one.grad = torch.ones(8, 8)
        optimizer.step()
    assert largest_singular_values(rank_one).values.item() == pytest.approx(8 / 10, rel=1e-3)


def test_without_decay_norms_grow_as_the_root_of_time_and_are_not_stationary():
    _, sizes = noise_run(0.01, 0.0, 1200)
    assert sizes[-1] / sizes[len(sizes) // 4 - 1] == pytest.approx(2.0, rel=0.05)
    assert not is_stationary(sizes)
    assert "not stationary" in SteadyState(0.01, 0.0, 1e9).describe()
    assert SteadyState(0.01, 0.0).rms == math.inf


def test_with_decay_they_are_stationary():
    _, sizes = noise_run(0.01, 0.5, 1200)
    assert is_stationary(sizes)


@pytest.mark.parametrize("bad", [[1.0] * 7, [1.0] * 8 + [0.0], [math.nan] * 9])
def test_records_that_say_nothing_are_refused(bad):
    with pytest.raises(DataError, match="recorded norms"):
        is_stationary(bad)


def test_time_to_settle():
    state = SteadyState(8e-3, 0.1, 2400)
    assert state.needed == pytest.approx(3750)
    assert state.reached is False
    assert SteadyState(8e-3, 0.1, 2600).reached is True
    assert SteadyState(8e-3, 0.1).reached is None
    assert "3,750" in SteadyState(8e-3, 0.1).describe()


# Why norms matter


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def readout(weight: torch.Tensor) -> torch.Tensor:
    """The loss of a linear layer whose output is normalised, ε = 0."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return (normalised(x @ weight.t()) - target).square().mean()


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_a_norm_hides_the_scale_forward_and_inverts_it_backward(scale):
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = []
    for factor in (1.0, scale):
        scaled = (factor * weight).requires_grad_()
        loss = readout(scaled)
        loss.backward()
        grads.append((loss.item(), scaled.grad))
    assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-6)
    torch.testing.assert_close(grads[1][1], grads[0][1] / scale)


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_a_scaled_matrix_with_a_scaled_rate_has_the_scaled_trajectory(scale):
    start = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def trained(factor):
        weight = nn.Parameter(factor * start)
        optimizer = torch.optim.AdamW([weight], lr=factor * 0.02, weight_decay=2 / factor, eps=0)
        for _ in range(20):
            optimizer.zero_grad()
            readout(weight).backward()
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(trained(scale), scale * trained(1.0), rtol=1e-9, atol=1e-12)


# Conventions


class Independent(torch.optim.SGD):
    """W ← (1 - λ)W."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                with torch.no_grad():
                    parameter.mul_(1 - group["weight_decay"])


@pytest.mark.parametrize(
    ("optimizer", "convention"),
    [
        (torch.optim.AdamW, "decoupled"),
        (partial(torch.optim.AdamW, betas=(0.9, 0.95), foreach=False), "decoupled"),
        (partial(torch.optim.Adam, decoupled_weight_decay=True), "decoupled"),
        (Muon, "decoupled"),
        (Independent, "independent"),
    ],
)
def test_the_convention_is_found_by_a_step(optimizer, convention):
    assert decay_convention(optimizer) == convention


def test_l2_is_refused():
    with pytest.raises(ConfigError, match="L2"):
        decay_convention(torch.optim.Adam)


def test_other_shrinking_is_refused():
    with pytest.raises(ConfigError, match="a weight of 1 that became"):
        decay_convention(lambda given, lr, weight_decay: torch.optim.SGD(given, lr=lr))


def test_conversions_are_inverse_and_take_the_same_steps():
    lr, weight_decay = 0.02, 0.3
    independent = to_independent(lr, weight_decay)
    assert to_decoupled(lr, independent) == pytest.approx(weight_decay)
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for weight, optimizer in zip(
        weights,
        (
            torch.optim.AdamW([weights[0]], lr=lr, weight_decay=weight_decay),
            Independent([weights[1]], lr=lr, weight_decay=independent),
        ),
        strict=True,
    ):
        weight.grad = torch.zeros(2)
        optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


def test_bfloat16_loses_a_decay_below_half_its_last_place():
    assert lost_to_rounding(1e-3, 1.0, torch.bfloat16)
    assert not lost_to_rounding(1e-2, 1.0, torch.bfloat16)
    assert not lost_to_rounding(1e-3, 1.0, torch.float32)
    weight = torch.ones(4).bfloat16()
    assert torch.equal(weight * (1 - 1e-3), weight)
