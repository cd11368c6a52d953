"""Where things are in a model: its blocks, and in each its attention and feed-forward network.

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


@dataclass(frozen=True)
class Projection:
    """The outputs `start` to `stop` of a linear layer: query, key or value.

    Arguments:
        layer: name of the linear layer.
        start, stop: its outputs that belong to the projection; all of them unless it is fused.
    """

    layer: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Number of outputs."""
        return self.stop - self.start


@dataclass(frozen=True)
class Attention:
    """The attention of one block, by module names; a block of a decoder may have two.

    Arguments:
        block: number of the block, from 0, over the whole model (encoder first).
        role: "self" or "cross", after "encoder-" or "decoder-" where the names tell.
        module: the module whose forward attends.
        query, key, value: projections of its input, or of the encoder's output.
        output: the layer that reads the concatenated heads.
        width: of the input.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: width of each.
    """

    block: int
    role: str
    module: str
    query: Projection
    key: Projection
    value: Projection
    output: str
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


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


_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)
_FUSED = ("c_attn", "qkv_proj", "Wqkv", "qkv")  # queries first, then keys, then values
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "o", "out_lin", "dense", "proj")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
_CROSS = ("cross", "encdec", "encoder_attn")


def attentions(model: nn.Module) -> list[Attention]:
    """The attentions of a model in its order, found by the names of their projections.

    Raises:
        ConfigError: the model has none whose projections are known.
    """
    found = []
    for number, block in enumerate(block_names(model)):
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            attention = _attention(model, name, module, number)
            if attention is not None:
                found.append(attention)
    if not found:
        raise ConfigError(
            type(model).__name__,
            expected="blocks with attention: projections of query, key and value, and an output",
            found="none whose names are known",
            mend="Known names: "
            + "; ".join(", ".join(names) for names in (*_SEPARATE, _FUSED))
            + f"; and for the output {', '.join(_OUTPUTS)}.",
        )
    return found


def _attention(model: nn.Module, name: str, module: nn.Module, block: int) -> Attention | None:
    layers: dict[str, nn.Module] = {
        key: layer for key, layer in module.named_children() if isinstance(layer, LINEAR)
    }
    head_dim = next((getattr(module, key) for key in _HEAD_WIDTHS if hasattr(module, key)), None)
    output = next((f"{name}.{key}" for key in _OUTPUTS if key in layers), None)
    beside = f"{name.rpartition('.')[0]}.output.dense"  # BERT keeps it in a module of its own
    if output is None and isinstance(_submodule(model, beside), LINEAR):
        output = beside
    if not isinstance(head_dim, int) or output is None:
        return None
    heads = widths(model.get_submodule(output))[0]
    parts = _projections(name, layers, heads)
    if parts is None:
        return None
    query, key, value = parts
    path = name.lower()
    side = "encoder-" if ".encoder." in f".{path}" else ""
    side = "decoder-" if ".decoder." in f".{path}" else side
    return Attention(
        block,
        side + ("cross" if any(mark in path for mark in _CROSS) else "self"),
        name,
        query,
        key,
        value,
        output,
        widths(model.get_submodule(query.layer))[0],
        query.width // head_dim,
        key.width // head_dim,
        head_dim,
    )


def _projections(
    name: str, layers: dict[str, nn.Module], heads: int
) -> tuple[Projection, Projection, Projection] | None:
    """Query, key and value; `heads` is the width of the concatenated heads."""
    for names in _SEPARATE:
        if all(key in layers for key in names):
            query, key, value = (
                Projection(f"{name}.{part}", 0, widths(layers[part])[1]) for part in names
            )
            return query, key, value
    fused = next((key for key in _FUSED if key in layers), None)
    if fused is None:
        return None
    layer, total = f"{name}.{fused}", widths(layers[fused])[1]
    if "q_attn" in layers:  # GPT-2's cross-attention
        query, start = Projection(f"{name}.q_attn", 0, heads), 0
    else:
        query, start = Projection(layer, 0, heads), heads
    middle = (start + total) // 2
    return query, Projection(layer, start, middle), Projection(layer, middle, total)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


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
