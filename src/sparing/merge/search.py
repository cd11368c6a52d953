"""Search a method's numbers, such as PCB's ratio and λ, by what a validation score says.

The paper searches the λ of every task with an evolution strategy, and its released script for
language models scores on the test split. Here the score is the user's own function: give it a
validation split. Trials are kept in a database, so that a search that was stopped goes on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparing.errors import ConfigError, MissingExtraError
from sparing.studies import bind, open_study, require_optuna

Sampler = Literal["cma-es", "tpe"]


@dataclass(frozen=True)
class Space:
    """What is searched.

    Arguments:
        experts: n; with `per_task`, each has a λ of its own.
        lam: bounds of λ; 0.8 to 1.3 in the paper's vision script, 0.5 to 3 for language.
        ratio: bounds of r, searched on a logarithmic scale, or None to leave it alone.
        per_task: one λ an expert, as in the paper, or one for all.
        start: λ to begin with, inside its bounds.
    """

    experts: int
    lam: tuple[float, float] = (0.8, 1.3)
    ratio: tuple[float, float] | None = None
    per_task: bool = True
    start: float = 1.0

    def __post_init__(self) -> None:
        _require("experts", self.experts >= 1, self.experts, "at least 1")
        _require("lam", self.lam[0] < self.lam[1], self.lam, "a lower and a higher bound")
        inside = self.lam[0] <= self.start <= self.lam[1]
        _require("start", inside, self.start, f"a number from {self.lam[0]} to {self.lam[1]}")
        ordered = self.ratio is None or 0 < self.ratio[0] < self.ratio[1] <= 1
        _require("ratio", ordered, self.ratio, "bounds above 0, to 1")

    def first(self) -> dict[str, float]:
        """The first trial's numbers."""
        names = self._lam_names()
        first = dict.fromkeys(names, self.start)
        if self.ratio is not None:
            first["ratio"] = math.sqrt(self.ratio[0] * self.ratio[1])
        return first

    def ask(self, trial: Any) -> dict[str, Any]:
        """Options of the method for one trial of optuna."""
        lams = [trial.suggest_float(name, *self.lam) for name in self._lam_names()]
        if self.ratio is None:
            return self.options(lams, None)
        return self.options(lams, trial.suggest_float("ratio", *self.ratio, log=True))

    def options(self, lams: Sequence[float], ratio: float | None) -> dict[str, Any]:
        """Options of `pcb-merging`."""
        chosen: dict[str, Any] = {"lam": list(lams) if self.per_task else lams[0]}
        return chosen if ratio is None else chosen | {"ratio": ratio}

    def _lam_names(self) -> list[str]:
        return [f"lam_{i}" for i in range(self.experts)] if self.per_task else ["lam"]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Arguments:
        options: of the best trial, to give to `merge` or `pcb_merge`.
        score: of the best trial.
        scores: of all trials in order; None for one whose score was no number.
    """

    options: dict[str, Any]
    score: float
    scores: list[float | None]


def search(
    score: Callable[[dict[str, Any]], float],
    space: Space,
    storage: str | Path,
    *,
    budget: int = 100,
    sampler: Sampler = "cma-es",
    maximize: bool = True,
    seed: int = 0,
) -> Found:
    """Find the options with the best score.

    Arguments:
        score: from options of the method to a number, on validation data. Options that only
            differ in `lam` need only `PCBWeights.merge`.
        space: what to search.
        storage: a file for SQLite, or the address of a database that workers share; a search with
            the same storage and space goes on where it stopped.
        budget: trials in all, those of earlier runs included; 100 in the paper's vision script.
        sampler: "cma-es", an evolution strategy as in the paper, or "tpe".
        maximize: whether a higher score is better.
        seed: of the sampler.

    Raises:
        ConfigError: an option cannot work, or no trial gave a number.
        CheckpointError: the storage is of another search.
        MissingExtraError: optuna is not installed.
    """
    _require("budget", budget >= 1, budget, "at least 1")
    _require("sampler", sampler in ("cma-es", "tpe"), sampler, "'cma-es' or 'tpe'")
    optuna = require_optuna("merge")
    study = open_study(optuna, storage, "merge", ["maximize" if maximize else "minimize"])
    bind(study, storage, {"space": repr(space)})
    done = _finished(optuna, study)
    study.sampler = _sampler(optuna, sampler, space, seed + done)
    if not study.trials:
        study.enqueue_trial(space.first())
    for _ in range(budget - done):
        trial = study.ask()
        value = float(score(space.ask(trial)))
        if math.isfinite(value):
            study.tell(trial, value)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return _best(optuna, study, space)


def _sampler(optuna: Any, name: Sampler, space: Space, seed: int) -> Any:
    if name == "tpe" or len(space.first()) == 1:  # CMA-ES needs two numbers
        return optuna.samplers.TPESampler(seed=seed)
    try:
        import cmaes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("cmaes", "merge") from error
    return optuna.samplers.CmaEsSampler(x0=space.first(), seed=seed)


def _finished(optuna: Any, study: Any) -> int:
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    return sum(trial.state in states for trial in study.trials)


def _best(optuna: Any, study: Any, space: Space) -> Found:
    complete = [t for t in study.trials if t.state is optuna.trial.TrialState.COMPLETE]
    if not complete:
        raise ConfigError(
            "score",
            expected="a finite number for at least one trial",
            found="none",
            mend="Check the scoring function and the bounds.",
        )
    best = study.best_trial
    names = [name for name in best.params if name.startswith("lam")]
    options = space.options([best.params[name] for name in names], best.params.get("ratio"))
    ended = [t for t in study.trials if t.state.is_finished()]
    return Found(options, best.value, [trial.value for trial in ended])


def _require(option: str, holds: bool, found: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(option, expected=expected, found=repr(found), mend="See its docstring.")
