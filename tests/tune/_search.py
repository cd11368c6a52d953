"""A search that takes milliseconds, for tests and for the processes that they start."""

from pathlib import Path

import torch
from _networks import Stack
from torch import nn

from sparing.tune import LogUniform, MemControl, Run, block_groups

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def train(run: Run) -> None:
    """Two steps of AdamW with heavy decay."""
    optimizer = torch.optim.AdamW(run.parameters, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run.model(X).square().sum().backward()
        optimizer.step()


def size(model: nn.Module) -> float:
    return sum(p.square().sum().item() for p in model.blocks.parameters())


def output(model: nn.Module) -> float:
    return model(X).sum().item()


def control(storage: Path | None = None, **options) -> MemControl:
    model = options.pop("model", None) or Stack(options.pop("blocks", 3))
    chosen = {"trials": 5, "learning_rates": LogUniform(1e-3, 1e-1), "storage": storage} | options
    groups = block_groups(model, "full", freeze=["enter", "norm"])
    return MemControl(model, groups, chosen.pop("rewards", [size, output]), **chosen)
