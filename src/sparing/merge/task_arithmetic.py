"""Task arithmetic: add the task vectors to the base.

Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089 (ICLR 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparing.merge.average import weighted_sum
from sparing.merge.method import Method, Options
from sparing.merge.view import Block


@dataclass(frozen=True)
class TaskArithmeticOptions(Options):
    """Options of task arithmetic.

    Arguments:
        scale: λ, one number or a list with one an expert; below 0 forgets a task. 0.4 is what the
            TIES paper uses for task arithmetic where nothing can be validated.
    """

    scale: float | Sequence[float] = 0.4

    def __post_init__(self) -> None:
        self.require_scales("scale")

    def check(self, experts: int) -> None:
        self.per_expert("scale", experts)


def _update(deltas: Sequence[Tensor], options: TaskArithmeticOptions, _: None, __: Block) -> Tensor:
    """Σ_i λ_i τ_i."""
    return weighted_sum(deltas, options.per_expert("scale", len(deltas)))


METHOD = Method("task-arithmetic", "arXiv 2212.04089", TaskArithmeticOptions, _update)
