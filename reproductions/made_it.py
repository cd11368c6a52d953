"""MADE-IT on eight transformed digit tasks: accuracy, experts, arrival order and forgetting.

A residual network of five linear layers is trained on digits and fine-tuned to eight tasks, each a
transform of the input: three pixel permutations, rotations, an inversion; two of the transforms
come twice. Encoders are merged, every task keeps its head, and nobody tells the encoder which task
an input is of. Shown: that data-free routing by input subspaces keeps nearly all of the separate
models' accuracy where averaging fails, that duplicates and only duplicates share an expert, in any
order, and how much earlier tasks lose as others arrive. Not shown: that early layers share more,
which needs tasks with common early features; input transforms make the first layer the most
specific one.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from _digits import Task, digits, fit
from _in_memory import in_memory
from torch import Tensor, nn

from sparing.merge import MadeIt, Routing, set_routing
from sparing.merge.routed import Experts, Router, routed_layers
from sparing.reproduce import Check, Claim, Evidence, verdict_of

CLAIM = Claim(
    text="A bank of experts in every module that merges newcomers with a like input subspace and "
    "routes by feature alignment, without data, training or task labels, beats merging baselines "
    "on long and shuffled sequences of tasks and keeps redundant experts out.",
    number="not found (abstract only)",
    source="abstract of arXiv 2604.22464; all thresholds are our specification's",
)

ACCURACY = 0.90
OVER_TASK_ARITHMETIC = 0.35
FROM_NO_MERGE = 0.01
EXPERTS = 6  # in every module, for eight tasks of which two come twice
UNIFORM = 0.45  # accuracy of the control stays below

WIDTH, BLOCKS = 96, 4
STEPS_BASE, RATE_BASE = 400, 2e-3
STEPS_TASK, RATE_TASK = 300, 1e-3
OPTIONS: dict[str, Any] = {
    "rank": 48,
    "energy": 1.0,
    "router_rank": 16,
    "temperature": 0.05,
    "target_modules": ["input", "linear"],  # "all-linear" is that of the blocks alone
}
NEVER = {"tau_min": 1.5, "tau_max": 1.5}
NAMES = ("P0", "turn 90", "invert", "P1", "P0 again", "turn 180", "turn 90 again", "P2")
ORDERS = {
    "as listed": (0, 1, 2, 3, 4, 5, 6, 7),
    "reversed": (7, 6, 5, 4, 3, 2, 1, 0),
    "shuffled": (5, 2, 6, 0, 7, 4, 1, 3),
}
BASELINES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "average": ("average", [{}]),
    "task arithmetic": ("task-arithmetic", [{"scale": s} for s in (0.125, 0.3, 0.5)]),
    "TIES": ("ties", [{"scale": s} for s in (0.5, 1.0, 1.5)]),
    "DARE": ("dare", [{"scale": s, "drop": 0.5} for s in (0.125, 0.3, 0.5)]),
    "PCB": (
        "pcb-merging",
        [{"lam": s, "ratio": r} for s, r in product((0.8, 1.2, 2.0), (0.1, 0.2))],
    ),
}


class Block(nn.Module):
    """h + 0.7 GELU(W LayerNorm(h))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + 0.7 * F.gelu(self.linear(self.norm(h)))


class Encoder(nn.Module):
    """Pixels (batch, 64) -> features (batch, 96)."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(64, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.input(x))


class Model(nn.Module):
    """An encoder and one task's head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm, self.head = Encoder(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(x)))


class Oracle(Router):
    """Is told the task."""

    def __init__(self, task: int, tasks: int) -> None:
        super().__init__(Routing(), tasks)
        self.task = task

    def weights(self, scores: Tensor, experts: Experts) -> Tensor:
        chosen = next(e for e, members in enumerate(experts.members) if self.task in members)
        return F.one_hot(torch.tensor(chosen), len(experts.members)).to(scores)


def tasks(seed: int) -> list[Task]:
    """The eight tasks; a duplicate has the same transform."""
    data = digits(seed)
    data = replace(data, train_x=data.train_x + 0.5, test_x=data.test_x + 0.5)  # in 0 to 1
    grid = torch.arange(64).view(8, 8)
    permutations = [
        torch.randperm(64, generator=torch.Generator().manual_seed(1000 * seed + number))
        for number in range(3)
    ]
    turn, half = torch.rot90(grid, 1).reshape(-1), torch.rot90(grid, 2).reshape(-1)
    moves = (permutations[0], turn, None, permutations[1], permutations[0], half, turn,
             permutations[2])  # fmt: skip

    def moved(x: Tensor, move: Tensor | None) -> Tensor:
        return 1 - x if move is None else x[:, move]

    return [
        replace(data, train_x=moved(data.train_x, move), test_x=moved(data.test_x, move))
        for move in moves
    ]


def train(seed: int, given: Sequence[Task]) -> tuple[Model, list[Model]]:
    """The base, and a fine-tune for each task from it."""
    torch.manual_seed(seed)
    base = Model()
    start = digits(seed)
    start = replace(start, train_x=start.train_x + 0.5, test_x=start.test_x + 0.5)
    fit(base, base.parameters(), start, lr=RATE_BASE, steps=STEPS_BASE, seed=seed)
    tuned = []
    for number, task in enumerate(given):
        model = copy.deepcopy(base)
        fit(
            model,
            model.parameters(),
            task,
            lr=RATE_TASK,
            steps=STEPS_TASK,
            seed=100 * seed + number,
        )
        tuned.append(model)
    return base, tuned


@torch.no_grad()
def accuracy(encoder: nn.Module, model: Model, task: Task) -> float:
    """Of an encoder with one task's norm and head."""
    encoder.eval()
    predicted = model.head(model.norm(encoder(task.test_x))).argmax(1)
    return (predicted == task.test_y).float().mean().item()


def accuracies(encoder: nn.Module, tuned: Sequence[Model], given: Sequence[Task]) -> list[float]:
    """Of all tasks."""
    return [accuracy(encoder, m, t) for m, t in zip(tuned, given, strict=True)]


def with_routing(encoder: nn.Module, **routing: Any) -> nn.Module:
    """A copy that routes in another way."""
    other = copy.deepcopy(encoder)
    set_routing(other, Routing(**routing))
    return other


def arrive(
    base: Model, tuned: Sequence[Model], given: Sequence[Task], order: Sequence[int], **more: Any
) -> tuple[MadeIt, list[list[float]]]:
    """The bank after all tasks, and after each arrival the accuracies of those that are there."""
    bank = MadeIt(base.encoder, **OPTIONS, **more)
    curve = []
    for place, number in enumerate(order):
        bank.add(tuned[number].encoder, NAMES[number])
        there, encoder = order[: place + 1], bank.module()
        curve.append([accuracy(encoder, tuned[n], given[n]) for n in there])
    return bank, curve


@torch.no_grad()
def layer_inputs(model: Model, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What the linear layers of a task's own encoder see."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.update({name: args[0]})

    layers = [(name, model.encoder.get_submodule(name)) for name in names]
    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers]
    model.encoder(x)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def routing_accuracy(bank: MadeIt, tuned: Sequence[Model], given: Sequence[Task]) -> list[float]:
    """For every layer, how often the best score is that of the task's own expert, on the features
    that the task's own model has there."""
    layers = list(routed_layers(bank.module()))
    hits: dict[str, list[float]] = {name: [] for name, _ in layers}
    for number, (model, task) in enumerate(zip(tuned, given, strict=True)):
        seen = layer_inputs(model, task.test_x, list(hits))
        for name, experts in layers:
            own = next(e for e, members in enumerate(experts.members) if number in members)
            chosen = experts.scores(seen[name]).argmax(-1)
            hits[name].append((chosen == own).float().mean().item())
    return [fmean(values) for values in hits.values()]


def baselines(base: Model, tuned: Sequence[Model], given: Sequence[Task]) -> dict[str, list[float]]:
    """Accuracies of every other method at its best option, chosen on the very test items."""
    found = {}
    states = [model.encoder.state_dict() for model in tuned]
    encoder = copy.deepcopy(base.encoder)
    for name, (slug, choices) in BASELINES.items():
        results = []
        for options in choices:
            encoder.load_state_dict(in_memory(base.encoder.state_dict(), states, slug, options))
            results.append(accuracies(encoder, tuned, given))
        found[name] = max(results, key=fmean)
    return found


def one_seed(seed: int) -> dict[str, Any]:
    """All that is measured."""
    given = tasks(seed)
    base, tuned = train(seed, given)
    table = {
        "separate models": [accuracy(m.encoder, m, t) for m, t in zip(tuned, given, strict=True)],
        "base": accuracies(base.encoder, tuned, given),
        **baselines(base, tuned, given),
    }
    banks, curves = {}, {}
    for name, order in ORDERS.items():
        banks[name], curves[name] = arrive(base, tuned, given, order)
    encoder = banks["as listed"].module()
    table["MADE-IT"] = accuracies(encoder, tuned, given)
    never = MadeIt(base.encoder, **OPTIONS, **NEVER)
    for model, name in zip(tuned, NAMES, strict=True):
        never.add(model.encoder, name)
    table["MADE-IT, no merging"] = accuracies(never.module(), tuned, given)
    oracle = []
    for number, (model, task) in enumerate(zip(tuned, given, strict=True)):
        told = banks["as listed"].module()
        for _, experts in routed_layers(told):
            experts.router = Oracle(number, len(given))
        oracle.append(accuracy(told, model, task))
    table["MADE-IT, told the task"] = oracle
    table["MADE-IT, hard"] = accuracies(with_routing(encoder, top_k=1), tuned, given)
    table["MADE-IT, one choice over layers"] = accuracies(
        with_routing(encoder, granularity="model"), tuned, given
    )
    table["MADE-IT, T = 1"] = accuracies(with_routing(encoder, temperature=1.0), tuned, given)
    table["MADE-IT, uniform"] = accuracies(with_routing(encoder, temperature=1e9), tuned, given)
    narrow = MadeIt(base.encoder, **{**OPTIONS, "router_rank": 8}, **NEVER)
    for model, name in zip(tuned, NAMES, strict=True):
        narrow.add(model.encoder, name)
    pairs = [
        ({arrival.task, earlier}, value)
        for layer in narrow.report().layers
        for arrival in layer.arrivals
        for earlier, value in enumerate(arrival.affinities)
    ]
    twins = [value for pair, value in pairs if pair in ({0, 4}, {1, 6})]
    others = [value for pair, value in pairs if pair not in ({0, 4}, {1, 6})]
    return {
        "accuracy": table,
        "experts": {
            name: [layer.experts for layer in bank.report().layers] for name, bank in banks.items()
        },
        "groups": {
            name: sorted("+".join(sorted(g)) for g in bank.report().layers[0].members)
            for name, bank in banks.items()
        },
        "last threshold": {name: bank.report().thresholds[-1][2] for name, bank in banks.items()},
        "affinity at r = 8": {
            "duplicates": [min(twins), max(twins)],
            "others": [min(others), max(others)],
        },
        "routing accuracy by layer": routing_accuracy(banks["as listed"], tuned, given),
        "forgetting": {
            name: {
                "order": [NAMES[n] for n in order],
                "mean accuracy of the tasks so far": [fmean(row) for row in curves[name]],
                "loss of the first task": curves[name][0][0] - curves[name][-1][0],
                "backward transfer": fmean(
                    curves[name][-1][k] - curves[name][k][k] for k in range(len(order) - 1)
                ),
            }
            for name, order in ORDERS.items()
        },
        "share of dense changes": banks["as listed"].report().numbers
        / banks["as listed"].report().dense,
    }


def run(device: str, seeds: Sequence[int]) -> Evidence:
    """Train, merge in three orders, and compare."""
    found = [one_seed(seed) for seed in seeds]

    def mean(arm: str) -> list[float]:
        return [fmean(one["accuracy"][arm]) for one in found]

    ours, arithmetic = mean("MADE-IT"), mean("task arithmetic")
    counts = [
        count
        for one in found
        for order in ("as listed", "reversed")
        for count in one["experts"][order]
    ]
    checks = [
        Check.above(f"least accuracy of a seed > {ACCURACY}", min(ours), ACCURACY),
        Check.above(
            f"least gain of a seed over task arithmetic at its best λ > {OVER_TASK_ARITHMETIC}",
            min(a - b for a, b in zip(ours, arithmetic, strict=True)),
            OVER_TASK_ARITHMETIC,
        ),
        Check.below(
            f"largest distance of a seed from never merging < {FROM_NO_MERGE}",
            max(abs(a - b) for a, b in zip(ours, mean("MADE-IT, no merging"), strict=True)),
            FROM_NO_MERGE,
        ),
        Check.below(
            f"modules without exactly {EXPERTS} experts, in two orders and all seeds < 0.5",
            sum(count != EXPERTS for count in counts),
            0.5,
        ),
    ]
    controls = [
        Check.below(
            f"accuracy with nearly uniform weights (T = 1) < {UNIFORM}",
            fmean(mean("MADE-IT, T = 1")),
            UNIFORM,
        ),
    ]
    arms = {arm: mean(arm) for arm in found[0]["accuracy"]}
    tables = {
        arm: [fmean(one["accuracy"][arm][t] for one in found) for t in range(len(NAMES))]
        for arm in found[0]["accuracy"]
    }
    return Evidence(
        measured={
            "accuracy": arms,
            "accuracy by task, mean over seeds": {"tasks": list(NAMES), **tables},
            **{key: [one[key] for one in found] for key in found[0] if key != "accuracy"},
        },
        checks=checks,
        controls=controls,
        verdict=verdict_of(checks, controls),
        notes=f"{len(seeds)} seeds, eight tasks, three orders. Baselines have their best option on "
        "the very test items, MADE-IT its defaults but k = 48 without an energy rule. Every task "
        "keeps its own norm and head; the encoder is not told the task. The order changes MADE-IT "
        "only through the layer norms' running mean and through truncation. The paper's claim that "
        "early layers share experts is not tested here. Changed after the first run: that left the "
        "input layer to the running mean, where the specification's experiment has a bank in all "
        "five layers; accuracy was then 0.889, 0.878, 0.840, and 0.895, 0.883, 0.857 told the "
        "task.",
    )
