"""Adapters of any PEFT method, ours included, as experts: merged layer by layer by PEFT itself.

The base is mapped into memory, not loaded: only the layer that is being merged is copied.
"""

import threading
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparing.errors import CheckpointError, SparingError
from sparing.merge.experts import Expert, base_name, require_finite
from sparing.merge.skeleton import skeleton
from sparing.shards import Checkpoint

_ADAPTER = "expert"
_KEPT_LAYERS = 2  # merged ones, while their numbers are asked for


class TunerExpert(Expert):
    """An adapter that PEFT can merge.

    Arguments:
        label: its name, for messages.
        path: its folder.
        base: the base model's weights.
        folder: the base model's folder, with its config.

    Raises:
        CheckpointError: PEFT or transformers cannot load it on this base, or it cannot be merged.
    """

    complete = False

    def __init__(self, label: str, path: Path, base: Checkpoint, folder: Path) -> None:
        self.label, self.path = label, path
        self.files = sorted(path.glob("adapter_model.safetensors"))
        if not self.files:
            Checkpoint(path).close()  # says what is there instead
        self._base = base
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, Tensor] = OrderedDict()
        try:
            with ExitStack() as stack:
                stack.callback(torch.set_rng_state, torch.get_rng_state())
                self._model = self._load(folder)
            self._owners = self._owners_of_tensors()
            for owner in list(self._owners.values())[:1]:
                self._merged(owner)  # some adapters depend on their input; hear of it at once
        except SparingError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"adapter {label}",
                expected="an adapter of this base",
                found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                mend="Merge it into its own base with merge_and_unload and give the whole model.",
            ) from error

    def _load(self, folder: Path) -> nn.Module:
        import peft

        model = skeleton(folder, f"adapter {self.label}")
        _fill_with_maps(model, self._base)
        loaded: Any = peft.PeftModel.from_pretrained(model, self.path, adapter_name=_ADAPTER)
        return loaded.base_model.model

    def _owners_of_tensors(self) -> dict[str, nn.Module]:
        """By the base's names, the wrapper that changes a tensor."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        owners: dict[str, nn.Module] = {}
        for name, module in self._model.named_modules():
            if isinstance(module, BaseTunerLayer):
                inner: Any = module.get_base_layer()
            elif isinstance(module, ModulesToSaveWrapper):
                inner = module.original_module
            else:
                continue
            for tensor, _ in inner.named_parameters():
                if ".base_layer" not in tensor:
                    owners[base_name(f"{name}.{tensor}", self._base, self.label)] = module
        return owners

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._base.tensors[name].shape for name in self._owners}

    def close(self) -> None:
        self._recent.clear()

    def delta(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        with self._lock:
            if name not in self._recent:
                self._recent.update(self._merged(self._owners[name]))
                while len(self._recent) > 2 * _KEPT_LAYERS:
                    self._recent.popitem(last=False)
            change = self._recent[name]
        values = change[start:stop].to(base.device, base.dtype)
        require_finite(values, str(self.path), name)
        return values

    def _merged(self, owner: nn.Module) -> dict[str, Tensor]:
        """The flat task vectors of all tensors of one wrapped module."""
        names = [name for name, module in self._owners.items() if module is owner]
        layer: Any = owner
        if not hasattr(owner, "modules_to_save"):
            return self._merged_layer(layer, names)
        saved = dict(layer.modules_to_save[_ADAPTER].named_parameters())
        return {
            name: _difference(saved[_leaf(name, saved)], self._base.read(name)) for name in names
        }

    def _merged_layer(self, owner: Any, names: list[str]) -> dict[str, Tensor]:
        layer = owner.get_base_layer()
        mapped = dict(layer.named_parameters(recurse=False))
        empty = [name for name, tensor in layer._parameters.items() if tensor is None]
        try:
            for leaf, tensor in mapped.items():
                exact = torch.promote_types(tensor.dtype, torch.float32)
                copy = tensor.detach().to(exact, copy=True)
                setattr(layer, leaf, nn.Parameter(copy, requires_grad=False))
            owner.merge(adapter_names=[_ADAPTER])
            added = [leaf for leaf in empty if layer._parameters[leaf] is not None]
            if added and layer._parameters[added[0]].abs().max() > 0:
                raise CheckpointError(
                    f"adapter {self.label}",
                    expected="changes of tensors that the base has",
                    found=f"a new {added[0]} for {names[0]}",
                    mend="Keep the adapter as it is; the base has no place for it.",
                )
            changed = dict(layer.named_parameters(recurse=False))
            return {
                name: _difference(changed[_leaf(name, changed)], mapped[_leaf(name, mapped)])
                for name in names
            }
        finally:
            owner.merged_adapters.clear()
            if hasattr(owner, "_unmerged"):
                owner._unmerged = None
            for leaf, tensor in {**mapped, **dict.fromkeys(empty)}.items():
                layer._parameters[leaf] = tensor


def _leaf(name: str, tensors: dict[str, Any]) -> str:
    return max((leaf for leaf in tensors if f".{name}".endswith(f".{leaf}")), key=len)


def _difference(changed: Tensor, before: Tensor) -> Tensor:
    flat = changed.detach().flatten()
    return flat - before.detach().flatten().to(flat.dtype)


def _fill_with_maps(model: nn.Module, base: Checkpoint) -> None:
    """Give a model without weights those of the base, mapped from its files."""
    for name, _ in list(model.named_parameters()):
        try:
            saved = base_name(name, base, "base")
        except CheckpointError:
            continue  # tied to another
        parent, _, leaf = name.rpartition(".")
        with safe_open(base.file(saved), framework="pt") as file:
            tensor = file.get_tensor(saved)
        model.get_submodule(parent)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    model.tie_weights()  # type: ignore[operator]
