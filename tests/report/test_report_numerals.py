"""Numbers are written exactly as stated, and never say anything else than the value."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.compare.results import Summary
from sparing.report import numerals


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.04123, "0.0412"), (0.5, "0.500"), (9.996, "10.0"), (12.34, "12.3"), (1234.5, "1,234")),
        *((0.0, "0"), (-0.1, "−0.100"), (math.nan, "nan"), (-math.inf, "−∞")),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert numerals.significant(value) == text


def test_a_single_seed_has_no_spread() -> None:
    assert numerals.loss_summary(Summary.of([2.90121])) == "2.9012"
    assert numerals.loss_summary(Summary.of([2.0, 3.0])) == "2.5000 ± 0.7071"


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.123, "−0.1230"), (0.0041, "+0.0041"), (0.0, "0.0000"), (-1e-9, "0.0000")],
)
def test_changes_carry_their_sign(value: float, text: str) -> None:
    assert numerals.change(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "2e-4"), (3.162e-4, "3.16e-4"), (1e-3, "1e-3"), (0.05, "5e-2"), (1.0, "1e0"), (0, "0")],
)
def test_learning_rates_are_short(value: float, text: str) -> None:
    assert numerals.learning_rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (614_400, "600 KiB")),
        *((2_459_000, "2.35 MiB"), (2**30, "1.00 GiB"), (2**20 - 1, "1.00 MiB")),
    ],
)
def test_sizes_are_binary(value: int, text: str) -> None:
    assert numerals.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (614_400, "614k"), (999_700, "1.00M"), (134_515_008, "135M")],
)
def test_compact_counts(value: int, text: str) -> None:
    assert numerals.compact(value) == text


def test_shares_and_ratios() -> None:
    assert numerals.share(0.9982) == "99.8 %"
    assert numerals.ratio(1.083) == "1.08×"
    assert numerals.count(134_515_008) == "134,515,008"


def test_perplexity_never_overflows() -> None:
    assert numerals.perplexity(numerals.perplexity_of(2.9)) == "18.17"
    assert numerals.perplexity(numerals.perplexity_of(10.0)) == "22,026"
    assert numerals.perplexity(numerals.perplexity_of(1e6)) == "∞"


def test_settings_of_any_kind_are_readable() -> None:
    assert numerals.plain({"train": 400_000, "parts": [1, True, None]}) == (
        "train: 400,000; parts: 1, yes, —"
    )


@given(st.floats(min_value=1e-6, max_value=1e12))
def test_significant_is_within_half_a_percent(value: float) -> None:
    assert float(numerals.significant(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@given(st.integers(min_value=0, max_value=2**59))
def test_size_is_within_half_a_percent(num_bytes: int) -> None:
    number, unit = numerals.size(num_bytes).split(" ")
    scale = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB", "PiB").index(unit)
    assert float(number.replace(",", "")) * scale == pytest.approx(num_bytes, rel=0.0051)
    assert len(number) <= 5
