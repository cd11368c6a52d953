"""Linear layers of every kind as matrices: plain, transposed, convolutional and packed."""

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def matrix_view(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a layer's weight as (outputs, inputs): transposed for GPT-2's `Conv1D`,
    (out, in·height·width) for a convolution, and (width, 1) for a normalisation."""
    if isinstance(layer, Conv1D):
        return tensor.t()
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a layer as a matrix, also where its weight is packed."""
    if resolve_quantization_backend(layer) is None:
        assert isinstance(layer.weight, Tensor)
        outputs, inputs = matrix_view(layer, layer.weight).shape
        return outputs, inputs
    width, height = _get_in_out_features(layer)
    assert width is not None
    assert height is not None
    return height, width


def product_type(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The type in which a plain linear layer would multiply x: autocast's, if it is on.

    Products of our own operators are not seen by autocast, so they have to ask.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise
