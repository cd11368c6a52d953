"""What every PEFT method of `sparing.adapt` has in common.

A method is three small classes in one file: a config (what the user writes), a `LayerAdapter`
(the trainable numbers of one layer and how they change it) and a `Tuner` (which adapter goes on
which layer). Everything PEFT promises about named adapters, merging, saving and loading is here.
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.errors import CheckpointError, ConfigError
from sparing.fingerprint import fingerprint
from sparing.forward_pass import Passes


@dataclass
class TunerConfig(PeftConfig):
    """Options that all our fine-tuning methods share.

    Arguments:
        target_modules: names or a regular expression of the layers to adapt, or "all-linear".
        exclude_modules: names or a regular expression of layers to leave out.
        layers_to_transform: only blocks with these numbers.
        layers_pattern: name of the block list, if it is not a common one.
        modules_to_save: other modules to train in full and save (a task head, say).
        seed: of every random choice; same seed, same adapter, on any device and world size.
        base_fingerprint: filled in at first use by methods that train entries of the base weights;
            guards against loading on another base model.

    Class attributes for budgets and comparisons:
        method: name in PEFT, lower case with underscores.
        bound_to_base: whether the adapter makes sense only on the very weights it was trained on.
        starts_fresh: whether it is trained from scratch; False for methods that are put together
            from trained adapters, which comparisons leave out.
        size_option: the integer option that sets the number of trainable parameters.
        size_pattern_option: the option that sets it per module, if there is one.
        smaller_options: options to fall back to, in order, where the defaults exceed a budget or
            do not suit a model.
        learning_rates: a grid around the paper's, ascending.
    """

    method: ClassVar[str]
    bound_to_base: ClassVar[bool] = False
    starts_fresh: ClassVar[bool] = True
    size_option: ClassVar[str]
    size_pattern_option: ClassVar[str | None] = None
    smaller_options: ClassVar[tuple[dict[str, Any], ...]] = ()
    learning_rates: ClassVar[tuple[float, ...]]

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    seed: int = 0
    base_fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method.upper()]
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def require(self, option: str, holds: bool, expected: str, mend: str) -> None:
        """Raise a `ConfigError` that names the option unless its value `holds`."""
        if not holds:
            raise ConfigError(
                f"{type(self).__name__}.{option}",
                expected=expected,
                found=repr(getattr(self, option)),
                mend=mend,
            )


def option_for(pattern: dict[str, Any] | None, module_name: str, default: Any) -> Any:
    """The value of a per-module option: that of the matching key of `pattern`, or `default`.

    Keys match as in PEFT's `rank_pattern`: the end of a module name, or a regular expression.
    """
    if not pattern:
        return default
    return pattern.get(get_pattern_key(list(pattern), module_name), default)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for one random choice: other names, other numbers.

    Arguments:
        seed: of the adapter.
        name: of the module and of what is drawn for it.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


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


class LayerAdapter(nn.Module, ABC):
    """One adapter on one layer.

    Trainable parameters are float32 whatever the type of the base model.

    Attributes:
        mergeable: whether the effect is a fixed change of weight and bias.
        instead_of_merging: what to do if it is not.
    """

    mergeable: ClassVar[bool] = True
    instead_of_merging: ClassVar[str] = "Keep the adapter as it is; it cannot be merged."

    @abstractmethod
    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The adapted output.

        Arguments:
            x: the layer's input, (..., inputs).
            layer: the frozen base layer.

        Returns:
            (..., outputs), of the type that `layer(x)` has.
        """

    @abstractmethod
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a plain layer with the same effect; differentiable.

        Arguments:
            weight: (outputs, inputs), not to be changed in place.
            bias: (outputs,) or None.
        """


class AdditiveAdapter(LayerAdapter):
    """An adapter whose output is added to the base layer's; several of them simply add up."""

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """What is added to the base layer's output: (..., inputs) -> (..., outputs)."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """(outputs, inputs) float: the weight change with the same effect."""

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        y = layer(x)
        return y + self.delta(x).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        exact = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(exact) + self.delta_weight().to(exact)).to(weight.dtype), bias


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

    def add(self, name: str, adapter: "LayerAdapter | ModuleAdapter") -> None:
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
                    raise _unmergeable(name, adapter)
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


def _weight_of(layer: TunerLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor


class ModuleAdapter(nn.Module, ABC):
    """One adapter on a module that is not a linear layer: an activation, a feed-forward network.

    Trainable parameters are float32 whatever the type of the base model.
    """

    mergeable: ClassVar[bool] = False
    instead_of_merging: ClassVar[str] = LayerAdapter.instead_of_merging

    @abstractmethod
    def forward(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The adapted output.

        Arguments:
            module: the base module, or the one already changed by another active adapter.
            args, kwargs: of the module's call.
        """


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
                raise _unmergeable(name, self.adapters[name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


def _unmergeable(name: str, adapter: LayerAdapter | ModuleAdapter) -> ConfigError:
    return ConfigError(
        f"adapter {name!r}",
        expected="a change of the weights that is the same for every input",
        found=f"{type(adapter).__name__}, which depends on its input",
        mend=adapter.instead_of_merging,
    )


class AdaptedLinear(TunerLayer):
    """A linear layer with adapters. PEFT's "all-linear" looks for "Linear" in the class name."""


class AdaptedConv2d(TunerLayer):
    """A convolution with adapters."""


class Tuner(BaseTuner):
    """Puts a method's adapters on a model.

    A method sets `prefix` and implements `new_adapter`; one with tensors shared by all layers also
    implements `new_shared`. One whose layers need to know more than their input sets `uses_passes`
    and gives `self.passes` to its adapters; keyword arguments of the model's call named in
    `forward_inputs` go there.
    """

    prefix: str
    tuner_layer_cls = TunerLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    uses_passes: ClassVar[bool] = False
    forward_inputs: ClassVar[tuple[str, ...]] = ()

    def new_adapter(
        self, config: Any, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> LayerAdapter | ModuleAdapter:
        """The adapter for one layer, created on the CPU and equal to the identity.

        Arguments:
            config: of the adapter.
            layer: the base layer.
            module_name: its full name in the model.
            shared: what `new_shared` returned.

        Raises:
            ConfigError: the layer does not suit the options.
        """
        raise TypeError(f"{type(self).__name__} does not implement new_adapter")

    def new_shared(self, config: Any, layers: dict[str, nn.Module]) -> nn.Module | None:
        """Parameters that all layers of one adapter share, or None.

        Held once, on the tuner; the adapters refer to them without registering them again.

        Arguments:
            config: of the adapter.
            layers: the base layers to be adapted, by module name.
        """
        return None

    def after_step(self, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after every optimiser step by our training loop and by `TunerCallback`.

        Arguments:
            step: steps taken so far, from 1.
            total_steps: of the whole run.
            optimizer: the one that took the step.
        """

    def before_step(self) -> None:
        """Called once the gradients are complete, before they are used.

        Our own loop clips the gradients afterwards, `Trainer` has clipped them before.
        """

    @property
    def shared(self) -> nn.ModuleDict:
        """Shared parameters by adapter name."""
        name = f"{self.prefix}shared"
        if name not in self._modules:
            self.add_module(name, nn.ModuleDict())
        return self._modules[name]  # type: ignore[return-value]

    @property
    def passes(self) -> Passes:
        """What layers share during a forward; see `sparing.forward_pass`."""
        if "_passes" not in self.__dict__:
            self.__dict__["_passes"] = Passes(self.forward_inputs)
            self.passes.watch(self.model)
        return self.__dict__["_passes"]

    def auxiliary_loss(self) -> Tensor | None:
        """What the method adds to the loss of the last forward, or None.

        Already part of `output.loss` in training mode; a loop that computes its own loss from the
        logits adds it.
        """
        return self.passes.auxiliary_loss() if self.uses_passes else None

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config: Any = self.peft_config[adapter_name]
        shared = self.new_shared(config, self.targets(config))
        if shared is not None:
            self.shared[adapter_name] = shared
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.bound_to_base:
            self._check_base(config, adapter_name)
        self._set_shared_trainable()

    def targets(self, config: Any) -> dict[str, nn.Module]:
        """The base layers that a config selects, by module name, in the model's order."""
        config = self._prepare_adapter_config(config, self.get_model_config(self.model))
        config = _maybe_include_all_linear_layers(config, self.model)
        return {
            name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for name, module in self.model.named_modules()
            if name
            and ".base_layer" not in name
            and bool(self._check_target_module_exists(config, name))
        }

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target.get_base_layer() if isinstance(target, TunerLayer) else target
        self._check_layer(layer, current_key)
        shared = self.shared[adapter_name] if adapter_name in self.shared else None
        adapter = self.new_adapter(peft_config, layer, current_key, shared)
        if adapter_name not in self.active_adapters:
            adapter.requires_grad_(False)
        if isinstance(target, TunerLayer):
            target.add(adapter_name, adapter)
            return
        wrapper = self.wrapper_type(layer, adapter)(layer, self.prefix)
        wrapper.add(adapter_name, adapter)
        wrapper.set_adapter(self.active_adapters)
        self._replace_module(parent, target_name, wrapper, target)

    def wrapper_type(self, layer: nn.Module, adapter: nn.Module) -> type[TunerLayer]:
        """The class that wraps a base layer and its adapters."""
        if isinstance(adapter, ModuleAdapter):
            return AdaptedModule
        return AdaptedConv2d if isinstance(layer, nn.Conv2d) else AdaptedLinear

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT looks for the weight of what is wrapped or unwrapped; some modules have none.
        if isinstance(child, AdaptedModule) or next(child.parameters(), None) is None:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        if self.uses_passes:
            self.passes.unwatch(self.model)
        return model

    def _check_layer(self, layer: nn.Module, name: str) -> None:
        if not isinstance(layer, self.layer_types) and resolve_quantization_backend(layer) is None:
            kinds = ", ".join(kind.__name__ for kind in self.layer_types)
            raise ConfigError(
                f"module {name!r}",
                expected=f"one of the layer types {kinds}",
                found=type(layer).__name__,
                mend="Leave it out of target_modules, or name it in exclude_modules.",
            )

    def _check_base(self, config: TunerConfig, adapter_name: str) -> None:
        found = fingerprint(
            _weight_of(module)
            for module in self.model.modules()
            if isinstance(module, TunerLayer) and adapter_name in module.adapters
        )
        if found is None:
            return
        if config.base_fingerprint not in (None, found):
            raise CheckpointError(
                f"{type(config).__name__} adapter",
                expected=f"its own base model (fingerprint {config.base_fingerprint})",
                found=f"another one (fingerprint {found})",
                mend="Load the adapter on its own base model, before any other change to it.",
            )
        config.base_fingerprint = found

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._set_shared_trainable(frozen=inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._set_shared_trainable(frozen=not enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.shared:
            del self.shared[adapter_name]
        self._set_shared_trainable()

    def _set_shared_trainable(self, frozen: bool = False) -> None:
        for name, shared in self.shared.items():
            inference = name in self.peft_config and self.peft_config[name].inference_mode
            shared.requires_grad_(name in self.active_adapters and not frozen and not inference)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in (f"{cls.prefix}adapter", f"{cls.prefix}shared"):
            named = f".{container}.{adapter_name}."
            if named in key:
                return key.replace(named, f".{container}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        expected = model.state_dict()
        for key, tensor in remapped.items():
            if key not in expected:
                raise _other_architecture(key, "a tensor that the model has", "no such tensor")
            if expected[key].shape != tensor.shape:
                raise _other_architecture(
                    key, f"shape {tuple(expected[key].shape)}", f"shape {tuple(tensor.shape)}"
                )
        return remapped


def _other_architecture(key: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"adapter tensor {key!r}",
        expected=expected,
        found=found,
        mend="The adapter belongs to another base architecture or other options; load it there.",
    )


def register_tuner(config_class: type[TunerConfig], tuner_class: type[Tuner]) -> None:
    """Make a method known to PEFT: `get_peft_model`, `save_pretrained`, `from_pretrained`.

    PEFT keeps its methods in an enum, so the method's member is added first. Registering the same
    classes again does nothing.

    Raises:
        ConfigError: this version of PEFT already has another method of that name.
    """
    name = config_class.method
    if name.upper() in PeftType.__members__:
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name.upper()]) is config_class:
            return
        raise ConfigError(
            f"PEFT method {name!r}",
            expected="a name that PEFT does not use",
            found=f"a method of that name in PEFT: {PeftType[name.upper()]!r}",
            mend="Report it to sparing, and use an older peft meanwhile.",
        )
    member = str.__new__(PeftType, name.upper())
    member._name_ = member._value_ = name.upper()
    type.__setattr__(PeftType, name.upper(), member)
    PeftType._member_names_.append(name.upper())
    PeftType._member_map_[name.upper()] = member
    PeftType._value2member_map_[name.upper()] = member
    register_peft_method(
        name=name, config_cls=config_class, model_cls=tuner_class, prefix=tuner_class.prefix
    )
