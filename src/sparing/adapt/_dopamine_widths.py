"""Linear layers that lose neurons."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def keep(layer: Any, rows: Tensor, *, outputs: bool) -> None:
    """Leave only some outputs or inputs of a linear layer."""
    axis = int(not outputs) ^ int(isinstance(layer, Conv1D))
    layer.weight = with_values(layer.weight, layer.weight.data.index_select(axis, rows))
    bias = getattr(layer, "bias", None)
    if outputs and bias is not None:
        layer.bias = with_values(bias, bias.data.index_select(0, rows))
    _tell_widths(layer)


def resize(layer: Any, stored: Tensor) -> None:
    """Give a linear layer the shape of a stored weight."""
    layer.weight = with_values(layer.weight, layer.weight.new_zeros(stored.shape))
    outputs = stored.shape[1 if isinstance(layer, Conv1D) else 0]
    bias = getattr(layer, "bias", None)
    if bias is not None and len(bias) != outputs:
        layer.bias = with_values(bias, bias.new_zeros(outputs))
    _tell_widths(layer)


def _tell_widths(layer: Any) -> None:
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape


def with_values(old: nn.Parameter, tensor: Tensor) -> nn.Parameter:
    """A parameter that takes the place of another."""
    return nn.Parameter(tensor.contiguous(), requires_grad=old.requires_grad)
