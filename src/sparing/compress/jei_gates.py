"""The heads of JEI-DNN, a linear classifier and a small gate an exit, and who leaves where.

Equation numbers are those of our specification of arXiv 2310.09163; see `jei_dnn`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

FEATURES = 4


def gate_features(logits: Tensor) -> Tensor:
    """What a gate sees of a prediction (eq. 2): its largest probability, entropy, margin between
    the two largest, and the entropy of the normalised squares. Natural logarithms, no gradient.

    Arguments:
        logits: (..., classes), at least 2 classes, any floating type.

    Returns:
        (..., 4) float32, or float64 if the logits are.
    """
    exact = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    log_q = exact.log_softmax(-1)
    log_r = (2 * log_q).log_softmax(-1)  # in logarithms, as the square of a small q underflows
    first, second = log_q.exp().topk(2, dim=-1).values.unbind(-1)
    return torch.stack([first, _entropy(log_q), first - second, _entropy(log_r)], dim=-1)


def _entropy(log_p: Tensor) -> Tensor:
    finite = log_p.clamp_min(torch.finfo(log_p.dtype).min)  # 0 log 0 is 0
    return -(log_p.exp() * finite).sum(-1)


def spend(gate: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One exit's part of the probability that is left (eq. 4 and 5).

    Arguments:
        gate: g_l, from 0 to 1.
        mass: 1 - Σ_{j<l} P_j, of the same shape.

    Returns:
        P_l, c_l = P_l / mass (1 where no mass is left), and the mass after this exit.
    """
    taken = torch.minimum(gate, mass)
    tiny = torch.finfo(mass.dtype).tiny
    conditional = torch.where(mass > 0, taken / mass.clamp_min(tiny), torch.ones_like(mass))
    return taken, conditional.clamp(0, 1), mass - taken


def exit_probabilities(gates: Tensor) -> tuple[Tensor, Tensor]:
    """P (exits + 1, ...) with the final exit last, and c (exits, ...), of g (exits, ...)."""
    mass = torch.ones_like(gates[0])
    taken, conditional = [], []
    for gate in gates:
        probability, share, mass = spend(gate, mass)
        taken.append(probability)
        conditional.append(share)
    return torch.stack([*taken, mass]), torch.stack(conditional)


class Heads(nn.Module):
    """All that JEI-DNN trains: G (D C + C) + 5 G float32 numbers.

    Arguments:
        widths: D of every exit.
        classes: C, at least 2.
        seed: of torch's default initialisation of linear layers.
    """

    def __init__(self, widths: Sequence[int], classes: int, seed: int = 322) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifiers = nn.ModuleList(nn.Linear(width, classes) for width in widths)
            self.gates = nn.ModuleList(nn.Linear(FEATURES, 1) for _ in widths)

    def classify(self, pooled: Sequence[Tensor]) -> Tensor:
        """Logits (exits, batch, classes) of pooled features, (batch, width) an exit (eq. 1)."""
        pairs = zip(self.classifiers, pooled, strict=True)
        return torch.stack([classifier(z) for classifier, z in pairs])

    def scores(self, logits: Tensor) -> Tensor:
        """s (exits, batch) of logits (exits, batch, classes); no gradient to the logits (eq. 3)."""
        pairs = zip(self.gates, gate_features(logits), strict=True)
        return torch.stack([gate(u).squeeze(-1) for gate, u in pairs])


class Policy(Protocol):
    """Who leaves at an exit, told from the logits there and the mass that is left of each row."""

    def decide(self, exit: int, logits: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """From (batch, classes) and (batch,): who leaves, (batch,) bool, and the mass after."""
        ...


@dataclass(frozen=True)
class LearnedGates:
    """Leave at the first exit with c_l ≥ ½ (eq. 6), which is not g_l ≥ ½.

    Arguments:
        heads: trained.
        threshold: ½ is the method; another is a change after training, and no longer JEI-DNN.
        generator: leave with probability c_l instead, so that exits follow P exactly.
    """

    heads: Heads
    threshold: float = 0.5
    generator: torch.Generator | None = None

    def decide(self, exit: int, logits: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.heads.gates[exit](gate_features(logits).to(mass.dtype)).squeeze(-1).sigmoid()
        _, conditional, left = spend(gate, mass)
        if self.generator is None:
            return conditional >= self.threshold, left
        drawn = torch.rand(mass.shape, generator=self.generator, device=self.generator.device)
        return drawn.to(mass.device) < conditional, left


@dataclass(frozen=True)
class ConfidenceThresholds:
    """The baseline: leave where the largest probability is above an exit's threshold.

    Arguments:
        thresholds: one an exit; 0 lets everything leave, above 1 nothing.
    """

    thresholds: Sequence[float]

    def decide(self, exit: int, logits: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        return gate_features(logits)[..., 0] > self.thresholds[exit], mass


@torch.no_grad()
def simulate(logits: Tensor, policy: Policy) -> Tensor:
    """The exit (batch,) int64 of every row, from all logits (exits + 1, batch, classes)."""
    exits = logits.shape[0] - 1
    chosen = torch.full(logits.shape[1:2], exits, dtype=torch.int64, device=logits.device)
    mass = torch.ones(logits.shape[1], device=logits.device)
    for exit in range(exits):
        leaves, mass = policy.decide(exit, logits[exit], mass)
        chosen = torch.where(leaves & (chosen == exits), exit, chosen)
    return chosen
