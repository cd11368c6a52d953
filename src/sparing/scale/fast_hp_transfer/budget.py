"""What a budget of compute should be spent on: a search at the full width, or on a proxy.

A run of width n costs n^r, and error is the loss above its limit at infinite width: A n^(-α) for
the width, and half the curvature μ times the squared distance from the best hyperparameters, which
is half a grid step in each of h directions and, for a proxy, B n^(-β) more (the compute theorem,
eq. 6).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparing.errors import ConfigError

_SHARES = 1 / (1 + np.exp(-np.linspace(-9, 9, 721)))  # of the budget that the search takes


class Direct(NamedTuple):
    """Grid search at the width that is used: that width, the grid step in ν, the error."""

    width: float
    step: float
    error: float


class Transferred(NamedTuple):
    """Grid search on a proxy, and one large run.

    Arguments:
        proxy_width: to search at.
        step: of the grid, in ν.
        final_width: to run once.
        search_share: of the budget that the search takes.
        error: of the final run.
    """

    proxy_width: float
    step: float
    final_width: float
    search_share: float
    error: float


class Exponents(NamedTuple):
    """Powers of the budget: of the error, and of the widths searched at and run in the end."""

    error: float
    searched_width: float
    final_width: float


@dataclass(frozen=True)
class TransferCost:
    """Fitted constants of a sweep.

    Arguments:
        alpha, loss_amplitude: a_n = A n^(-α).
        beta, hp_amplitude: b_n = B n^(-β).
        curvature: μ of the loss in ν.
        span: of the grid in ν, in each direction.
        dimensions: h, number of hyperparameters.
        cost_exponent: r.

    Raises:
        ConfigError: one of them is not above 0.
    """

    alpha: float
    loss_amplitude: float
    beta: float
    hp_amplitude: float
    curvature: float
    span: float
    dimensions: int = 1
    cost_exponent: float = 2.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(
                    f"TransferCost.{name}", expected="a number above 0", found=repr(value),
                    mend="Without such a rate a budget cannot be planned.",
                )  # fmt: skip

    def direct(self, budget: float) -> Direct:
        """The best search at one width, of which the best run is kept."""
        width = self._searched_width(self.loss_amplitude, self.alpha, budget)
        step = self._step(width, budget)
        error = self.loss_amplitude * width**-self.alpha + self._coarseness(step)
        return Direct(width, step, error)

    def transfer(self, budget: float) -> Transferred:
        """The best split into a search on a proxy and one run, the proxy no wider than the run."""
        tried = [self.search(budget, share * budget) for share in _SHARES]
        return min(tried, key=lambda plan: plan.error)

    def search(self, budget: float, search: float) -> Transferred:
        """The best proxy if the search may cost so much of the budget."""
        final = (budget - search) ** (1 / self.cost_exponent)
        weight = 0.5 * self.curvature * self.hp_amplitude**2
        width = min(self._searched_width(weight, 2 * self.beta, search), final)
        step = self._step(width, search)
        error = (
            self.loss_amplitude * final**-self.alpha
            + weight * width ** (-2 * self.beta)
            + self._coarseness(step)
        )
        return Transferred(width, step, final, search / budget, error)

    @property
    def direct_exponents(self) -> Exponents:
        """Error ~ F^(-2α/(hα+2r)) at n* ~ F^(2/(hα+2r))."""
        width = 2 / (self.dimensions * self.alpha + 2 * self.cost_exponent)
        return Exponents(-self.alpha * width, width, width)

    @property
    def transfer_exponents(self) -> Exponents:
        """Error ~ F^(-α/r) + F^(-2β/(hβ+r)) at n* ~ F^(1/(hβ+r)), M* ~ F^(1/r)."""
        width = 1 / (self.dimensions * self.beta + self.cost_exponent)
        error = -min(self.alpha / self.cost_exponent, 2 * self.beta * width)
        return Exponents(error, width, 1 / self.cost_exponent)

    def _searched_width(self, weight: float, power: float, search: float) -> float:
        """Minimum of weight·n^(-power) plus the coarseness of the grid that the search can pay."""
        if not search > 0:
            raise ConfigError(
                "budget", expected="a number above 0", found=repr(search),
                mend="Give it in the unit of a run's cost.",
            )  # fmt: skip
        growth = 2 * self.cost_exponent / self.dimensions
        coarse = self._coarseness(self._step(1.0, search))
        return (weight * power / (coarse * growth)) ** (1 / (power + growth))

    def _step(self, width: float, search: float) -> float:
        """Of a grid whose runs of that width use the search up."""
        return self.span * (width**self.cost_exponent / search) ** (1 / self.dimensions)

    def _coarseness(self, step: float) -> float:
        """Loss at the corner of a grid's cell, half a step away in every direction."""
        return 0.5 * self.curvature * self.dimensions * (step / 2) ** 2
