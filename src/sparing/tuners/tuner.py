"""Puts the adapters of a method on the layers of a model, as PEFT wants it."""

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.errors import CheckpointError, ConfigError
from sparing.fingerprint import fingerprint
from sparing.forward_pass import Passes
from sparing.tuners.adapters import LayerAdapter, ModuleAdapter
from sparing.tuners.config import TunerConfig
from sparing.tuners.layers import AdaptedConv2d, AdaptedLinear, AdaptedModule, TunerLayer


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


def _weight_of(layer: TunerLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


def _other_architecture(key: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"adapter tensor {key!r}",
        expected=expected,
        found=found,
        mend="The adapter belongs to another base architecture or other options; load it there.",
    )
