"""Reduced spectral norms of a model while it trains, and of a checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from sparing.checkpoint import write_json
from sparing.errors import ConfigError
from sparing.scale.matrix_optimizer import MatrixOptimizer
from sparing.scale.muon_mup import spectral_unit
from sparing.scale.muon_mup_plan import muon_mup_plan, pieces_of, unit_of
from sparing.scale.planning import Plan
from sparing.scale.singular import largest_singular_values
from sparing.scale.spectra import MatrixSpectrum


@dataclass(frozen=True)
class Reading:
    """One matrix at one time.

    Arguments:
        name: of the parameter, with a number in brackets where it holds several matrices.
        norm: w = ‖W‖/ρ, the largest factor by which it changes the RMS of features.
        moved: ‖ΔW‖/ρ since the reading before; None at the first or where not asked for.
        alignment: ā of its updates (Muon++, eq. 12); None where not measured.
    """

    name: str
    norm: float
    moved: float | None = None
    alignment: float | None = None


class SpectralMonitor(TrainerCallback):
    """Reads the reduced norms of all hidden matrices, also as a callback of `Trainer`.

    Arguments:
        model: to watch.
        plan: of muon-mup, if branch multipliers are folded into it; made anew where not given.
        optimizer: a `MuonPlusPlus`, for alignments.
        every: steps between readings of the callback.
        steps: also how far each matrix moved, which takes a copy of the matrices.

    Attributes:
        history: `{"step", "matrices"}` of every reading of the callback.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None = None,
        optimizer: Optimizer | None = None,
        *,
        every: int = 100,
        steps: bool = False,
    ) -> None:
        if every < 1:
            raise ConfigError(
                "every", expected="1 or more steps", found=repr(every), mend="Try 100."
            )
        self._named = dict(model.named_parameters())
        rows = (plan or muon_mup_plan(model)).parameters
        self._rows = [row for row in rows if row.algorithm == "matrix"]
        self._optimizer, self._every, self._steps = optimizer, every, steps
        self._directions: dict[str, Tensor] = {}
        self._before: dict[str, list[Tensor]] = {}
        self.history: list[dict[str, Any]] = []

    @torch.no_grad()
    def read(self) -> list[Reading]:
        """All matrices now, by a few products with each; warm-started from the reading before."""
        found: list[Reading] = []
        for row in self._rows:
            name = row.info.name
            aligned = self._alignments(self._named[name])
            weight = MatrixOptimizer.gathered(self._named[name])
            norms: list[float] = []
            moved: list[float] = []
            for number, matrix in enumerate(pieces_of(weight, row)):
                unit, key = unit_of(matrix, row), f"{name} {number}"
                largest = largest_singular_values(matrix, start=self._directions.get(key))
                self._directions[key] = largest.directions
                norms += (largest.values / unit).tolist()
                if name in self._before:
                    change = largest_singular_values(matrix - self._before[name][number])
                    moved += (change.values / unit).tolist()
            if self._steps:
                self._before[name] = [piece.clone() for piece in pieces_of(weight, row)]
            for number, norm in enumerate(norms):
                found.append(
                    Reading(
                        name if len(norms) == 1 else f"{name}[{number}]",
                        norm,
                        moved[number] if moved else None,
                        aligned[number] if number < len(aligned) else None,
                    )
                )
        return found

    def _alignments(self, weight: Tensor) -> list[float]:
        state = {} if self._optimizer is None else self._optimizer.state.get(weight, {})
        kept = [state[key] for key in sorted(state) if key.startswith("alignment_")]
        return [value for each in kept for value in each.flatten().tolist()]

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Read every so many steps; called by `Trainer`."""
        if state.global_step % self._every == 0:
            rows = [asdict(reading) for reading in self.read()]
            self.history.append({"step": state.global_step, "matrices": rows})

    def save(self, path: Path) -> None:
        """Write the history as JSON, atomically."""
        write_json(path, self.history)


def reduced_norms(spectra: Sequence[MatrixSpectrum]) -> dict[str, float]:
    """w of matrices whose σ₁ has been measured, such as those of a checkpoint."""
    return {row.name: row.sigma / spectral_unit(row.outputs, row.inputs) for row in spectra}
