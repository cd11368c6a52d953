"""Adapters of different origin, all seen as low-rank factors by module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from sparing.adapt.mos import MoSAdapter
from sparing.adapt.phatgoose import PhatgooseAdapter
from sparing.checkpoint import read_json
from sparing.errors import CheckpointError, ConfigError
from sparing.lora_files import CONFIG_FILE, Factors, FactorShape, open_lora
from sparing.tuners import AdditiveAdapter, TunerConfig, TunerLayer, layer_shape


@dataclass(frozen=True)
class Expert:
    """One adapter.

    Arguments:
        name: for people.
        path: of its folder.
        config: its `adapter_config.json`.
        shapes: of its factors, by module name.
        read: gives the factors of a module.
    """

    name: str
    path: Path
    config: dict[str, Any]
    shapes: dict[str, FactorShape]
    read: Callable[[str], Factors]


def open_experts(
    base: nn.Module, folders: Sequence[str | Path] | Mapping[str, str | Path]
) -> list[Expert]:
    """Open adapters of a base model: plain LoRAs of PEFT, and ours where they are low-rank.

    Arguments:
        base: the plain base model.
        folders: of the adapters; names are those of the folders, unless a mapping gives others.

    Raises:
        ConfigError: no folder, or two of one name; or the base is adapted already.
        CheckpointError: an adapter is damaged, of another kind, or does not fit the base.
    """
    if any(isinstance(module, PeftModel | TunerLayer) for module in base.modules()):
        raise ConfigError(
            "base",
            expected="a plain model",
            found="one with adapters",
            mend="Load the base model afresh.",
        )
    named = folders if isinstance(folders, Mapping) else _by_name(folders)
    if not named:
        raise ConfigError(
            "experts", expected="at least one adapter", found="none", mend="Give adapter folders."
        )
    return [_open(base, name, Path(folder)) for name, folder in named.items()]


def _by_name(folders: Sequence[str | Path]) -> dict[str, str | Path]:
    named: dict[str, str | Path] = {}
    for folder in folders:
        name = Path(folder).resolve().name
        if name in named:
            raise ConfigError(
                "experts",
                expected="folders of different names",
                found=f"{named[name]} and {folder}",
                mend="Give a mapping from names to folders.",
            )
        named[name] = folder
    return named


def _open(base: nn.Module, name: str, path: Path) -> Expert:
    config = read_json(path / CONFIG_FILE)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(config.get("peft_type"))
    if kind is not None and issubclass(kind, TunerConfig):
        factors = _read_ours(base, path)
        shapes = {
            module: FactorShape(len(found.a), found.a.shape[1], len(found.b))
            for module, found in factors.items()
        }
        expert = Expert(name, path, config, shapes, factors.__getitem__)
    else:
        lora = open_lora(path)
        expert = Expert(name, path, config, lora.shapes, lora.read)
    _check_fits(base, expert)
    return expert


def _check_fits(base: nn.Module, expert: Expert) -> None:
    modules = dict(base.named_modules())
    for name, shape in expert.shapes.items():
        expected = f"a layer of {shape.inputs} inputs and {shape.outputs} outputs in the base"
        if name not in modules:
            found = "no such module"
        elif not hasattr(modules[name], "weight"):
            found = f"a {type(modules[name]).__name__}"
        else:
            outputs, inputs = layer_shape(modules[name])
            if (inputs, outputs) == (shape.inputs, shape.outputs):
                continue
            found = f"one of {inputs} inputs and {outputs} outputs"
        raise CheckpointError(
            f"module {name!r} of expert {expert.name!r}",
            expected=expected,
            found=found,
            mend="The expert belongs to another base model; leave it out.",
        )


def check_same_base(base: nn.Module, experts: Sequence[Expert]) -> None:
    """Refuse experts that say they were trained on another base, or revision, than this one.

    Raises:
        CheckpointError: naming the expert.
    """
    name = getattr(getattr(base, "config", None), "_name_or_path", "") or None
    revision = None
    for expert in experts:
        theirs = expert.config.get("base_model_name_or_path") or None
        revised = expert.config.get("revision") or None
        other_name = name and theirs and theirs != name
        if other_name or (revision and revised and revised != revision):
            raise CheckpointError(
                f"expert {expert.name!r}",
                expected=f"base {name}, revision {revision or 'any'}",
                found=f"base {theirs}, revision {revised}",
                mend="Leave it out; or give check_base=False if these are the same weights.",
            )
        name, revision = name or theirs, revision or revised


def _read_ours(base: nn.Module, path: Path) -> dict[str, Factors]:
    """Factors of one of our adapters, which needs the base to be read."""
    model: Any = PeftModel.from_pretrained(base, str(path))
    try:
        factors = {}
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, TunerLayer):
                found = _factors(layer.adapters["default"], f"module {name!r} of {path}")
                if len(found.a):
                    factors[name] = found
        return factors
    finally:
        model.unload()


@torch.no_grad()
def _factors(adapter: nn.Module, where: str) -> Factors:
    if isinstance(adapter, PhatgooseAdapter) and len(adapter.ranks) == 1:
        return Factors(adapter.a.clone(), adapter.b.t().clone(), float(adapter.scales[0]))
    if isinstance(adapter, MoSAdapter):
        a, b = adapter.factors()
        return Factors(a.clone(), b.t().clone(), 1.0)
    if isinstance(adapter, AdditiveAdapter) and adapter.mergeable:
        found = low_rank(adapter.delta_weight())
        if found is not None:
            return found
    raise CheckpointError(
        where,
        expected="an adapter whose effect is one low-rank matrix added to the weight",
        found=f"{type(adapter).__name__}, whose effect is not",
        mend="Train this expert as LoRA, MoS or PhatgooseConfig.",
    )


def low_rank(delta: Tensor) -> Factors | None:
    """Factors of a matrix (outputs, inputs), exact up to rounding; None if they would not be
    smaller than it is."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    noise = values[0] * max(delta.shape) * torch.finfo(torch.float32).eps
    rank = int((values > noise).sum())
    if rank * sum(delta.shape) >= delta.numel():
        return None
    return Factors(right[:rank].float(), (left[:, :rank] * values[:rank]).float(), 1.0)
