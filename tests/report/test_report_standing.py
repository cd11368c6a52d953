"""The sentence about the winner claims no more than the runs show."""

from dataclasses import replace

from _results import fake_results, fake_row

from sparing.compare.results import LearningRate, Results, Row, Summary
from sparing.report import standing
from sparing.report.rows import in_order


def only(*rows: Row) -> Results:
    return replace(fake_results(), rows=list(rows))


def test_a_tie_within_one_standard_deviation_has_no_winner() -> None:
    outcome = standing(fake_results())
    assert outcome.headline.startswith("No single winner: neuroada")
    assert "mos is within one standard deviation" in outcome.headline
    assert not outcome.clear


def test_a_clear_lead_names_the_distance_to_lora() -> None:
    outcome = standing(only(fake_row("lora", [3.0, 3.01]), fake_row("mos", [2.9, 2.91])))
    assert outcome.headline.startswith("mos has the lowest validation loss of 2 methods")
    assert "0.1000 below LoRA" in outcome.headline
    assert outcome.clear


def test_one_seed_has_no_spread_and_no_clear_winner() -> None:
    outcome = standing(fake_results(seeds=1))
    assert any("no spread is known" in caveat for caveat in outcome.caveats)
    assert not outcome.clear


def test_no_improvement_is_said() -> None:
    outcome = standing(only(fake_row("lora", [3.5, 3.6])))
    assert outcome.headline.startswith("No method improves on the untouched model (3.4021)")
    assert not outcome.clear


def test_full_fine_tuning_is_not_within_the_budget_and_cannot_win() -> None:
    assert "full" not in standing(fake_results()).headline


def test_failures_and_grid_edges_are_caveats() -> None:
    text = str(standing(fake_results()))
    assert "left out of the ranking: sara" in text
    assert "learning rate of lora is on the edge of the grid" in text


def test_all_failed() -> None:
    failed = [row for row in fake_results().rows if row.status == "failed"]
    assert standing(only(*failed)).headline == "No method finished with a loss."


def test_a_diverged_method_is_ranked_last_and_never_first() -> None:
    nan = float("nan")
    diverged = fake_row("mos", [2.0], loss=Summary(nan, nan, [nan, 2.0]))
    results = only(fake_row("lora", [3.0, 3.1]), diverged)
    assert standing(results).headline.startswith("lora is the only method that finished")
    assert in_order(results)[-1] is diverged


def test_rows_are_references_first_then_by_loss_then_failures() -> None:
    names = [row.method for row in in_order(fake_results())]
    assert names == ["untouched", "full", "neuroada", "mos", "lora", "hut", "sara"]


def test_the_middle_of_the_grid_is_no_edge() -> None:
    rate = LearningRate(2e-3, [1e-3, 2e-3, 3e-3], [3.1, 3.0, 3.1])
    assert standing(only(fake_row("mos", [2.9] * 3, learning_rate=rate))).caveats == []
