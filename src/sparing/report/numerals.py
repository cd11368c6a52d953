"""Numbers as people read them: one function for each kind of quantity."""

import math
from typing import Any

from sparing.compare.results import Summary

MISSING = "—"
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL_SUFFIXES = ("", "k", "M", "B", "T")


def significant(value: float, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits, whole digits kept: 0.0412, 12.3, 1,234."""
    if not math.isfinite(value):
        return _not_finite(value)
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def loss(value: float) -> str:
    """Nats a token, to four decimals."""
    return f"{value:.4f}" if math.isfinite(value) else _not_finite(value)


def loss_summary(summary: Summary) -> str:
    """The mean; with more than one seed also the standard deviation: 2.9012 ± 0.0030."""
    if len(summary.values) < 2:
        return loss(summary.mean)
    return f"{loss(summary.mean)} ± {loss(summary.std)}"


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def perplexity(value: float) -> str:
    """18.19; whole from a thousand on."""
    if not math.isfinite(value):
        return _not_finite(value)
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def change(value: float) -> str:
    """A difference of losses with its sign: −0.1230, +0.0041, 0.0000."""
    if not math.isfinite(value):
        return _not_finite(value)
    text = f"{abs(value):.4f}"
    if float(text) == 0:
        return text
    return ("−" if value < 0 else "+") + text


def learning_rate(value: float) -> str:
    """2e-4, 3.16e-4, 1e-3: three significant digits, no padding."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count(value: int) -> str:
    """Every digit, in groups of three."""
    return f"{value:,}"


def compact(value: float) -> str:
    """Three significant digits with a decimal suffix: 614k, 1.35M, 8.03B."""
    return _scaled(value, 1000.0, 999.5, _DECIMAL_SUFFIXES, "")


def size(num_bytes: float) -> str:
    """Bytes in binary units: 512 B, 2.34 MiB, 1,010 KiB."""
    return _scaled(num_bytes, 1024.0, 1023.5, _BINARY_UNITS, " ")


def share(value: float) -> str:
    """A fraction in percent, to one decimal."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else _not_finite(value)


def ratio(value: float) -> str:
    """1.08×."""
    return f"{value:.2f}×" if math.isfinite(value) else _not_finite(value)


def plain(value: Any) -> str:
    """Any setting or option as text: lists with commas, nested settings as `name: value`."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {plain(item)}" for name, item in value.items()) or "none"
    return str(value)


def _scaled(value: float, step: float, limit: float, units: tuple[str, ...], separator: str) -> str:
    if not math.isfinite(value):
        return _not_finite(value)
    power = 0
    while abs(value) >= limit and power + 1 < len(units):
        value, power = value / step, power + 1
    whole = power == 0 and float(value).is_integer()
    text = f"{value:,.0f}" if whole else significant(value)
    return f"{text}{separator}{units[power]}"


def _not_finite(value: float) -> str:
    return "nan" if math.isnan(value) else ("∞" if value > 0 else "−∞")
