"""The base of a scaling rule: a model, a width, or a file of shapes as `mup` writes it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparing.errors import CheckpointError, ConfigError
from sparing.scale.parameters import Role, classify
from sparing.scale.planning import Pair, pairs

Shapes = Mapping[str, Sequence[int | None]]

_INNER = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
          "n_inner", "ffn_dim")  # fmt: skip


def pairs_with(
    base: nn.Module | Shapes | Path, target: nn.Module, overrides: dict[str, Role] | None = None
) -> list[Pair]:
    """The parameters of a model beside those of its base.

    Arguments:
        base: a model (the meta device will do), shapes by parameter name, or a `.bsh` file of
            `mup`; None in a shape stands for a side that does not depend on the width.
        target: the model to train.
        overrides: roles of parameters that are not known.

    Raises:
        ConfigError: another architecture.
        CheckpointError: the file is no table of shapes.
    """
    if isinstance(base, nn.Module):
        return pairs(base, target, overrides)
    shapes = read_shapes(base) if isinstance(base, Path) else base
    infos = classify(target, overrides)
    different = sorted(set(shapes) ^ set(infos))
    if different:
        raise ConfigError(
            "base shapes",
            expected="one for every parameter of the model",
            found=f"{len(different)} names in only one of them, such as {different[0]!r}",
            mend="Save the shapes of the same architecture.",
        )
    found = []
    for name, info in infos.items():
        if len(shapes[name]) != len(info.shape):
            raise ConfigError(
                f"base shape of {name!r}",
                expected=f"{len(info.shape)} sides",
                found=repr(list(shapes[name])),
                mend="Save the shapes of the same architecture.",
            )
        sides = zip(shapes[name], info.shape, strict=True)
        shape = tuple(now if side is None else side for side, now in sides)
        found.append(Pair(replace(info, shape=shape), info))
    return found


def read_shapes(path: Path) -> dict[str, list[int | None]]:
    """Shapes by parameter name from a `.bsh` file, which is YAML.

    Raises:
        CheckpointError: missing, or something else.
    """
    import yaml  # comes with transformers

    try:
        table: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        sides = [side for shape in table.values() for side in shape]
        valid = all(side is None or (type(side) is int and side > 0) for side in sides)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        table, valid, found = None, False, f"{type(error).__name__}: {error}"
    else:
        found = "sides that are no whole numbers above 0"
    if not valid:
        raise CheckpointError(
            str(path),
            expected="a table of shapes by parameter name, as mup.save_base_shapes writes it",
            found=" ".join(found.split()),
            mend="Save it again, or give the base model itself.",
        )
    return table


def narrowed(model: nn.Module, width: int, kv_heads: int | None = None) -> nn.Module:
    """A model of another width, on the meta device: the same depth and size of heads.

    Arguments:
        model: a `transformers` model; its feed-forward width and number of heads are scaled.
        width: hidden size of the base.
        kv_heads: of the base; must be said where keys and values have fewer heads than queries,
            as nobody can tell whether they grow.

    Raises:
        ConfigError: no such configuration, or sizes that do not come out whole.
    """
    found = getattr(model, "config", None)
    hidden = getattr(found, "hidden_size", None)
    if found is None or not isinstance(hidden, int):
        raise ConfigError(
            f"base_width of {type(model).__name__}",
            expected="a transformers model whose configuration has a hidden_size",
            found="none",
            mend="Give base=, a model of the base's size or its shapes.",
        )
    config: Any = copy.deepcopy(found)

    def scaled(name: str, value: int) -> int:
        whole, rest = divmod(value * width, hidden)
        if rest or not whole:
            raise ConfigError(
                f"base_width={width}",
                expected=f"a whole {name} in proportion to width {hidden}",
                found=f"{value} · {width} / {hidden}",
                mend="Choose another width, or give base=, a model of the base's size.",
            )
        return whole

    heads = found.num_attention_heads
    grouped = getattr(found, "num_key_value_heads", None)
    head_dim = getattr(found, "head_dim", None) or hidden // heads
    config.num_attention_heads = scaled("number of heads", heads)
    config.hidden_size = width
    if hasattr(found, "head_dim"):
        config.head_dim = head_dim
    for name in _INNER:
        value = getattr(found, name, None)
        if isinstance(value, int):
            setattr(config, name, scaled(name, value))
    if grouped is not None:
        if grouped != heads and kv_heads is None:
            raise ConfigError(
                "kv_heads",
                expected=f"the base's number of key and value heads ({grouped} in this model)",
                found="nothing",
                mend="Say kv_heads=, as grouped heads may grow with the width or stay as many.",
            )
        config.num_key_value_heads = kv_heads or config.num_attention_heads
    with torch.device("meta"):
        return type(model)(config)
