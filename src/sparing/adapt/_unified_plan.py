"""Which part of an adapter goes on which layer of a model."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from sparing.adapt._unified_bottleneck import (
    AfterNorm,
    Bias,
    Bottleneck,
    InputSide,
    LowRank,
    OnLayer,
    OutputSide,
    Reading,
    Tap,
)
from sparing.adapt._unified_config import EVERYTHING, Place, Slot, UnifiedPeftConfig
from sparing.adapt._unified_prefix import PrefixTrunk, new_head_part
from sparing.errors import ConfigError, near_matches
from sparing.surgery import (
    LINEAR,
    Attention,
    FeedForward,
    Projection,
    attentions,
    feed_forwards,
    widths,
)
from sparing.tuners import LayerAdapter

BIASED = (*LINEAR, nn.LayerNorm, nn.GroupNorm, nn.Conv2d)
Trunks = dict[str, PrefixTrunk]
Maker = Callable[[Trunks], LayerAdapter]


class Anatomy:
    """The sub-layers of a model, read before any adapter is put on it.

    Arguments:
        model: without adapters; may be on the meta device.

    Attributes:
        widths: (inputs, outputs) of every linear layer.
        norms: by the last layer of a feed-forward network, the norm after its add, where that
            is a module beside it.
        biased: layers that have a bias.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[str, list[Any] | ConfigError] = {
            "attn": _or_error(attentions, model),
            "ffn": _or_error(feed_forwards, model),
        }
        layers = {name: m for name, m in model.named_modules() if isinstance(m, LINEAR)}
        self.widths = {name: widths(layer) for name, layer in layers.items()}
        self.norms = {
            name: norm for name in layers if (norm := _norm_beside(model, name)) is not None
        }
        self.biased = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, BIASED) and isinstance(module.bias, Tensor)
        }

    def attentions(self) -> list[Attention]:
        """All attentions; a `ConfigError` if there are none."""
        return self._of("attn")

    def feed_forwards(self) -> list[FeedForward]:
        """All feed-forward networks; a `ConfigError` if there are none."""
        return self._of("ffn")

    def _of(self, place: str) -> list[Any]:
        found = self._found[place]
        if isinstance(found, ConfigError):
            raise found
        return found


def _or_error(find: Callable[[nn.Module], list[Any]], model: nn.Module) -> list[Any] | ConfigError:
    try:
        return find(model)
    except ConfigError as error:
        return error.with_traceback(None)  # which would keep the model alive


def _norm_beside(model: nn.Module, layer: str) -> tuple[str, int] | None:
    """Name and width of the only norm in a module that holds one linear layer, as BERT's output
    modules do."""
    parent, _, own = layer.rpartition(".")
    children = dict(model.get_submodule(parent).named_children())
    norms = {name: m for name, m in children.items() if isinstance(m, nn.LayerNorm)}
    if len(norms) != 1 or [n for n, m in children.items() if isinstance(m, LINEAR)] != [own]:
        return None
    ((name, norm),) = norms.items()
    return f"{parent}.{name}", norm.normalized_shape[0]


@dataclass
class Plan:
    """One adapter, spread over a model.

    Attributes:
        makers: by the name of a layer, what makes its part.
        prefixed: attentions with prefixes or multi-head adapters.
    """

    makers: dict[str, Maker] = field(default_factory=dict)
    prefixed: list[Attention] = field(default_factory=list)


def plan(config: UnifiedPeftConfig, anatomy: Anatomy) -> Plan:
    """Spread an adapter over the sub-layers that its `target_modules` select.

    Raises:
        ConfigError: nothing is selected, or a sub-layer cannot take what its slot says.
    """
    made = Plan()
    if config.biases:
        selected = _selector(config, anatomy.biased)
        makers = {name: _bias_maker(m) for name, m in anatomy.biased.items() if selected(name)}
        made.makers.update(makers)
    else:
        selected = _selector(config, anatomy.widths)
        if config.attn.form != "none":
            for attention in anatomy.attentions():
                layers = [p.layer for p in (attention.query, attention.key, attention.value)]
                if any(map(selected, [*layers, attention.output])):
                    _plan_attention(config, attention, anatomy, made)
        if config.ffn.form != "none":
            for network in anatomy.feed_forwards():
                if any(map(selected, [*network.first, network.last])):
                    _plan_feed_forward(config, network, anatomy, made)
    if not made.makers:
        raise ConfigError(
            "UnifiedPeftConfig.target_modules",
            expected="linear layers of a sub-layer to adapt"
            + (", or layers with a bias" if config.biases else ""),
            found=f"{config.target_modules!r}, which selects none",
            mend=near_matches(str(config.target_modules), _last_names(anatomy)),
        )
    return made


def _selector(config: UnifiedPeftConfig, names: Iterable[str]) -> Callable[[str], bool]:
    names = list(names)
    wanted = config.target_modules
    probe = copy.copy(config)
    if wanted == EVERYTHING:
        # Last names: full ones would bypass layers_to_transform.
        probe.target_modules = {n.rsplit(".", 1)[-1] for n in names}  # type: ignore[assignment]
    elif not isinstance(wanted, str):
        for one in sorted(wanted or ()):
            if not any(name == one or name.endswith(f".{one}") for name in names):
                raise ConfigError(
                    "UnifiedPeftConfig.target_modules",
                    expected="names of layers that the model has, or a regular expression",
                    found=repr(one),
                    mend=near_matches(one, sorted({name.rsplit(".", 1)[-1] for name in names})),
                )
    return lambda name: bool(check_target_module_exists(probe, name))


def _last_names(anatomy: Anatomy) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in anatomy.widths})


def _bias_maker(layer: nn.Module) -> Maker:
    return lambda trunks: Bias(layer)


def _plan_attention(
    config: UnifiedPeftConfig, attention: Attention, anatomy: Anatomy, made: Plan
) -> None:
    slot, seed, width = config.attn, config.seed, config.width("attn")
    if slot.form in ("prefix", "mh_adapter"):
        made.prefixed.append(attention)
        made.makers[attention.output] = lambda trunks: new_head_part(
            slot, width, attention, trunks.get(attention.role), seed
        )
        return
    projections = {
        "query": attention.query,
        "key": attention.key,
        "value": attention.value,
        "output": Projection(attention.output, 0, anatomy.widths[attention.output][1]),
    }
    _plan_bottlenecks(
        config, "attn", projections, attention.query.layer, attention.output, anatomy, made
    )


def _plan_feed_forward(
    config: UnifiedPeftConfig, network: FeedForward, anatomy: Anatomy, made: Plan
) -> None:
    if config.ffn.position("ffn") == "norm":
        if network.last not in anatomy.norms:
            raise ConfigError(
                f"module {network.last!r}",
                expected="a LayerNorm beside it, after the add, as in BERT and RoBERTa",
                found="none",
                mend="Use UnifiedPeftConfig.adapter(where='ffn') on other architectures.",
            )
        norm, width = anatomy.norms[network.last]
        made.makers[norm] = lambda trunks: AfterNorm(_bottleneck(config, "ffn", width, width, norm))
        return
    projections = {f"first{i}": name for i, name in enumerate(network.first)}
    projections["last"] = network.last
    whole = {key: Projection(name, 0, anatomy.widths[name][1]) for key, name in projections.items()}
    _plan_bottlenecks(config, "ffn", whole, network.first[0], network.last, anatomy, made)


def _plan_bottlenecks(
    config: UnifiedPeftConfig,
    place: Place,
    projections: dict[str, Projection],
    source: str,
    sink: str,
    anatomy: Anatomy,
    made: Plan,
) -> None:
    """Bottlenecks of one sub-layer, which starts at the layer `source` and ends at `sink`."""
    slot: Slot = getattr(config, place)
    sequential, position = slot.insertion == "sequential", slot.position(place)
    if position == "layers":
        by_layer: dict[str, dict[str, Projection]] = {}
        for key, projection in projections.items():
            if key.rstrip("0123456789") in slot.chosen_projections(place):
                by_layer.setdefault(projection.layer, {})[key] = projection
        for layer, of_layer in by_layer.items():
            made.makers[layer] = _layer_maker(config, place, layer, of_layer, anatomy)
        return
    inner = anatomy.widths[sink][0 if position == "heads" else 1]
    inputs = inner if sequential else anatomy.widths[source][0]
    reading = None if sequential else Reading()
    if reading is not None:
        made.makers[source] = lambda trunks: Tap(reading)
    side = InputSide if position == "heads" else OutputSide
    made.makers[sink] = lambda trunks: side(
        _bottleneck(config, place, inputs, inner, sink), reading
    )


def _layer_maker(
    config: UnifiedPeftConfig,
    place: Place,
    layer: str,
    projections: dict[str, Projection],
    anatomy: Anatomy,
) -> Maker:
    slot: Slot = getattr(config, place)
    sequential = slot.insertion == "sequential"
    inputs, outputs = anatomy.widths[layer]

    def make(trunks: Trunks) -> LayerAdapter:
        parts = {
            key: (
                part,
                _bottleneck(
                    config,
                    place,
                    part.width if sequential else inputs,
                    part.width,
                    f"{layer} {key}",
                ),
            )
            for key, part in projections.items()
        }
        if slot.form == "lora":
            return LowRank(parts, outputs)
        return OnLayer(parts, outputs, sequential)

    return make


def _bottleneck(
    config: UnifiedPeftConfig, place: Place, inputs: int, outputs: int, name: str
) -> Bottleneck:
    return Bottleneck(
        getattr(config, place), config.width(place), inputs, outputs, config.seed, name
    )
