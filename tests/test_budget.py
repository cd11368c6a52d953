"""Budgets as users write them."""

import contextlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.budget import Budget, Unit
from sparing.errors import ConfigError

SCALES = {
    "": (Unit.PARAMETERS, 1),
    "k": (Unit.PARAMETERS, 10**3),
    "M": (Unit.PARAMETERS, 10**6),
    "B": (Unit.PARAMETERS, 10**9),
    "bytes": (Unit.BYTES, 1),
    "kB": (Unit.BYTES, 10**3),
    "MB": (Unit.BYTES, 10**6),
    "GB": (Unit.BYTES, 10**9),
    "KiB": (Unit.BYTES, 2**10),
    "MiB": (Unit.BYTES, 2**20),
    "GiB": (Unit.BYTES, 2**30),
    "bit": (Unit.BITS, 1),
    "%": (Unit.SHARE, Fraction(1, 100)),
}
DECIMALS = st.decimals(min_value=0, max_value=100, places=4, allow_nan=False).filter(lambda d: d)


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("0.45%", Unit.SHARE, Fraction(45, 10_000)),
        ("100%", Unit.SHARE, Fraction(1)),
        ("600k", Unit.PARAMETERS, Fraction(600_000)),
        ("2M", Unit.PARAMETERS, Fraction(2_000_000)),
        ("1_000", Unit.PARAMETERS, Fraction(1000)),
        (" 4 MiB ", Unit.BYTES, Fraction(4 * 2**20)),
        (".5k", Unit.PARAMETERS, Fraction(500)),
        ("3.65bit", Unit.BITS, Fraction(365, 100)),
    ],
)
def test_what_users_write(text: str, unit: Unit, amount: Fraction) -> None:
    budget = Budget.parse(text)
    assert (budget.unit, budget.amount, str(budget)) == (unit, amount, text.strip())


@given(st.text(max_size=30) | st.text("0123456789._%kmMGiBbte -+e", max_size=12))
def test_any_text_is_a_budget_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        budget = Budget.parse(text)
        assert budget.amount > 0
        assert Budget.parse(str(budget)) == budget


@given(st.integers(1, 100))
def test_long_numbers_are_exact(digits: int) -> None:
    assert Budget.parse("9" * digits).amount == 10**digits - 1


@given(st.integers(101, 6000))
def test_endless_numbers_are_refused_in_one_short_line(digits: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget.parse("9" * digits)
    assert len(str(caught.value)) < 500


@given(DECIMALS, st.sampled_from(sorted(SCALES)), st.sampled_from([str, str.lower, str.upper]))
def test_amounts_are_exact_and_case_does_not_matter(number, suffix, spelling) -> None:
    unit, scale = SCALES[suffix]
    budget = Budget.parse(f"{number:f}{spelling(suffix)}")
    assert budget.unit is unit
    assert budget.amount == Fraction(str(number)) * scale


@given(DECIMALS, st.integers(1, 10**12))
def test_the_limit_of_a_share_is_exact(number, total: int) -> None:
    exact = Fraction(str(number)) / 100 * total
    limit = Budget.parse(f"{number:f}%").limit(total)
    assert limit <= exact < limit + 1


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_a_number_of_parameters_is_its_own_limit_up_to_the_model(number: int, total: int) -> None:
    budget = Budget.parse(str(number))
    if number <= total:
        assert budget.limit(total) == number
    else:
        with pytest.raises(ConfigError, match=f"at most the model's own {total:,} parameters"):
            budget.limit(total)


def test_bytes_are_limited_by_the_model_in_float32() -> None:
    assert Budget.parse("400bytes").limit(100) == 400
    with pytest.raises(ConfigError, match="at most the model's own 400 bytes"):
        Budget.parse("401bytes").limit(100)


@pytest.mark.parametrize(
    "text", ["0", "0%", "101%", "-1k", "1e3", "nan", "inf", "", "%", "5 apples"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Budget.parse(text)


def test_bits_a_weight_are_no_size() -> None:
    with pytest.raises(ConfigError, match="sparing compress"):
        Budget.parse("3.65bit").limit(1000)
