"""Step time of our matrix optimizers against `torch.optim.Muon` and AdamW, in one run.

The parameters have the shapes of SmolLM2-135M; gradients are fixed noise, so nothing but the
optimizer is timed. torch's Muon takes matrices only; AdamW does the rest, as inside ours. Steps
are taken in turns, so that all optimizers see the same machine. Also: the largest singular value
of every matrix by power iteration, warm and from scratch, against a full SVD.

torch's Muon multiplies in bfloat16, which most CPUs only emulate: there it takes ten times as long.
So that the comparison means something, it multiplies in float32 here, as ours do on a CPU.

    python benchmarks/optim.py --layers 30 --repeats 5 --out benchmarks/optim.json
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sparing.checkpoint import write_json
from sparing.reproduce import environment
from sparing.scale import AdamH, Muon, MuonH, MuonPlusPlus
from sparing.scale.orthogonalize import spectral_norm

WIDTH, HIDDEN, KEYS, VOCABULARY = 576, 1536, 192, 49_152
# A step's time over that of torch's Muon, or of torch's AdamW where no matrix is orthogonalised.
TARGETS = {"muon": 1.05, "muonh": 1.05, "muon++": 1.05}
REFERENCES = {"adamh": "torch adamw"}


def shapes(layers: int) -> Iterator[tuple[int, ...]]:
    """Of SmolLM2-135M's parameters: the tied embedding, then each block, then the last norm."""
    yield (VOCABULARY, WIDTH)
    for _ in range(layers):
        yield from ((WIDTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (WIDTH, WIDTH))
        yield from ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
        yield from ((WIDTH,), (WIDTH,))
    yield (WIDTH,)


class Parameters:
    """One set for each optimizer, with gradients."""

    def __init__(self, layers: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrices: list[nn.Parameter] = []
        self.others: list[nn.Parameter] = []
        for number, shape in enumerate(shapes(layers)):
            parameter = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
            parameter.grad = torch.randn(shape, generator=generator)
            (self.matrices if number and len(shape) == 2 else self.others).append(parameter)

    def groups(self) -> list[dict[str, Any]]:
        """For our optimizers."""
        rest = {"params": self.others, "algorithm": "adamw", "weight_decay": 0.0}
        return [{"params": self.matrices, "algorithm": "matrix"}, rest]


def _torch_muon(parameters: Parameters) -> Callable[[], None]:
    muon = torch.optim.Muon(parameters.matrices, lr=1e-3)
    adamw = torch.optim.AdamW(parameters.others, lr=1e-3)

    def step() -> None:
        with mock.patch.object(Tensor, "bfloat16", Tensor.float):
            muon.step()
        adamw.step()

    return step


def _torch_adamw(parameters: Parameters) -> Callable[[], None]:
    return torch.optim.AdamW([*parameters.matrices, *parameters.others], lr=1e-3).step


ARMS: dict[str, Callable[[Parameters], Callable[[], Any]]] = {
    "torch muon": _torch_muon,
    "torch adamw": _torch_adamw,
    "muon": lambda parameters: Muon(parameters.groups(), lr=1e-3).step,
    "muon++": lambda parameters: MuonPlusPlus(parameters.groups(), lr=1e-3).step,
    "muonh": lambda parameters: MuonH(parameters.groups(), lr=1e-3).step,
    "adamh": lambda parameters: AdamH(parameters.groups(), lr=1e-3).step,
}


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def steps(layers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every step but the first, by optimizer."""
    actions = {name: make(Parameters(layers)) for name, make in ARMS.items()}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            taken = seconds(action)
            if repeat:
                times[name].append(taken)
    return times


def singular_values(layers: int, repeats: int) -> dict[str, float]:
    """Seconds for σ1 of all matrices, and the largest relative error of the quick ones."""
    matrices = [parameter.detach() for parameter in Parameters(layers).matrices]
    exact = [torch.linalg.svdvals(matrix)[0] for matrix in matrices]
    first = [spectral_norm(matrix) for matrix in matrices]
    starts = [vector for _, vector in first]

    def error(found: list[tuple[Tensor, Tensor]]) -> float:
        return max(
            float(abs(value - true) / true) for (value, _), true in zip(found, exact, strict=True)
        )

    def warm() -> list[tuple[Tensor, Tensor]]:
        pairs = zip(matrices, starts, strict=True)
        return [spectral_norm(matrix, start, steps=2) for matrix, start in pairs]

    actions: dict[str, Callable[[], Any]] = {
        "svd": lambda: [torch.linalg.svdvals(matrix) for matrix in matrices],
        "power iteration": lambda: [spectral_norm(matrix) for matrix in matrices],
        "warm power iteration": warm,
    }
    found = {
        name: statistics.median(seconds(action) for _ in range(repeats))
        for name, action in actions.items()
    }
    return found | {"error": error(first), "error, warm": error(warm())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="30 are SmolLM2-135M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    times = steps(arguments.layers, arguments.repeats)
    rows: dict[str, dict[str, Any]] = {}
    for name, taken in times.items():
        reference = REFERENCES.get(name, "torch muon")
        rows[name] = {
            "seconds_per_step": statistics.median(taken),
            "over": reference,
            # Paired by round: what slows the machine down for a moment slows both.
            "ratio": statistics.median(a / b for a, b in zip(taken, times[reference], strict=True)),
            "target": TARGETS.get(name),
        }
    spectrum = singular_values(min(arguments.layers, 2), arguments.repeats)
    for name, row in rows.items():
        missed = row["target"] is not None and row["ratio"] > row["target"] + 0.005
        print(
            f"{name:12}{row['seconds_per_step']:9.3f} s{row['ratio']:8.2f} x {row['over']}"
            f"{'  target missed' if missed else ''}"
        )
    for name, value in spectrum.items():
        print(f"σ1, {name:22}{value:.3g}")
    if arguments.out:
        record = {"layers": arguments.layers, "repeats": arguments.repeats}
        content = {**record, "rows": rows, "sigma1": spectrum, "environment": environment()}
        write_json(arguments.out, content)


if __name__ == "__main__":
    main()
