"""Rates, verdicts and budgets from tables of runs."""

import csv
import json
import math

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.errors import ConfigError, DataError
from sparing.scale import analyze_transfer
from sparing.scale.fast_hp_transfer import Columns, TransferCost, read_sweep, run_grid
from sparing.scale.fast_hp_transfer.curves import locate, noise
from sparing.scale.fast_hp_transfer.rates import fit_power_laws
from sparing.train import DivergedError

WIDTHS = [8, 16, 32, 64, 128, 256]


def toy(
    beta: float, alpha: float = 1.0, *, step: float = 0.05, noise: float = 0.0, seeds: int = 1,
    widths: list[int] = WIDTHS,
) -> list[dict]:  # fmt: skip
    """φ_n(ν) = (ν - ν_∞ - n^(-β))² + n^(-α), as a table with a learning rate of 2^ν."""
    draw = np.random.default_rng(0)
    rows = []
    for n in widths:
        for nu in np.arange(-4.0, -1.5, step):
            for seed in range(seeds):
                loss = (nu + 3 - n**-beta) ** 2 + n**-alpha + noise * draw.standard_normal()
                rows.append({"width": n, "lr": float(2**nu), "seed": seed, "loss": float(loss)})
    return rows


# Rates and verdicts


@pytest.mark.parametrize(("beta", "verdict"), [(0.45, "slow"), (0.55, "fast")])
def test_rates_of_the_toy_are_found_and_classified(beta, verdict):
    found = analyze_transfer(toy(beta), replicates=50)
    assert found.alpha.value == pytest.approx(1.0, rel=0.01)
    assert found.beta.value == pytest.approx(beta, rel=0.01)
    assert found.suboptimality_rate == pytest.approx(2 * beta, rel=0.01)
    assert found.verdict == verdict
    assert found.hp_limit[0] == pytest.approx(2**-3, rel=1e-4)
    assert found.loss_limit == pytest.approx(0.0, abs=1e-6)


@given(st.floats(0.3, 1.5), st.floats(0.3, 1.2))
@settings(max_examples=8, deadline=None)
def test_any_rates_are_found(alpha, beta):
    found = analyze_transfer(toy(beta, alpha), replicates=0)
    assert found.alpha.value == pytest.approx(alpha, rel=0.01)
    assert found.beta.value == pytest.approx(beta, rel=0.01)


def test_the_gaps_are_those_to_the_widest_model():
    found = analyze_transfer(toy(0.5), replicates=0)
    for row in found.widths:
        shift = row.width**-0.5 - 256**-0.5
        assert row.hp_gap == pytest.approx(shift, abs=1e-9)
        assert row.loss_gap == pytest.approx(1 / row.width - 1 / 256, abs=1e-9)
        assert row.suboptimality == pytest.approx(shift**2, abs=1e-9)


def test_intervals_cover_and_shrink_with_seeds():
    few, many = (analyze_transfer(toy(0.55, noise=3e-4, seeds=s), replicates=150) for s in (3, 24))
    for found in (few, many):
        assert found.beta.low < 0.55 < found.beta.high
        assert found.alpha.low < 1.0 < found.alpha.high
    assert many.beta.std < 0.6 * few.beta.std


def test_one_seed_is_judged_by_the_roughness_of_its_curve():
    found = analyze_transfer(toy(0.55, noise=3e-4), replicates=100)
    assert found.beta.std > 0.005
    sweep = read_sweep(toy(0.55, noise=3e-4))
    sigmas = [noise(one.axes, one.mean).deviation for one in sweep.widths]
    assert np.mean(sigmas) == pytest.approx(3e-4, rel=0.4)
    assert noise((np.arange(5.0),), np.arange(5.0) ** 2).deviation == pytest.approx(0, abs=1e-12)
    assert noise((np.arange(3.0),), np.arange(3.0) ** 2).freedom == 0


def test_noise_that_hides_the_margin_gives_no_verdict():
    found = analyze_transfer(toy(0.5, noise=1e-3, seeds=3), replicates=100)
    assert found.verdict == "undetermined"
    assert "both sides of 0" in found.reasons[0]


def test_a_grid_coarser_than_the_drift_is_undetermined_not_fast():
    found = analyze_transfer(toy(0.55, step=0.7), replicates=50)
    assert found.verdict == "undetermined"
    assert "refine the grid" in found.reasons[0]
    with pytest.raises(DataError, match="refine the grid"):
        found.plan(4)


def test_an_optimum_that_stands_still_has_no_rate():
    rows = [
        {"width": n, "lr": float(2.0**nu), "loss": (nu + 3) ** 2 + 1 / n}
        for n in (8, 16, 32, 64)
        for nu in range(-6, 1)
    ]
    found = analyze_transfer(rows, replicates=20)
    assert found.verdict == "undetermined"
    assert math.isnan(found.beta.value)


def test_without_replicates_there_is_no_verdict():
    found = analyze_transfer(toy(0.55), replicates=0)
    assert found.verdict == "undetermined"
    assert math.isnan(found.beta.low)
    assert found.to_json()["beta"]["low"] is None
    json.dumps(found.to_json(), allow_nan=False)


def test_the_bootstrap_is_seeded():
    rows = toy(0.55, noise=1e-4, seeds=3)
    first, again, other = (
        analyze_transfer(rows, replicates=20, seed=seed).beta.low for seed in (0, 0, 1)
    )
    assert first == again != other


def test_power_laws_are_fitted_for_replicates_at_once():
    n = np.array([16.0, 32, 64, 128, 256])
    rates, amplitudes, limits = [0.3, 1.0, 2.0], [2.0, -1.0, 0.5], [0.0, 3.0, -1.0]
    values = np.array([[e + a * n**-r] for r, a, e in zip(rates, amplitudes, limits, strict=True)])
    found = fit_power_laws(n, values)
    np.testing.assert_allclose(found.rates, rates, rtol=1e-5)
    np.testing.assert_allclose(found.amplitudes[:, 0], amplitudes, rtol=1e-4)
    np.testing.assert_allclose(found.limits[:, 0], limits, atol=1e-4)
    assert np.isnan(fit_power_laws(n, np.ones((1, 1, 5))).rates[0])


# Several hyperparameters, other axes


def test_two_hyperparameters_share_a_rate():
    rows = [
        {
            "width": n, "lr": float(2.0**x), "wd": float(2.0**y),
            "loss": (x + 2 - n**-0.6) ** 2 + (x + 2 - n**-0.6) * (y + 1 + n**-0.6)
            + 2 * (y + 1 + n**-0.6) ** 2 + 1 / n,
        }
        for n in (8, 16, 32, 64, 128)
        for x in np.arange(-3, -0.9, 0.1)
        for y in np.arange(-2, 0.1, 0.1)
    ]  # fmt: skip
    found = analyze_transfer(rows, ["lr", "wd"], replicates=10)
    assert found.beta.value == pytest.approx(0.6, rel=0.01)
    assert found.verdict == "fast"
    assert found.widths[0].hp_gap == pytest.approx(2**0.5 * (8**-0.6 - 128**-0.6), rel=1e-6)
    assert found.cost.dimensions == 2


def test_a_window_axis_measures_momentum_by_its_length():
    rows = [
        {"width": n, "beta1": 1 - float(2.0**-w), "loss": (w - 3 - n**-0.8) ** 2 + 1 / n}
        for n in (8, 16, 32, 64)
        for w in np.arange(2, 5, 0.05)
    ]
    found = analyze_transfer(rows, "beta1", axis="window", replicates=0)
    assert found.beta.value == pytest.approx(0.8, rel=0.01)
    assert found.hp_limit[0] == pytest.approx(1 - 1 / 8, rel=1e-3)


def test_a_linear_axis_takes_values_as_they_are():
    rows = [
        {"width": n, "ridge": float(r), "loss": (r - 0.5 - n**-0.7) ** 2 + 1 / n}
        for n in (8, 16, 32, 64)
        for r in np.arange(0, 1.2, 0.04)
    ]
    assert analyze_transfer(rows, "ridge", axis="linear", replicates=0).beta.value == pytest.approx(
        0.7, rel=0.01
    )


def test_the_optimum_of_a_parabola_on_any_grid_is_exact():
    grid = np.array([0.0, 0.7, 1.1, 2.5, 3.0])
    found = locate((grid,), 3 * (grid - 1.3) ** 2 + 2)
    assert found.at[0] == pytest.approx(1.3)
    assert found.loss == pytest.approx(2.0)
    assert found.curvature == pytest.approx(6.0)


# Bad tables


def test_an_optimum_on_the_edge_says_which_grid_to_extend():
    rows = [row for row in toy(0.5) if not (row["width"] == 8 and row["lr"] > 2**-2.8)]
    with pytest.raises(DataError, match=r"Extend the grid above lr 0\.1\d+ at width 8"):
        analyze_transfer(rows)


def test_fewer_than_three_widths_are_refused():
    with pytest.raises(DataError, match="3 widths"):
        analyze_transfer(toy(0.5, widths=[8, 16]))


def test_missing_columns_are_named():
    with pytest.raises(DataError, match=r"'lr'.*learning_rate"):
        analyze_transfer([{"width": 1, "learning_rate": 1, "loss": 1}])
    with pytest.raises(DataError, match="'val_los'"):
        analyze_transfer(toy(0.5), columns=Columns(loss="val_los"))


def test_two_runs_of_one_point_are_refused_and_what_differs_is_named():
    rows = toy(0.5)
    with pytest.raises(DataError, match="seed column"):
        analyze_transfer([*rows, rows[0]])
    deep = [row | {"depth": depth} for row in rows for depth in (2, 4)]
    with pytest.raises(DataError, match="depth"):
        analyze_transfer(deep)
    assert analyze_transfer(deep, where={"depth": "4"}, replicates=0).beta.value == pytest.approx(
        0.5, rel=0.01
    )
    with pytest.raises(DataError, match="none where"):
        analyze_transfer(deep, where={"depth": 3})


def test_bad_values_are_refused_by_row():
    rows = toy(0.5)
    for change, match in (
        ({"lr": 0.0}, "above 0"),
        ({"lr": "fast"}, "a number in column 'lr'"),
        ({"width": -8}, "above 0"),
        ({"loss": "good"}, "a number in column 'loss'"),
    ):
        with pytest.raises(DataError, match=match):
            analyze_transfer([rows[0] | change, *rows[1:]])
    for options, match in (
        ({"axis": "cubic"}, "axis"),
        ({"window": 0}, "window"),
        ({"confidence": 1.0}, "confidence"),
        ({"replicates": -1}, "replicates"),
    ):
        with pytest.raises(ConfigError, match=match):
            analyze_transfer(rows, **options)


def test_too_few_points_and_widths_that_only_diverge_are_refused():
    with pytest.raises(DataError, match="3 values"):
        analyze_transfer([row for row in toy(0.5) if row["lr"] < 0.066 or row["width"] > 8])
    rows = [row | ({"loss": None} if row["width"] == 8 else {}) for row in toy(0.5)]
    with pytest.raises(DataError, match="only diverged"):
        analyze_transfer(rows)


def test_diverged_runs_are_infinite_and_counted():
    rows = toy(0.55)
    hot = [
        row | {"loss": [None, float("nan"), float("inf"), "NaN"][i % 4], "status": "diverged"}
        if row["lr"] > 2**-1.9
        else row
        for i, row in enumerate(rows)
    ]
    found = analyze_transfer(hot, replicates=20)
    assert found.verdict == "fast"
    assert sum(row.diverged for row in found.widths) == sum(row["lr"] > 2**-1.9 for row in rows)
    assert any("diverged" in note for note in found.notes)


def test_an_optimum_beside_a_diverged_run_is_known_to_the_grid_only():
    rows = [
        row | {"loss": None} if row["width"] == 64 and row["lr"] > 2**-2.88 else row
        for row in toy(0.55)
    ]
    found = analyze_transfer(rows, replicates=0)
    row = next(row for row in found.widths if row.width == 64)
    assert not row.interpolated
    assert any("grid step only" in note for note in found.notes)


def test_unfinished_runs_are_left_out_and_counted():
    rows = [
        *toy(0.55),
        {"width": 8, "lr": 0.125, "seed": 9, "loss": 0.0, "status": "crashed"},
        {"width": 8, "lr": 0.125, "seed": 8, "loss": None, "status": "running"},
    ]
    found = analyze_transfer(rows, replicates=0)
    assert found.unfinished == 2
    assert found.beta.value == pytest.approx(0.55, rel=0.01)


# Files


def test_csv_json_jsonl_frames_and_columns_are_the_same_table(tmp_path):
    rows = toy(0.55, step=0.1)
    expected = analyze_transfer(rows, replicates=0).beta.value
    with (tmp_path / "t.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "t.json").write_text(json.dumps(rows))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    (tmp_path / "c.json").write_text(json.dumps(columns))
    tables = [*(tmp_path / n for n in ("t.csv", "t.jsonl", "t.json", "c.json"))]
    tables += [columns, pandas.DataFrame(rows)]
    for table in tables:
        assert analyze_transfer(table, replicates=0).beta.value == pytest.approx(expected)


def test_exports_of_weights_and_biases_are_read(tmp_path):
    rows = toy(0.55, step=0.1)
    expected = analyze_transfer(rows, replicates=0).beta.value
    page = [
        {
            "Name": f"run-{i}", "State": "finished", "model.width": row["width"],
            "optimizer.lr": row["lr"], "seed": 0, "eval/loss": row["loss"],
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    page.append({**page[0], "State": "crashed", "eval/loss": ""})
    api = [
        {
            "": i, "name": f"run-{i}", "summary": str({"loss": row["loss"], "_step": 9}),
            "config": str(
                {"lr": {"value": row["lr"], "desc": None}, "model": {"width": row["width"]}}
            ),
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    for number, table in enumerate((page, api)):
        path = tmp_path / f"{number}.csv"
        pandas.DataFrame(table).to_csv(path, index=False)
        assert analyze_transfer(path, replicates=0).beta.value == pytest.approx(expected)
    two = [row | {"train/loss": 0.0} for row in page]
    with pytest.raises(DataError, match="eval/loss and train/loss"):
        analyze_transfer(two)
    found = analyze_transfer(two, columns=Columns(loss="eval/loss"), replicates=0)
    assert found.unfinished == 1


def test_files_that_are_no_tables_are_refused(tmp_path):
    for name, text, match in (
        ("a.jsonl", "{broken", "valid JSONL"),
        ("b.json", "3", "objects"),
        ("c.json", '{"width": [1, 2], "lr": [1]}', "one length"),
        ("d.xlsx", "", r"\.csv"),
        ("e.csv", "width,lr,loss\n", "rows"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=match):
            read_sweep(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_sweep(tmp_path / "none.csv")


def test_any_function_that_trains_makes_a_table():
    def train(width: int, lr: float, seed: int) -> float:
        if lr > 0.3:
            raise DivergedError("loss", expected="finite", found="nan", mend="Lower the rate.")
        return math.inf if lr > 0.25 else (math.log2(lr) + 3 - width**-0.9) ** 2 + 1 / width

    seen: list[dict] = []
    rates = [float(2**nu) for nu in np.arange(-4, -1.4, 0.05)]
    rows = run_grid(train, WIDTHS, rates, (0,), on_run=seen.append)
    assert seen == rows
    assert {row["status"] for row in rows} == {"done", "diverged"}
    found = analyze_transfer(rows, replicates=0)
    assert found.beta.value == pytest.approx(0.9, rel=0.01)
    assert sum(row.diverged for row in found.widths) == sum(rate > 0.25 for rate in rates) * 6


# The compute theorem


COST = TransferCost(0.7, 2.0, 0.6, 1.5, 3.0, 8.0)


def test_exponents_are_equal_where_beta_is_half_of_alpha():
    for alpha in (0.3, 1.0, 1.7):
        for h in (1, 2, 3):
            for r in (1.0, 2.0, 3.0):
                cost = TransferCost(alpha, 1, alpha / 2, 1, 1, 1, h, r)
                assert cost.direct_exponents.error == pytest.approx(cost.transfer_exponents.error)
                faster = TransferCost(alpha, 1, alpha / 2 + 0.1, 1, 1, 1, h, r)
                slower = TransferCost(alpha, 1, alpha / 2 - 0.1, 1, 1, 1, h, r)
                assert faster.transfer_exponents.error < faster.direct_exponents.error
                assert slower.transfer_exponents.error > slower.direct_exponents.error


def brute_force(cost: TransferCost, budget: float) -> tuple[float, float]:
    """Both least errors by trying widths and grids, from the costs alone."""
    logs = np.linspace(np.log(1.0), 0.5 * np.log(budget), 3000)
    n = np.exp(logs)
    step = cost.span * n**2 / budget
    coarse = cost.curvature / 8
    direct = (cost.loss_amplitude * n**-cost.alpha + coarse * step**2).min()
    best = np.inf
    for share in np.linspace(0.01, 0.99, 99):
        final = ((1 - share) * budget) ** 0.5
        step = cost.span * n**2 / (share * budget)
        drift = cost.curvature / 2 * (cost.hp_amplitude * n**-cost.beta) ** 2
        error = cost.loss_amplitude * final**-cost.alpha + drift + coarse * step**2
        best = min(best, error[n <= final].min())
    return float(direct), float(best)


@pytest.mark.parametrize("budget", [1e5, 1e8])
def test_plans_are_the_best_that_can_be_bought(budget):
    direct, transferred = brute_force(COST, budget)
    assert COST.direct(budget).error == pytest.approx(direct, rel=1e-3)
    assert COST.transfer(budget).error == pytest.approx(transferred, rel=1e-2)


def test_widths_grow_with_the_budget_as_the_theorem_says():
    for cost in (COST, TransferCost(1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 2, 3.0)):
        low, high = 1e30, 1e34

        def power(small: float, large: float, low=low, high=high) -> float:
            return math.log(large / small) / math.log(high / low)

        direct = [cost.direct(budget) for budget in (low, high)]
        assert power(direct[0].width, direct[1].width) == pytest.approx(
            cost.direct_exponents.searched_width, rel=0.01
        )
        assert power(direct[0].error, direct[1].error) == pytest.approx(
            cost.direct_exponents.error, rel=0.01
        )
        moved = [cost.transfer(budget) for budget in (low, high)]
        assert power(moved[0].final_width, moved[1].final_width) == pytest.approx(
            cost.transfer_exponents.final_width, rel=0.01
        )
        assert power(moved[0].error, moved[1].error) == pytest.approx(
            cost.transfer_exponents.error, rel=0.03
        )
        # At an even split, so that the share does not add a power of its own.
        even = [cost.search(budget, budget / 2) for budget in (low, high)]
        assert power(even[0].proxy_width, even[1].proxy_width) == pytest.approx(
            cost.transfer_exponents.searched_width, rel=0.01
        )


def test_a_fast_sweep_plans_a_proxy_that_beats_the_direct_search():
    found = analyze_transfer(toy(1.0), replicates=20)
    plan = found.plan(4)
    assert 8 < plan.proxy_width < plan.final_width < 2 * 256
    assert plan.error < found.direct_error(4)
    spent = plan.proxy_width**2 * found.cost.span / plan.step + plan.final_width**2
    assert spent == pytest.approx(4 * 256**2, rel=1e-6)
    with pytest.raises(ConfigError, match="budget"):
        found.plan(0)


# The command and its report


def write_table(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_command_prints_the_verdict_and_writes_the_report(sparing, tmp_path):
    table = write_table(tmp_path / "sweep.jsonl", toy(0.9, step=0.1))
    code, printed, errors = sparing(
        "transfer", table, "--out", tmp_path / "out", "--replicates", 20, "--budget", 4
    )
    assert code == 0, errors
    assert ": fast" in printed
    assert "proxy width" in printed
    page = (tmp_path / "out" / "transfer.html").read_text()
    assert "Fast: tune on a small model." in page
    assert 'data-plot="rates"' in page
    assert "http://" not in page.split("<script>")[0]
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert content["verdict"] == "fast"
    assert content["beta"]["value"] == pytest.approx(0.9, rel=0.01)
    for name in ("curves.png", "rates.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_the_report_of_an_undetermined_sweep_with_divergence_and_two_hyperparameters(
    sparing, tmp_path
):
    rows = [
        {
            "width": n, "lr": 2.0**x, "wd": 2.0**y,
            "loss": None if x == 0 else (x + 2) ** 2 + (y + 2) ** 2 + 1 / n, "depth": 4,
        }
        for n in (8, 16, 32)
        for x in range(-4, 1)
        for y in range(-4, 1)
    ]  # fmt: skip
    table = write_table(tmp_path / "sweep.jsonl", rows)
    code, printed, errors = sparing(
        "transfer", table, "--hp", "lr,wd", "--where", "depth=4", "--out", tmp_path / "out",
        "--replicates", 5,
    )  # fmt: skip
    assert code == 0, errors
    assert "undetermined" in printed
    assert "15 diverged runs" in printed
    assert "Undetermined" in (tmp_path / "out" / "transfer.html").read_text()


def test_bad_tables_end_the_command_with_one_line(sparing, tmp_path):
    table = write_table(tmp_path / "sweep.jsonl", toy(0.5))
    for options, match in (
        (["--hp", "wd"], "'wd'"),
        (["--where", "depth"], "column=value"),
        (["--axis", "cubic"], "axis"),
    ):
        code, _, errors = sparing("transfer", table, "--out", tmp_path / "out", *options)
        assert code == 2
        assert match in errors
        assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
