"""Muon++ on networks that predict characters: do spectral norms stay in one band at every width?

Two residual blocks of width 32 to 128 read 16 characters and predict the next. Shown: the reduced
norms of matrices with and without decay, over width and over the length of training, against
Moonlight's factor; whether the best learning rate is the same at two widths; that no norm ever
exceeds its bound. Not shown: that Muon++ reaches a lower loss, which is not its claim, and
anything about large models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import _charlm as charlm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.reproduce import Check, Claim, Evidence, verdict_of
from sparing.scale import MuonPlusPlus
from sparing.scale.muon_mup import norm_bound, spectral_unit

CLAIM = Claim(
    text=(
        "A Muon that controls only its updates keeps the spectral condition of μP on weights and "
        "updates for the whole of training, without normalising weights."
    ),
    number="not found",
    source="arXiv 2601.01306, abstract",
)

# Declared before the run; the specification's own.
MOST_WIDTH_RATIO = 1.15  # of the largest reduced norms at widths 128 and 32
LEAST_WIDTH_RATIO_MOONLIGHT = 1.5
MOST_GROWTH, LEAST_GROWTH_WITHOUT_DECAY = 1.10, 1.25  # of norms from step 1000 to 2000
MOST_OF_BOUND = 1.001  # rounding
LEAST_TRANSPOSED = 3.0  # norms of down over up matrices, which is 4 in the long run
MOST_UPRIGHT = 1.5

WIDTHS = (32, 64, 128)
# Changed after a first run with 0.005 to 0.08. Its best rate was 0.08 at both widths: the edge of
# the grid, so that their agreement said nothing. The grid was moved up, at the same cost, and the
# control that the best rates are inside it was added. No threshold was changed.
RATES = (0.02, 0.04, 0.08, 0.16, 0.32)
RATE, MOONLIGHT_RATE, AUXILIARY_RATE = 0.02, 0.01, 3e-3
CONTEXT, FEATURES, ROWS, HELD_OUT = 16, 16, 128, 4096
WARM_UP, BASE_WIDTH = 30, 64
GROWTH_STEPS, LONG_STEPS, SWEEP_STEPS = 600, 2000, 500


class Network(nn.Module):
    """Characters embedded, concatenated and mapped to a residual stream; two blocks; a head."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        symbols = charlm.characters()[1]

        def drawn(outputs: int, inputs: int, std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(outputs, inputs, generator=generator))

        def hidden(outputs: int, inputs: int) -> nn.Parameter:
            unit = spectral_unit(outputs, inputs)
            return drawn(outputs, inputs, unit / (math.sqrt(outputs) + math.sqrt(inputs)))

        self.table = drawn(symbols, FEATURES, 1.0)
        self.enter = drawn(width, CONTEXT * FEATURES, (CONTEXT * FEATURES) ** -0.5)
        self.up = nn.ParameterList([hidden(2 * width, width) for _ in range(2)])
        self.down = nn.ParameterList([hidden(width, 2 * width) for _ in range(2)])
        self.head = drawn(symbols, width, BASE_WIDTH**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, context) -> (rows, symbols)."""
        width = self.head.shape[1]
        x = F.embedding(ids, self.table).flatten(1) @ self.enter.t()
        for up, down in zip(self.up, self.down, strict=True):
            x = x + F.relu(F.rms_norm(x, (width,)) @ up.t()) @ down.t()
        return F.rms_norm(x, (width,)) @ self.head.t() * (BASE_WIDTH / width)

    def matrices(self) -> list[nn.Parameter]:
        """Those that Muon++ treats."""
        return [*self.up, *self.down]


@dataclass
class Run:
    """What came of one training run.

    Arguments:
        loss: held-out, in nats a character.
        largest: reduced norm of any matrix at the end.
        up, down: mean reduced norms at the end.
        mean: over all matrices, by step.
        of_bound: the largest share of the bound (7) at any step looked at; 0 where it is not due.
    """

    loss: float
    largest: float
    up: float
    down: float
    mean: dict[int, float]
    of_bound: float


def norms(matrices: Sequence[Tensor]) -> list[float]:
    return [
        float(torch.linalg.matrix_norm(matrix.detach(), ord=2)) / spectral_unit(*matrix.shape)
        for matrix in matrices
    ]


@cache
def train(
    width: int,
    seed: int,
    *,
    steps: int,
    rate: float = RATE,
    decay: float = 0.1,
    decayed_rate: bool = False,
    rule: str = "spectral",
    transposed: bool = False,
    orthogonalizer: str = "sharp",
) -> Run:
    """Train one network; with `decayed_rate` the rate falls linearly to 0."""
    network = Network(width, seed)
    muon: dict[str, Any] = {"params": network.matrices(), "rule": rule, "transposed": transposed}
    muon |= {"lr": rate, "weight_decay": decay, "orthogonalizer": orthogonalizer}
    rest = [network.table, network.enter, network.head]
    adam = {"params": rest, "algorithm": "adamw", "lr": AUXILIARY_RATE, "weight_decay": 0.0}
    optimizer = MuonPlusPlus([muon, adam], on_nan="raise")
    peaks = [group["lr"] for group in optimizer.param_groups]
    known, unseen = charlm.split()
    generator = torch.Generator().manual_seed(seed)
    start = norms(network.matrices())
    # The bound (7) is for a constant rate; before, the warm-up's steps are smaller.
    bounded = rule == "spectral" and not transposed and not decayed_rate
    means: dict[int, float] = {}
    of_bound = 0.0
    for step in range(1, steps + 1):
        factor = min(1.0, step / WARM_UP)
        factor *= (1 - step / steps) if decayed_rate else 1.0
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        places = torch.randint(len(known) - CONTEXT, (ROWS, 1), generator=generator)
        block = known[places + torch.arange(CONTEXT + 1)]
        F.cross_entropy(network(block[:, :-1]), block[:, -1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 and not decayed_rate:
            found = norms(network.matrices())
            means[step] = fmean(found)
            if bounded:
                limit = [
                    max(w, norm_bound(step, start=w, lr=rate, weight_decay=decay)) for w in start
                ]
                shares = (w / most for w, most in zip(found, limit, strict=True))
                of_bound = max(of_bound, *shares)
    places = torch.linspace(0, len(unseen) - CONTEXT - 1, HELD_OUT).long().unsqueeze(1)
    block = unseen[places + torch.arange(CONTEXT + 1)]
    with torch.no_grad():
        loss = float(F.cross_entropy(network(block[:, :-1]), block[:, -1]))
    up, down = norms(network.up), norms(network.down)
    return Run(loss, max(up + down), fmean(up), fmean(down), means, of_bound)


def run(device: str, seeds: Sequence[int]) -> Evidence:
    """Train everything on the CPU; the networks are too small for more."""
    torch.set_num_threads(1)

    def all_of(width: int, **options: Any) -> list[Run]:
        return [train(width, seed, **options) for seed in seeds]

    growth = {width: all_of(width, steps=GROWTH_STEPS, decay=0.5) for width in WIDTHS}
    long = {decay: all_of(64, steps=LONG_STEPS, decay=decay) for decay in (0.0, 0.1)}
    sweep = {
        (width, rate): all_of(width, steps=SWEEP_STEPS, rate=rate, decayed_rate=True)
        for width in (32, 128)
        for rate in RATES
    }
    moonlight = {
        width: all_of(
            width, steps=SWEEP_STEPS, rate=MOONLIGHT_RATE, decayed_rate=True, rule="moonlight"
        )
        for width in (32, 128)
    }
    transposed = all_of(64, steps=GROWTH_STEPS, decay=0.5, transposed=True)
    rough = train(
        128, seeds[0], steps=SWEEP_STEPS, rate=RATE, decayed_rate=True, orthogonalizer="ns5"
    )

    best = {
        width: min(RATES, key=lambda r: fmean(each.loss for each in sweep[width, r]))
        for width in (32, 128)
    }
    cells = [RATES.index(best[width]) for width in (32, 128)]
    ratio = _ratio(sweep[32, RATE], sweep[128, RATE])
    bounded = [each for runs in (*growth.values(), *long.values()) for each in runs]
    later = {d: fmean(r.mean[2000] / r.mean[1000] for r in runs) for d, runs in long.items()}

    measured: dict[str, Any] = {
        f"largest norm, decay 0.5, width {width}": [r.largest for r in runs]
        for width, runs in growth.items()
    }
    for decay, runs in long.items():
        for step in (500, 1000, 2000):
            measured[f"mean norm, decay {decay:g}, step {step}"] = [r.mean[step] for r in runs]
        measured[f"loss, decay {decay:g}, step 2000"] = [r.loss for r in runs]
    for (width, rate), runs in sweep.items():
        measured[f"loss, width {width}, rate {rate:g}"] = [r.loss for r in runs]
    for width in (32, 128):
        measured[f"largest norm, sweep, width {width}"] = [r.largest for r in sweep[width, RATE]]
        measured[f"largest norm, Moonlight sweep, width {width}"] = [
            r.largest for r in moonlight[width]
        ]
        measured[f"loss, Moonlight, width {width}"] = [r.loss for r in moonlight[width]]
        measured[f"best rate, width {width}"] = best[width]
    measured["down over up, transposed"] = [r.down / r.up for r in transposed]
    measured["down over up"] = [r.down / r.up for r in growth[64]]
    measured["loss, width 128, ns5, first seed"] = rough.loss

    checks = [
        Check.below(
            "the best rates of widths 32 and 128 are 0 cells apart", abs(cells[0] - cells[1]), 0.5
        ),
        Check.below(
            f"largest norm at width 128 < {MOST_WIDTH_RATIO} x that at width 32",
            ratio,
            MOST_WIDTH_RATIO,
        ),
        Check.below(
            "no norm at any step and width is above its bound",
            max(each.of_bound for each in bounded),
            MOST_OF_BOUND,
        ),
        Check.below(
            f"with decay 0.1 norms grow by less than {MOST_GROWTH} x from step 1000 to 2000",
            later[0.1],
            MOST_GROWTH,
        ),
    ]
    controls = [
        Check.above(
            "the best rates are 1 or more cells from the edges of the grid",
            min(min(cell, len(RATES) - 1 - cell) for cell in cells),
            0.5,
        ),
        Check.above(
            f"Moonlight: largest norm at width 128 > {LEAST_WIDTH_RATIO_MOONLIGHT} x at 32",
            _ratio(moonlight[32], moonlight[128]),
            LEAST_WIDTH_RATIO_MOONLIGHT,
        ),
        Check.above(
            f"without decay norms grow by more than {LEAST_GROWTH_WITHOUT_DECAY} x from step 1000 "
            "to 2000",
            later[0.0],
            LEAST_GROWTH_WITHOUT_DECAY,
        ),
        Check.above(
            f"transposed unit: norms of down > {LEAST_TRANSPOSED} x those of up",
            fmean(each.down / each.up for each in transposed),
            LEAST_TRANSPOSED,
        ),
        Check.below(
            f"right unit: norms of down < {MOST_UPRIGHT} x those of up",
            fmean(each.down / each.up for each in growth[64]),
            MOST_UPRIGHT,
        ),
    ]
    notes = (
        "The orthogonaliser is the default, sharp, not the specification's ns5, whose loss at "
        "width 128 is beside it. Loss is not part of the claim: without decay, or with "
        "Moonlight's factor, it can be as low on runs as short as these. The specification's "
        "runs (a) without decay and with Moonlight's factor, and its lowest rate, are left "
        "out for time; (b) and (c) show the same. A first run had rates of 0.005 to 0.08; "
        "both widths were best at 0.08, the edge, which finds no optimum, so the grid was "
        "moved up and a control added, thresholds unchanged."
    )
    return Evidence(measured, checks, controls, verdict_of(checks, controls), notes)


def _ratio(narrow: Sequence[Run], wide: Sequence[Run]) -> float:
    return fmean(b.largest / a.largest for a, b in zip(narrow, wide, strict=True))
