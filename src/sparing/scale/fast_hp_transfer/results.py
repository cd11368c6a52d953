"""The figures of a sweep over widths, and what can be asked of them."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparing.errors import DataError
from sparing.scale.fast_hp_transfer.budget import TransferCost, Transferred
from sparing.scale.fast_hp_transfer.table import Axis

Verdict = Literal["fast", "slow", "undetermined"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty from the bootstrap.

    Arguments:
        value: from all runs.
        std: half the width of the middle 68 % of the replicates; nan if there are none.
        low, high: percentile interval.
    """

    value: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class WidthResult:
    """The optimum of one width.

    Arguments:
        width: of the model.
        values: best hyperparameters.
        coordinates: the same as ν, with an interval each.
        loss: φ*.
        curvature: mean second derivative in ν; nan where it could not be fitted.
        interpolated: whether the optimum was fitted between grid points.
        seeds: most runs of one point.
        diverged: runs that did.
        loss_gap, hp_gap: a_n and b_n to the widest model; suboptimality: c_n, nan if the grid of
            the widest model does not reach that far.
    """

    width: float
    values: tuple[float, ...]
    coordinates: tuple[Estimate, ...]
    loss: float
    curvature: float
    interpolated: bool
    seeds: int
    diverged: int
    loss_gap: float
    hp_gap: float
    suboptimality: float


@dataclass(frozen=True)
class TransferAnalysis:
    """What a sweep says about transfer.

    Arguments:
        hps, axis: see `Sweep`.
        widths: results, ascending; the last stands for infinite width in the gaps.
        alpha: rate of a_n, fitted as A n^(-α) + E.
        beta: rate of b_n, fitted likewise with a limit of its own.
        suboptimality_rate: of c_n, which theory has at 2β; a check, without an interval.
        margin: β - α/2.
        verdict: "fast" if all of the margin's interval is above 0, "slow" if all is below.
        reasons: why, in words; of "undetermined" what to do about it.
        notes: what else a reader should know.
        loss_limit, loss_amplitude: E and A.
        hp_limit: best hyperparameters at infinite width, by the fit.
        cost: constants for budgets; None where a rate or a curvature is not known.
        unfinished: runs left out.
        replicates: of the bootstrap; confidence: of intervals.
    """

    hps: tuple[str, ...]
    axis: Axis
    widths: tuple[WidthResult, ...]
    alpha: Estimate
    beta: Estimate
    suboptimality_rate: float
    margin: Estimate
    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    loss_limit: float
    loss_amplitude: float
    hp_limit: tuple[float, ...]
    cost: TransferCost | None
    unfinished: int
    replicates: int
    confidence: float

    def plan(self, budget: float) -> Transferred:
        """The compute-optimal proxy for a budget.

        Arguments:
            budget: in runs at the widest width of the sweep; 4 is four such runs.

        Raises:
            DataError: the sweep does not give the rates.
        """
        return self._known_cost().transfer(budget * self.widths[-1].width ** self._exponent())

    def direct_error(self, budget: float) -> float:
        """Error above the limit loss if the same budget is spent on a search at one width."""
        return self._known_cost().direct(budget * self.widths[-1].width ** self._exponent()).error

    def to_json(self) -> dict[str, Any]:
        """Everything, with null for what is not known."""
        return _without_nan(asdict(self))

    def _exponent(self) -> float:
        return self._known_cost().cost_exponent

    def _known_cost(self) -> TransferCost:
        if self.cost is None:
            raise DataError(
                "budget of a transfer", expected="a sweep that shows both rates",
                found="; ".join(self.reasons), mend="Extend the sweep, then ask again.",
            )  # fmt: skip
        return self.cost


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
