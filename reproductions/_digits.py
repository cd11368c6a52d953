"""Shared by reproductions: a small residual network on digits, adapted to a shifted task.

The network is trained on scikit-learn's 8x8 digits; the shifted task permutes the pixels and
relabels the classes, so that every layer has to change. Specifications call it "digits transfer".
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

TRAIN_ITEMS = 1200
CLASSES = 10


class Block(nn.Module):
    """x + 0.5 GELU(W LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * F.gelu(self.linear(self.norm(x)))


class ResidualNet(nn.Module):
    """Pixels (batch, 64) -> logits (batch, 10) through `blocks.<i>.linear`, all `width` square."""

    def __init__(self, depth: int = 8, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class Task:
    """Training and test items: x (items, 64) float32, y (items,) int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def shifted(self, seed: int) -> "Task":
        """The same items with permuted pixels and relabelled classes."""
        generator = torch.Generator().manual_seed(10_000 + seed)
        pixels = torch.randperm(64, generator=generator)
        labels = torch.randperm(CLASSES, generator=generator)
        return Task(
            self.train_x[:, pixels],
            labels[self.train_y],
            self.test_x[:, pixels],
            labels[self.test_y],
        )


def digits(seed: int) -> Task:
    """The digits, split by seed."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.data))
    x = torch.tensor(data.data[order] / 16.0 - 0.5, dtype=torch.float32)
    y = torch.tensor(data.target[order], dtype=torch.int64)
    return Task(x[:TRAIN_ITEMS], y[:TRAIN_ITEMS], x[TRAIN_ITEMS:], y[TRAIN_ITEMS:])


def fit(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    task: Task,
    *,
    lr: float,
    steps: int,
    seed: int,
    batch: int = 128,
    warmup: int = 20,
    weight_decay: float = 0.0,
    cosine: bool = False,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW, linear warm-up, then linear decay to zero, or half a cosine."""
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=weight_decay)

    def factor(step: int) -> float:
        left = (steps - step) / max(1, steps - warmup)
        falling = (1 - math.cos(math.pi * min(1.0, left))) / 2 if cosine else left
        return min((step + 1) / warmup, falling)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(task.train_x), (batch,), generator=generator)
        loss = F.cross_entropy(model(task.train_x[chosen]), task.train_y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        after_step(step)


@torch.no_grad()
def test(model: nn.Module, task: Task) -> tuple[float, float]:
    """Test cross-entropy and accuracy."""
    model.eval()
    logits = model(task.test_x)
    loss = F.cross_entropy(logits, task.test_y).item()
    return loss, (logits.argmax(1) == task.test_y).float().mean().item()


def pretrained(seed: int, *, depth: int = 8, width: int = 64, steps: int = 400) -> ResidualNet:
    """A network trained on the unshifted digits."""
    torch.manual_seed(seed)
    model = ResidualNet(depth, width)
    fit(model, model.parameters(), digits(seed), lr=3e-3, steps=steps, seed=seed)
    return model
