"""MemControl on a small diffusion model of digits: which blocks to tune decides what is copied.

A residual network learns to denoise scikit-learn's 8x8 digits, and is then fine-tuned on digits in
another style: 200 ordinary ones, and 20 that have a prompt of their own and are repeated until
they make half of the data. Searched are a bit for each of six blocks and the learning rate, for a
small norm of equation 4 and a small Fréchet distance; how many of the private images are given
back is measured besides, and not shown to the search. Shown: whether the search finds a mask that
is as good as full tuning and copies far less. Not shown: Stable Diffusion, or a network's features.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from diffusers import DDIMScheduler
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sparing.reproduce import Check, Claim, Evidence, verdict_of
from sparing.tune import (
    CopyRate,
    Denoising,
    FineTuning,
    FrechetDistance,
    GuidedSampler,
    Images,
    LogUniform,
    MemControl,
    MemorizationNorm,
    PrincipalComponents,
    Reward,
    Trial,
    block_groups,
    pareto_set,
)
from sparing.tune.front import dominates
from sparing.tuners import generator_for

CLAIM = Claim(
    text=(
        "Searching which attention blocks to tune finds masks that generate better and memorise "
        "less than full fine-tuning, with a small share of the parameters."
    ),
    number="0.019 % of the parameters tuned; figures of quality and memorisation not found",
    source="abstract of arXiv 2405.19458; figures of the specification's own run",
)

# Declared before the run, from the specification.
MAX_FID_OVER_FULL = 1.05
MAX_EXTRACTION_OVER_FULL = 0.1
MIN_RANK_CORRELATION = 0.5  # of the maximum of (4) with extraction, over the trials
MIN_FRONT = 2
MIN_FULL_EXTRACTION = 0.5  # otherwise there is nothing to prevent

WIDTH, BLOCKS, T = 192, 6, 50
CLASSES, PRIVATE, ORDINARY, SOURCE = 10, 20, 200, 1200
PRETRAIN_STEPS, TUNE_STEPS, BATCH = 1500, 400, 64
TRIALS, CONTROL_TRIALS = 10, 3
FULL_RATE = 1e-3
RATES = LogUniform(1e-4, 3e-3)
COPIES, COPY_DISTANCE, GUIDANCE, GENERATED = 8, 2.0, 2.0, 400
EMPTY = CLASSES + PRIVATE  # the prompt ""


class Denoiser(nn.Module):
    """Noisy digits (batch, 1, 8, 8), steps and prompts (batch,) int64 -> predicted noise."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, WIDTH)
        self.time = nn.Linear(64, WIDTH)
        self.prompt = nn.Embedding(EMPTY + 1, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.leave = nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        waves = step[:, None] * torch.logspace(0, -2, 32)
        time = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        h = self.enter(x.flatten(1)) + time + self.prompt(prompt)
        for block in self.blocks:
            h = h + nn.functional.silu(block(self.norm(h)))
        return self.leave(h).view(x.shape)


def predict(model: nn.Module, x: Tensor, steps: Tensor, prompts: Tensor) -> Tensor:
    return model(x, steps, prompts)


def pixels(x: Tensor) -> Tensor:
    """From -1...1, on which the model works, to 0...1, on which all distances are measured."""
    return (x + 1) / 2


def denoising() -> Denoising:
    scheduler = DDIMScheduler(
        num_train_timesteps=T, beta_start=1e-3, beta_end=0.2, clip_sample=False
    )
    return Denoising(scheduler, torch.tensor(EMPTY), predict)


class Experiment:
    """Data, base model and measures of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.denoising = seed, denoising()
        data = load_digits()
        order = torch.randperm(len(data.images), generator=generator_for(seed, "split"))
        images = torch.tensor(data.images, dtype=torch.float32)[order][:, None] / 8 - 1
        labels = torch.tensor(data.target, dtype=torch.int64)[order]
        style = images.transpose(2, 3).flip(3)
        source = Images(images[:SOURCE], labels[:SOURCE])
        private = style[SOURCE : SOURCE + PRIVATE]
        first, last = SOURCE + PRIVATE, SOURCE + PRIVATE + ORDINARY
        ordinary = Images(style[first:last], labels[first:last])
        repeated = Images(private, torch.arange(PRIVATE) + CLASSES)
        held_out = Images(style[last:], labels[last:])

        torch.manual_seed(seed)
        self.model = Denoiser()
        pretraining = MemControl(
            self.model,
            block_groups(self.model, "full", blocks=[f"blocks.{i}" for i in range(BLOCKS)]),
            [Reward(lambda model: 0.0, "none")],
            storage=None,
            seed=seed,
        )
        train = FineTuning(
            self.denoising,
            source,
            steps=PRETRAIN_STEPS,
            batch_size=BATCH,
            drop_condition=0.1,
        )
        pretraining.tune(train, "1" * (BLOCKS + 1), 1e-3)

        self.train = FineTuning(
            self.denoising,
            ordinary,
            repeated,
            repeats=ORDINARY // PRIVATE,  # half of each batch
            steps=TUNE_STEPS,
            batch_size=BATCH,
            drop_condition=0.1,
        )
        prompts = repeated.conditions.repeat_interleave(COPIES)
        labels_of_samples = held_out.conditions.repeat(2)[:GENERATED]
        shape = (1, 8, 8)
        options: dict[str, Any] = {"steps": T, "guidance": GUIDANCE, "decode": pixels, "seed": seed}
        self.extraction = CopyRate(
            GuidedSampler(self.denoising, prompts, shape, **options),
            pixels(private).repeat_interleave(COPIES, 0),
            COPY_DISTANCE,
        )
        self.rewards = [
            MemorizationNorm(self.denoising, repeated, seed=seed),
            FrechetDistance(
                GuidedSampler(self.denoising, labels_of_samples, shape, **options),
                pixels(held_out.images),
                PrincipalComponents(pixels(held_out.images), 16),
            ),
        ]

    def control(self, *, full: bool = False) -> MemControl:
        """The search over six blocks, or one whose single mask trains everything."""
        if full:
            groups = block_groups(self.model, "full", blocks=["blocks"])
        else:
            groups = block_groups(
                self.model,
                "full",
                blocks=[f"blocks.{i}" for i in range(BLOCKS)],
                always=["prompt"],
                freeze=["enter", "time", "leave"],
            )
        return MemControl(
            self.model,
            groups,
            [*self.rewards, self.extraction],
            learning_rates=RATES,
            trials=TRIALS,
            sampler="random",
            storage=None,
            seed=self.seed,
        )


def one_seed(seed: int) -> dict[str, Any]:
    """Search and controls of one seed; extraction is the third value, and not searched for."""
    experiment = Experiment(seed)
    full = experiment.control(full=True).evaluate(experiment.train, "11", FULL_RATE)
    control = experiment.control()
    trials = control.search(experiment.train).complete
    everything = "1" * BLOCKS
    draw = generator_for(seed, "controls")
    low, high = torch.tensor([RATES.low, RATES.high]).log()
    rates = (low + (high - low) * torch.rand(CONTROL_TRIALS, generator=draw)).exp().tolist()
    only_rates = [control.evaluate(experiment.train, everything, rate) for rate in rates]
    embedding = control.evaluate(experiment.train, "0" * BLOCKS, FULL_RATE)
    points = [trial_values(trial)[:2] for trial in trials]
    front = [trials[i] for i in pareto_set(points)]
    good = [t for t in trials if trial_values(t)[1] <= MAX_FID_OVER_FULL * full[1]]
    chosen = min(good, key=lambda t: (trial_values(t)[2], trial_values(t)[1]), default=None)
    scrambled = None
    if chosen is not None:
        bits = [int(bit) for bit in chosen.mask]
        masks = [[bits[i] for i in torch.randperm(BLOCKS, generator=draw)] for _ in range(20)]
        other = next((mask for mask in masks if mask != bits), bits[::-1])
        scrambled = control.evaluate(experiment.train, other, chosen.learning_rate)
    return {
        "full": full,
        "embedding only": embedding,
        "all blocks, searched rates": only_rates,
        "trials": [[t.mask, t.learning_rate, *trial_values(t)] for t in trials],
        "front": [t.mask for t in front],
        "chosen": None if chosen is None else [chosen.mask, *trial_values(chosen)],
        "as many other blocks, same rate": scrambled,
        "full is dominated": any(dominates(point, full[:2]) for point in points),
        "least norm copies": trial_values(min(trials, key=lambda t: trial_values(t)[0]))[2],
        "correlation": float(
            spearmanr(*zip(*[(v[0], v[2]) for v in map(trial_values, trials)], strict=True))[0]
        ),
    }


def trial_values(trial: Trial) -> tuple[float, ...]:
    """max of (4), Fréchet distance, extraction."""
    assert trial.values is not None
    return trial.values


def run(device: str, seeds: Sequence[int]) -> Evidence:
    """Search for each seed; on the CPU, whatever the device."""
    found = [one_seed(seed) for seed in seeds]
    full_copies = fmean(f["full"][2] for f in found)
    chosen = [f["chosen"] for f in found]
    worst = [  # of the chosen points; a seed without one counts as copying everything
        (c[2] / f["full"][1], c[3] / f["full"][2]) if c else (float("inf"), 1.0)
        for c, f in zip(chosen, found, strict=True)
    ]
    # A search of rates alone must not do what the search of masks does.
    bounds = [MAX_FID_OVER_FULL * f["full"][1] for f in found]
    by_rate = [
        min((v[2] for v in f["all blocks, searched rates"] if v[1] <= bound), default=1.0)
        for f, bound in zip(found, bounds, strict=True)
    ]
    others = [f["as many other blocks, same rate"] for f in found]
    checks = [
        Check.below(
            "some searched point with FID <= 1.05 x full tuning extracts <= 0.1 x as much",
            fmean(copies for _, copies in worst),
            MAX_EXTRACTION_OVER_FULL + 1e-9,
        ),
        Check.above(
            "the front of norm and FID has at least two points in every seed",
            min(len(f["front"]) for f in found),
            MIN_FRONT - 0.5,
        ),
        Check.above(
            "full tuning is dominated in norm and FID, share of seeds",
            fmean(f["full is dominated"] for f in found),
            0.999,
        ),
        Check.above(
            "rank correlation of the norm's maximum with extraction > 0.5",
            fmean(f["correlation"] for f in found),
            MIN_RANK_CORRELATION,
        ),
    ]
    controls = [
        Check.above("full tuning extracts > 0.5 of samples", full_copies, MIN_FULL_EXTRACTION),
        Check.above(
            "all blocks at searched rates, FID <= 1.05 x full: extraction > 0.1 x full",
            fmean(by_rate) / full_copies,
            MAX_EXTRACTION_OVER_FULL,
        ),
        Check.above(
            "as many other blocks at the chosen rate extract more than the chosen ones",
            fmean(o[2] if o else 0.0 for o in others),
            fmean(c[3] if c else 1.0 for c in chosen),
        ),
        Check.above(
            "the norm is no certificate: tuning the embedding alone copies nothing, yet has a "
            "larger norm than the least of the search",
            fmean(f["embedding only"][0] for f in found),
            fmean(min(t[2] for t in f["trials"]) for f in found),
        ),
        Check.below(
            "extraction of tuning the embedding alone < 0.05",
            fmean(f["embedding only"][2] for f in found),
            0.05,
        ),
    ]
    notes = (
        f"{TRIALS} random trials a seed (25 in the specification), {TUNE_STEPS} steps each. Values "
        "are the maximum of equation 4, the Fréchet distance on 16 principal components, and the "
        "share of 160 samples within 2.0 of their own private image, with pixels in 0...1. The "
        "specification does not give its schedule, its pixels or its rate of pre-training."
    )
    return Evidence(
        {str(seed): f for seed, f in zip(seeds, found, strict=True)},
        checks,
        controls,
        verdict_of(checks, controls),
        notes,
    )
