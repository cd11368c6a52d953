"""What a planner has to know about two runs beside their models."""

from dataclasses import dataclass, fields
from math import isfinite

from sparing.errors import ConfigError

_MAY_BE_ZERO = ("weight_decay", "decay_exponent", "one_sided_exponent")


@dataclass(frozen=True)
class PlanSettings:
    """The base run, in which the hyperparameters were tuned, and the run to come.

    Arguments:
        lr: peak learning rate of matrices, tuned in the base run.
        aux_lr: that of embeddings and vectors; None for the same.
        weight_decay: decoupled, times the learning rate, tuned in the base run.
        base_tokens, tokens: training tokens of the two runs; give both or none.
        base_batch, batch: tokens a step of the two runs; give both or none.
        decay_exponent: p of a weight decay that grows as width^p (wd-scaling), 0 or more.
        one_sided_exponent: the same for matrices of which one side grows; None for half of it.

    Raises:
        ConfigError: a number that is not one, or one of a pair.
    """

    lr: float
    aux_lr: float | None = None
    weight_decay: float = 0.1
    base_tokens: float | None = None
    tokens: float | None = None
    base_batch: float | None = None
    batch: float | None = None
    decay_exponent: float = 0.5
    one_sided_exponent: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            zero = field.name in _MAY_BE_ZERO
            if value is not None and not (isfinite(value) and (value > 0 or (zero and value == 0))):
                raise ConfigError(
                    field.name,
                    expected="a number, 0 or more" if zero else "a number above 0",
                    found=repr(value),
                    mend="Describe the run in which the learning rate was tuned.",
                )
        for name in ("tokens", "batch"):
            if (getattr(self, name) is None) != (getattr(self, f"base_{name}") is None):
                raise ConfigError(
                    f"{name} and base_{name}",
                    expected="both or none",
                    found="one of the two",
                    mend="The law needs their ratio: give both.",
                )
