"""Where the loss of one width is least: a quadratic in ν around the best point of the grid."""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Optimum:
    """The minimum of a loss surface.

    Arguments:
        at: ν*, one coordinate a hyperparameter.
        loss: φ*.
        curvature: mean eigenvalue of the second derivative there; nan where none was fitted.
        interpolated: whether a quadratic was fitted; else it is the best grid point.
        edges: (axis, "lower" or "upper") for each side on which the best point has no neighbour.
    """

    at: np.ndarray
    loss: float
    curvature: float
    interpolated: bool
    edges: tuple[tuple[int, str], ...]


def locate(axes: tuple[np.ndarray, ...], mean: np.ndarray, window: int = 1) -> Optimum:
    """Find the optimum.

    Arguments:
        axes: ascending grid of each hyperparameter.
        mean: losses on the grid; +inf diverged, nan missing; one at least is finite.
        window: grid steps to each side that the quadratic is fitted to. Where it cannot be, or has
            its minimum beyond the neighbours, it is fitted to the neighbours alone, or not at all.
    """
    centre = best_point(mean)
    edges = tuple(
        (axis, side)
        for axis, (place, grid) in enumerate(zip(centre, axes, strict=True))
        for side, last in (("lower", 0), ("upper", len(grid) - 1))
        if place == last
    )
    low = np.array([axes[d][max(i - 1, 0)] for d, i in enumerate(centre)])
    high = np.array([axes[d][min(i + 1, len(axes[d]) - 1)] for d, i in enumerate(centre)])
    for steps in dict.fromkeys((window, 1)):
        fitted = _Quadratic.fit(axes, mean, centre, steps)
        if fitted is None:
            continue
        at = fitted.minimum()
        if at is not None and (at >= low).all() and (at <= high).all():
            curvature = float(np.trace(fitted.hessian) / len(axes))
            return Optimum(at, fitted(at), curvature, True, edges)
    at = np.array([axes[d][i] for d, i in enumerate(centre)])
    return Optimum(at, float(mean[centre]), float("nan"), False, edges)


def best_point(mean: np.ndarray) -> tuple[int, ...]:
    """Indices of the least finite loss."""
    flat = int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))
    return tuple(int(i) for i in np.unravel_index(flat, mean.shape))


def loss_at(
    axes: tuple[np.ndarray, ...], mean: np.ndarray, at: np.ndarray, window: int = 1
) -> float:
    """The loss between grid points, by the quadratic around the nearest one that has neighbours.

    Returns:
        nan outside the grid; where the neighbours are not all finite, the nearest point's loss.
    """
    if any(not grid[0] <= x <= grid[-1] for grid, x in zip(axes, at, strict=True)):
        return float("nan")
    nearest = tuple(int(np.abs(grid - x).argmin()) for grid, x in zip(axes, at, strict=True))
    centre = tuple(min(max(i, 1), len(grid) - 2) for i, grid in zip(nearest, axes, strict=True))
    fitted = _Quadratic.fit(axes, mean, centre, window) if np.isfinite(mean[centre]) else None
    return float(mean[nearest]) if fitted is None else fitted(at)


class Noise(NamedTuple):
    """Of single losses: a standard deviation, and the degrees of freedom it is known with."""

    deviation: float
    freedom: int


def noise(axes: tuple[np.ndarray, ...], mean: np.ndarray) -> Noise:
    """How far single losses are from a smooth curve, judged from one run of each.

    Every four neighbours in a row around the optimum leave one degree of freedom to a quadratic;
    the root of the mean square is the estimate. What is not quadratic counts as noise too.

    Returns:
        nan, with no degree of freedom, with fewer than four finite neighbours in a row.
    """
    centre = best_point(mean)
    squares = []
    for axis, grid in enumerate(axes):
        line = mean[tuple(slice(None) if d == axis else i for d, i in enumerate(centre))]
        for start in range(max(0, centre[axis] - 3), min(centre[axis], len(grid) - 4) + 1):
            x, y = grid[start : start + 4], line[start : start + 4]
            if np.isfinite(y).all():
                x = (x - x.mean()) / (x[-1] - x[0])
                # The vector orthogonal to 1, x and x² over the four points.
                normal = np.linalg.svd(np.vander(x, 3).T)[2][-1]
                squares.append(float(normal @ y) ** 2)
    return Noise(float(np.sqrt(np.mean(squares))) if squares else float("nan"), len(squares))


@dataclass(frozen=True)
class _Quadratic:
    """constant + gradient·x + ½ x·hessian·x around a centre."""

    centre: np.ndarray
    constant: float
    gradient: np.ndarray
    hessian: np.ndarray

    @classmethod
    def fit(
        cls, axes: tuple[np.ndarray, ...], mean: np.ndarray, centre: tuple[int, ...], steps: int
    ) -> "_Quadratic | None":
        """Least squares over the finite points of a box; None if they do not determine it."""
        ranges = [
            range(max(0, i - steps), min(len(grid), i + steps + 1))
            for i, grid in zip(centre, axes, strict=True)
        ]
        cells = [cell for cell in product(*ranges) if np.isfinite(mean[cell])]
        middle = np.array([grid[i] for i, grid in zip(centre, axes, strict=True)])
        x = np.array([[axes[d][i] for d, i in enumerate(cell)] for cell in cells]) - middle
        scale = np.abs(x).max(axis=0)
        if (scale == 0).any():
            return None
        x /= scale
        pairs = [(i, j) for i in range(len(axes)) for j in range(i, len(axes))]
        squares = [x[:, i] * x[:, j] for i, j in pairs]
        features = np.column_stack([np.ones(len(x)), x, *squares])
        found, _, rank, _ = np.linalg.lstsq(
            features, np.array([mean[c] for c in cells]), rcond=None
        )
        if rank < features.shape[1]:
            return None
        hessian = np.zeros((len(axes), len(axes)))
        for (i, j), value in zip(pairs, found[1 + len(axes) :], strict=True):
            hessian[i, j] += value / (scale[i] * scale[j])
            hessian[j, i] += value / (scale[i] * scale[j])
        return cls(middle, float(found[0]), found[1 : 1 + len(axes)] / scale, hessian)

    def __call__(self, at: np.ndarray) -> float:
        x = at - self.centre
        return float(self.constant + self.gradient @ x + 0.5 * x @ self.hessian @ x)

    def minimum(self) -> np.ndarray | None:
        """Where it is least; None where it is not strictly convex."""
        if not np.linalg.eigvalsh(self.hessian)[0] > 0:
            return None
        return self.centre - np.linalg.solve(self.hessian, self.gradient)
