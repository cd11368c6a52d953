"""The paper's synthetic setting, reconstructed: a residual block that learns a ReLU teacher."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from sparing.scale import DecayRule, Spectra, fit_width_exponent, measure_spectra, wd_scaled_plan
from sparing.scale.spectra import compare_spectra

INPUTS, HIDDEN, BATCH, STEPS = 32, 64, 256, 700
BASE_WIDTH, WIDTH = 64, 128
VECTORS = {"embed.weight": "vector", "readout.weight": "vector"}
RATE, DECAY = 4e-3, 2.0  # ηλ × steps is 5.6 at the base and 2.8 at twice the width and p = 0


class Block(nn.Module):
    """y = h + W₂ ReLU(W₁ norm(h)), h = E x; the output reads norm(y)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.last_norm = nn.RMSNorm(width)
        self.readout = nn.Linear(width, INPUTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        y = h + self.second(self.first(self.norm(h)).relu())
        return self.readout(self.last_norm(y))


@cache
def trained(width: int, p: float) -> Spectra:
    torch.manual_seed(0)
    base, model = Block(BASE_WIDTH), Block(width)
    plan = wd_scaled_plan(model, base, DecayRule(RATE, DECAY, p=p), overrides=VECTORS)
    plan.initialize(model)
    optimizer = torch.optim.AdamW(plan.param_groups(model), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(INPUTS, HIDDEN, generator=generator) / INPUTS**0.5
    down = torch.randn(HIDDEN, INPUTS, generator=generator) / HIDDEN**0.5
    for _ in range(STEPS):
        x = torch.randn(BATCH, INPUTS, generator=generator)
        target = (x @ up).relu() @ down
        target += 0.3 * torch.randn(target.shape, generator=generator)
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    row = next(row for row in plan.parameters if row.info.role == "matrix")
    return measure_spectra(model, lr=row.lr, weight_decay=row.weight_decay, overrides=VECTORS)


def test_a_low_rank_signal_has_an_exponent_between_noise_and_one_direction():
    fit = fit_width_exponent([trained(BASE_WIDTH, 0.0), trained(WIDTH, 0.0)])
    assert set(fit.by_matrix) == {"first.weight", "second.weight"}
    assert 0.6 < fit.exponent < 1.05


def test_the_fitted_exponent_of_decay_mends_the_growth_of_sigma():
    runs = [trained(BASE_WIDTH, 0.0), trained(WIDTH, 0.0)]
    before = compare_spectra(*runs).slope
    p = fit_width_exponent(runs).decay_exponent()
    after = compare_spectra(runs[0], trained(WIDTH, p)).slope
    assert abs(after) < abs(before) / 2
    assert abs(after) < 0.15 < before


def test_more_decay_gives_smaller_singular_values():
    slopes = [compare_spectra(trained(BASE_WIDTH, 0.0), trained(WIDTH, p)).slope for p in (0, 0.5)]
    assert slopes[1] == pytest.approx(slopes[0] - 0.25, abs=0.1)  # σ₁ ∝ √(η/λ)
