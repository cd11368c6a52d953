"""What the plots show is decided before anything is drawn."""

import math

import pytest
from _results import fake_results, fake_row
from hypothesis import given
from hypothesis import strategies as st

from sparing.report.curves import mean_over_seeds, running_mean, smoothing_window
from sparing.report.palette import GREY, looks
from sparing.report.pareto import (
    COSTS,
    Point,
    budget_limit,
    cost_window,
    front,
    loss_window,
    nearby_references,
    reference_lines,
    staircase,
)

PARAMETERS, MEMORY, _ = COSTS
ROW = fake_row("mos", [1.0])
amounts = st.floats(min_value=0.1, max_value=100)


@given(st.lists(st.tuples(amounts, amounts), min_size=1, max_size=12))
def test_nothing_dominates_the_front_and_the_front_dominates_the_rest(
    pairs: list[tuple[float, float]],
) -> None:
    candidates = [Point(ROW, cost, loss, 0.0) for cost, loss in pairs]
    kept = front(candidates)
    for point in candidates:
        better = [k for k in kept if k.cost <= point.cost and k.loss <= point.loss]
        assert better
        assert not any(point.cost < k.cost and point.loss < k.loss for k in kept)


def test_the_staircase_turns_at_right_angles() -> None:
    steps = [Point(ROW, 1.0, 5.0, 0.0), Point(ROW, 2.0, 3.0, 0.0)]
    assert staircase(steps, 4.0) == ([1.0, 2.0, 2.0, 4.0], [5.0, 5.0, 3.0, 3.0])


def test_a_distant_reference_does_not_squeeze_the_methods() -> None:
    low, high = loss_window(fake_results())
    losses = {line.name: line.loss for line in reference_lines(fake_results())}
    assert high < losses["untouched"]
    assert low < losses["full"] < high


def test_full_fine_tuning_is_a_line_where_it_costs_far_more() -> None:
    assert nearby_references(fake_results(), PARAMETERS) == []
    line = reference_lines(fake_results())[1]
    assert line.text(MEMORY) == "full 2.851 (at 4,704 MiB)"


def test_far_apart_costs_are_on_a_logarithmic_axis() -> None:
    near, far = Point(ROW, 10.0, 1.0, 0.0), Point(ROW, 1000.0, 1.0, 0.0)
    assert cost_window([near])[2] is False
    assert cost_window([near, far])[2] is True
    left, right, _ = cost_window([near, far])
    assert 0 < left < 10 < 1000 < right


def test_the_budget_is_drawn_only_on_its_own_axis() -> None:
    assert budget_limit(fake_results(), PARAMETERS) == 615_500
    assert budget_limit(fake_results(), MEMORY) is None


def test_each_method_has_its_own_look_and_references_are_grey() -> None:
    style = looks(fake_results())
    ours = [style[name] for name in ("mos", "neuroada", "hut", "sara")]
    assert len({look.colour for look in ours}) == len({look.marker for look in ours}) == 4
    assert style["lora"].colour == style["full"].colour == GREY


def test_curves_are_averaged_over_the_seeds_that_are_there() -> None:
    assert mean_over_seeds([[1.0, 2.0], [3.0]]) == [2.0, 2.0]
    assert math.isnan(mean_over_seeds([[math.nan]])[0])


def test_the_running_mean_of_a_line_is_the_line_inside() -> None:
    line = [float(step) for step in range(9)]
    assert running_mean(line, 3)[1:-1] == pytest.approx(line[1:-1])
    assert running_mean(line, 1) == line


def test_long_runs_are_smoothed_by_an_odd_window() -> None:
    assert smoothing_window(fake_results()) == 11
