"""Linear layers with a bank of experts, picked by where the features lie: no data, no training.

Each layer keeps its own weight. Its experts sit beside it as one stack of matrices: the product of
a feature with all input factors gives the scores and, for the experts that take part, half of their
output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.errors import ConfigError
from sparing.forward_pass import Passes
from sparing.routing import sparse_softmax

Granularity = Literal["token", "sample", "model"]
_NOTE = "made-it"
_TINY = 1e-30


@dataclass(frozen=True)
class Routing:
    """How experts are picked at inference.

    Arguments:
        temperature: T of the softmax over scores, above 0.
        top_k: experts that take part in a layer; None for all, 1 for the best alone.
        granularity: "token" picks for every token, "sample" for every row by its mean score,
            "model" for every row by the scores of its tasks summed over the layers so far.
        ood: None, or "base": no expert for features that no expert claims.
        margin: with `ood`, an expert claims a feature if its score is at least r/i · (1 + margin),
            where r/i is that of a random feature.
        drop_common: None, or a share above 0: directions that more than this share of a layer's
            experts have in common do not count in scores. For language models, whose outlier
            channels are in all of them.
    """

    temperature: float = 0.05
    top_k: int | None = None
    granularity: Granularity = "token"
    ood: Literal["base"] | None = None
    margin: float = 0.1
    drop_common: float | None = None


class Router:
    """What the routed layers of one model share.

    Arguments:
        routing: how to pick; may be replaced at any time.
        tasks: how many there are.
    """

    def __init__(self, routing: Routing, tasks: int) -> None:
        self.routing, self.tasks = routing, tasks
        self.passes = Passes()

    def watch(self, model: nn.Module) -> None:
        """Follow the forwards of a model: attention masks, and notes from layer to layer."""
        self.passes.watch(model)
        model.register_forward_pre_hook(self._check_cache, with_kwargs=True)

    def _check_cache(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.routing.granularity == "token":
            return
        caches = (kwargs.get(name) for name in ("cache", "past_key_values"))  # new name and old
        if any(cache is not None and cache.get_seq_length() > 0 for cache in caches):
            raise ConfigError(
                f"granularity {self.routing.granularity!r}",
                expected="whole rows, whose scores can be averaged",
                found="a step of generation that sees only the newest token",
                mend='Generate with use_cache=False, or route with granularity="token".',
            )

    def weights(self, scores: Tensor, experts: "Experts") -> Tensor:
        """From scores (batch, ..., E) float32 to weights that broadcast to them (eq. 9)."""
        if self.routing.granularity != "token":
            scores = self._pooled(scores)
        if self.routing.granularity == "model":
            scores = self._over_layers(scores, experts.members)
        weights = sparse_softmax(scores / self.routing.temperature, self.routing.top_k)
        if self.routing.ood == "base":
            claimed = scores >= experts.null_scores(scores.device) * (1 + self.routing.margin)
            weights = weights * claimed.any(-1, keepdim=True)
        return weights

    def _pooled(self, scores: Tensor) -> Tensor:
        """Mean over all axes between the first and the last, without padding."""
        if scores.ndim < 3:
            return scores
        mask = self.passes.current.attention_mask
        if mask is not None and mask.shape == scores.shape[:2] and scores.ndim == 3:
            kept = mask.to(scores).unsqueeze(-1)
            return (scores * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
        return scores.mean(dim=tuple(range(1, scores.ndim - 1)), keepdim=True)

    def _over_layers(self, scores: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
        """Each task's mean score over the layers so far; an expert has that of its best task."""
        rows = scores.reshape(len(scores), -1)
        total, count = self.passes.current.notes.get(
            _NOTE, (rows.new_zeros(1, self.tasks), rows.new_zeros(self.tasks))
        )
        if len(total) not in (1, len(rows)):
            raise ConfigError(
                'granularity "model"',
                expected="layers that all see the batch as their first axis",
                found=f"{len(rows)} rows after {len(total)}",
                mend='Route with granularity="token" or "sample".',
            )
        total, count = total.to(rows.device), count.to(rows.device)
        total, count = total.expand(len(rows), -1).clone(), count.clone()
        for expert, tasks in enumerate(members):
            total[:, list(tasks)] += rows[:, expert, None]
            count[list(tasks)] += 1
        self.passes.current.leave(_NOTE, (total, count))
        mean = total / count.clamp_min(1)
        best = torch.stack([mean[:, list(tasks)].amax(1) for tasks in members], dim=1)
        return best.view(len(rows), *scores.shape[1:-1], len(members))


class Experts(nn.Module):
    """The experts of one layer.

    Arguments:
        widths: inputs i and outputs o of the layer.
        ranks: k of every expert.
        router_ranks: r of every expert.
        members: for every expert, the numbers of its tasks.
        bias: whether experts change a bias.
        router: shared by the model.

    Attributes:
        inputs: (Σ max(k, r), i), the factors A and routing bases Vᵀ of all experts.
        outputs: (Σ k, o), the factors Bᵀ.
        biases: (E, o), or None.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        ranks: Sequence[int],
        router_ranks: Sequence[int],
        members: Sequence[Sequence[int]],
        *,
        bias: bool,
        router: Router,
    ) -> None:
        super().__init__()
        self.ranks, self.router_ranks = tuple(ranks), tuple(router_ranks)
        self.members = tuple(tuple(tasks) for tasks in members)
        self.router = router
        inputs, outputs = widths
        heights = [max(k, r) for k, r in zip(ranks, router_ranks, strict=True)]
        self._starts = [sum(heights[:e]) for e in range(len(heights))]
        self._kept: dict[str, Tensor] = {}
        self.inputs = _frozen(sum(heights), inputs)
        self.outputs = _frozen(sum(ranks), outputs)
        self.biases = _frozen(len(ranks), outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The change of the layer's output: (..., i) -> (..., o)."""
        top_k = self.router.routing.top_k
        if top_k is not None and top_k < len(self.ranks):
            return self._grouped(x)
        projected = F.linear(x, self.inputs)
        spread, active = self._index("router", x.device), self._index("active", x.device)
        weights = self.router.weights(self._scores(x, projected[..., spread]), self).to(x.dtype)
        hidden = projected[..., active] * weights[..., self._index("owner", x.device)]
        change = hidden @ self.outputs
        return change if self.biases is None else change + weights @ self.biases

    def scores(self, x: Tensor) -> Tensor:
        """s_e(x) = ‖V_eᵀ x‖² / ‖x‖² (eq. 8): (..., i) -> (..., E) float32 or float64, 0 to 1."""
        return self._scores(x, F.linear(x, self.inputs[self._index("router", x.device)]))

    def null_scores(self, device: torch.device) -> Tensor:
        """(E,) r/i, the expected score of a random feature."""
        return torch.tensor(self.router_ranks, device=device) / self.inputs.shape[1]

    def _scores(self, x: Tensor, projected: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        projected, x = projected.to(exact), x.to(exact)
        size = x.square().sum(-1, keepdim=True)
        if self.router.routing.drop_common is not None:
            common = self._common(self.router.routing.drop_common, exact)
            shared = x @ common.mT
            basis = self.inputs[self._index("router", x.device)].to(exact)
            projected = projected - shared @ (common @ basis.mT)
            size = size - shared.square().sum(-1, keepdim=True)
        parts = projected.square().split(list(self.router_ranks), dim=-1)
        return torch.stack([part.sum(-1) for part in parts], dim=-1) / size.clamp_min(_TINY)

    def _grouped(self, x: Tensor) -> Tensor:
        """Only the experts that take part are computed, each for its own tokens."""
        weights = self.router.weights(self.scores(x), self).to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        weights = weights.expand(*x.shape[:-1], -1).reshape(len(flat), -1)
        change = flat.new_zeros(len(flat), self.outputs.shape[1])
        ends = [sum(self.ranks[:e]) for e in range(len(self.ranks) + 1)]
        for expert, (start, rank) in enumerate(zip(self._starts, self.ranks, strict=True)):
            rows = weights[:, expert].nonzero().squeeze(1)
            hidden = F.linear(flat[rows], self.inputs[start : start + rank])
            part = hidden @ self.outputs[ends[expert] : ends[expert + 1]]
            if self.biases is not None:
                part = part + self.biases[expert]
            change.index_add_(0, rows, part * weights[rows, expert, None])
        return change.view(*x.shape[:-1], -1)

    def _index(self, kind: str, device: torch.device) -> Tensor:
        """Rows of `inputs` that route, rows that belong to factors, and whose those are."""
        key = f"{kind} {device}"
        if key not in self._kept:
            ranks = self.router_ranks if kind == "router" else self.ranks
            rows: list[int] = []
            for expert, (start, rank) in enumerate(zip(self._starts, ranks, strict=True)):
                rows += [expert] * rank if kind == "owner" else range(start, start + rank)
            self._kept[key] = torch.tensor(rows, dtype=torch.int64, device=device)
        return self._kept[key]

    def _common(self, share: float, dtype: torch.dtype) -> Tensor:
        """(c, i) orthonormal rows: directions in more than this share of the routing bases."""
        key = f"common {share} {dtype} {self.inputs.device}"
        if key not in self._kept:
            basis = self.inputs[self._index("router", self.inputs.device)].to(dtype)
            _, values, right = torch.linalg.svd(basis, full_matrices=False)
            several = len(self.ranks) > 1
            self._kept[key] = right[(values.square() > share * len(self.ranks)) & several]
        return self._kept[key]


def _frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


def attach(layer: nn.Module, experts: Experts) -> None:
    """Add a bank of experts to a linear layer or `Conv1D`; its own parameters keep their names."""
    layer.add_module("experts", experts)
    layer.register_forward_hook(_add_experts)


def _add_experts(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    experts: Any = layer.experts
    return output + experts(args[0])


def routed_layers(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The banks of a model, by the name of their layer."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name.removesuffix(".experts"), module


def set_routing(model: nn.Module, routing: Routing) -> None:
    """Route all layers of a model in another way from now on."""
    for router in {experts.router for _, experts in routed_layers(model)}:
        router.routing = routing
