"""PCB: every parameter of every task vector competes, inside its task and with the other tasks.

Du et al., "Parameter Competition Balancing for Model Merging", arXiv 2410.02396 (NeurIPS 2024).
Equation numbers are those of our specification. Equations 1-6 are the paper's; 7-11 are what its
released code computes instead, in three versions that differ in the competition between tasks.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from sparing.merge.average import weighted_sum
from sparing.merge.dare import drop_and_rescale
from sparing.merge.memory import InMemory
from sparing.merge.method import Method, Options, Scope, groups
from sparing.merge.selection import order_statistics
from sparing.merge.ties import rank_of_cut
from sparing.merge.view import Block, View

Variant = Literal["paper", "vision_es", "vision", "reference"]
_CODE_CLIP = 0.01


@dataclass(frozen=True)
class PCBOptions(Options):
    """Options of PCB merging.

    Arguments:
        ratio: r, share of its entries that every task vector keeps, above 0 to 1; 0.05 to 0.2 in
            the paper. Entries with the same weight as the last one kept are kept too.
        lam: λ, one number or a list with one an expert. It is not comparable with the λ of task
            arithmetic: an entry that one expert alone keeps enters with λ in full (eq. 5).
        variant: "paper" (eq. 1-5); "vision_es", "vision" and "reference" are the released code
            (eq. 7-11). "reference" depends on the absolute size of the task vectors.
        intra: competition inside a task (eq. 1 or 8).
        inter: competition between tasks (eq. 2 or 9).
        drop: drop the weakest entries (eq. 4); without it `ratio` does nothing.
        rescale: divide by the sum of the weights (eq. 5). Without it, weights are scaled to at
            most 1 and the sum is divided by the number of experts; the scaling is reconstructed.
        include_self: whether a task also competes with itself between tasks (j = i in eq. 2).
        scope: "model" normalises and drops over the whole task vector, as the paper does;
            "tensor" does so for every tensor on its own, which is another method.
        clip_q: q, clamp sizes to their q and 1-q quantiles (eq. 7), from 0 to below 0.5; None is 0
            for the paper's formula and 0.01 for the released code.
        dare_drop: first drop entries at random with this probability, as DARE does.
        seed: of that.
    """

    ratio: float = 0.1
    lam: float | Sequence[float] = 1.0
    variant: Variant = "paper"
    intra: bool = True
    inter: bool = True
    drop: bool = True
    rescale: bool = True
    include_self: bool = True
    scope: Scope = "model"
    clip_q: float | None = None
    dare_drop: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.require_number("ratio", 0, 1, above=True, mend="The paper uses 0.05 to 0.2.")
        self.require_scales("lam")
        self.require_choice("variant", ("paper", "vision_es", "vision", "reference"))
        self.require_truth("intra", "inter", "drop", "rescale", "include_self")
        self.require_choice("scope", ("model", "tensor"))
        if self.clip_q is not None:
            self.require_number("clip_q", 0, 0.499, mend="The released code uses 0.01.")
        self.require_number("dare_drop", 0, 1 - 1e-6, mend="0 turns it off.")
        self.require("seed", type(self.seed) is int, "a whole number", "Use 0.")

    def check(self, experts: int) -> None:
        self.per_expert("lam", experts)
        self.require(
            "include_self",
            self.include_self or experts > 1 or not self.inter,
            "true for a single expert, which has nobody else to compete with",
            "Leave it out.",
        )
        if experts == 1:
            warnings.warn("PCB of a single expert only prunes it.", stacklevel=2)

    @property
    def keep(self) -> float:
        """Share of entries kept."""
        return self.ratio if self.drop else 1.0

    @property
    def quantile(self) -> float:
        """q of eq. 7."""
        if self.clip_q is not None:
            return self.clip_q
        return 0.0 if self.variant == "paper" else _CODE_CLIP


@dataclass(frozen=True)
class Competition:
    """What must be known about whole task vectors; n experts.

    Arguments:
        bounds: for every expert, the least and greatest size after clamping (eq. 7), or None.
        lows: (n, n) float64, least value of τ_i τ_j.
        highs: (n, n) float64, greatest value of τ_i τ_j.
        sums: (n, n) float64, softmax denominators of eq. 2, times e.
        own_sums: (n,) float64, softmax denominators of eq. 1, times e^n.
        cuts: s_i of eq. 4, the smallest weight kept.
        tops: greatest weight of every expert.
    """

    bounds: list[tuple[float, float]] | None = None
    lows: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    highs: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    sums: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    own_sums: Tensor = field(default_factory=lambda: torch.empty(0))
    cuts: Sequence[float] = ()
    tops: Sequence[float] = ()


def norm(values: Tensor, low: float, high: float) -> Tensor:
    """Norm(·): min-max scaling to [0, 1]; a constant row becomes 0 (eq. 1, oracle 2)."""
    if high <= low:
        return torch.zeros_like(values)
    return (values - low).div_(high - low)


def clamp_sizes(delta: Tensor, bounds: tuple[float, float]) -> Tensor:
    """τ^c of eq. 7: sizes clamped, signs kept, exact zeros stay 0."""
    return delta.sign() * delta.abs().clamp_(*bounds)


def weigh(deltas: Sequence[Tensor], options: PCBOptions, known: Competition) -> list[Tensor]:
    """β_i of eq. 3 for every expert, (m,) float64, before anything is dropped.

    Arguments:
        deltas: task vectors after DARE but not clamped, (m,) float64.
        options: of the method.
        known: at least `bounds`; for the paper's formula also extremes and sums.
    """
    formula = _weigh_paper if options.variant == "paper" else _weigh_code
    return formula(deltas, options, known)


def _weigh_paper(deltas: Sequence[Tensor], options: PCBOptions, known: Competition) -> list[Tensor]:
    """Eq. 1-3."""
    vectors = _clamped(deltas, known)
    count = len(vectors)
    weights = [torch.ones_like(vectors[0])] * count
    if options.inter:
        weights = [torch.zeros_like(vector) for vector in vectors]
        for i, j in _pairs(count):
            if i == j and not options.include_self:
                continue
            share = _softmax_of_product(vectors[i] * vectors[j], known, i, j)
            weights[i] += share
            if i != j:
                weights[j] += share
    if options.intra:
        for i, vector in enumerate(vectors):
            own = norm(vector * vector, known.lows[i, i].item(), known.highs[i, i].item())
            own = own.sub_(1).mul_(count).exp_().div_(known.own_sums[i].item())
            weights[i] = weights[i] * own
    return weights


def _softmax_of_product(product: Tensor, known: Competition, i: int, j: int) -> Tensor:
    """One term of eq. 2."""
    scaled = norm(product, known.lows[i, j].item(), known.highs[i, j].item())
    return scaled.sub_(1).exp_().div_(known.sums[i, j].item())


def _weigh_code(deltas: Sequence[Tensor], options: PCBOptions, known: Competition) -> list[Tensor]:
    """Eq. 7-9. Eq. 8 is divided by e^n, which vanishes in eq. 10, so that it cannot overflow."""
    assert known.bounds is not None
    signed = [
        delta.sign() * norm(delta.abs().clamp_(*bounds), *bounds)
        for delta, bounds in zip(deltas, known.bounds, strict=True)
    ]
    weights = []
    for i in range(len(deltas)):
        weight = torch.ones_like(deltas[i])
        if options.intra:
            weight = (signed[i].square() - 1).mul_(len(deltas)).exp_()
        if options.inter:
            others = [j for j in range(len(deltas)) if options.include_self or j != i]
            if options.variant == "vision_es":
                between = sum(torch.tanh(signed[i] * signed[j]) for j in others)
            else:
                rivals = deltas if options.variant == "reference" else signed
                between = torch.tanh(deltas[i] * sum(rivals[j] for j in others))
            weight = weight * between
        weights.append(weight)
    return weights


def shares(deltas: Sequence[Tensor], options: PCBOptions, known: Competition) -> list[Tensor]:
    """What each expert contributes to the merged task vector at λ_i = 1 (eq. 4-5, or 10-11).

    Arguments:
        deltas: task vectors after DARE but not clamped, (m,) float64.
        options: of the method.
        known: all of it.

    Returns:
        For every expert, (m,) float64: β̂_i τ_i / Σ_j β̂_j, 0 where no expert is kept.
    """
    weights = weigh(deltas, options, known)
    for i, weight in enumerate(weights):
        cut, top = known.cuts[i], known.tops[i]
        if options.variant == "paper":
            weights[i] = torch.where(weight >= cut, weight, 0)
            if not options.rescale:
                weights[i] /= top
        elif top > cut:
            weights[i] = norm(weight.clamp(min=cut), cut, top)
        else:  # all that is left weighs the same, so there is no competition
            weights[i] = (weight >= cut).to(weight.dtype)
    total = torch.full_like(weights[0], len(weights))
    if options.rescale:
        total = weighted_sum(weights, [1.0] * len(weights))
    total[total == 0] = 1
    return [
        weight.div(total).mul_(vector)
        for weight, vector in zip(weights, _clamped(deltas, known), strict=True)
    ]


def survey(view: View, options: PCBOptions) -> dict[str, Competition]:
    """For every tensor, the competition in its scope: four to six scans of the models."""
    found = {}
    for tensors in groups(view, options.scope):
        found.update(dict.fromkeys(tensors, _survey(view, options, tensors)))
    return found


def _survey(view: View, options: PCBOptions, tensors: Sequence[str]) -> Competition:
    count, size = view.experts, view.size(tensors)
    known = Competition(bounds=_quantiles(view, options, tensors))
    if options.variant == "paper" and (options.intra or options.inter):
        known = _survey_products(view, options, tensors, known)

    def weights(deltas: list[Tensor], block: Block) -> list[Tensor]:
        return weigh(_prepared(deltas, options, block), options, known)

    cuts, tops = [-math.inf] * count, [1.0] * count
    if options.keep < 1 or options.variant != "paper":
        rank = rank_of_cut(options.keep, size)
        cuts = order_statistics(view, weights, [rank] * count, tensors, "finding the weakest")
    if options.variant != "paper" or not options.rescale:
        tops = [-math.inf] * count
        greatest = view.scan(
            lambda deltas, block: [weight.max().item() for weight in weights(deltas, block)],
            tensors,
            "finding the strongest",
        )
        for found in greatest:
            tops = [max(pair) for pair in zip(tops, found, strict=True)]
    return Competition(
        known.bounds, known.lows, known.highs, known.sums, known.own_sums, cuts, tops
    )


def _quantiles(
    view: View, options: PCBOptions, tensors: Sequence[str]
) -> list[tuple[float, float]] | None:
    """The bounds of eq. 7: entries number ⌊qD⌋ and D - 1 - ⌊qD⌋ of the sorted sizes."""
    if options.variant == "paper" and options.quantile == 0:
        return None
    count, size = view.experts, view.size(tensors)
    low = min(int(options.quantile * size), (size - 1) // 2)

    def sizes(deltas: list[Tensor], block: Block) -> list[Tensor]:
        return [delta.abs() for delta in _prepared(deltas, options, block)] * 2

    ranks = [low] * count + [size - 1 - low] * count
    found = order_statistics(view, sizes, ranks, tensors, "finding quantiles")
    return list(zip(found[:count], found[count:], strict=True))


def _survey_products(
    view: View, options: PCBOptions, tensors: Sequence[str], known: Competition
) -> Competition:
    """Extremes of all products, then the sums of the softmaxes over them."""
    count = view.experts
    pairs = _pairs(count) if options.inter else [(i, i) for i in range(count)]

    def extremes(deltas: list[Tensor], block: Block) -> Tensor:
        vectors = _clamped(_prepared(deltas, options, block), known)
        both = [torch.stack((vectors[i] * vectors[j]).aminmax()) for i, j in pairs]
        return torch.stack(both).cpu()

    lows, highs = (torch.full((count, count), s * math.inf, dtype=torch.float64) for s in (1, -1))
    for found in view.scan(extremes, tensors, "comparing the experts"):
        for (i, j), (low, high) in zip(pairs, found, strict=True):
            lows[i, j] = lows[j, i] = torch.minimum(lows[i, j], low)
            highs[i, j] = highs[j, i] = torch.maximum(highs[i, j], high)
    ones = torch.ones(count, count, dtype=torch.float64)
    ranged = Competition(known.bounds, lows, highs, ones, ones[0])

    def partial(deltas: list[Tensor], block: Block) -> tuple[Tensor, Tensor]:
        vectors = _clamped(_prepared(deltas, options, block), known)
        between = [
            _softmax_of_product(vectors[i] * vectors[j], ranged, i, j).sum() for i, j in pairs
        ]
        own = [
            norm(vector * vector, lows[i, i].item(), highs[i, i].item()).sub_(1).mul_(count)
            for i, vector in enumerate(vectors)
        ]
        return torch.stack(between).cpu(), torch.stack([x.exp_().sum() for x in own]).cpu()

    sums, own_sums = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count).double()
    for between, own in view.scan(partial, tensors, "weighing the competition"):
        own_sums += own
        for (i, j), value in zip(pairs, between, strict=True):
            sums[i, j] += value
            sums[j, i] = sums[i, j]
    return Competition(known.bounds, lows, highs, sums, own_sums)


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def _clamped(deltas: Sequence[Tensor], known: Competition) -> list[Tensor]:
    if known.bounds is None:
        return list(deltas)
    return [clamp_sizes(*pair) for pair in zip(deltas, known.bounds, strict=True)]


def _prepared(deltas: Sequence[Tensor], options: PCBOptions, block: Block) -> list[Tensor]:
    """Float64, because the weights of a large model differ by less than float32 can tell."""
    return [
        drop_and_rescale(delta, options.dare_drop, expert, options.seed, block).double()
        for expert, delta in enumerate(deltas)
    ]


def _update(
    deltas: Sequence[Tensor], options: PCBOptions, known: Mapping[str, Competition], block: Block
) -> Tensor:
    prepared = _prepared(deltas, options, block)
    contributions = shares(prepared, options, known[block.tensor])
    merged = weighted_sum(contributions, options.per_expert("lam", len(deltas)))
    return merged.to(deltas[0].dtype)


METHOD = Method("pcb-merging", "arXiv 2410.02396", PCBOptions, _update, survey)


class PCBWeights:
    """The competition of models in memory, computed once and merged with any λ.

    Only eq. 5 depends on λ, so that a search over λ need not compete again.

    Arguments:
        models: base and experts.
        contributions: for every tensor, each expert's share of the merged task vector, float64.
    """

    def __init__(self, models: InMemory, contributions: dict[str, list[Tensor]]) -> None:
        self._models = models
        self._contributions = contributions

    @classmethod
    def compute(
        cls, base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], **options: Any
    ) -> Self:
        """Let the models compete.

        Arguments:
            base: state dict of the common base.
            models: state dicts with the same names and shapes.
            options: of `PCBOptions`.

        Raises:
            ConfigError: names or shapes differ, or an option cannot work.
        """
        chosen = PCBOptions.of("pcb-merging", options)
        chosen.check(len(models))
        together = InMemory(base, models)
        known = survey(together.view, chosen)
        contributions = {}
        for name, size in together.view.sizes.items():
            block = Block(name, 0, size)
            prepared = _prepared(together.view.read(block)[1], chosen, block)
            contributions[name] = shares(prepared, chosen, known[name]) if size else prepared
        together.keep_base()
        return cls(together, contributions)

    def merge(self, lam: float | Sequence[float] = 1.0) -> dict[str, Tensor]:
        """The merged state dict (eq. 5-6) in the base's types.

        Arguments:
            lam: λ, one number or one an expert.
        """
        experts = self._models.view.experts
        scales = PCBOptions(lam=lam).per_expert("lam", experts)
        return self._models.with_update(
            lambda name: weighted_sum(self._contributions[name], scales)
        )


def pcb_merge(
    base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], **options: Any
) -> dict[str, Tensor]:
    """Merge state dicts in memory; see `PCBOptions`."""
    lam = options.pop("lam", 1.0)
    return PCBWeights.compute(base, models, **options).merge(lam)
