"""How a search draws masks and learning rates: by slot, so that a resumed search draws the same."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparing.errors import ConfigError
from sparing.studies import trials_by_slot
from sparing.tuners import generator_for

SAMPLERS = ("nsga2", "tpe", "random", "exhaustive")
LEARNING_RATE = "learning rate"
_REDRAWS = 100  # genetic algorithms propose what has been tried; in a small space all may have been


@dataclass(frozen=True)
class LogUniform:
    """Numbers between two bounds, as likely in each decade.

    Arguments:
        low: above 0.
        high: above `low`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < float("inf"):
            raise ConfigError(
                "learning_rates",
                expected="a lower and a higher bound above 0",
                found=repr(self),
                mend="For example: LogUniform(1e-5, 1e-3), the paper's.",
            )


@dataclass(frozen=True)
class SearchSpace:
    """Masks and learning rates.

    Arguments:
        groups: names of the bits.
        rates: a range, or the rates to choose from.
        allow_empty: whether the mask without a bit is a choice.
    """

    groups: tuple[str, ...]
    rates: LogUniform | Sequence[float]
    allow_empty: bool

    def __post_init__(self) -> None:
        if isinstance(self.rates, LogUniform):
            return
        good = all(0 < rate < float("inf") for rate in self.rates)
        if not self.rates or not good or len(set(self.rates)) < len(self.rates):
            raise ConfigError(
                "learning_rates",
                expected="LogUniform(low, high) or different positive rates",
                found=repr(self.rates),
                mend="For example: LogUniform(1e-5, 1e-3), or [1e-4, 1e-3].",
            )

    def distributions(self, optuna: Any) -> dict[str, Any]:
        """The space in optuna's words."""
        kinds = optuna.distributions
        found = {name: kinds.CategoricalDistribution([False, True]) for name in self.groups}
        if isinstance(self.rates, LogUniform):
            rate = kinds.FloatDistribution(self.rates.low, self.rates.high, log=True)
        else:
            rate = kinds.CategoricalDistribution(list(self.rates))
        return found | {LEARNING_RATE: rate}

    def ask(self, trial: Any) -> tuple[str, float]:
        """Mask and rate of a trial of optuna."""
        bits = [trial.suggest_categorical(name, [False, True]) for name in self.groups]
        mask = "".join(str(int(bit)) for bit in bits)
        if isinstance(self.rates, LogUniform):
            return mask, trial.suggest_float(
                LEARNING_RATE, self.rates.low, self.rates.high, log=True
            )
        return mask, trial.suggest_categorical(LEARNING_RATE, list(self.rates))

    def everything(self) -> list[dict[str, Any]]:
        """All choices in order: masks as binary numbers, and for each all rates.

        Raises:
            ConfigError: the learning rate is a range.
        """
        if isinstance(self.rates, LogUniform):
            raise ConfigError(
                "sampler",
                expected="a list of learning rates, to search exhaustively",
                found=repr(self.rates),
                mend="Give learning_rates=[1e-4, 1e-3], say, or another sampler.",
            )
        masks = itertools.product([False, True], repeat=len(self.groups))
        return [
            dict(zip(self.groups, mask, strict=True)) | {LEARNING_RATE: rate}
            for mask in masks
            if self.allow_empty or any(mask)
            for rate in self.rates
        ]


def slot_sampler(
    optuna: Any, name: str, space: SearchSpace, *, seed: int, population: int
) -> tuple[Any, Callable[[Any, int], None]]:
    """A sampler of optuna whose draws depend on seed, slot and the trials that have finished.

    Returns:
        the sampler, and a function to call with a trial and its slot before the trial asks for
        anything.
    """
    if name not in SAMPLERS:
        raise ConfigError(
            "sampler",
            expected=", ".join(repr(known) for known in SAMPLERS),
            found=repr(name),
            mend="'nsga2' is the paper's with several rewards.",
        )
    choices = space.everything() if name == "exhaustive" else []
    distributions = space.distributions(optuna)
    # A repeated proposal keeps its mask and gets a new rate; or, of few rates, other choices too.
    mutable = [LEARNING_RATE] if isinstance(space.rates, LogUniform) else list(distributions)

    def fresh(slot: int) -> Any:
        drawn = _seed(seed, slot)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=drawn)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=drawn, population_size=population)
        return optuna.samplers.RandomSampler(seed=drawn)

    class SlotSampler(optuna.samplers.BaseSampler):
        """Draws all parameters at once, when the first is asked for: only then the slot is known.

        What optuna would draw jointly it would draw as the trial begins, so that it is told that
        no parameter is.
        """

        def __init__(self) -> None:
            self.slots: dict[int, int] = {}
            self._drawn: dict[int, tuple[Any, dict[str, Any]]] = {}

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(
            self, study: Any, trial: Any, param_name: str, param_distribution: Any
        ) -> Any:
            if trial.number not in self._drawn:
                self._drawn[trial.number] = self._draw(study, trial)
            return self._drawn[trial.number][1][param_name]

        def _draw(self, study: Any, trial: Any) -> tuple[Any, dict[str, Any]]:
            slot = self.slots[trial.number]
            if choices:
                return None, choices[slot]
            inner = fresh(slot)
            joint = inner.infer_relative_search_space(study, trial)
            drawn = self._complete(inner, study, trial, inner.sample_relative(study, trial, joint))
            others = (t for t in trials_by_slot(study).values() if t.number != trial.number)
            before = [t.params for t in others]
            again = optuna.samplers.RandomSampler(seed=_seed(seed, slot))
            for attempt in range(_REDRAWS):
                if drawn not in before:
                    break
                fresh_one = mutable[attempt % len(mutable)]
                kept = {name: value for name, value in drawn.items() if name != fresh_one}
                drawn = self._complete(again, study, trial, kept)
            return inner, drawn

        def _complete(
            self, inner: Any, study: Any, trial: Any, drawn: dict[str, Any]
        ) -> dict[str, Any]:
            for parameter, distribution in distributions.items():
                if parameter not in drawn:
                    drawn[parameter] = inner.sample_independent(
                        study, trial, parameter, distribution
                    )
            if not space.allow_empty and not any(drawn[group] for group in space.groups):
                filled = self.slots[trial.number] % len(space.groups)
                drawn[space.groups[filled]] = True  # otherwise nothing would be trained
            return drawn

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            inner, _ = self._drawn.pop(trial.number, (None, {}))
            if inner is not None:
                inner.after_trial(study, trial, state, values)

    sampler = SlotSampler()

    def begin(trial: Any, slot: int) -> None:
        sampler.slots[trial.number] = slot

    return sampler, begin


def _seed(seed: int, slot: int) -> int:
    return generator_for(seed, f"slot {slot}").initial_seed() % 2**32
