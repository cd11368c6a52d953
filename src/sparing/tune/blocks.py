"""Which blocks of a model a mask switches on and off."""

import re
from collections import Counter
from typing import Literal

from torch import nn

from sparing.errors import ConfigError
from sparing.surgery import block_names

Coverage = Literal["strict", "legacy"]
_ATTENTION = re.compile(
    r"(?:(down)_blocks\.(\d+)|(mid)_block|(up)_blocks\.(\d+))\.attentions\.(\d+)"
)
_STAGES = ("down", "mid", "up")


def is_unet(model: nn.Module) -> bool:
    """Whether a model is a UNet in the layout of diffusers."""
    return hasattr(model, "down_blocks") and hasattr(model, "up_blocks")


def attention_blocks(model: nn.Module) -> list[str]:
    """Names of a UNet's attention blocks: down, middle, up, in the order of the forward pass.

    Raises:
        ConfigError: the UNet has none.
    """
    found = [name for name, _ in model.named_modules() if _ATTENTION.fullmatch(name)]
    if not found:
        raise ConfigError(
            type(model).__name__,
            expected="attention blocks below down_blocks, mid_block or up_blocks",
            found="none",
            mend="Name the blocks yourself: block_groups(model, blocks=[...]).",
        )
    return sorted(found, key=_place)


def switchable_blocks(model: nn.Module) -> list[str]:
    """Attention blocks of a UNet; of any other model, the repeated blocks.

    Raises:
        ConfigError: there are none.
    """
    if is_unet(model):
        return attention_blocks(model)
    found = block_names(model)
    if not found:
        raise ConfigError(
            type(model).__name__,
            expected="repeated blocks in a ModuleList or Sequential",
            found="none",
            mend="Name the blocks yourself: block_groups(model, blocks=[...]).",
        )
    return found


def legacy_blocks(model: nn.Module, family: str) -> list[str]:
    """The attention blocks that the released code can mask.

    It looks at two a down block, at the first of the middle, and in every up block at two for
    SVDiff and DiffFit but three for attention tuning: 13 or 16 of Stable Diffusion's 16.
    """
    most = {"down": 2, "mid": 1, "up": 3 if family == "attention" else 2}
    chosen, seen = [], Counter[tuple[str, int]]()
    for name in attention_blocks(model):
        stage, block, _ = _place(name)
        seen[_STAGES[stage], block] += 1
        if seen[_STAGES[stage], block] <= most[_STAGES[stage]]:
            chosen.append(name)
    return chosen


def _place(name: str) -> tuple[int, int, int]:
    """Stage (down, mid, up), block and attention by number."""
    match = _ATTENTION.fullmatch(name)
    assert match is not None
    down, down_block, mid, _, up_block, attention = match.groups()
    stage = 0 if down else 1 if mid else 2
    return stage, int(down_block or up_block or 0), int(attention)
