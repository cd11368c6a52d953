"""Which adapted layers of a model route together (Queryable LoRA, block b(l))."""

import warnings
from dataclasses import dataclass

from torch import nn

from sparing.surgery import block_names, block_of


@dataclass(frozen=True)
class Place:
    """Where an adapted layer stands.

    Arguments:
        block: its block b, from 0, over the whole model.
        before: earlier blocks of the same stack, whose states the depth summary reads.
        opens_block: whether it lies in the first transformer layer of the block.
    """

    block: int
    before: tuple[int, ...]
    opens_block: bool


def place_layers(model: nn.Module, names: list[str], block_size: int) -> dict[str, Place]:
    """Cut every stack of transformer layers into blocks of `block_size` adapted layers.

    Stacks (an image and a text encoder, say) see different tokens, so blocks do not reach across
    them. A linear layer outside of any stack is a block of its own that nobody reads and that reads
    nobody, as it may see other tokens than the stack (a pooler sees one).

    Arguments:
        model: the base model.
        names: of the linear layers to adapt, in the model's order.
        block_size: transformer layers a block; the last block of a stack may be shorter, with a
            warning.

    Returns:
        by module name.
    """
    layers = block_names(model)
    homes = {name: layers[number] if (number := block_of(name, layers)) is not None else None
             for name in names}  # fmt: skip
    stacks: dict[str, list[str]] = {}
    for home in layers:
        if home in homes.values():
            stacks.setdefault(home.rpartition(".")[0], []).append(home)
    blocks: dict[str, Place] = {}
    count = 0
    for stack, members in stacks.items():
        _tell_if_uneven(stack, len(members), block_size)
        first = count
        for position, home in enumerate(members):
            block = first + position // block_size
            opens = position % block_size == 0
            blocks[home] = Place(block, tuple(range(first, block)), opens)
            count = block + 1
    places = {}
    for name, stack_block in homes.items():
        if stack_block is None:
            places[name] = Place(count, (), True)
            count += 1
        else:
            places[name] = blocks[stack_block]
    return places


def _tell_if_uneven(stack: str, layers: int, block_size: int) -> None:
    rest = layers % block_size
    if layers > block_size and rest:
        warnings.warn(
            f"QueryableLoRAConfig.block_size: {layers} layers of {stack!r} in blocks of "
            f"{block_size}; the last block has {rest}.",
            stacklevel=2,
        )
