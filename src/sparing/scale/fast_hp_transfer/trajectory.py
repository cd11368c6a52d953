"""What a recorder saw: the change of the loss, by steps and by the number of directions."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparing.checkpoint import atomic_path
from sparing.errors import CheckpointError, DataError

_TENSORS = ("steps", "losses", "whole", "vectors", "directions")


@dataclass(frozen=True)
class Trajectory:
    """One training run along its averaged weights.

    Arguments:
        width: of the model.
        steps: (records + 1,) int64, optimizer steps at which a point was taken; the first is 0.
        losses: (records + 1,) float64, evaluation loss at these points.
        whole: (records,) float64, ⟨∇L, δw⟩ over all parameters: δφ (eq. 8).
        vectors: (records,) float64, the part of parameters that are not split.
        directions: (records, k + 1) float64, δφ^k for k = 0 ... (eq. 10 and 11); column 0 is the
            part of the vectors.
        by_parameter: (k + 1,) float64 by name of a matrix, over the whole run, without vectors.
        samples: (samples, k) float64, ψ of eq. 17, if recorded; empty otherwise.
        about: hyperparameters and whatever else tells the run from others.
    """

    width: int
    steps: Tensor
    losses: Tensor
    whole: Tensor
    vectors: Tensor
    directions: Tensor
    by_parameter: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    about: dict[str, float | str] = field(default_factory=dict)

    @property
    def phi(self) -> Tensor:
        """(k + 1,) float64: φ^k of the run, k = 0 ... (eq. 11)."""
        return self.directions.sum(dim=0)

    @property
    def total(self) -> float:
        """φ, the change of the loss to first order along the averaged weights."""
        return float(self.whole.sum())

    @property
    def loss_change(self) -> float:
        """L at the end less L at the start."""
        return float(self.losses[-1] - self.losses[0])

    @property
    def linearization_error(self) -> float:
        """|φ - ΔL| / |ΔL|: how far the decomposition is from what it decomposes."""
        return abs(self.total - self.loss_change) / abs(self.loss_change)

    def share(self, k: int) -> float:
        """φ^k / φ."""
        return float(self.phi[k]) / self.total

    def save(self, path: Path) -> None:
        """Write safetensors, atomically."""
        tensors = {name: getattr(self, name).contiguous() for name in (*_TENSORS, "samples")}
        tensors |= {f"by_parameter.{n}": t.contiguous() for n, t in self.by_parameter.items()}
        about = {"format": "sparing trajectory 1", "width": str(self.width)}
        about["about"] = json.dumps(self.about)
        with atomic_path(path) as fresh:
            save_file(tensors, fresh, metadata=about)

    @classmethod
    def load(cls, path: Path) -> "Trajectory":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(
                int(metadata["width"]),
                **{name: tensors[name] for name in (*_TENSORS, "samples")},
                by_parameter={
                    name.removeprefix("by_parameter."): tensor
                    for name, tensor in tensors.items()
                    if name.startswith("by_parameter.")
                },
                about=json.loads(metadata["about"]),
            )
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                str(path), expected="a saved trajectory", found=f"{type(error).__name__}: {error}",
                mend="Check the path, or record it again.",
            ) from error  # fmt: skip
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise CheckpointError(
                str(path), expected="a saved trajectory", found=str(error),
                mend="Record it again.",
            ) from error  # fmt: skip


@dataclass(frozen=True)
class PhiCurves:
    """φ^k over the grid of one hyperparameter, at one width.

    Arguments:
        width: of the models.
        grid: (points,) ascending coordinates ν, such as log2 of the learning rate.
        phi: (points, k + 1) float64; column k is φ^k, column 0 the part of the vectors.
        whole: (points,) φ itself; column `width` of `phi` if all directions were recorded.

    Raises:
        DataError: another shape, a value that is not finite, or a grid that is not ascending.
    """

    width: int
    grid: Tensor
    phi: Tensor
    whole: Tensor

    def __post_init__(self) -> None:
        points = len(self.grid)
        if self.phi.ndim != 2 or len(self.phi) != points or self.whole.shape != (points,):
            raise DataError(
                f"PhiCurves of width {self.width}", expected=f"values at {points} grid points",
                found=f"{tuple(self.phi.shape)} and {tuple(self.whole.shape)}",
                mend="Give one row a grid point.",
            )  # fmt: skip
        if not (self.grid.diff() > 0).all():
            raise DataError(
                f"PhiCurves of width {self.width}", expected="an ascending grid without repeats",
                found=str(self.grid.tolist()), mend="Sort it, and average what is there twice.",
            )  # fmt: skip
        if not all(t.isfinite().all() for t in (self.grid, self.phi, self.whole)):
            raise DataError(
                f"PhiCurves of width {self.width}", expected="finite values",
                found="NaN or infinity", mend="Leave out the points whose runs diverged.",
            )  # fmt: skip

    @classmethod
    def of(cls, runs: dict[float, list[Trajectory]]) -> "PhiCurves":
        """From the trajectories of each grid point ν, averaged over seeds.

        Raises:
            DataError: trajectories of different widths or numbers of directions.
        """
        shapes = {(t.width, t.directions.shape[1]) for of_point in runs.values() for t in of_point}
        if len(shapes) != 1:
            raise DataError(
                "PhiCurves.of", expected="trajectories of one width and number of directions",
                found=str(sorted(shapes)), mend="Make one set of curves for each width.",
            )  # fmt: skip
        grid = sorted(runs)
        return cls(
            shapes.pop()[0],
            torch.tensor(grid, dtype=torch.float64),
            torch.stack([torch.stack([t.phi for t in runs[nu]]).mean(0) for nu in grid]),
            torch.tensor(
                [sum(t.total for t in runs[nu]) / len(runs[nu]) for nu in grid],
                dtype=torch.float64,
            ),
        )

    def truncated(self, kappa: Tensor) -> Tensor:
        """φ^κ(ν): (points,) directions -> (points,) (eq. 12)."""
        return self.phi.gather(1, kappa[:, None])[:, 0]
