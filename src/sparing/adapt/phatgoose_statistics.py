"""Which experts a routed adapter uses: by module, by expert and by token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing.adapt._phatgoose_keys import evaluating, in_decoder, tokens_of
from sparing.adapt.phatgoose import PhatgooseAdapter, expert_layers
from sparing.checkpoint import write_json
from sparing.errors import ConfigError
from sparing.routing import entropy


@dataclass
class ModuleRouting:
    """What one module did with the tokens it saw.

    Arguments:
        tokens: how many there were, padding left out.
        weight: (experts,) float64, sums of the routing weights.
        chosen: (experts,) float64, how often each expert took part.
        first: (experts,) float64, how often each expert had the largest weight.
        entropy: sum over tokens of the entropy of their weights, in nats.
    """

    tokens: int
    weight: Tensor
    chosen: Tensor
    first: Tensor
    entropy: float

    @property
    def share(self) -> Tensor:
        """(experts,) the part of all weight that each expert got; sums to 1."""
        return self.weight / self.weight.sum()

    @property
    def diversity(self) -> float:
        """Entropy of the shares in nats: 0 if one expert does everything, ln Z if all do alike."""
        return float(entropy(self.share))


@dataclass
class RoutingStatistics:
    """Routing of a model over some text.

    Arguments:
        experts: names, in the order of all tensors.
        modules: by module name.
        token_weights: (tokens, experts) float32, for the batch that came last: routing weights
            averaged over the modules that see its `input_ids`; padding left out.
        token_ids: (tokens,) int64 of the same.
    """

    experts: list[str]
    modules: dict[str, ModuleRouting] = field(default_factory=dict)
    token_weights: Tensor | None = None
    token_ids: Tensor | None = None

    @property
    def share(self) -> Tensor:
        """(experts,) the part of all weight, averaged over modules."""
        return torch.stack([module.share for module in self.modules.values()]).mean(dim=0)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        named: dict[str, Any] = {
            "experts": self.experts,
            "share": self._by_expert(self.share),
            "modules": {
                name: {
                    "tokens": module.tokens,
                    "share": self._by_expert(module.share),
                    "chosen": self._by_expert(module.chosen / module.tokens),
                    "first": self._by_expert(module.first / module.tokens),
                    "mean entropy of a token's weights": module.entropy / module.tokens,
                    "entropy of the shares": module.diversity,
                }
                for name, module in self.modules.items()
            },
        }
        if self.token_weights is not None and self.token_ids is not None:
            named["token_ids"] = self.token_ids.tolist()
            named["token_weights"] = [
                [round(w, 5) for w in row] for row in self.token_weights.tolist()
            ]
        return named

    def write(self, file: Path) -> None:
        """Write all numbers as JSON, atomically."""
        write_json(file, self.as_dict())

    def _by_expert(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.experts, map(float, values), strict=True))


@torch.no_grad()
def routing_statistics(
    model: nn.Module, *batches: dict[str, Tensor], adapter_name: str = "default"
) -> RoutingStatistics:
    """Run a routed model on batches and count where the tokens go.

    The model runs in evaluation mode without gradients, so that checkpointing, which runs blocks
    twice, cannot count a token twice.

    Arguments:
        model: with a PHATGOOSE adapter in mode "routed".
        batches: keyword arguments of the model, `input_ids` (rows, tokens) among them;
            `attention_mask` tells tokens from padding.
        adapter_name: of the adapter.

    Raises:
        ConfigError: the adapter does not route, or there is no batch.
    """
    layers = expert_layers(model, adapter_name)
    config = next(iter(layers.values())).config
    if config.mode != "routed" or not batches:
        raise ConfigError(
            "routing statistics",
            expected="a model in mode 'routed' and at least one batch",
            found=f"mode {config.mode!r} and {len(batches)} batches",
            mend="Call set_mode(model, 'routed') first.",
        )
    statistics = RoutingStatistics(config.experts)
    with evaluating(model):
        for batch in batches:
            _count(statistics, model, batch, layers)
    return statistics


def _count(
    statistics: RoutingStatistics,
    model: nn.Module,
    batch: dict[str, Tensor],
    layers: dict[str, PhatgooseAdapter],
) -> None:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    kept = tokens_of(ids[..., None], mask)[:, 0]
    by_token, modules_seen = torch.zeros(len(kept), len(statistics.experts)), 0
    with _observing(layers) as seen:
        model(**batch)
    for name, calls in seen.items():
        for weights in calls:
            same_tokens = len(weights) == ids.numel() and not in_decoder(model, name)
            if same_tokens:
                weights = tokens_of(weights.view(*ids.shape, -1), mask)
                by_token += weights
                modules_seen += 1
            _add(statistics, name, weights)
    statistics.token_weights = by_token / max(modules_seen, 1)
    statistics.token_ids = kept.cpu()


@contextmanager
def _observing(layers: dict[str, PhatgooseAdapter]) -> Iterator[dict[str, list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, adapter in layers.items():
        adapter.observer = lambda weights, calls=seen[name]: calls.append(weights.float().cpu())
    try:
        yield seen
    finally:
        for adapter in layers.values():
            adapter.observer = None


def _add(statistics: RoutingStatistics, name: str, weights: Tensor) -> None:
    exact = weights.double()
    first = torch.bincount(exact.argmax(dim=1), minlength=exact.shape[1]).double()
    total, chosen = exact.sum(dim=0), (exact > 0).sum(dim=0).double()
    spread = float(entropy(exact / exact.sum(dim=1, keepdim=True)).sum())
    if name not in statistics.modules:
        statistics.modules[name] = ModuleRouting(len(exact), total, chosen, first, spread)
        return
    module = statistics.modules[name]
    module.tokens += len(exact)
    module.weight, module.chosen = module.weight + total, module.chosen + chosen
    module.first, module.entropy = module.first + first, module.entropy + spread
