"""Speed and memory of our fine-tuning methods against PEFT's LoRA, in one run.

At equal trainable parameters on SmolLM2-135M (or the nearest below that a method has): seconds of
a training step and of a forward, peak resident memory of a training process, and latency of the
merged model, each as a ratio to LoRA. Steps are taken in turns, so that all methods see the same
machine; memory is measured in one fresh process a method. A method whose effect depends on its
input has no merged model.

    python benchmarks/adapt.py --tokens 256 --repeats 9 --out benchmarks/adapt.json
"""

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from peft import get_peft_model
from torch import nn

from sparing import pretrained
from sparing.budget import Budget
from sparing.checkpoint import write_json
from sparing.compare.competitors import competitor, split_methods
from sparing.compare.jobs import peak_memory
from sparing.compare.sizing import MetaModel, solve
from sparing.errors import ConfigError
from sparing.reproduce import environment
from sparing.tuners import Tuner

MODEL = "smollm2-135m"
# HUT with r = 1, scale and shift; the others come as near as they can (LoRA of rank 2: 99 %).
PARAMETERS = 616_320
METHODS = tuple(split_methods("all-adapt"))
STATIC, ROUTED = 1.05, 1.15  # a step's time over LoRA's
TARGETS = {
    "mos": {"step": 1.10, "memory": 1.05},
    "neuroada": {"step": 1.10, "memory": 1.00},
    "sara": {"step": 1.10, "memory": 1.00},
    "hut": {"step": 1.15, "memory": 1.05, "forward": 1.00},
    "ept": {"step": ROUTED},
    "queryable-lora": {"step": ROUTED},
    "dopamine": {"step": STATIC},
    "unified-peft": {"step": STATIC},
    "bi-adapter": {"step": STATIC},
}


class Arm:
    """One adapted model and its optimiser."""

    def __init__(self, method: str, options: dict[str, Any], tokens: int) -> None:
        entry = competitor(method)
        base = pretrained.load(MODEL).model
        vocabulary = base.config.vocab_size
        torch.manual_seed(0)
        self.model = get_peft_model(base, entry.config(options, "all-linear")).train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        self.tuner = self.model.base_model
        self.steps = 0
        self.ids = torch.randint(vocabulary, (2, tokens // 2))

    def step(self) -> float:
        """Seconds of forward, backward, update and whatever else the method does in a step."""
        start = time.perf_counter()
        self.steps += 1
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        if isinstance(self.tuner, Tuner):
            self.tuner.before_step()
        self.optimizer.step()
        if isinstance(self.tuner, Tuner):
            self.tuner.after_step(self.steps, 10**6, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    @torch.no_grad()
    def forward(self) -> float:
        """Seconds of a forward, not merged."""
        return _seconds(self.model, self.ids)

    @torch.no_grad()
    def merged(self, base: nn.Module, repeats: int) -> float | None:
        """Latency of the merged model over that of the base model, or None; ends the arm."""
        try:
            merged = self.model.merge_and_unload().eval()
        except ConfigError:  # depends on its input
            return None
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for model, seconds in zip((merged, base), times, strict=True):
                seconds.append(_seconds(model, self.ids))
        return statistics.median(times[0]) / statistics.median(times[1])


def _seconds(model: nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids)
    return time.perf_counter() - start


def sizes() -> dict[str, dict[str, Any]]:
    """Options at which every method has the same number of parameters, or the nearest below."""
    meta = MetaModel(pretrained.resolve(MODEL), "all-linear")
    budget = Budget.parse(str(PARAMETERS))
    return {method: solve(competitor(method), meta, budget).options for method in METHODS}


def peak_of(method: str, options: dict[str, Any], tokens: int, connection: Any) -> None:
    """In a fresh process: peak memory of three training steps."""
    arm = Arm(method, options, tokens)
    for _ in range(3):
        arm.step()
    connection.send(peak_memory(torch.device("cpu")))


def memory(options: dict[str, dict[str, Any]], tokens: int) -> dict[str, int]:
    """Peak bytes of each method, in processes forked after the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparing.compare.jobs"])
    peaks = {}
    for method in METHODS:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=peak_of, args=(method, options[method], tokens, sender))
        child.start()
        peaks[method] = receiver.recv()
        child.join()
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="per step, in two rows")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options = sizes()
    peaks = memory(options, arguments.tokens)
    arms = {method: Arm(method, options[method], arguments.tokens) for method in METHODS}
    steps: dict[str, list[float]] = {method: [] for method in METHODS}
    forwards: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(arguments.repeats + 1):
        for method, arm in arms.items():
            times = arm.step(), arm.forward()
            if repeat:  # the first round warms up
                steps[method].append(times[0])
                forwards[method].append(times[1])
    base = pretrained.load(MODEL).model
    rows: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        arm = arms.pop(method)
        rows[method] = {
            "options": options[method],
            "parameters": arm.parameters,
            "seconds_per_step": statistics.median(steps[method]),
            "peak_bytes": peaks[method],
            # Paired by round: what slows the machine down for a moment slows both.
            "step": _paired(steps[method], steps["lora"]),
            "forward": _paired(forwards[method], forwards["lora"]),
            "memory": peaks[method] / peaks["lora"],
            "merged": arm.merged(base, arguments.repeats),
            "targets": TARGETS.get(method, {}),
        }
        del arm
        gc.collect()
    _print(rows)
    if arguments.out:
        record = {"model": MODEL, "tokens": arguments.tokens, "repeats": arguments.repeats}
        write_json(arguments.out, {**record, "rows": rows, "environment": environment()})


def _paired(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def _print(rows: dict[str, dict[str, Any]]) -> None:
    print(f"{'method':16}{'parameters':>12}{'s/step':>8}{'step':>8}{'forward':>9}", end="")
    print(f"{'memory':>8}{'merged':>8}  targets missed")
    for method, row in rows.items():
        missed = [
            f"{name} {row[name]:.2f} > {limit:.2f}"
            for name, limit in row["targets"].items()
            if row[name] > limit + 0.005
        ]
        print(
            f"{method:16}{row['parameters']:>12,}{row['seconds_per_step']:>8.2f}"
            f"{row['step']:>8.2f}{row['forward']:>9.2f}{row['memory']:>8.2f}"
            f"{row['merged'] or float('nan'):>8.2f}  {', '.join(missed) or 'none'}"
        )


if __name__ == "__main__":
    main()
