"""A model without its weights, to know what its tensors are: which belong to linear layers, say."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from sparing.errors import CheckpointError, ConfigError
from sparing.shards import Checkpoint

Targets = str | Sequence[str]


@dataclass(frozen=True)
class Target:
    """A linear layer that experts go to.

    Arguments:
        module: its name in the model.
        weight: name of its weight, in the base's files.
        bias: of its bias, or None.
        inputs: i.
        outputs: o.
        transposed: whether the weight is stored as (i, o), as `Conv1D` does.
    """

    module: str
    weight: str
    bias: str | None
    inputs: int
    outputs: int
    transposed: bool


@dataclass(frozen=True)
class Layout:
    """How a base's files and its model fit together.

    Arguments:
        architecture: class of transformers.
        generates: whether the model generates text.
        targets: the layers that experts go to.
        names: from the base's tensors to the model's.
    """

    architecture: str
    generates: bool
    targets: tuple[Target, ...]
    names: dict[str, str]


def skeleton(folder: Path, label: str) -> nn.Module:
    """The model of a folder, on the meta device.

    Arguments:
        folder: with a config.json.
        label: whose base it is, for messages.

    Raises:
        CheckpointError: the config names no class of transformers.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise _no_class(label, "no config.json")
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["?"])[0], None)
    if kind is None:
        raise _no_class(label, repr(config.architectures))
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model


def layout(base: Checkpoint, folder: Path, targets: Targets) -> Layout:
    """Look at a base model.

    Arguments:
        base: its weights.
        folder: where they are, with a config.json.
        targets: "all-linear", which is all linear layers inside the model's blocks, or patterns of
            their names.

    Raises:
        CheckpointError: files and class do not fit together.
        ConfigError: no linear layer has such a name.
    """
    from sparing.surgery import LINEAR

    model = skeleton(folder, "base")
    names = _names(model, base)
    owners = {ours: theirs for theirs, ours in names.items()}
    found = []
    for name in target_names(model, targets):
        layer = model.get_submodule(name)
        assert isinstance(layer, LINEAR)
        transposed = not isinstance(layer, nn.Linear)
        shape = tuple(layer.weight.shape)
        inputs, outputs = shape if transposed else shape[::-1]
        weight = owners[f"{name}.weight"]
        bias = owners.get(f"{name}.bias")
        found.append(Target(name, weight, bias, inputs, outputs, transposed))
    generates = bool(getattr(model, "can_generate", lambda: False)())
    return Layout(type(model).__name__, generates, tuple(found), names)


def target_names(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the linear layers that experts go to, in the model's order.

    Raises:
        ConfigError: there is none of such a name.
    """
    from sparing.surgery import LINEAR, block_names, block_of

    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    if targets == "all-linear":
        blocks = block_names(model)
        found = [name for name in linear if block_of(name, blocks) is not None] or linear
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        found = [
            name
            for name in linear
            if any(
                fnmatchcase(name, pattern) or f".{name}".endswith(f".{pattern}")
                for pattern in patterns
            )
        ]
    if not found:
        raise ConfigError(
            "target_modules",
            expected='"all-linear", or names or patterns of linear layers',
            found=repr(targets),
            mend=f"The model has {', '.join(linear[:5])} …" if linear else "It has no such layer.",
        )
    return found


def _names(model: nn.Module, base: Checkpoint) -> dict[str, str]:
    """From the base's tensors to the model's; transformers renames those of many architectures.

    Raises:
        CheckpointError: a tensor of the model is none of the base's, or is made of several.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    ours = model.state_dict()
    names: dict[str, str] = {}
    for name in base.tensors:
        prefix = getattr(model, "base_model_prefix", None) or None
        renamed, converted = rename_source_key(name, renamings, converters, prefix, ours)
        if converted is None and renamed in ours:
            names[name] = renamed
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    missing = {name for name, _ in model.named_parameters()} - set(names.values()) - tied
    if missing:
        raise CheckpointError(
            f"tensor {min(missing)!r} of {type(model).__name__}",
            expected="one tensor in the base's files",
            found="none, or several that transformers would put together",
            mend="Give a base whose files and class have the same linear layers.",
        )
    return names


def _no_class(label: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"base of {label}" if label != "base" else "base",
        expected="a config.json that names a class of transformers",
        found=found,
        mend="Give the folder that save_pretrained wrote.",
    )
