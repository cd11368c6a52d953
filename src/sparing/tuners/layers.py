"""Base layers wrapped with their adapters: which are active, merged or disabled."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.errors import ConfigError
from sparing.tuners.adapters import AdditiveAdapter, LayerAdapter, ModuleAdapter, unmergeable
from sparing.tuners.matrices import matrix_view


class TunerLayer(nn.Module, BaseTunerLayer):
    """Wraps one base layer and holds its adapters by name.

    Arguments:
        base_layer: `nn.Linear`, `Conv1D`, `nn.Conv2d` or a quantised linear layer.
        prefix: of the method; names the container of adapters in the state dict.
    """

    def __init__(self, base_layer: nn.Module, prefix: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self.adapter_layer_names = (f"{prefix}adapter",)
        self.add_module(f"{prefix}adapter", nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged: tuple[Tensor, nn.Parameter | None] | None = None

    @property
    def adapters(self) -> Any:
        """The adapters of this layer by name: a `nn.ModuleDict` of `LayerAdapter`s."""
        return getattr(self, self.adapter_layer_names[0])

    def add(self, name: str, adapter: LayerAdapter | ModuleAdapter) -> None:
        """Hold one more adapter, on the base layer's device."""
        self.adapters[name] = adapter
        self._move_adapter_to_device_of_base_layer(name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would also cast to the base layer's type and so round float32 adapters to bfloat16.
        if adapter_name not in self.adapters:
            return
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        tensors = [
            *self.adapters[adapter_name].parameters(),
            *self.adapters[adapter_name].buffers(),
        ]
        if target is not None and not any(t.is_meta for t in tensors):
            self.adapters[adapter_name].to(target)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output changed by the active adapters. x: (..., inputs)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [self.adapters[name] for name in self.active_adapters if name in self.adapters]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1:
            return active[0](x, self.base_layer)
        if all(isinstance(adapter, AdditiveAdapter) for adapter in active):
            y = self.base_layer(x)
            for adapter in active:
                y = y + adapter.delta(x).to(y.dtype)
            return y
        return self._through_weights(x, active)

    def _through_weights(self, x: Tensor, active: Iterable[Any]) -> Tensor:
        layer: Any = self.get_base_layer()
        weight, bias = matrix_view(layer, self.get_base_weight()), getattr(layer, "bias", None)
        for adapter in active:
            weight, bias = adapter.merged(weight, bias)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, weight.view_as(layer.weight), bias)
        return F.linear(x, weight.to(x.dtype), bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight.

        The weight before is kept until `unmerge`, so that unmerging is exact.

        Raises:
            ConfigError: an adapter depends on its input, the base weight is packed, or, with
                `safe_merge`, the merged weight is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapters]
        if not names:
            return
        layer: Any = self.get_base_layer()
        if self.quantization_backend is not None:
            raise ConfigError(
                type(layer).__name__,
                expected="a base layer with plain floating-point weights",
                found="a quantised weight, which merging would round again",
                mend="Load the base model unquantised and merge there.",
            )
        weight, bias = matrix_view(layer, layer.weight.data), layer.bias
        with torch.no_grad():
            for name in names:
                adapter = self.adapters[name]
                if not adapter.mergeable:
                    raise unmergeable(name, adapter)
                weight, bias = adapter.merged(weight, bias)
        if safe_merge and not torch.isfinite(weight).all():
            raise ConfigError(
                f"adapter {names}",
                expected="finite merged weights",
                found="NaN or infinity",
                mend="Train again with a smaller learning rate.",
            )
        if self._unmerged is None:
            self._unmerged = (layer.weight.data, layer.bias)
        stored = weight.t() if isinstance(layer, Conv1D) else weight
        layer.weight.data = stored.reshape(layer.weight.shape).contiguous()
        if bias is not layer.bias:
            layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the weight from before the first merge, bit by bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer: Any = self.get_base_layer()
        weight, bias = self._unmerged
        layer.weight.data = weight.to(layer.weight.device)
        layer.bias = bias
        self._unmerged = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the base weight by one adapter, shaped like the base weight."""
        layer: Any = self.get_base_layer()
        base = self.get_base_weight()
        weight = matrix_view(layer, base)
        change = self.adapters[adapter].merged(weight, getattr(layer, "bias", None))[0] - weight
        return (change.t() if isinstance(layer, Conv1D) else change).reshape(base.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may approximate the adapter by a LoRA through `get_delta_weight`: only if
        it leaves the bias alone, which a LoRA cannot change."""
        adapter: Any = self.adapters[adapter_name] if adapter_name in self.adapters else None
        if adapter is None or not adapter.mergeable:
            return False
        layer: Any = self.get_base_layer()
        weight, bias = matrix_view(layer, self.get_base_weight()), getattr(layer, "bias", None)
        with torch.no_grad():
            after = adapter.merged(weight, bias)[1]
        return after is bias or (after is not None and torch.equal(after, _or_zeros(bias, after)))


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor


class AdaptedModule(TunerLayer):
    """Any module with `ModuleAdapter`s; several active ones wrap each other in their order."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = self.base_layer
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.adapters:
                    call = partial(self.adapters[name], call)
        return call(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.adapters:
                raise unmergeable(name, self.adapters[name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class AdaptedLinear(TunerLayer):
    """A linear layer with adapters. PEFT's "all-linear" looks for "Linear" in the class name."""


class AdaptedConv2d(TunerLayer):
    """A convolution with adapters."""
