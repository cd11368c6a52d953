"""NeuroAda on digits transfer: a few bypasses in every neuron against other places for them.

Shows whether spreading a small count evenly over neurons beats giving it to the largest weights of
the whole network, whether one bypass a neuron beats one bias a neuron, and how near eight come to
training the full weights. Does not show that magnitude is the best score, nor that NeuroAda beats
LoRA: those arms are reported without a check. Says nothing about language models or memory.
"""

import copy
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import peft
import torch
import torch.nn.functional as F
from _digits import ResidualNet, Task, digits, fit, pretrained, test
from torch import Tensor, nn

from sparing.adapt import NeuroAdaConfig, select_by_gradient
from sparing.reproduce import Check, Claim, Evidence, verdict_of

CLAIM = Claim(
    text="Zero-initialised bypasses on each neuron's k largest input weights, trained alone, rival "
    "far larger fine-tuning from 0.02 % of the parameters, because no neuron is left out.",
    number="LLaMA-7B, commonsense, k=1 (0.020 %): 80.0; k=20 (0.404 %): 82.7",
    source="official repository's README (FightingFighting/NeuroAda); arXiv 2510.18940",
)
GLOBAL_FACTOR = 0.9
BITFIT_FACTOR = 0.6
FULL_FACTOR = 1.1
UNADAPTED_LOSS = 1.5
UNCOVERED_SHARE = 0.05

LEARNING_RATES = (5e-3, 2e-2, 5e-2)
STEPS = 400

Build = Callable[[ResidualNet, Task], nn.Module]


def neuroada(**options: Any) -> Build:
    """The network with NeuroAda on every block."""
    config = NeuroAdaConfig(target_modules=["linear"], **options)

    def build(net: ResidualNet, task: Task) -> nn.Module:
        if config.score != "gradient":
            return peft.get_peft_model(net, copy.copy(config))
        batches = list(zip(task.train_x.split(128), task.train_y.split(128), strict=True))
        return select_by_gradient(net, config, batches, loss=_loss)

    return build


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def lora(net: ResidualNet, task: Task) -> nn.Module:
    """PEFT's LoRA with the trainable count of k=2."""
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["linear"])
    return peft.get_peft_model(net, config)


def bitfit(net: ResidualNet, task: Task) -> nn.Module:
    """One trainable bias for each neuron of the blocks, and nothing else."""
    net.requires_grad_(False)
    for block in net.blocks:
        block.linear.bias = nn.Parameter(torch.zeros_like(block.linear.weight[:, 0]))
    return net


def full(net: ResidualNet, task: Task) -> nn.Module:
    """All weights of the blocks' linear layers train."""
    net.requires_grad_(False)
    for block in net.blocks:
        block.linear.weight.requires_grad_(True)
    return net


ARMS: dict[str, Build] = {
    "bitfit": bitfit,
    "k=1": neuroada(k=1),
    "k=2": neuroada(k=2),
    "k=8": neuroada(k=8),
    "full": full,
    "k=2 global": neuroada(k=2, scope="global"),
    "k=2 half of the neurons": neuroada(k=2, neuron_ratio=0.5),
    "k=2 random": neuroada(k=2, score="random"),
    "k=2 reverse": neuroada(k=2, score="reverse"),
    "k=2 gradient": neuroada(k=2, score="gradient"),
    "lora r=1": lora,
}


def run(device: str, seeds: Sequence[int]) -> Evidence:
    """Train every arm at every learning rate; each arm counts at the rate of its best mean loss."""
    results: dict[str, dict[float, list[tuple[float, float]]]] = {
        arm: {lr: [] for lr in LEARNING_RATES} for arm in ARMS
    }
    parameters: dict[str, int] = {}
    unadapted, uncovered, stray = [], [], 0
    for seed in seeds:
        base = pretrained(seed).to(device)
        task = _to(digits(seed).shifted(seed), device)
        unadapted.append(test(base, task)[0])
        for arm, build in ARMS.items():
            for lr in LEARNING_RATES:
                model = build(copy.deepcopy(base), task)
                trainable = [p for p in model.parameters() if p.requires_grad]
                parameters[arm] = sum(p.numel() for p in trainable)
                fit(model, trainable, task, lr=lr, steps=STEPS, seed=seed)
                results[arm][lr].append(test(model, task))
            if arm in ("k=2", "k=2 global"):
                moved = _moved(base, model)
                stray += max(0, int(moved.sum()) - parameters[arm])
                if arm == "k=2 global":
                    uncovered.append(1 - moved.any(dim=2).float().mean().item())
    rates = {
        arm: min(LEARNING_RATES, key=lambda lr: fmean(loss for loss, _ in by_rate[lr]))
        for arm, by_rate in results.items()
    }
    losses = {arm: [loss for loss, _ in results[arm][rate]] for arm, rate in rates.items()}
    mean = {arm: fmean(values) for arm, values in losses.items()}
    checks = [
        Check.below(
            f"k=2 per neuron: loss < {GLOBAL_FACTOR} x the same count placed globally",
            mean["k=2"],
            GLOBAL_FACTOR * mean["k=2 global"],
        ),
        Check.below(
            f"k=1: loss < {BITFIT_FACTOR} x that of as many biases",
            mean["k=1"],
            BITFIT_FACTOR * mean["bitfit"],
        ),
        Check.below(
            f"k=8: loss < {FULL_FACTOR} x that of full weights",
            mean["k=8"],
            FULL_FACTOR * mean["full"],
        ),
    ]
    controls = [
        Check.above(
            "freezing half of the neurons is worse", mean["k=2 half of the neurons"], mean["k=2"]
        ),
        Check.above(
            f"the unadapted network fails: loss > {UNADAPTED_LOSS}",
            fmean(unadapted),
            UNADAPTED_LOSS,
        ),
        Check.above(
            f"global placement leaves more than {UNCOVERED_SHARE:.0%} of the neurons out",
            fmean(uncovered),
            UNCOVERED_SHARE,
        ),
        Check.below("weights moved beyond the trainable count: none", stray, 1),
        Check.below(
            "k=2 and its global placement train the same count",
            abs(parameters["k=2"] - parameters["k=2 global"]),
            1,
        ),
    ]
    measured = {
        "test loss": losses,
        "test accuracy": {
            arm: [accuracy for _, accuracy in results[arm][rate]] for arm, rate in rates.items()
        },
        "learning rate": rates,
        "trainable parameters": parameters,
        "unadapted test loss": unadapted,
        "share of neurons without a bypass, global": uncovered,
    }
    return Evidence(
        measured,
        checks,
        controls,
        verdict_of(checks, controls),
        notes=f"A network of 8 blocks of width 64, {STEPS} AdamW steps without decay. The rate "
        "of each arm is the best of three by mean test loss, for all arms alike. Scores and LoRA "
        "are reported, not checked.",
    )


def _to(task: Task, device: str) -> Task:
    return Task(*(part.to(device) for part in vars(task).values()))


def _moved(base: ResidualNet, model: Any) -> Tensor:
    """(blocks, outputs, inputs): which weights a merge changes."""
    merged = model.merge_and_unload()
    pairs = zip(base.blocks, merged.blocks, strict=True)
    return torch.stack([old.linear.weight != new.linear.weight for old, new in pairs])
