"""Rates of convergence with width: fits of limit + amplitude · n^(-rate)."""

from typing import NamedTuple

import numpy as np

SLOWEST, FASTEST = 0.01, 8.0
_ZOOMS, _POINTS = 7, 41


class PowerLaws(NamedTuple):
    """Fits of several replicates, each of several quantities that share a rate.

    Arguments:
        limits: (replicates, quantities) at infinite width.
        amplitudes: (replicates, quantities), of either sign.
        rates: (replicates,); nan where the values do not change with width.
    """

    limits: np.ndarray
    amplitudes: np.ndarray
    rates: np.ndarray

    @property
    def bounded(self) -> np.ndarray:
        """(replicates,) whether the rate is one, not an end of the range that was searched."""
        return (self.rates > 1.01 * SLOWEST) & (self.rates < 0.99 * FASTEST)


def fit_power_laws(widths: np.ndarray, values: np.ndarray) -> PowerLaws:
    """Least squares over limit, amplitude and rate; the first two are linear and solved for.

    Arguments:
        widths: (widths,) three or more, above 0.
        values: (replicates, quantities, widths) finite.
    """
    middle = np.exp(np.log(widths).mean())
    relative = widths / middle
    count = len(values)
    low, high = np.full(count, np.log(SLOWEST)), np.full(count, np.log(FASTEST))
    centred = values - values.mean(axis=2, keepdims=True)
    for _ in range(_ZOOMS):
        share = np.linspace(0, 1, _POINTS)
        tried = low[:, None] + (high - low)[:, None] * share
        missed = _misfit(relative, centred, np.exp(tried))
        best = missed.argmin(axis=1)
        rows = np.arange(count)
        low, high = (
            tried[rows, np.maximum(best - 1, 0)],
            tried[rows, np.minimum(best + 1, _POINTS - 1)],
        )
    rates = np.exp((low + high) / 2)
    basis = relative ** -rates[:, None]
    spread = basis - basis.mean(axis=1, keepdims=True)
    slopes = (centred * spread[:, None]).sum(axis=2) / (spread**2).sum(axis=1)[:, None]
    limits = values.mean(axis=2) - slopes * basis.mean(axis=1)[:, None]
    still = np.abs(centred).max(axis=(1, 2)) <= 1e-12 * np.abs(values).max(axis=(1, 2))
    rates = np.where(still, np.nan, rates)
    return PowerLaws(limits, slopes * middle ** rates[:, None], rates)


def _misfit(relative: np.ndarray, centred: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """(replicates, rates) sums of squares left, over the sum of squares of each quantity."""
    basis = relative ** -rates[:, :, None]
    spread = basis - basis.mean(axis=2, keepdims=True)
    spread /= np.linalg.norm(spread, axis=2, keepdims=True)
    explained = np.einsum("rqw,rtw->rtq", centred, spread)
    left = centred[:, None] - explained[..., None] * spread[:, :, None]
    return (left**2).sum(axis=(2, 3))


def fit_suboptimality(widths: np.ndarray, gaps: np.ndarray) -> float:
    """The rate of c_n, which is 0 at the last width because that stands for infinity.

    With c_n ~ K (n^(-g) - N^(-g))², so that √c_n is a power law through 0 at N; the rate is 2 g.

    Arguments:
        widths: (widths,), the last one N.
        gaps: (widths,) with 0 at the end; nan where they are not known.

    Returns:
        nan if fewer than two are known and above 0.
    """
    known = np.isfinite(gaps) & (gaps > 0)
    if known.sum() < 2:
        return float("nan")
    logs = 0.5 * np.log(gaps[known])
    n, last = widths[known] / widths[-1], 1.0
    low, high = np.log(SLOWEST), np.log(FASTEST)
    for _ in range(_ZOOMS):
        tried = np.linspace(low, high, _POINTS)
        shape = np.log(n[:, None] ** -np.exp(tried) - last)
        misses = logs[:, None] - shape
        best = int(((misses - misses.mean(axis=0)) ** 2).sum(axis=0).argmin())
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, _POINTS - 1)]
    return float(2 * np.exp((low + high) / 2))
