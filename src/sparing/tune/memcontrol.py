"""MemControl: search which blocks to fine-tune, for quality and against memorisation.

The outer level chooses a binary mask ω over groups of parameters and a learning rate η that
minimise several rewards together; the inner level fine-tunes what the mask leaves on, for a fixed
number of steps (eq. 1 and 2). No reward is differentiated, so any function of the model will do.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparing.errors import ConfigError
from sparing.fingerprint import fingerprint
from sparing.studies import FAILURE, bind, open_study, require_optuna, run_slots, trials_by_slot
from sparing.train import DivergedError
from sparing.tune.front import Front, State, Trial
from sparing.tune.parameter_groups import Mask, ParameterGroups
from sparing.tune.samplers import LEARNING_RATE, LogUniform, SearchSpace, slot_sampler
from sparing.tuners import generator_for

PAPER_RATES = LogUniform(1e-5, 1e-3)
Pruner = Literal["halving", "median", "hyperband"]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Reward:
    """What the outer level optimises.

    Arguments:
        measure: from the fine-tuned model, in evaluation mode and without gradients, to a number.
        name: of its column.
        maximize: whether higher is better.
    """

    measure: Callable[[nn.Module], float]
    name: str
    maximize: bool = False

    @classmethod
    def of(cls, reward: "Reward | Callable[[nn.Module], float]") -> "Reward":
        """A reward from any callable: attributes `name` and `maximize` count if it has them."""
        if isinstance(reward, Reward):
            return reward
        name = getattr(reward, "name", None) or getattr(reward, "__name__", None)
        return cls(reward, name or type(reward).__name__, getattr(reward, "maximize", False))


@dataclass
class Run:
    """One fine-tuning, as the function that does it sees it.

    Arguments:
        model: in training mode, with only the masked parameters trainable.
        mask: a digit a group.
        learning_rate: η.
        parameters: groups for an optimiser: what the mask trains, with their learning rates.
        seed: the same in all trials, so that they differ by mask and rate only.
    """

    model: nn.Module
    mask: str
    learning_rate: float
    parameters: list[dict[str, Any]]
    seed: int
    _report: Callable[[int], None] = field(default=lambda step: None, repr=False)

    def generator(self, name: str) -> torch.Generator:
        """Random numbers on the CPU, the same in every trial: of data order, say, or of noise."""
        return generator_for(self.seed, name)

    def report(self, step: int) -> None:
        """Measure the only reward now, and end the trial here if its pruner finds it hopeless.

        Without a pruner this does nothing. Call it now and then, after each epoch say.
        """
        self._report(step)


Train = Callable[[Run], None]


class MemControl:
    """A search over masks and learning rates (MemControl, eq. 1 and 2).

    The model is held once. Before every trial the parameters that any mask trains, and all buffers,
    are put back bit by bit; if a trial changed anything else that is an error.

    Arguments:
        model: the base, prepared by `block_groups`.
        groups: what `block_groups` returned.
        rewards: functions of the model, lower being better unless they have `maximize = True`. By
            convention memorisation is the first and quality the second.
        learning_rates: a range (the paper's: 1e-5 to 1e-3) or a list to choose from.
        learning_rate_1d: of SVDiff's shifts of vectors; None is that of the others.
        trials: in all, those of earlier runs and other workers included. "exhaustive" tries every
            combination, and takes as many as there are.
        sampler: "nsga2" (the paper's with several rewards), "tpe", "random" or "exhaustive".
        population: of NSGA-II; the trials of its first generation are random. optuna's default,
            and so the paper's, is 50.
        pruner: "halving", "median" or "hyperband" with one reward; "auto" is "halving" with one
            and none with several, which cannot be pruned.
        storage: a file for SQLite, the address of a database that workers share, or None for
            memory. The same search with the same storage goes on where it stopped.
        name: of the study in its database.
        seed: of masks, learning rates, and the random numbers of all trials.
        settings: what else a trial depends on, such as steps; checked when a search goes on.
        on_trial: called with all trials so far after each.

    Raises:
        ConfigError: an option cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ParameterGroups,
        rewards: Sequence[Reward | Callable[[nn.Module], float]],
        *,
        learning_rates: LogUniform | Sequence[float] = PAPER_RATES,
        learning_rate_1d: float | None = None,
        trials: int | None = None,
        sampler: str = "nsga2",
        population: int = 10,
        pruner: Pruner | Literal["auto"] | None = "auto",
        storage: str | Path | None = "memcontrol.db",
        name: str = "memcontrol",
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        on_trial: Callable[[Front], None] | None = None,
    ) -> None:
        self.model, self.groups, self.seed = model, groups, seed
        self.rewards = [Reward.of(reward) for reward in rewards]
        self._check_rewards(pruner)
        self.space = SearchSpace(groups.names, learning_rates, allow_empty=bool(groups.always))
        everything = len(self.space.everything()) if sampler == "exhaustive" else None
        self.trials = everything or (20 if trials is None else trials)
        _require("trials", self.trials >= 1 and trials in (None, self.trials), trials, "at least 1")
        _require("population", population >= 2, population, "at least 2")
        self.learning_rate_1d = learning_rate_1d
        self.sampler, self.population = sampler, population
        self.pruner = (
            ("halving" if len(self.rewards) == 1 else None) if pruner == "auto" else pruner
        )
        self.storage, self.name = storage, name
        self.settings = dict(settings or {})
        self.on_trial = on_trial
        groups.apply_mask(model, "1" * len(groups))  # also tells whether they belong together
        self._start = {n: t.detach().clone() for n, t in self._tunable().items()}
        self._sums = _checksums(model)

    def search(self, train: Train) -> Front:
        """Run the trials that are left.

        A trial whose rewards are no finite numbers, or whose training diverged, counts as failed.

        Arguments:
            train: fine-tunes `run.model` with an optimiser over `run.parameters`.

        Returns:
            all trials and those that no other beats; the model is as it was before the search.

        Raises:
            CheckpointError: the storage is of another search or cannot be used.
            ConfigError: the training changed parameters that its mask froze.
            MissingExtraError: optuna is not installed.
        """
        optuna = require_optuna("tune")
        study = self._study(optuna)
        sampler, begin = slot_sampler(
            optuna, self.sampler, self.space, seed=self.seed, population=self.population
        )
        study.sampler = sampler

        def objective(trial: Any, slot: int) -> Any:
            begin(trial, slot)
            mask, rate = self.space.ask(trial)
            start = time.perf_counter()
            try:
                values = self.evaluate(train, mask, rate, report=self._reporter(optuna, trial))
                failure = _failure(self.rewards, values)
            except (DivergedError, FloatingPointError) as error:
                values, failure = [math.nan] * len(self.rewards), str(error)
            trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
            if failure:
                trial.set_user_attr(FAILURE, failure)
                return [math.nan] * len(self.rewards)
            return values

        def told(study: Any, trial: Any) -> None:
            if self.on_trial is not None:
                self.on_trial(self._front(study))

        run_slots(study, self.trials, objective, callbacks=[told])
        return self._front(study)

    def front(self) -> Front:
        """What earlier runs and other workers have found so far; runs nothing."""
        return self._front(self._study(require_optuna("tune")))

    def evaluate(
        self,
        train: Train,
        mask: Mask,
        learning_rate: float,
        report: Callable[[int], None] | None = None,
    ) -> list[float]:
        """The rewards of one mask and rate, outside the search; the model is put back afterwards.

        Raises:
            ConfigError: the mask does not fit or trains nothing, or the training changed
                parameters that the mask froze.
        """
        try:
            self.tune(train, mask, learning_rate, report)
            return [self._measure(reward) for reward in self.rewards]
        finally:
            self.restore()

    def tune(
        self,
        train: Train,
        mask: Mask,
        learning_rate: float,
        report: Callable[[int], None] | None = None,
    ) -> nn.Module:
        """Fine-tune from the base with one mask and rate, and leave the model so (stage 2).

        Give it another `train` than the search: one that has all the data and more steps.
        """
        self.restore()
        self.groups.apply_mask(self.model, mask)
        run = Run(
            self.model.train(),
            "".join(str(int(bit)) for bit in self.groups.mask(mask)),
            learning_rate,
            self.groups.optimizer_groups(self.model, mask, learning_rate, self.learning_rate_1d),
            self.seed,
            report or (lambda step: None),
        )
        with _seeded(self.seed, self.model):
            train(run)
        self.model.zero_grad(set_to_none=True)
        return self.model.eval()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the base back, bit by bit.

        Raises:
            ConfigError: something was changed that no mask trains.
        """
        now = self._tunable()
        for name, tensor in self._start.items():
            now[name].copy_(tensor)
        self.model.zero_grad(set_to_none=True)
        for name, total in _checksums(self.model).items():
            if total != self._sums.get(name):
                raise ConfigError(
                    name,
                    expected="a parameter that no mask trains to stay as it is",
                    found="that the training changed it",
                    mend="Optimise only run.parameters, and load the base model again.",
                )

    def _tunable(self) -> dict[str, Tensor]:
        known: dict[str, Tensor] = dict(self.model.named_parameters())
        return {n: known[n] for n in self.groups.parameters} | dict(self.model.named_buffers())

    def _check_rewards(self, pruner: Any) -> None:
        names = [reward.name for reward in self.rewards]
        good = bool(names) and len(set(names)) == len(names)
        _require("rewards", good, names, "at least one, with different names")
        known = (None, "auto", "halving", "median", "hyperband")
        _require("pruner", pruner in known, pruner, "'halving', 'median', 'hyperband' or None")
        fits = len(names) == 1 or pruner in (None, "auto")
        _require("pruner", fits, pruner, "None, for several rewards cannot be pruned by")

    def _study(self, optuna: Any) -> Any:
        directions = ["maximize" if reward.maximize else "minimize" for reward in self.rewards]
        pruners = {
            None: optuna.pruners.NopPruner,
            "halving": optuna.pruners.SuccessiveHalvingPruner,
            "median": optuna.pruners.MedianPruner,
            "hyperband": optuna.pruners.HyperbandPruner,
        }
        options = {"pruner": pruners[self.pruner]()}
        study = open_study(optuna, self.storage, self.name, directions, **options)
        bind(study, self.storage, self._description())
        return study

    def _description(self) -> dict[str, Any]:
        rates = self.space.rates
        bounds = [rates.low, rates.high] if isinstance(rates, LogUniform) else None
        choices = None if isinstance(rates, LogUniform) else list(rates)
        return {
            "family": self.groups.family,
            "coverage": self.groups.coverage,
            "groups": list(self.groups.names),
            "always": len(self.groups.always),
            "rewards": [reward.name for reward in self.rewards],
            "learning_rate_range": bounds,
            "learning_rates": choices,
            "learning_rate_1d": self.learning_rate_1d,
            "sampler": self.sampler,
            "population": self.population,
            "pruner": self.pruner,
            "seed": self.seed,
            "base": fingerprint(self.model.parameters()),
            "settings": self.settings,
        }

    def _measure(self, reward: Reward) -> float:
        with torch.no_grad(), parametrize.cached():
            return float(reward.measure(self.model.eval()))

    def _reporter(self, optuna: Any, trial: Any) -> Callable[[int], None] | None:
        if self.pruner is None:
            return None

        def report(step: int) -> None:
            trial.report(self._measure(self.rewards[0]), step)
            self.model.train()
            if trial.should_prune():
                raise optuna.TrialPruned

        return report

    def _front(self, study: Any) -> Front:
        found = []
        for slot, trial in trials_by_slot(study).items():
            if LEARNING_RATE not in trial.params:
                continue  # has only just begun
            bits = "".join(str(int(trial.params[name])) for name in self.groups.names)
            found.append(
                Trial(
                    slot,
                    bits,
                    trial.params[LEARNING_RATE],
                    tuple(trial.values) if trial.state.name == "COMPLETE" else None,
                    trial.user_attrs.get("seconds", 0.0),
                    self.groups.count(self.model, bits),
                    _STATES[trial.state.name],
                    trial.user_attrs.get(FAILURE, ""),
                )
            )
        return Front(
            tuple(reward.name for reward in self.rewards),
            tuple(reward.maximize for reward in self.rewards),
            self.groups.names,
            tuple(found),
        )


_STATES: dict[str, State] = {
    "COMPLETE": "complete",
    "FAIL": "failed",
    "PRUNED": "pruned",
    "RUNNING": "running",
}


def _failure(rewards: Sequence[Reward], values: Sequence[float]) -> str:
    pairs = zip(rewards, values, strict=True)
    return ", ".join(f"{r.name} is {value}" for r, value in pairs if not math.isfinite(value))


@contextmanager
def _seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Let torch's global generators, of which dropout draws, start alike in every trial."""
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    with torch.random.fork_rng([device.index for device in devices]):
        torch.manual_seed(seed)
        yield


def _checksums(model: nn.Module) -> dict[str, int]:
    """The sum of the bits of every tensor: any single change shows, on any device."""
    return {
        name: int(
            tensor.detach().reshape(-1).view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
        )
        for name, tensor in model.state_dict().items()
    }


def _require(option: str, holds: bool, found: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(option, expected=expected, found=repr(found), mend="See its docstring.")
