"""How many directions decide the optimum: the search for κ, and the bound it is measured by.

κ is chosen for each grid point so that the loss from the first κ directions is the same at both
widths and what is left is flat (eq. 12 to 16). It is not unique: it depends on the weights τ and
the tolerances, which the paper does not give; those here are reconstructions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparing.errors import ConfigError, DataError
from sparing.scale.fast_hp_transfer.trajectory import PhiCurves

TAUS = tuple(float(tau) for tau in np.geomspace(1e-4, 1, 9))


@dataclass(frozen=True)
class Truncation:
    """The result of a search.

    Arguments:
        kappa: (points,) int64 directions at each grid point, 1 to the narrow width.
        tau1, tau2: weights of the residuals' slopes, narrow and wide.
        proxy: J_proxy of eq. 14.
        shift: the farther of the two moves of an argmin by truncation, in ν.
        convexity: the higher of the two shares of grid points where φ^κ bends down.
        accepted: whether both are within their tolerances; if not, the search failed and this is
            the last that was tried.
    """

    kappa: Tensor
    tau1: float
    tau2: float
    proxy: float
    shift: float
    convexity: float
    accepted: bool


def steepest(grid: Tensor, values: Tensor) -> float:
    """Lip: the largest slope between neighbours, in magnitude."""
    return float((values.diff() / grid.diff()).abs().max())


def bends(grid: Tensor, values: Tensor) -> Tensor:
    """(points - 2,) second derivatives, twice the divided differences; exact on parabolas."""
    slopes = values.diff() / grid.diff()
    return 2 * slopes.diff() / (grid[2:] - grid[:-2])


def convexity_error(grid: Tensor, values: Tensor) -> float:
    """ConvErr: the share of inner grid points where the curve bends down."""
    found = bends(grid, values)
    return float((found < 0).double().mean()) if len(found) else 0.0


def proxy(narrow: PhiCurves, wide: PhiCurves, kappa: Tensor, tau1: float, tau2: float) -> float:
    """J_proxy: how far the truncated curves are apart, and how steep what is left is (eq. 14)."""
    apart = (narrow.truncated(kappa) - wide.truncated(kappa)).abs().mean()
    return (
        float(apart)
        + tau1 * steepest(narrow.grid, narrow.whole - narrow.truncated(kappa))
        + tau2 * steepest(wide.grid, wide.whole - wide.truncated(kappa))
    )


def descend(
    narrow: PhiCurves, wide: PhiCurves, tau1: float, tau2: float, start: Tensor | None = None
) -> Tensor:
    """Coordinate descent on J_proxy from κ = n/2, point by point until nothing changes (eq. 15).

    Returns:
        (points,) int64 from 1 to the most directions of the narrow curves.
    """
    _check_pair(narrow, wide)
    most = min(narrow.phi.shape[1], wide.phi.shape[1]) - 1
    points = len(narrow.grid)
    kappa = torch.full((points,), max(1, most // 2)) if start is None else start.clone()
    tried = torch.arange(1, most + 1)
    best = proxy(narrow, wide, kappa, tau1, tau2)
    changed = True
    while changed:
        changed = False
        for point in range(points):
            values = _along(narrow, wide, kappa, point, tried, tau1, tau2)
            k = int(values.argmin())
            # Only for less, or equal values could be exchanged for ever.
            if float(values[k]) < best - 1e-15 * max(1.0, abs(best)):
                best, changed = float(values[k]), True
                kappa[point] = tried[k]
    return kappa


def find_truncation(
    narrow: PhiCurves,
    wide: PhiCurves,
    *,
    taus: Sequence[float] = TAUS,
    convexity_tolerance: float = 0.2,
    shift_tolerance: float | None = None,
) -> Truncation:
    """The first κ whose truncated curves are convex and have the optimum in place (eq. 16).

    Arguments:
        narrow, wide: curves on one grid, of the smaller width and of the largest.
        taus: for both weights, tried in the order of their sum, the smaller τ1 first [rec].
        convexity_tolerance: share of inner grid points that may bend down [rec].
        shift_tolerance: of an argmin, in ν; by default the widest grid step [rec].

    Raises:
        DataError: other grids, or fewer than 3 points.
        ConfigError: no τ, or a negative one.
    """
    _check_pair(narrow, wide)
    if not taus or min(taus) < 0:
        raise ConfigError(
            "find_truncation.taus", expected="numbers from 0 on", found=repr(tuple(taus)),
            mend="The default is a geometric grid from 1e-4 to 1.",
        )  # fmt: skip
    allowed = float(narrow.grid.diff().max()) if shift_tolerance is None else shift_tolerance
    pairs = sorted(((a, b) for a in taus for b in taus), key=lambda pair: (sum(pair), pair[0]))
    found = None
    for tau1, tau2 in pairs:
        kappa = descend(narrow, wide, tau1, tau2)
        shift = max(_shift(curves, kappa) for curves in (narrow, wide))
        bent = max(convexity_error(c.grid, c.truncated(kappa)) for c in (narrow, wide))
        accepted = bent <= convexity_tolerance and shift <= allowed * (1 + 1e-9)
        value = proxy(narrow, wide, kappa, tau1, tau2)
        found = Truncation(kappa, tau1, tau2, value, shift, bent, accepted)
        if accepted:
            break
    assert found is not None
    return found


@dataclass(frozen=True)
class TransferBound:
    """J(κ), which b_n cannot exceed (eq. 13).

    Arguments:
        invariance: ε_inv, how far the truncated curves are apart in units of their curvature.
        flatness: ε_flat, how steep the residuals are in units of the curves' curvature.
        feasible: whether both truncated curves are strongly convex on the grid, which the proof
            needs; the bound is infinite if not.
    """

    invariance: float
    flatness: float
    feasible: bool

    @property
    def value(self) -> float:
        """J = 2 √ε_inv + ε_flat."""
        return 2 * math.sqrt(self.invariance) + self.flatness if self.feasible else math.inf


def transfer_bound(narrow: PhiCurves, wide: PhiCurves, kappa: Tensor) -> TransferBound:
    """J(κ) of two widths on a grid, with suprema and infima over its points."""
    _check_pair(narrow, wide)
    cut = [curves.truncated(kappa) for curves in (narrow, wide)]
    curvatures = [float(bends(narrow.grid, values).min()) for values in cut]
    if min(curvatures) <= 0:
        return TransferBound(math.inf, math.inf, False)
    flatness = 0.0
    for curves, truncated in zip((narrow, wide), cut, strict=True):
        slope = steepest(curves.grid, curves.whole - truncated)
        curvature = float(bends(curves.grid, curves.whole).min())
        flatness += slope / curvature if curvature > 0 else math.inf if slope > 0 else 0.0
    apart = float((cut[0] - cut[1]).abs().max())
    return TransferBound(apart / max(curvatures), flatness, True)


def tightest_bound(narrow: PhiCurves, wide: PhiCurves) -> tuple[int, TransferBound]:
    """The least J over the same number of directions at every grid point, and that number.

    t_n of the paper is the least over all κ(ν), of which there are too many; this is an upper
    bound of it, and of b_n likewise.
    """
    most = min(narrow.phi.shape[1], wide.phi.shape[1]) - 1
    bounds = [
        (k, transfer_bound(narrow, wide, torch.full((len(narrow.grid),), k)))
        for k in range(1, most + 1)
    ]
    return min(bounds, key=lambda pair: pair[1].value)


def _shift(curves: PhiCurves, kappa: Tensor) -> float:
    places = curves.truncated(kappa).argmin(), curves.whole.argmin()
    return float((curves.grid[places[0]] - curves.grid[places[1]]).abs())


def _along(
    narrow: PhiCurves, wide: PhiCurves, kappa: Tensor, point: int, tried: Tensor,
    tau1: float, tau2: float,
) -> Tensor:  # fmt: skip
    """J_proxy for every number of directions at one point, the others fixed."""
    cut = []
    for curves in (narrow, wide):
        values = curves.truncated(kappa).expand(len(tried), -1).clone()
        values[:, point] = curves.phi[point, tried]
        cut.append(values)
    total = (cut[0] - cut[1]).abs().mean(dim=1)
    for curves, values, tau in zip((narrow, wide), cut, (tau1, tau2), strict=True):
        slopes = (curves.whole - values).diff(dim=1) / curves.grid.diff()
        total = total + tau * slopes.abs().amax(dim=1)
    return total


def _check_pair(narrow: PhiCurves, wide: PhiCurves) -> None:
    if narrow.grid.shape != wide.grid.shape or not torch.equal(narrow.grid, wide.grid):
        raise DataError(
            "truncation", expected="curves on one grid", found="two different grids",
            mend="Record both widths at the same hyperparameters.",
        )  # fmt: skip
    if len(narrow.grid) < 3:
        raise DataError(
            "truncation", expected="3 grid points or more", found=str(len(narrow.grid)),
            mend="Convexity needs three: record more points.",
        )  # fmt: skip
