"""Where the paper puts its adapters: beside feed-forward networks, and on queries and values."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from sparing.errors import ConfigError
from sparing.surgery import (
    FeedForward,
    Projection,
    attentions,
    block_names,
    feed_forwards,
    widths,
)
from sparing.tuners import TunerConfig

Found = TypeVar("Found")


@dataclass(frozen=True)
class Places:
    """What was found in a model before anything was put on it.

    Arguments:
        blocks: names of its blocks.
        networks: feed-forward networks by the name of their last layer.
        projections: by layer, those of its outputs that are queries or values, by that word.
        fused: the same for layers that also compute something else.
    """

    blocks: list[str]
    networks: dict[str, FeedForward]
    projections: dict[str, dict[str, Projection]]
    fused: dict[str, dict[str, Projection]]

    @classmethod
    def of(cls, model: nn.Module) -> "Places":
        """Look for them; what a model does not have is empty."""
        networks = {network.last: network for network in _found(feed_forwards, model)}
        projections: dict[str, dict[str, Projection]] = {}
        for attention in _found(attentions, model):
            for role, place in (("query", attention.query), ("value", attention.value)):
                projections.setdefault(place.layer, {})[role] = place
        fused = {
            name: parts
            for name, parts in projections.items()
            if any(place.width < widths(model.get_submodule(name))[1] for place in parts.values())
        }
        return cls(block_names(model), networks, projections, fused)


def within_chosen_blocks(config: TunerConfig, names: Iterable[str]) -> set[str]:
    """Those of the names that `layers_to_transform` leaves; PEFT itself ignores it for modules that
    are named in full."""
    return {
        name
        for name in names
        if check_target_module_exists(
            LoraConfig(
                target_modules=[name.rpartition(".")[2]],
                layers_to_transform=config.layers_to_transform,
                layers_pattern=config.layers_pattern,
            ),
            name,
        )
    }


def _found(look: Callable[[nn.Module], list[Found]], model: nn.Module) -> list[Found]:
    try:
        return look(model)
    except ConfigError:
        return []
