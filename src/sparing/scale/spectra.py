"""Singular values of a trained model's matrices: do they match those of another width?

A layer's gain RMS(Wx)/RMS(x) follows its largest singular value σ₁, because inputs align with the
top directions. Hyperparameters transfer when σ₁ is the same at both widths; if not, the measured
σ₁ ≈ C √(η/λ) d^a says which exponent of weight decay makes it so ("wd-scaling", eq. 9-12).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparing import pretrained
from sparing.errors import CheckpointError, DataError
from sparing.scale.parameters import ParameterInfo, Role, classify, matrices
from sparing.scale.singular import of_parameter
from sparing.shards import Checkpoint

MATCHED = 0.15  # largest width-slope of log σ₁ that counts as none; the specification's
_ROLES = ("matrix", "expert", "router")

Advance = Callable[[str], None]


@dataclass(frozen=True)
class MatrixSpectrum:
    """One matrix as measured.

    Arguments:
        name: of the parameter, with a number in brackets where it holds several matrices.
        outputs, inputs: of the matrix.
        sigma: σ₁.
        rms: root mean square of the entries.
    """

    name: str
    outputs: int
    inputs: int
    sigma: float
    rms: float

    @property
    def width(self) -> float:
        """Geometric mean of both sides; only its ratios matter."""
        return math.sqrt(self.outputs * self.inputs)


@dataclass(frozen=True)
class Spectra:
    """The matrices of one trained model.

    Arguments:
        matrices: in the model's order.
        lr, weight_decay: of its matrices in training, decoupled; where known.
    """

    matrices: tuple[MatrixSpectrum, ...]
    lr: float | None = None
    weight_decay: float | None = None

    @property
    def scale(self) -> float | None:
        """√(η/λ), which σ₁ is proportional to in the steady state; None where not known."""
        if not self.lr or not self.weight_decay:
            return None
        return math.sqrt(self.lr / self.weight_decay)


def measure_spectra(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    overrides: dict[str, Role] | None = None,
) -> Spectra:
    """σ₁ of every hidden matrix of a model; blocks and experts one by one.

    Arguments:
        model: on any device, also sharded by FSDP2.
        lr, weight_decay: peak rate and decay of its matrices in training, to fit exponents with.
        overrides: roles of parameters that are not known.
    """
    named = dict(model.named_parameters())
    found: list[MatrixSpectrum] = []
    for name, info in classify(model, overrides).items():
        if info.role in _ROLES:
            found += _measured(named[name], info)
    return Spectra(tuple(found), lr, weight_decay)


def measure_checkpoint(
    path: Path,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    advance: Advance | None = None,
) -> Spectra:
    """The same from a folder of safetensors with its config.json.

    One tensor at a time, unless `transformers` has to rename or join tensors: then it loads all.

    Arguments:
        path: of the folder.
        lr, weight_decay: as for `measure_spectra`.
        advance: called with the name of every matrix.

    Raises:
        CheckpointError: no config, damaged files, or tensors of another model.
    """
    with Checkpoint(path) as checkpoint:
        if checkpoint.config is None:
            raise CheckpointError(
                str(path),
                expected="a folder with config.json, which tells matrices from embeddings",
                found="none",
                mend="Give the folder that save_pretrained wrote.",
            )
        with torch.device("meta"):
            model = pretrained.architecture(str(path))
        infos = {n: info for n, info in classify(model).items() if info.role in _ROLES}
        if set(model.state_dict()) >= set(checkpoint.tensors) >= set(infos):
            tensors = (
                (name, checkpoint.read(name).view(checkpoint.tensors[name].shape)) for name in infos
            )
            found = _each(tensors, infos, advance)
        else:
            # Renamed or joined on loading, as experts are; anything else wrong is an error there.
            loaded = dict(pretrained.load_whole(str(path)).named_parameters())
            found = _each(((name, loaded[name]) for name in infos), infos, advance)
    return Spectra(tuple(found), lr, weight_decay)


def _each(
    tensors: Iterable[tuple[str, Tensor]], infos: dict[str, ParameterInfo], advance: Advance | None
) -> list[MatrixSpectrum]:
    found: list[MatrixSpectrum] = []
    for name, tensor in tensors:
        if advance is not None:
            advance(name)
        found += _measured(tensor, infos[name])
    return found


@torch.no_grad()
def _measured(weight: Tensor, info: ParameterInfo) -> list[MatrixSpectrum]:
    outputs, inputs = info.outputs // info.blocks, info.inputs
    count = info.count // (outputs * inputs)
    sizes = _rms(weight, info, count)
    if not all(map(math.isfinite, sizes)):
        raise DataError(
            f"parameter {info.name!r}",
            expected="finite weights",
            found=f"an RMS of {max(sizes, key=math.isnan)}",
            mend="The run has diverged; measure an earlier checkpoint.",
        )
    sigmas = of_parameter(weight, info).values.tolist()
    return [
        MatrixSpectrum(
            info.name if count == 1 else f"{info.name}[{number}]", outputs, inputs, sigma, rms
        )
        for number, (sigma, rms) in enumerate(zip(sigmas, sizes, strict=True))
    ]


def _rms(weight: Tensor, info: ParameterInfo, count: int) -> list[float]:
    """Of every matrix; of the whole parameter where it is sharded, as blocks would be gathered."""
    if isinstance(weight, DTensor):
        mean = weight.float().square().mean().full_tensor()  # type: ignore[attr-defined]
        return [math.sqrt(float(mean))] * count
    stack = matrices(weight, transposed=info.transposed, blocks=info.blocks)
    exact = stack.to(torch.promote_types(weight.dtype, torch.float32))
    return exact.square().mean(dim=(-2, -1)).sqrt().flatten().tolist()


@torch.no_grad()
def singular_values(
    model: nn.Module, overrides: dict[str, Role] | None = None
) -> dict[str, Tensor]:
    """All singular values of every hidden matrix: parameter name -> (matrices, values), falling."""
    named = dict(model.named_parameters())
    return {
        name: torch.linalg.svdvals(
            matrices(named[name].float(), transposed=info.transposed, blocks=info.blocks)
        ).reshape(-1, min(info.outputs // info.blocks, info.inputs))
        for name, info in classify(model, overrides).items()
        if info.role in _ROLES
    }


def ks_distance(first: Tensor, second: Tensor) -> float:
    """Kolmogorov-Smirnov: the largest gap between two distributions, 0 to 1.

    Arguments:
        first, second: any numbers, such as singular values over √(η/λ) of two runs, whose
            distributions agree in the steady state.
    """
    one, two = first.flatten().sort().values, second.flatten().sort().values
    places = torch.cat([one, two])
    below = [torch.searchsorted(x, places, right=True) / len(x) for x in (one, two)]
    return float((below[0] - below[1]).abs().max())


@dataclass(frozen=True)
class WidthFit:
    """σ₁ ≈ C √(η/λ) d^a over runs of several widths (eq. 9).

    Arguments:
        exponent: a, the mean over matrices.
        error: its standard error over matrices; 0 for one.
        by_matrix: a of every matrix.
        constants: C of every matrix, for d as the geometric mean of its sides.
    """

    exponent: float
    error: float
    by_matrix: dict[str, float]
    constants: dict[str, float]

    def decay_exponent(self, lr_exponent: float = 1.0) -> float:
        """The p of λ ∝ d^p that keeps σ₁ the same: 2a - 1 for η ∝ 1/d (eq. 11)."""
        return 2 * self.exponent - lr_exponent


def fit_width_exponent(runs: Sequence[Spectra]) -> WidthFit:
    """Fit a by least squares, with a constant for every matrix.

    Matrices of which one side is the same in all runs are left out; so are those that some run
    does not have.

    Arguments:
        runs: of two or more widths, each with the rate and decay of its training.

    Raises:
        DataError: fewer than two widths, a run without its rate and decay, or nothing in common.
    """
    scales = []
    for run in runs:
        if run.scale is None:
            raise DataError(
                "spectra",
                expected="the learning rate and weight decay of every run, above 0",
                found=f"lr={run.lr}, weight_decay={run.weight_decay}",
                mend="Say them when measuring; without decay there is no steady state to fit.",
            )
        scales.append(run.scale)
    by_matrix, constants = {}, {}
    for name, rows in _in_common(runs).items():
        if not _both_sides_grow(rows):
            continue
        where = torch.tensor([math.log(row.width) for row in rows], dtype=torch.float64)
        value = torch.tensor(
            [math.log(row.sigma / scale) for row, scale in zip(rows, scales, strict=True)],
            dtype=torch.float64,
        )
        centred = where - where.mean()
        slope = float((centred * value).sum() / centred.square().sum())
        by_matrix[name] = slope
        constants[name] = math.exp(float(value.mean()) - slope * float(where.mean()))
    if not by_matrix:
        raise DataError(
            "spectra",
            expected="matrices of the same names, of at least two widths",
            found=f"{len(runs)} runs with none whose both sides differ",
            mend="Train the same architecture at another width, and measure that too.",
        )
    values = list(by_matrix.values())
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return WidthFit(fmean(values), error, by_matrix, constants)


@dataclass(frozen=True)
class Comparison:
    """Two models' matrices side by side.

    Arguments:
        rows: pairs of one name, in the order of the first model.
        unmatched: names that only one of them has, such as those of further blocks.
    """

    rows: tuple[tuple[MatrixSpectrum, MatrixSpectrum], ...]
    unmatched: tuple[str, ...]

    @property
    def mean_log_ratio(self) -> float:
        """Of σ₁ in the second over the first."""
        return fmean(math.log(b.sigma / a.sigma) for a, b in self.rows if a.sigma and b.sigma)

    @property
    def slope(self) -> float | None:
        """Mean of log(σ₁ ratio) / log(width ratio); None where no matrix grows on both sides."""
        found = [
            math.log(b.sigma / a.sigma) / math.log(b.width / a.width)
            for a, b in self.rows
            if _both_sides_grow((a, b)) and a.sigma and b.sigma
        ]
        return fmean(found) if found else None

    @property
    def matched(self) -> bool:
        """Whether σ₁ does not depend on the width: a slope within ±0.15, or ratios within 15 %."""
        found = self.mean_log_ratio if self.slope is None else self.slope
        return abs(found) < MATCHED


def compare_spectra(first: Spectra, second: Spectra) -> Comparison:
    """Match the matrices of two models by name.

    Raises:
        DataError: nothing in common.
    """
    common = _in_common((first, second))
    if not common:
        raise DataError(
            "spectra",
            expected="two sizes of one architecture",
            found="no matrix of the same name in both",
            mend="Compare two checkpoints of one kind of model.",
        )
    every = [row.name for run in (first, second) for row in run.matrices]
    unmatched = tuple(name for name in every if name not in common)
    return Comparison(tuple((a, b) for a, b in common.values()), unmatched)


def _in_common(runs: Sequence[Spectra]) -> dict[str, list[MatrixSpectrum]]:
    tables = [{row.name: row for row in run.matrices} for run in runs]
    names = [n for n in tables[0] if all(n in table for table in tables)] if tables else []
    return {name: [table[name] for table in tables] for name in names}


def _both_sides_grow(rows: Sequence[MatrixSpectrum]) -> bool:
    return len({row.outputs for row in rows}) > 1 and len({row.inputs for row in rows}) > 1
