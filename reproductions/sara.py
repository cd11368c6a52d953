"""SaRA on a small denoising diffusion model: new style in, old images not forgotten.

A residual MLP learns to denoise scikit-learn's 8x8 digits, then 64 digits in a new style (flipped,
shifted, negated). Shown: whether the smallest weights are free (zeroing them hardly hurts), and
whether training only them forgets the source less than training as many random or largest weights,
or all of them, at the same learning rate. Not shown: image quality (FID, CLIP) and Stable
Diffusion; the measure is the error of the predicted noise on held-out digits.
"""

import copy
from collections.abc import Callable, Sequence
from statistics import fmean

import peft
import torch
import torch.nn.functional as F
from _digits import CLASSES, digits
from torch import Tensor, nn

from sparing.adapt import SaRAConfig, probe, theta_for
from sparing.reproduce import Check, Claim, Evidence, verdict_of

CLAIM = Claim(
    text=(
        "The smallest 10 to 20 % of a diffusion model's weights do not matter for generation; "
        "fine-tuning only them learns the new task and keeps more of the prior than other choices."
    ),
    number="zeroing hardly hurts; per-dataset figures not found",
    source="abstract and reviews of arXiv 2409.06633; figures of the specification's own run",
)

# Declared before the run; from the specification's trial on another network of the same kind.
MAX_RISE_SMALLEST = 0.03  # of the source error, when the smallest 10 % are zeroed
MIN_RISE_RATIO = 50.0  # of zeroing random 10 % over zeroing the smallest 10 %
MAX_TARGET_OVER_BEST = 1.03
MIN_RISE_RANDOM = 0.2  # otherwise the probe is blind
MIN_FULL_FORGETTING = 1.5  # otherwise there is nothing to forget
MAX_TARGET_LEFT = 0.8  # of the target error before tuning

WIDTH, BLOCKS, STEPS_OF_NOISE = 256, 3, 100
PRETRAIN_STEPS, TUNE_STEPS, BATCH = 5_000, 1_000, 64
TARGET_IMAGES = 64
SHARE = 0.1
LEARNING_RATE = 1e-3
PROBED = (0.05, 0.1, 0.2, 0.3)
LINEAR = r"enter|time|leave|blocks\.\d"
ALPHA_BAR = (1 - torch.linspace(1e-3, 0.1, STEPS_OF_NOISE)).cumprod(0)


class Denoiser(nn.Module):
    """Noisy image (batch, 64), noise step and class (batch,) int64 -> predicted noise."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, WIDTH)
        self.time = nn.Linear(64, WIDTH)
        self.label = nn.Embedding(CLASSES, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(BLOCKS))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.leave = nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:
        waves = step[:, None] * torch.logspace(0, -3, 32)
        time = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        h = self.enter(x) + time + self.label(label)
        for norm, linear in zip(self.norms, self.blocks, strict=True):
            h = h + F.silu(linear(norm(h)))
        return self.leave(h)


def error(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the noise predicted at one random noise step an image."""
    step = torch.randint(STEPS_OF_NOISE, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    kept = ALPHA_BAR[step, None]
    return F.mse_loss(model(kept.sqrt() * x + (1 - kept).sqrt() * noise, step, y), noise)


@torch.no_grad()
def test_error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The error over the same eight draws of noise for every model."""
    generator = torch.Generator().manual_seed(1)
    return fmean(error(model, x, y, generator).item() for _ in range(8))


def train(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, lr: float, seed: int) -> None:
    """AdamW with the paper's decay, cosine schedule, no warm-up; calls a tuner's hooks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    tuner = model.base_model if isinstance(model, peft.PeftModel) else None
    for step in range(1, steps + 1):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        error(model, x[chosen], y[chosen], generator).backward()
        if tuner is not None:
            tuner.before_step()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if tuner is not None:
            tuner.after_step(step, steps, optimizer)


def restyled(x: Tensor) -> Tensor:
    """Mirrored, moved by one row and two columns, and negated."""
    return -x.view(-1, 8, 8).flip(2).roll((1, 2), dims=(1, 2)).flatten(1)


@torch.no_grad()
def with_random_zeroed(model: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy with this share of all parameters set to zero, no matter which."""
    damaged, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in damaged.parameters():
        p.mul_(torch.rand(p.shape, generator=generator) >= share)
    return damaged


def options(entries: int, seed: int) -> dict[str, dict[str, object]]:
    """The tuner's options of each way to choose 10 % of the weights."""
    same = {"target_modules": LINEAR, "n_params": entries, "seed": seed, "lambda_rank": 0.0}
    return {
        "largest": same | {"select": "largest", "progressive_at": None},
        "random": same | {"select": "random", "progressive_at": None},
        "sara, one stage": same | {"progressive_at": None},
        "sara": same,
        # λ = 1e-4 every step on all matrices, applied five-fold every fifth step to save SVDs.
        "sara, nuclear": same | {"lambda_rank": 1e-4, "rank_every": 5, "rank_matrices": "all"},
    }


def one_seed(seed: int) -> dict[str, float]:
    """All figures of one seed, by name."""
    task = digits(seed)
    source = (2 * task.test_x, task.test_y)
    target = (restyled(2 * task.test_x), task.test_y)
    few = (restyled(2 * task.train_x[:TARGET_IMAGES]), task.train_y[:TARGET_IMAGES])
    torch.manual_seed(seed)
    base = Denoiser()
    train(base, 2 * task.train_x, task.train_y, steps=PRETRAIN_STEPS, lr=LEARNING_RATE, seed=seed)

    source_error: Callable[[nn.Module], float] = lambda model: test_error(model, *source)  # noqa: E731
    start = source_error(base)
    found = {"source before": start, "target before": test_error(base, *target)}
    total = sum(p.numel() for p in base.parameters())
    for share in PROBED:
        name = f"{share:.0%} zeroed"
        theta = theta_for(base, int(share * total))
        found[f"rise, smallest {name}"] = probe(base, theta, source_error) / start - 1
        damaged = with_random_zeroed(base, share, seed)
        found[f"rise, random {name}"] = source_error(damaged) / start - 1

    def tune(name: str, model: nn.Module, lr: float = LEARNING_RATE) -> None:
        train(model, *few, steps=TUNE_STEPS, lr=lr, seed=seed)
        found[f"target, {name}"] = test_error(model, *target)
        found[f"source, {name}"] = source_error(model)

    tune("full", copy.deepcopy(base))
    tune("full at 3e-4", copy.deepcopy(base), 3e-4)
    entries = int(SHARE * sum(p.numel() for n, p in base.named_parameters() if p.dim() == 2))
    before = [module.weight for module in base.modules() if isinstance(module, nn.Linear)]
    for name, chosen in options(entries, seed).items():
        model = peft.get_peft_model(copy.deepcopy(base), SaRAConfig(**chosen))
        parts = [a.weight for _, _, a in model.base_model._on_layers("default")]
        tune(name, model)
        found[f"still free, {name}"] = sum(part.free() for part in parts) / entries
        masks = [part.pattern.mask() for part in parts]
        merged = model.merge_and_unload()
        after = [module.weight for module in merged.modules() if isinstance(module, nn.Linear)]
        changes = [a.detach() - b.detach() for a, b in zip(after, before, strict=True)]
        found[f"norm of change, {name}"] = sum(c.square().sum() for c in changes).sqrt().item()
        found[f"changed outside the mask, {name}"] = sum(
            int((change[~mask] != 0).sum()) for change, mask in zip(changes, masks, strict=True)
        )
    return found


def run(device: str, seeds: Sequence[int]) -> Evidence:
    """Pre-train, probe and tune for each seed; on the CPU, whatever the device."""
    per_seed = [one_seed(seed) for seed in seeds]
    measured = {name: [round(found[name], 5) for found in per_seed] for name in per_seed[0]}
    mean = {name: fmean(found[name] for found in per_seed) for name in per_seed[0]}
    rise_smallest = mean["rise, smallest 10% zeroed"]
    rise_random = mean["rise, random 10% zeroed"]
    methods = [name.removeprefix("target, ") for name in mean if name.startswith("target, ")]
    best = min(mean[f"target, {method}"] for method in methods)
    checks = [
        Check.below(
            "zeroing the smallest 10 % raises the source error by < 3 %",
            rise_smallest,
            MAX_RISE_SMALLEST,
        ),
        Check.above(
            "zeroing random 10 % raises it > 50 times as much",
            rise_random / max(rise_smallest, 1e-6),
            MIN_RISE_RATIO,
        ),
        Check.below(
            "source error after SaRA < after random entries",
            mean["source, sara"],
            mean["source, random"],
        ),
        Check.below(
            "source error after random entries < after largest entries",
            mean["source, random"],
            mean["source, largest"],
        ),
        Check.below(
            "source error after largest entries < after full tuning",
            mean["source, largest"],
            mean["source, full"],
        ),
        Check.below(
            "source error after SaRA in two stages < in one",
            mean["source, sara"],
            mean["source, sara, one stage"],
        ),
        Check.below(
            "target error after SaRA < 1.03 x the best of all",
            mean["target, sara"] / best,
            MAX_TARGET_OVER_BEST,
        ),
        Check.below(
            "the nuclear-norm term makes the change smaller",
            mean["norm of change, sara, nuclear"],
            mean["norm of change, sara"],
        ),
    ]
    controls = [
        Check.above("zeroing random 10 % hurts by > 20 %", rise_random, MIN_RISE_RANDOM),
        Check.above(
            "full tuning forgets: source error > 1.5 x before",
            mean["source, full"] / mean["source before"],
            MIN_FULL_FORGETTING,
        ),
        Check.below(
            "SaRA learns the target: error < 0.8 x before",
            mean["target, sara"] / mean["target before"],
            MAX_TARGET_LEFT,
        ),
        *(
            Check.below(
                f"no weight outside the mask has changed, {name}",
                max(found[f"changed outside the mask, {name}"] for found in per_seed),
                1,
            )
            for name in ("sara", "largest", "random")
        ),
    ]
    notes = (
        "Errors are mean squared errors of predicted noise on held-out digits. "
        f"{PRETRAIN_STEPS} steps of pre-training, {TUNE_STEPS} of tuning on {TARGET_IMAGES} "
        "images, equal learning rate unless named; 10 % of the weight matrices are trained, "
        "without biases, norms and the class embedding."
    )
    return Evidence(measured, checks, controls, verdict_of(checks, controls), notes)
