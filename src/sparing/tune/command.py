"""What `sparing search` does: a search over masks whose whole state is one folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.errors import ConfigError, near_matches
from sparing.tune.denoising import FineTuning
from sparing.tune.extraction import CopyRate
from sparing.tune.figure import draw_front
from sparing.tune.front import Front, Trial
from sparing.tune.memcontrol import MemControl, Reward
from sparing.tune.memorization import AverageMinimumDistance, MemorizationNorm
from sparing.tune.parameter_groups import block_groups
from sparing.tune.quality import (
    FrechetDistance,
    GuidedSampler,
    MemorizationInformedDistance,
    PrincipalComponents,
)
from sparing.tune.samplers import LogUniform
from sparing.tune.task import Task, digits_task, load_task, pixels
from sparing.tune.tuned import save_tuned

_COPIES = 4  # samples for each private image


@dataclass(frozen=True)
class Request:
    """All that a search depends on.

    Arguments:
        model: "digits", or a UNet as `load_task` takes it.
        data: file for `load_task`; None for digits.
        family, coverage: of parameters, see `block_groups`.
        rewards: names from `REWARDS`, memorisation first.
        trials: in all.
        steps, batch_size, repeats: of fine-tuning, see `FineTuning`.
        learning_rates: a lower and a higher bound.
        sampler: of masks.
        samples: images to generate in each trial.
        sampling_steps, guidance: of DDIM.
        features: principal components, as features of the Fréchet distance.
        copy_distance: two images match below this; pixels are in 0...1.
        pretraining: steps of the base on digits.
        seed: of everything.
    """

    model: str = "digits"
    data: Path | None = None
    family: str = "svdiff"
    coverage: str = "strict"
    rewards: tuple[str, ...] = ("max_norm", "FID")
    trials: int = 20
    steps: int = 100
    batch_size: int = 64
    repeats: int = 10
    learning_rates: tuple[float, float] = (1e-5, 1e-3)
    sampler: str = "nsga2"
    samples: int = 128
    sampling_steps: int = 20
    guidance: float = 2.0
    features: int = 16
    copy_distance: float = 2.0
    pretraining: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.rewards:
            if name not in REWARDS:
                raise ConfigError(
                    "rewards",
                    expected="names of rewards",
                    found=repr(name),
                    mend=near_matches(name, list(REWARDS)),
                )
        if self.samples <= self.features:
            raise ConfigError(
                "samples",
                expected=f"more than the {self.features} features, for a covariance of full rank",
                found=str(self.samples),
                mend="Generate more images, or use fewer features.",
            )
        if self.model != "digits" and self.data is None:
            raise ConfigError(
                "data",
                expected="a safetensors file of images and conditions, with a model of your own",
                found="none",
                mend="Give --data FILE; sparing.tune.task.load_task says what it holds.",
            )

    def settings(self) -> dict[str, Any]:
        """What trials depend on besides the groups and the sampler."""
        left_out = ("trials", "data", "learning_rates", "sampler", "rewards", "seed")
        return {n: v for n, v in self.__dict__.items() if n not in left_out}


class Search:
    """A search in a folder: `study.db`, `trials.csv`, `front.json` and `front.png`.

    Arguments:
        request: what to search.
        folder: for everything; the same request goes on where it stopped.
        storage: of trials, if not in the folder.
        stage: told what is being done.
        on_trial: called with all trials so far after each.

    Raises:
        SparingError: the request cannot work; nothing but a base model was written.
    """

    def __init__(
        self,
        request: Request,
        folder: Path,
        *,
        storage: str | None = None,
        stage: Callable[[str], None] = lambda text: None,
        on_trial: Callable[[Front], None] = lambda front: None,
    ) -> None:
        self.request, self.folder = request, folder
        if request.model == "digits":
            options: dict[str, Any] = {"steps": request.pretraining, "seed": request.seed}
            self.task = digits_task(folder / "base", **options, stage=stage)
        else:
            assert request.data is not None
            self.task = load_task(request.model, request.data)
        self.train = FineTuning(
            self.task.denoising,
            self.task.ordinary,
            self.task.repeated,
            repeats=request.repeats,
            steps=request.steps,
            batch_size=request.batch_size,
            drop_condition=0.1,
        )

        def after(front: Front) -> None:
            front.write_csv(folder / "trials.csv")
            on_trial(front)

        self.control = MemControl(
            self.task.model,
            block_groups(
                self.task.model,
                request.family,  # type: ignore[arg-type]
                coverage=request.coverage,  # type: ignore[arg-type]
            ),
            [REWARDS[name](self.task, request) for name in request.rewards],
            learning_rates=LogUniform(*request.learning_rates),
            trials=request.trials,
            sampler=request.sampler,
            storage=storage or folder / "study.db",
            seed=request.seed,
            settings=request.settings(),
            on_trial=after,
        )

    def run(self) -> Front:
        """Run the trials that are left, and write table and picture."""
        front = self.control.search(self.train)
        front.write_csv(self.folder / "trials.csv")
        front.save(self.folder / "front.json")
        draw_front(front, self.folder / "front.png")
        return front

    def finish(self, chosen: Trial, steps: int) -> None:
        """Stage 2: tune with the mask and rate of a trial for `steps`, and save that in `tuned`."""
        longer = FineTuning(
            self.task.denoising,
            self.task.ordinary,
            self.task.repeated,
            repeats=self.request.repeats,
            steps=steps,
            batch_size=self.request.batch_size,
            drop_condition=0.1,
        )
        model = self.control.tune(longer, chosen.mask, chosen.learning_rate)
        save_tuned(model, self.control.groups, chosen.mask, self.folder / "tuned")
        self.control.restore()


def _sampler(task: Task, request: Request, conditions: Any) -> GuidedSampler:
    return GuidedSampler(
        task.denoising,
        conditions,
        tuple(task.ordinary.images.shape[1:]),
        steps=request.sampling_steps,
        guidance=request.guidance,
        decode=pixels,
        seed=request.seed,
    )


def _of_held_out(task: Task, request: Request) -> GuidedSampler:
    needed = -(-request.samples // len(task.held_out))
    conditions = task.held_out.conditions.repeat(
        needed, *[1] * (task.held_out.conditions.dim() - 1)
    )
    return _sampler(task, request, conditions[: request.samples])


def _of_private(task: Task, request: Request) -> GuidedSampler:
    return _sampler(task, request, task.repeated.conditions.repeat_interleave(_COPIES, 0))


def _components(task: Task, request: Request) -> PrincipalComponents:
    return PrincipalComponents(pixels(task.held_out.images), request.features)


def _norm(statistic: Any) -> Callable[[Task, Request], MemorizationNorm]:
    return lambda task, request: MemorizationNorm(
        task.denoising, task.repeated, statistic, seed=request.seed
    )


def _fid(task: Task, request: Request) -> FrechetDistance:
    real = pixels(task.held_out.images)
    return FrechetDistance(_of_held_out(task, request), real, _components(task, request))


def _mifid(task: Task, request: Request) -> MemorizationInformedDistance:
    repeated = pixels(task.repeated.images)
    features = PrincipalComponents(repeated, min(8, len(repeated) - 1))
    return MemorizationInformedDistance(_of_private(task, request), repeated, features)


def _distance(task: Task, request: Request) -> AverageMinimumDistance:
    return AverageMinimumDistance(_of_private(task, request), pixels(task.repeated.images))


def _extraction(task: Task, request: Request) -> CopyRate:
    own = pixels(task.repeated.images).repeat_interleave(_COPIES, 0)
    return CopyRate(_of_private(task, request), own, request.copy_distance)


REWARDS: dict[str, Callable[[Task, Request], Reward | Any]] = {
    "max_norm": _norm("max"),
    "avg_norm": _norm("mean"),
    "FID": _fid,
    "MIFID": _mifid,
    "distance": _distance,
    "extraction": _extraction,
}
