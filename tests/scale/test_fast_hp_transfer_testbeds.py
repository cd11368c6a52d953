"""The truncation search against brute force, and the testbeds against theory."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparing.errors import ConfigError, DataError
from sparing.scale import analyze_transfer
from sparing.scale.fast_hp_transfer import (
    Columns,
    PhiCurves,
    RandomFeatures,
    Trajectory,
    TwoLayerReLU,
    TwoLayerTask,
    find_truncation,
    tightest_bound,
    transfer_bound,
)
from sparing.scale.fast_hp_transfer.random_features import activation
from sparing.scale.fast_hp_transfer.truncation import (
    TAUS,
    bends,
    convexity_error,
    descend,
    proxy,
    steepest,
)


def curves(width: int, components: int, seed: int, points: int = 3) -> PhiCurves:
    draw = torch.Generator().manual_seed(seed)
    parts = -torch.rand(points, components, generator=draw, dtype=torch.float64)
    phi = torch.cat([torch.zeros(points, 1), parts.cumsum(1)], dim=1)
    grid = torch.rand(points, generator=draw, dtype=torch.float64).add(0.1).cumsum(0)
    return PhiCurves(width, grid, phi, phi[:, -1] - 0.01)


def on_grid(of: PhiCurves, grid: Tensor) -> PhiCurves:
    return PhiCurves(of.width, grid, of.phi, of.whole)


# Truncation


@given(st.integers(2, 6), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_descent_ends_where_no_single_change_helps_and_never_rises(components, seed):
    narrow = curves(components, components, seed)
    wide = on_grid(curves(2 * components, 2 * components, seed + 1000), narrow.grid)
    start = torch.full((3,), max(1, components // 2))
    found = descend(narrow, wide, 0.1, 0.05)
    best = proxy(narrow, wide, found, 0.1, 0.05)
    assert best <= proxy(narrow, wide, start, 0.1, 0.05) + 1e-12
    for point in range(3):
        for k in range(1, components + 1):
            other = found.clone()
            other[point] = k
            assert proxy(narrow, wide, other, 0.1, 0.05) >= best - 1e-12
    again = descend(narrow, wide, 0.1, 0.05, found)
    assert torch.equal(again, found)


def best_of_all(narrow: PhiCurves, wide: PhiCurves, components: int) -> float:
    tried = itertools.product(range(1, components + 1), repeat=3)
    return min(proxy(narrow, wide, torch.tensor(k), 0.0, 0.0) for k in tried)


@given(st.integers(2, 6), st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_descent_is_brute_force_where_points_do_not_interact(components, seed):
    narrow = curves(components, components, seed)
    wide = on_grid(curves(2 * components, 2 * components, seed + 1000), narrow.grid)
    found = descend(narrow, wide, 0.0, 0.0)
    assert proxy(narrow, wide, found, 0.0, 0.0) == pytest.approx(
        best_of_all(narrow, wide, components), abs=1e-12
    )


def test_descent_from_every_start_contains_the_best_of_all():
    for seed in range(10):
        narrow = curves(4, 4, seed)
        wide = on_grid(curves(8, 8, seed + 1000), narrow.grid)
        starts = list(itertools.product(range(1, 5), repeat=3))
        brute = min(proxy(narrow, wide, torch.tensor(k), 0.1, 0.1) for k in starts)
        reached = min(
            proxy(narrow, wide, descend(narrow, wide, 0.1, 0.1, torch.tensor(k)), 0.1, 0.1)
            for k in starts
        )
        assert reached == pytest.approx(brute, abs=1e-12)


def planted(width: int, decisive: int, tilt: float, points: int = 9) -> PhiCurves:
    """The first components make a parabola that all widths share; the rest is a slope."""
    grid = torch.linspace(-2, 2, points, dtype=torch.float64)
    bowl = (grid - 0.2).square() - 5
    tail = tilt * (grid + 3)
    parts = torch.zeros(points, width, dtype=torch.float64)
    parts[:, :decisive] = (bowl / decisive)[:, None]
    parts[:, decisive:] = (tail / (width - decisive))[:, None]
    phi = torch.cat([torch.zeros(points, 1, dtype=torch.float64), parts.cumsum(1)], dim=1)
    return PhiCurves(width, grid, phi, phi[:, -1])


def test_the_search_finds_the_directions_that_are_invariant():
    found = find_truncation(planted(16, 4, 0.3), planted(64, 4, 0.02))
    assert found.accepted
    assert found.kappa.tolist() == [4] * 9
    assert found.shift <= 0.5
    assert found.convexity == 0.0
    assert found.proxy < 0.1


def test_the_search_tries_small_weights_first_and_fails_openly():
    assert len(TAUS) == 9
    assert (TAUS[0], TAUS[-1]) == pytest.approx((1e-4, 1.0))
    found = find_truncation(planted(16, 4, 0.3), planted(64, 4, 0.02))
    assert (found.tau1, found.tau2) == pytest.approx((1e-4, 1e-4))
    concave = PhiCurves(4, planted(16, 4, 0).grid, -planted(4, 2, 0).phi, -planted(4, 2, 0).whole)
    assert not find_truncation(concave, concave).accepted
    with pytest.raises(ConfigError, match="taus"):
        find_truncation(concave, concave, taus=())


def test_slopes_and_bends_are_exact_on_parabolas_with_any_grid():
    grid = torch.tensor([0.0, 0.3, 1.1, 1.2, 3.0], dtype=torch.float64)
    values = 2.5 * (grid - 0.7).square() + 1
    torch.testing.assert_close(bends(grid, values), torch.full((3,), 5.0, dtype=torch.float64))
    assert convexity_error(grid, values) == 0.0
    assert convexity_error(grid, -values) == 1.0
    assert steepest(grid, values) == pytest.approx(2.5 * abs(3.0 + 1.2 - 1.4))
    bump = values.clone()
    bump[2] += 10
    assert convexity_error(grid, bump) == pytest.approx(1 / 3)


BENDS, SMALL = st.floats(0.5, 3), st.floats(-0.3, 0.3)


@given(BENDS, BENDS, SMALL, SMALL, SMALL)
@settings(max_examples=50, deadline=None)
def test_the_bound_holds_on_convex_families(narrow_bend, wide_bend, shift, tilt, other):
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)

    def family(bend: float, centre: float, slope: float) -> PhiCurves:
        cut = 0.5 * bend * (grid - centre).square()
        tail = slope * torch.sin(grid) / 2
        phi = torch.stack([torch.zeros_like(grid), cut, cut + tail], dim=1)
        return PhiCurves(2, grid, phi, phi[:, -1])

    narrow, wide = family(narrow_bend, 0.0, tilt), family(wide_bend, shift, other)
    moved = abs(float(grid[narrow.whole.argmin()] - grid[wide.whole.argmin()]))
    for k in (1, 2):
        bound = transfer_bound(narrow, wide, torch.full((601,), k))
        assert bound.feasible
        assert bound.value >= moved - 0.02  # two grid steps
    best, tightest = tightest_bound(narrow, wide)
    assert tightest.value >= moved - 0.02
    assert best in (1, 2)


def test_with_all_directions_only_the_distance_of_the_curves_is_left():
    grid = torch.linspace(-1, 1, 201, dtype=torch.float64)
    pair = [
        PhiCurves(1, grid, torch.stack([0 * grid, f], dim=1), f)
        for f in (grid.square(), grid.square() + 0.1 * grid)
    ]
    bound = transfer_bound(*pair, torch.ones(201, dtype=torch.long))
    assert bound.flatness == 0.0
    assert bound.value == pytest.approx(2 * math.sqrt(0.1 / 2.0))
    flat = PhiCurves(1, grid, torch.stack([0 * grid, -grid.square()], dim=1), -grid.square())
    assert not transfer_bound(flat, pair[1], torch.ones(201, dtype=torch.long)).feasible
    assert transfer_bound(flat, pair[1], torch.ones(201, dtype=torch.long)).value == math.inf


def test_unsorted_repeated_and_different_grids_are_refused():
    good = planted(8, 2, 0.1)
    for grid in (good.grid.flip(0), torch.zeros(9, dtype=torch.float64)):
        with pytest.raises(DataError, match="ascending"):
            on_grid(good, grid)
    with pytest.raises(DataError, match="one grid"):
        find_truncation(good, on_grid(good, good.grid + 1))
    with pytest.raises(DataError, match="diverged"):
        PhiCurves(8, good.grid, good.phi, good.whole * float("nan"))
    with pytest.raises(DataError, match="grid points"):
        PhiCurves(8, good.grid, good.phi[:3], good.whole)
    short = curves(4, 4, 0, points=2)
    with pytest.raises(DataError, match="3 grid points"):
        find_truncation(short, short)


def test_curves_are_made_of_trajectories_averaged_over_seeds():
    def run(value: float, width: int = 4) -> Trajectory:
        whole = torch.full((3,), value, dtype=torch.float64)
        directions = whole[:, None] * torch.arange(width + 1) / width
        steps = torch.arange(4)
        return Trajectory(width, steps, torch.zeros(4), whole, 0 * whole, directions)

    found = PhiCurves.of({1.0: [run(-1), run(-3)], 0.0: [run(-2)]})
    assert found.grid.tolist() == [0.0, 1.0]
    assert found.whole.tolist() == [-6.0, -6.0]
    assert found.phi[1].tolist() == pytest.approx([0, -1.5, -3.0, -4.5, -6.0])
    assert found.truncated(torch.tensor([1, 4])).tolist() == pytest.approx([-1.5, -6.0])
    with pytest.raises(DataError, match="one width"):
        PhiCurves.of({0.0: [run(-1), run(-1, 8)]})


# Random features


@pytest.fixture(scope="module")
def features() -> RandomFeatures:
    return RandomFeatures()


def test_constants_of_the_activations():
    assert activation("tanh").linear == pytest.approx(0.9304699, abs=1e-7)
    assert activation("relu").linear == pytest.approx(0.7334711, abs=1e-7)
    assert activation("linear").linear == pytest.approx(1.0)
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("tanh", "relu", "erf"):
        values = activation(name)(z)
        assert float(values.mean()) == pytest.approx(0, abs=0.01)
        assert float(values.var()) == pytest.approx(1, abs=0.02)
        assert float((z * values).mean()) ** 2 == pytest.approx(activation(name).linear, abs=0.02)


def test_the_best_ridge_and_its_error_at_infinite_width(features):
    best = features.best_at_infinity()
    assert best.ridge == pytest.approx(0.3478708, abs=1e-7)
    assert best.risk == pytest.approx(0.4210880, abs=1e-7)
    assert features._infinite(best.ridge) == pytest.approx(7.96739, abs=1e-5)
    for ridge in (0.9 * best.ridge, 1.1 * best.ridge):
        assert features.risk(ridge) > best.risk


def test_the_best_ridge_and_its_error_at_finite_width(features):
    assert features.best(16).ridge == pytest.approx(0.37678, abs=1e-5)
    assert features.best(256).ridge == pytest.approx(0.35093, abs=1e-5)
    assert features.best(256).risk == pytest.approx(0.421535, abs=1e-6)
    assert features.risk(features.best_at_infinity().ridge, 4) == pytest.approx(0.452766, abs=2e-4)
    assert features.best(4).risk == pytest.approx(0.452766, abs=1e-6)


def test_both_equations_are_solved(features):
    for ridge, psi2 in ((0.01, 0.5), (0.3, 4.0), (3.0, 64.0)):
        m = features.solve(ridge, psi2)
        mu1, mu2, psi1 = features._linear, 1 - features._linear, 4.0
        last = mu1 * m.m1 * m.m2 * (ridge * m.m1 - 1)
        assert (m.m1 - m.m2) * (mu2 * m.m1 + mu1 * m.m2) / psi1 + last == pytest.approx(
            0, abs=1e-12
        )
        second = psi2 / psi1 * (mu1 * m.m1 * m.m2 + (m.m2 - m.m1) / psi1) + last
        assert second == pytest.approx(0, abs=1e-9)
        near = features.solve(ridge * 1.0001, psi2)
        assert m.slope1 == pytest.approx((near.m1 - m.m1) / (1e-4 * ridge), rel=1e-3)


def test_limits_of_width_and_ridge(features):
    assert features.risk(0.3, 1e6) == pytest.approx(features.risk(0.3), abs=1e-6)
    for psi2 in (4.0, float("inf")):
        assert features.risk(1e7, psi2) == pytest.approx(1 + 0.25**2, abs=1e-4)


def test_local_slopes_of_the_gaps(features):
    limit = features.best_at_infinity()
    gaps = []
    for psi2 in (128, 256):
        best = features.best(psi2)
        gaps.append(
            (
                best.risk - limit.risk,
                best.ridge - limit.ridge,
                features.risk(best.ridge) - limit.risk,
            )
        )
    slopes = [math.log2(wide / narrow) for wide, narrow in zip(*gaps, strict=True)]
    assert slopes == pytest.approx([1.000, 0.938, 1.873], abs=1e-3)


def test_the_distance_of_the_best_ridge_is_not_monotone_at_small_widths(features):
    limit = features.best_at_infinity().ridge
    gaps = [abs(features.best(psi2).ridge - limit) for psi2 in (1, 2, 4, 8, 16, 32)]
    assert any(b > a for a, b in itertools.pairwise(gaps))
    assert gaps[-1] < gaps[-2]


def test_corrected_constants_are_the_limits_and_the_printed_ones_are_not(features):
    loss, ridge = features.constants()
    best, limit = features.best(2e4), features.best_at_infinity()
    assert (best.risk - limit.risk) * 2e4 / 4 == pytest.approx(loss, rel=1e-4)
    assert (best.ridge - limit.ridge) * 2e4 / 4 == pytest.approx(ridge, rel=2e-3)
    assert loss == pytest.approx(0.0286, abs=1e-4)
    assert ridge == pytest.approx(0.205, abs=2e-3)
    assert abs(loss - 0.0694) > 0.03
    assert ridge > 0  # the appendix has -0.032


def test_simulated_regressions_have_the_predicted_error(features):
    ridge = features.best_at_infinity().ridge
    found = sum(features.simulate(ridge, 4, dimensions=150, seed=s) for s in range(4)) / 4
    assert found == pytest.approx(features.risk(ridge, 4), abs=0.03)
    more = sum(features.simulate(50.0, 4, dimensions=100, seed=s) for s in range(4)) / 4
    assert more == pytest.approx(features.risk(50.0, 4), abs=0.06)
    assert features.risk(50.0, 4) > 0.8  # the penalty is on divided features


def test_the_analysis_finds_that_random_features_transfer_fast(features):
    rows = [
        {"psi2": psi2, "ridge": 2**nu, "loss": features.risk(2**nu, psi2)}
        for psi2 in (128, 181, 256, 512, 1024, 4096)
        for nu in torch.arange(-1.56, -1.46, 0.01).tolist()
    ]
    found = analyze_transfer(rows, "ridge", columns=Columns(width="psi2"), replicates=50)
    assert found.alpha.value == pytest.approx(1, abs=0.02)
    assert found.beta.value == pytest.approx(1, abs=0.08)
    assert found.verdict == "fast"


def test_bad_random_features_are_refused():
    with pytest.raises(ConfigError, match="activation"):
        RandomFeatures(features="swish")
    with pytest.raises(ConfigError, match="psi1"):
        RandomFeatures(psi1=0)
    with pytest.raises(ConfigError, match="noise"):
        RandomFeatures(target="linear", noise=0.0)
    with pytest.raises(ConfigError, match="above 0"):
        RandomFeatures().solve(0.0)


# Two-layer networks


def test_targets_are_what_the_paper_says():
    draw = torch.Generator().manual_seed(0)
    x, y = TwoLayerTask(dimensions=64).draw(20_000, draw)
    assert float(y.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(x.square().sum(1)[y == 1].min()) > float(x.square().sum(1)[y == 0].max()) - 1e-3
    x, y = TwoLayerTask("norm").draw(20_000, draw)
    assert float(x.var()) == pytest.approx(4 / 64, rel=0.02)
    torch.testing.assert_close(y, (64 / 60 * x[:, :15].square().sum(1)).sqrt())
    assert float(y.square().mean()) == pytest.approx(1.0, abs=0.05)


def test_mup_keeps_features_and_shrinks_outputs_and_their_rate():
    sizes = []
    for width in (128, 2048):
        network = TwoLayerReLU(64, width)
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            sizes.append((float(network.hidden(x).std()), float(network(x).std())))
        rates = [group["lr"] for group in network.groups(0.01, second_layer=0.02)]
        assert rates == pytest.approx([0.01, 0.01 * 0.02 * 128 / width])
    assert sizes[0][0] == pytest.approx(sizes[1][0], rel=0.1)
    assert sizes[0][1] / sizes[1][1] == pytest.approx(4.0, rel=0.5)


def test_a_sweep_of_networks_feeds_the_analysis():
    task = TwoLayerTask("norm", dimensions=8, relevant=4, steps=40, batch=64, tests=256)
    rows = task.sweep((16, 32, 64), [1e-4, 1e-2, 3e-2, 1e-1, 100.0], (0, 1))
    assert len(rows) == 30
    assert rows[0] == task.sweep((16,), [1e-4])[0]  # seeded
    found = analyze_transfer(rows, replicates=20)
    assert found.verdict in ("fast", "slow", "undetermined")
    assert [row.width for row in found.widths] == [16, 32, 64]
    with pytest.raises(ConfigError, match="target"):
        TwoLayerTask("cube")
    with pytest.raises(ConfigError, match="relevant"):
        TwoLayerTask(relevant=65)
