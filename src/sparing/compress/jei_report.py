"""What early exits buy: accuracy, uncertainty and cost of a network, and its wall time."""

import csv
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.checkpoint import atomic_path
from sparing.compress._jei_backbone import Inputs
from sparing.compress.jei_dnn import EarlyExitNetwork
from sparing.compress.jei_gates import LearnedGates, Policy, simulate
from sparing.compress.jei_training import Loader, cached_features
from sparing.compress.jei_uncertainty import calibration_error, risk_coverage_area


@dataclass(frozen=True)
class Point:
    """One network on one set of samples.

    Arguments:
        cost: mean multiply-adds over those of the final exit.
        accuracy, nll: of each sample at its exit.
        ece: calibration error, 15 bins of equal mass.
        aurc: area under risk and coverage; lower ranks risk better.
        accuracy_spread: standard deviation of the accuracy over 10 parts of the samples.
        shares: of samples, by exit, the final one last.
    """

    cost: float
    accuracy: float
    nll: float
    ece: float
    aurc: float
    accuracy_spread: float
    shares: tuple[float, ...]


def measure(logits: Tensor, labels: Tensor, exits: Tensor, costs: Tensor) -> Point:
    """A point from all logits (exits + 1, items, classes), and where each sample leaves."""
    taken = logits[exits, torch.arange(len(labels), device=exits.device)]
    probabilities = taken.softmax(-1)
    right = (taken.argmax(-1) == labels).float()
    parts = torch.stack([part.mean() for part in right.tensor_split(10) if len(part)])
    return Point(
        float(costs[exits].mean()),
        float(right.mean()),
        float(F.cross_entropy(taken, labels)),
        calibration_error(probabilities, labels),
        risk_coverage_area(probabilities, labels),
        float(parts.std()) if len(parts) > 1 else 0.0,
        tuple((torch.bincount(exits, minlength=len(costs)) / len(exits)).tolist()),
    )


@torch.no_grad()
def evaluate(network: EarlyExitNetwork, loader: Loader, policy: Policy | None = None) -> Point:
    """A point of a network with simulated exits, which are those of `predict`."""
    data = cached_features(network, loader)
    logits = torch.cat([network.heads.classify(data.pooled), data.final[None]])
    exits = simulate(logits, policy or LearnedGates(network.heads))
    return measure(logits, data.labels, exits, network.costs)


def write_curve(path: Path | str, points: Iterable[tuple[float, Point]]) -> None:
    """Write (λ, point) pairs as CSV: lam, cost, accuracy, nll, ece, aurc, accuracy_spread."""
    rows = []
    for lam, point in points:
        row = asdict(point)
        row.pop("shares")
        rows.append({"lam": lam} | row)
    with atomic_path(Path(path)) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        names = ["lam", "cost", "accuracy", "nll", "ece", "aurc", "accuracy_spread"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Served:
    """Wall time of one batch size.

    Arguments:
        batch: rows.
        plain_seconds: the model without exits.
        seconds: with exits.
        cost: mean of eq. 7, the bound that no implementation beats.
    """

    batch: int
    plain_seconds: float
    seconds: float
    cost: float


def serve_bench(
    network: EarlyExitNetwork,
    inputs: Inputs,
    batch_sizes: Sequence[int] = (1, 32, 256),
    repeats: int = 5,
) -> list[Served]:
    """Median wall time of the first rows of `inputs`, with and without exits, in alternation."""
    found = []
    for size in batch_sizes:
        part = _first(inputs, size)
        plain, early = [], []
        cost = network.predict(part).cost.mean().item()
        for _ in range(repeats):
            plain.append(_seconds(lambda part=part: network.backbone.call(part)))
            early.append(_seconds(lambda part=part: network.predict(part)))
        found.append(Served(size, median(plain), median(early), cost))
    return found


def _first(inputs: Inputs, size: int) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[:size]
    return {n: v[:size] if isinstance(v, Tensor) else v for n, v in inputs.items()}


def _seconds(work: object) -> float:
    assert callable(work)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
