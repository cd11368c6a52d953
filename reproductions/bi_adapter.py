"""Bi-Adapter: one bit and 32 times the width, against float32, at equal bytes.

A network of six residual feed-forward blocks learns scikit-learn's digits; frozen, it is adapted by
AdaptFormer branches and a new head to digits with permuted pixels and relabelled classes. Shown:
what bits a weight and width are worth when the adapter's bytes are fixed, and that rounding after
training is no substitute. Not shown: vision transformers and VTAB-1K.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import _digits
import peft
import torch
from torch import Tensor, nn

from sparing.adapt import BiAdapterConfig, relative_noise, round_weights
from sparing.adapt.bi_adapter import matrices
from sparing.reproduce import Check, Claim, Evidence, verdict_of

CLAIM = Claim(
    text="Adapters of one bit a weight reach the accuracy of float32 adapters of the same width, "
    "and at equal storage few bits and a larger width are better than many bits and a smaller one.",
    number="VTAB-1K, average of 19 tasks: 77.0 % for AdaptFormer with h = 32 and 1 bit, at 212.9 "
    "KB a task with a float32 head and 76.6 KB (76.9 %) with a binary one",
    source="abstract and the README of the released code",
)

GAIN_OVER_FLOAT = 0.8  # test loss of 1 bit over that of float32 with as many bytes
ACCURACY_LOST = 0.02  # at most, by 1 bit against float32 of the same width
ACCURACY_LOST_BY_ROUNDING = 0.15  # at least, by rounding to 1 bit after training
HEAD_ALONE = 0.05  # accuracy that adapters must add to a trained head, or there is nothing to adapt

WIDTH, DEPTH, PRETRAIN_STEPS = 64, 6, 500
STEPS, WARMUP, LEARNING_RATE, DECAY, BATCH = 400, 30, 5e-3, 1e-4, 64
TRAIN, HELD_OUT = 400, 400
SCALES = (0.1, 1.0, 10.0)
NOISE = 0.5

EQUAL_BYTES = {"1 bit, h = 32": (1, 32), "2 bits, h = 16": (2, 16), "4 bits, h = 8": (4, 8)}
ARMS = EQUAL_BYTES | {"32 bits, h = 1": (32, 1), "32 bits, h = 32": (32, 32)}


class Block(nn.Module):
    """x + W_2 GELU(W_1 LayerNorm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.activation = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


class Network(nn.Module):
    """Pixels (batch, 64) -> logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, _digits.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class Trained:
    """An adapted network, and how well it does."""

    model: nn.Module
    held_out: tuple[float, float]
    test: tuple[float, float]
    scale: float
    stored_bits: int


def fit(model: nn.Module, task: _digits.Task, seed: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    _digits.fit(
        model,
        parameters,
        task,
        lr=LEARNING_RATE,
        steps=STEPS,
        seed=seed,
        batch=BATCH,
        warmup=WARMUP,
        weight_decay=DECAY,
        cosine=True,
    )


def adapt(base: Network, bits: int, h: int, splits: tuple[_digits.Task, ...], seed: int) -> Trained:
    """Train at every scale, and keep the one with the lowest loss on the held-out images."""
    train, held_out = splits
    found = []
    for scale in SCALES:
        config = BiAdapterConfig(bits=bits, h=h, scale=scale, seed=seed, modules_to_save=["head"])
        model = peft.get_peft_model(copy.deepcopy(base), config)
        torch.manual_seed(seed)
        fit(model, train, seed)
        stored = sum(m.latent.numel() * m.bits for _, m in matrices(model, "default"))
        results = (_digits.test(model, held_out), _digits.test(model, train))
        found.append(Trained(model, *results, scale, stored))
    return min(found, key=lambda one: one.held_out[0])


def rounded(one: Trained, task: _digits.Task) -> tuple[float, float]:
    """Loss and accuracy after rounding to one bit."""
    model = copy.deepcopy(one.model)
    round_weights(model, 1)
    return _digits.test(model, task)


def rise_by_noise(model: nn.Module, task: _digits.Task) -> float:
    """By how much the test loss rises, on average, with noise on the trained matrices."""
    before = _digits.test(model, task)[0]
    after = []
    for seed in range(5):
        with relative_noise(model, NOISE, seed):
            after.append(_digits.test(model, task)[0])
    return fmean(after) - before


def one_seed(seed: int) -> dict[str, float]:
    """All figures of one seed, by name."""
    torch.manual_seed(seed)
    base, source = Network(), _digits.digits(seed)
    _digits.fit(base, base.parameters(), source, lr=3e-3, steps=PRETRAIN_STEPS, seed=seed)
    target = source.shifted(seed)
    train = replace(target, train_x=target.train_x[:TRAIN], train_y=target.train_y[:TRAIN])
    later = slice(TRAIN, TRAIN + HELD_OUT)
    held_out = replace(target, test_x=target.train_x[later], test_y=target.train_y[later])

    head = copy.deepcopy(base).requires_grad_(False)
    head.head.requires_grad_(True)
    fit(head, train, seed)
    full = copy.deepcopy(base)
    fit(full, train, seed)
    found = {
        "accuracy, source": _digits.test(base, source)[1],
        "accuracy, head alone": _digits.test(head, train)[1],
        "loss, head alone": _digits.test(head, train)[0],
    }
    for name, (bits, h) in ARMS.items():
        best = adapt(base, bits, h, (train, held_out), seed)
        found[f"loss, {name}"], found[f"accuracy, {name}"] = best.test
        found[f"scale, {name}"] = best.scale
        found[f"bits stored, {name}"] = best.stored_bits
        if (bits, h) == (32, 32):
            loss, accuracy = rounded(best, train)
            found["loss, 32 bits, h = 32, rounded"] = loss
            found["accuracy, 32 bits, h = 32, rounded"] = accuracy
            found["rise by noise, 32 bits, h = 32"] = rise_by_noise(best.model, train)
    found["rise by noise, full fine-tuning"] = rise_by_noise(full, train)
    return found


def run(device: str, seeds: Sequence[int]) -> Evidence:
    """Pre-train, adapt and round for each seed; on the CPU, whatever the device."""
    per_seed = [one_seed(seed) for seed in seeds]
    measured = {name: [round(found[name], 5) for found in per_seed] for name in per_seed[0]}
    mean = {name: fmean(found[name] for found in per_seed) for name in per_seed[0]}
    by_bits = [mean[f"loss, {name}"] for name in (*EQUAL_BYTES, "32 bits, h = 1")]
    one_bit = mean["accuracy, 1 bit, h = 32"]
    checks = [
        Check.below(
            f"loss of 1 bit < {GAIN_OVER_FLOAT} x loss of float32 with as many bytes",
            by_bits[0],
            GAIN_OVER_FLOAT * by_bits[-1],
        ),
        Check.above(
            f"accuracy of 1 bit > that of float32 of the same width - {ACCURACY_LOST}",
            one_bit,
            mean["accuracy, 32 bits, h = 32"] - ACCURACY_LOST,
        ),
        *(
            Check.below(f"at equal bytes, loss of {few} bits < loss of {many}", less, more)
            for few, many, less, more in zip(
                (1, 2, 4), (2, 4, 32), by_bits[:-1], by_bits[1:], strict=True
            )
        ),
    ]
    sizes = {mean[f"bits stored, {name}"] for name in (*EQUAL_BYTES, "32 bits, h = 1")}
    controls = [
        Check.below(
            f"rounding float32 after training costs > {ACCURACY_LOST_BY_ROUNDING} of accuracy",
            mean["accuracy, 32 bits, h = 32, rounded"],
            one_bit - ACCURACY_LOST_BY_ROUNDING,
        ),
        Check.below("arms of equal bytes: different sizes stored", len(sizes), 1.5),
        Check.above(
            f"1 bit is > {HEAD_ALONE} more accurate than a head alone",
            one_bit,
            mean["accuracy, head alone"] + HEAD_ALONE,
        ),
    ]
    notes = (
        f"{len(seeds)} seeds; {TRAIN} training images, {STEPS} steps; the scale of every arm and "
        f"seed is that of {SCALES} with the lowest loss on {HELD_OUT} other images. Bytes are "
        "those of the codes; mean and deviation, 8 bytes a matrix, and the head are not counted. "
        f"Not judged: how much noise of {NOISE} deviations on trained matrices raises the loss."
    )
    return Evidence(measured, checks, controls, verdict_of(checks, controls), notes)
