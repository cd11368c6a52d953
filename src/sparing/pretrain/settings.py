"""Everything that decides the numbers of a training run from scratch."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from sparing.errors import ConfigError, near_matches
from sparing.models import Shape
from sparing.scale.optimizers import check_decay, optimizer_named, planner_for
from sparing.scale.settings import PlanSettings
from sparing.train import TrainPlan

_LEAST = {"steps": 1, "batch_size": 1, "block_length": 2, "validation_blocks": 1}
_SCHEDULES = ("linear", "cosine", "constant")
USUAL_DECAY = 0.1


@dataclass(frozen=True)
class Settings:
    """One run.

    The learning rate and the decay are those that were tuned in the base run; the planner makes
    of them what each parameter of this run gets.

    Arguments:
        learning_rate: peak, of matrices.
        data: named corpus, file, folder or hub data set.
        tokenizer: "characters", "bytes" or a model whose tokenizer is taken.
        family: "llama" or "gpt2".
        width, depth, head, feed_forward, tied: see `models.Shape`.
        optimizer: a key of `scale.optimizers.OPTIMIZERS`.
        planner: a key of `scale.planners.PLANNERS`; None for the optimizer's usual one.
        aux_learning_rate: of embeddings and vectors; None for the same.
        weight_decay: None for 0 on spheres and 0.1 elsewhere.
        base_width, base_depth: of the base run; None for those of this run.
        base_tokens, base_batch: training tokens of the base run, and its tokens a step; None for
            those of this run.
        steps: optimiser steps.
        batch_size: rows a step, over all processes.
        block_length: tokens a row.
        warmup: share of the steps.
        schedule: "linear", "cosine" or "constant".
        final: where the schedule ends, relative to the peak.
        clip: largest norm of the gradient.
        seed: of initialisation and data order.
        validation_blocks: rows to choose hyperparameters on, and as many others to report on.

    Raises:
        ConfigError: an option that cannot work.
    """

    learning_rate: float
    data: str = "python-topics"
    tokenizer: str = "characters"
    family: str = "llama"
    width: int = 128
    depth: int = 4
    head: int = 16
    feed_forward: float = 4.0
    tied: bool = False
    optimizer: str = "muonh"
    planner: str | None = None
    aux_learning_rate: float | None = None
    weight_decay: float | None = None
    base_width: int | None = None
    base_depth: int | None = None
    base_tokens: float | None = None
    base_batch: float | None = None
    steps: int = 200
    batch_size: int = 16
    block_length: int = 64
    warmup: float = 0.0
    schedule: str = "linear"
    final: float = 0.1
    clip: float = 1.0
    seed: int = 0
    validation_blocks: int = 64

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                self._refuse(name, f"{least} or more")
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "a share from 0 to 1")
        if not (self.clip > 0):
            self._refuse("clip", "a number above 0; inf for none")
        if self.schedule not in _SCHEDULES:
            self._refuse(
                "schedule",
                f"one of {', '.join(_SCHEDULES)}",
                near_matches(self.schedule, list(_SCHEDULES)),
            )
        planner_for(self.optimizer, self.planner)
        check_decay(self.optimizer, self.weight_decay or 0.0)
        self.plan_settings()
        self.shape(vocabulary=2)
        self.base_shape(vocabulary=2)

    def _refuse(self, name: str, expected: str, mend: str = "Choose such a value.") -> None:
        found = repr(getattr(self, name))
        raise ConfigError(name, expected=expected, found=found, mend=mend)

    @property
    def planner_name(self) -> str:
        """The planner that is used."""
        return planner_for(self.optimizer, self.planner)

    @property
    def decay(self) -> float:
        """The weight decay of the base run."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if optimizer_named(self.optimizer).on_sphere else USUAL_DECAY

    @property
    def tokens_a_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.block_length

    def shape(self, vocabulary: int) -> Shape:
        """Of the model, with the tokens of the tokenizer."""
        return Shape(
            self.width,
            self.depth,
            vocabulary,
            self.block_length,
            self.head,
            self.feed_forward,
            self.tied,
        )

    def base_shape(self, vocabulary: int) -> Shape:
        """Of the model of the base run."""
        return dataclasses.replace(
            self.shape(vocabulary),
            width=self.base_width or self.width,
            depth=self.base_depth or self.depth,
        )

    def plan_settings(self) -> PlanSettings:
        """What the planner is told of the two runs."""
        return PlanSettings(
            lr=self.learning_rate,
            aux_lr=self.aux_learning_rate,
            weight_decay=self.decay,
            base_tokens=self.base_tokens,
            tokens=None if self.base_tokens is None else float(self.steps * self.tokens_a_step),
            base_batch=self.base_batch,
            batch=None if self.base_batch is None else float(self.tokens_a_step),
        )

    def train_plan(self) -> TrainPlan:
        """For the training loop; the rates of parameters are in their groups."""
        return TrainPlan(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            schedule=self.schedule,  # type: ignore[arg-type]
            weight_decay=self.decay,
            clip=self.clip,
            seed=self.seed,
            final=self.final,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data, equal for equal settings; an endless clip is left out, as JSON has none."""
        content = dataclasses.asdict(self)
        if math.isinf(self.clip):
            content["clip"] = None
        return dict(json.loads(json.dumps(content)))
