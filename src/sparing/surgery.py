"""Where things are in a model: its blocks, and in each block the feed-forward network.

The architecture is read from the modules themselves, not from a table of model types, so it works
for Llama, Qwen, GPT-2, ViT, BERT, BART and T5 alike.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from sparing.errors import ConfigError

LINEAR = (nn.Linear, Conv1D)
_NAMED: set[Any] = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    _NAMED | {nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Mish}
)


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward network of one block, by module names.

    Arguments:
        block: number of the block, from 0, over the whole model (encoder first).
        first: layers that read its input: one, or gate and up.
        activation: the module of the nonlinearity.
        last: the layer whose output is its output.
        width: of its input and output.
        hidden: width between.
    """

    block: int
    first: tuple[str, ...]
    activation: str
    last: str
    width: int
    hidden: int


def widths(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer or `Conv1D`."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def block_names(model: nn.Module) -> list[str]:
    """Names of the repeated blocks in the model's order: members of the outermost `ModuleList`s
    (or `Sequential`s of one class) that hold linear layers."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or _inside(name, found):
            continue
        members = list(module.named_children())
        alike = len({type(child) for _, child in members}) == 1
        if members and alike and all(_holds_linear(child) for _, child in members):
            found += [f"{name}.{child}" if name else child for child, _ in members]
    return found


def block_of(module_name: str, blocks: list[str]) -> int | None:
    """The number of the block that a module lies in, or None."""
    for number, block in enumerate(blocks):
        if module_name == block or module_name.startswith(f"{block}."):
            return number
    return None


def feed_forwards(model: nn.Module) -> list[FeedForward]:
    """The dense feed-forward networks of a model, one a block, in the model's order.

    Blocks without one (mixtures of experts, say) are left out.

    Raises:
        ConfigError: the model has none at all.
    """
    found = []
    for number, block in enumerate(block_names(model)):
        network = _feed_forward(model.get_submodule(block), block, number)
        if network is not None:
            found.append(network)
    if not found:
        raise ConfigError(
            type(model).__name__,
            expected="blocks with a feed-forward network: linear, activation, linear",
            found="none",
            mend="Name the layers yourself, or use a method that adapts linear layers.",
        )
    return found


def _feed_forward(block: nn.Module, prefix: str, number: int) -> FeedForward | None:
    layers, activations = [], []
    for name, module in block.named_modules(prefix=prefix):
        if "attention" in name.lower() or "attn" in name.lower():
            continue
        if isinstance(module, LINEAR):
            layers.append((name, module))
        elif isinstance(module, ACTIVATIONS):
            activations.append(name)
    if len(layers) not in (2, 3) or len(activations) != 1:
        return None
    (last, down), first = layers[-1], layers[:-1]
    hidden, width = widths(down)
    if any(widths(layer) != (width, hidden) for _, layer in first):
        return None
    return FeedForward(
        number, tuple(name for name, _ in first), activations[0], last, width, hidden
    )


def _inside(name: str, blocks: list[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(part, LINEAR) for part in module.modules()) and bool(
        list(module.children())
    )
