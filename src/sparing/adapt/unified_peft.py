"""Unified view: adapters, prefixes, LoRA and their hybrids as settings of one tuner.

Every method adds Δh to a hidden h of a frozen network. What differs is the functional form of Δh,
its insertion (parallel, from the sub-layer's input, or sequential, from h), the modified
representation h, and the composition (plain, scaled, learned or gated): the options of a `Slot` for
attention and of one for feed-forward networks. The MAM adapter is one of the settings, and the
default.

He, Zhou, Ma, Berg-Kirkpatrick and Neubig, "Towards a Unified View of Parameter-Efficient Transfer
Learning", arXiv 2110.04366 (ICLR 2022). Where Δh is added on pre-norm models is our reconstruction:
a parallel adapter reads what W_1 or W_q reads, after the norm. In training, models that drop units
after W_2 or W_o drop Δh with them, as it is added to that layer's output.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn

from sparing.adapt._unified_attention import check_routable, route, unroute
from sparing.adapt._unified_bottleneck import UnifiedLayer, UnifiedLinear
from sparing.adapt._unified_config import UnifiedPeftConfig
from sparing.adapt._unified_plan import Anatomy, Plan, plan
from sparing.adapt._unified_prefix import GatedPrefix, PrefixNetwork, PrefixTrunk, new_trunks
from sparing.errors import ConfigError
from sparing.surgery import LINEAR, Attention
from sparing.tuners import LayerAdapter, Tuner, TunerLayer, register_tuner

PAPER_COUNTS = ("down", "up", "keys", "values", "change")


class UnifiedPeftTuner(Tuner):
    """Puts the parts of an adapter on the layers of a model."""

    prefix = "unified_peft_"

    @property
    def anatomy(self) -> Anatomy:
        """The sub-layers of the model, read before the first adapter came."""
        if "_anatomy" not in self.__dict__:
            self.__dict__["_anatomy"] = Anatomy(self.model)
        return self.__dict__["_anatomy"]

    def _plan_for(self, config: Any) -> Plan:
        of, made = self.__dict__.get("_plan", (None, None))
        if of is not config:
            made = plan(config, self.anatomy)
            self.__dict__["_plan"] = (config, made)
        return made

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        self.__dict__.pop("_plan", None)  # a config given twice makes two adapters
        prefixed = self._plan_for(self.peft_config[adapter_name]).prefixed
        for attention in prefixed:
            check_routable(model.get_submodule(attention.module), attention.module)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for attention in prefixed:
            site = model.get_submodule(attention.output)
            assert isinstance(site, UnifiedLayer)
            route(model.get_submodule(attention.module), site)
        del self.__dict__["_plan"]  # it cannot be pickled

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._plan_for(peft_config).makers

    def _check_layer(self, layer: nn.Module, name: str) -> None:
        """The plan has looked at every layer already."""

    def new_shared(
        self, config: UnifiedPeftConfig, layers: dict[str, nn.Module]
    ) -> nn.ModuleDict | None:
        prefixed = self._plan_for(config).prefixed
        return nn.ModuleDict(_trunks(config, prefixed)) or None

    def new_adapter(
        self, config: Any, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> LayerAdapter:
        trunks: Any = {} if shared is None else shared
        return self._plan_for(config).makers[module_name](dict(trunks))

    def wrapper_type(self, layer: nn.Module, adapter: nn.Module) -> type[TunerLayer]:
        linear = isinstance(layer, LINEAR) or resolve_quantization_backend(layer) is not None
        return UnifiedLinear if linear else UnifiedLayer

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unroute(self.model)
        return model

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuse before the first layer is merged."""
        for name in adapter_names or self.active_adapters:
            for layer in _layers(self.model, name):
                part = layer.adapters[name]
                if not part.mergeable:
                    raise ConfigError(
                        f"adapter {name!r}",
                        expected="a setting that is a fixed matrix: LoRA on layers, or BitFit",
                        found=f"{type(part).__name__}, which depends on its input",
                        mend="Keep the adapter as it is; it cannot be merged.",
                    )


def _layers(model: nn.Module, adapter_name: str) -> Iterator[UnifiedLayer]:
    for module in model.modules():
        if isinstance(module, UnifiedLayer) and adapter_name in module.adapters:
            yield module


def _trunks(config: UnifiedPeftConfig, prefixed: list[Attention]) -> dict[str, PrefixTrunk]:
    if config.attn.form != "prefix" or config.prefix_mlp_dim is None:
        return {}
    return new_trunks(prefixed, config.width("attn"), config.prefix_mlp_dim, config.seed)


def fold_prefix(model: nn.Module, adapter_name: str = "default") -> None:
    """Replace the network that prefixes come from by the prefixes themselves, in place.

    Outputs stay the same; the adapter becomes as small as the paper counts it, to the 2 l d numbers
    of every attention. Do it once training is over: training goes on differently without the
    network. Nothing happens to an adapter that has none.

    Arguments:
        model: from `peft.get_peft_model`, with an adapter of `UnifiedPeftConfig`.
        adapter_name: of the adapter.

    Raises:
        ConfigError: the model has no such adapter.
    """
    tuner = next((m for m in model.modules() if isinstance(m, UnifiedPeftTuner)), None)
    if tuner is None or adapter_name not in tuner.peft_config:
        raise ConfigError(
            f"adapter {adapter_name!r}",
            expected="a unified-peft adapter of this model",
            found="none" if tuner is None else f"adapters {sorted(tuner.peft_config)}",
            mend="Give the model from peft.get_peft_model and the name of its adapter.",
        )
    for layer in _layers(tuner.model, adapter_name):
        part = layer.adapters[adapter_name]
        if isinstance(part, GatedPrefix) and isinstance(part.source, PrefixNetwork):
            trained = part.source.weight.requires_grad
            part.source = part.source.folded().requires_grad_(trained)
    if adapter_name in tuner.shared:
        del tuner.shared[adapter_name]
    tuner.peft_config[adapter_name].prefix_mlp_dim = None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ParameterCounts:
    """How large an adapter is, in numbers.

    Arguments:
        paper: as the paper counts: 2 r d for an adapter, 2 l d for a prefix; neither biases nor
            norms, nor the network that prefixes come from.
        kept: after training, with biases and norms, without that network.
        trained: with everything that gets gradients.
    """

    paper: int
    kept: int
    trained: int


def parameter_counts(model: nn.Module, config: UnifiedPeftConfig) -> ParameterCounts:
    """Count what an adapter adds to a model.

    Arguments:
        model: without adapters; may be on the meta device.
        config: of the adapter.

    Raises:
        ConfigError: the model has no sub-layer that the config could adapt.
    """
    made = plan(config, Anatomy(model))
    trunks = _trunks(config, made.prefixed)
    trained = sum(p.numel() for trunk in trunks.values() for p in trunk.parameters())
    paper = kept = 0
    for make in made.makers.values():
        part = make(trunks)
        trained += _count(part.parameters())
        if isinstance(part, GatedPrefix) and isinstance(part.source, PrefixNetwork):
            part.source = part.source.folded()
        kept += _count(part.parameters())
        paper += _count(p for n, p in part.named_parameters() if n.split(".")[-1] in PAPER_COUNTS)
    return ParameterCounts(paper, kept, trained)


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def budget_match(config: UnifiedPeftConfig, model: nn.Module, percent: float) -> UnifiedPeftConfig:
    """The config with the largest `bottleneck` whose kept parameters are within a budget.

    Equal r is not equal size: LoRA on a feed-forward network takes 10 r d, an adapter 2 r d.

    Arguments:
        config: its slots keep the widths that they give themselves.
        model: without adapters; may be on the meta device.
        percent: of the model's parameters, above 0.

    Raises:
        ConfigError: even a bottleneck of 1 is above the budget, or no slot uses `bottleneck`.
    """
    limit = percent / 100 * sum(p.numel() for p in model.parameters())
    one, two = (parameter_counts(model, config.resized(width)).kept for width in (1, 2))
    if one > limit or one == two:
        raise ConfigError(
            f"budget of {percent} %",
            expected=f"at least {one:,} parameters, and a slot without a bottleneck of its own",
            found=f"{limit:,.0f} parameters, {two - one:,} for every step of bottleneck",
            mend="Give a larger budget, or drop a slot or its bottleneck.",
        )
    return config.resized(1 + int((limit - one) // (two - one)))


register_tuner(UnifiedPeftConfig, UnifiedPeftTuner)
