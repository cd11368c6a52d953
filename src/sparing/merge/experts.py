"""What is merged: whole models and adapters, each read a few numbers at a time as a task vector."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.checkpoint import read_json
from sparing.errors import CheckpointError, ConfigError
from sparing.shards import Checkpoint

ADAPTER_CONFIG = "adapter_config.json"
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")


def locate(name: str | Path) -> Path:
    """The folder or file of a model by name; a hub id is fetched.

    Raises:
        ConfigError: no such model.
    """
    here = Path(name).expanduser()
    if here.exists() and here.suffix != ".gguf":
        return here
    from sparing import pretrained  # imports transformers, which takes seconds

    found = Path(pretrained.resolve(str(name)))
    if found.exists():
        return found
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub has many, and offline is one of them
        raise ConfigError(
            f"model {str(name)!r}",
            expected="a folder, a safetensors file or a hub id that can be fetched",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            mend="Check the spelling, the network and `hf auth login`.",
        ) from error


class Expert(ABC):
    """One fine-tune of the base.

    Attributes:
        label: its name, for messages.
        path: its folder or file.
        files: its weights.
        complete: whether it should have every tensor of the base; an adapter need not.
        config: its model's configuration, or None.
    """

    label: str
    path: Path
    files: list[Path]
    complete: bool
    config: dict[str, Any] | None = None

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors it has or changes, by its own names."""

    @abstractmethod
    def close(self) -> None:
        """Close its files."""

    @abstractmethod
    def delta(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """Numbers `start` to `stop` of a task vector.

        Arguments:
            name: of the tensor, the expert's own.
            start: first number.
            stop: number after the last.
            base: the base's numbers there, flat, in the type to compute in.

        Returns:
            A tensor like `base`.

        Raises:
            CheckpointError: NaN or infinity.
        """

    def factors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """A task vector as a product of two matrices, if that is how it is stored.

        Arguments:
            name: of the tensor, the expert's own.
            like: a tensor of the device and the type to compute in.

        Returns:
            (rows, m) and (m, columns) of a tensor of (rows, columns), or None.

        Raises:
            CheckpointError: NaN or infinity.
        """
        return None


class FullExpert(Expert):
    """A whole model; the task vector is what it has more than the base.

    Arguments:
        label: its name, for messages.
        path: its folder or file.
    """

    complete = True

    def __init__(self, label: str, path: Path) -> None:
        self.label, self.path = label, path
        self.checkpoint = Checkpoint(path)
        self.files = self.checkpoint.files
        self.config = self.checkpoint.config

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.checkpoint.tensors.items()}

    def close(self) -> None:
        self.checkpoint.close()

    def delta(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        values = self.checkpoint.read(name, start, stop).to(base.device, base.dtype)
        require_finite(values, str(self.checkpoint.file(name)), name)
        return values.sub_(base)


class LoraExpert(Expert):
    """A LoRA adapter of PEFT, expanded from the rows of its factors that are needed.

    Arguments:
        label: its name, for messages.
        path: its folder.
        config: its `adapter_config.json`.
        base: the base model, for names and shapes.

    Raises:
        CheckpointError: a tensor of the adapter fits nothing in the base.
    """

    complete = False

    def __init__(self, label: str, path: Path, config: dict[str, Any], base: Checkpoint) -> None:
        self.label, self.path = label, path
        self.checkpoint = Checkpoint(path)
        self.files = self.checkpoint.files
        self._config = config
        self._replaced: dict[str, str] = {}  # base name -> name of a tensor that takes its place
        self._factors: dict[str, tuple[str, str]] = {}  # base name -> names of A and B
        self._transposed: dict[str, bool] = {}
        self._scale: dict[str, float] = {}
        self._flat: dict[str, tuple[int, int]] = {}  # shape of B A
        self._base = base
        try:
            self._read_names()
            self._check_factors()
        except BaseException:
            self.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        replaced = {n: self.checkpoint.tensors[saved].shape for n, saved in self._replaced.items()}
        return {name: self._base.tensors[name].shape for name in self._factors} | replaced

    def close(self) -> None:
        self.checkpoint.close()

    def _read_names(self) -> None:
        for key in self.checkpoint.tensors:
            for kind in (".lora_A", ".lora_embedding_A"):
                module, found, rest = key.partition(kind)
                if found and rest in ("", ".weight"):
                    other = f"{module}{kind[:-1]}B{rest}"
                    self._add_factors(module, key, other, embedding="embedding" in kind)
                    break
            else:
                if ".lora_B" not in key and ".lora_embedding_B" not in key:
                    self._replaced[base_name(key, self._base, self.label)] = key

    def _add_factors(self, module: str, first: str, second: str, *, embedding: bool) -> None:
        name = base_name(f"{module}.weight", self._base, self.label)
        if second not in self.checkpoint.tensors:
            raise _foreign(self.label, second, "nothing of that name")
        a, b = (self.checkpoint.tensors[key] for key in (first, second))
        self._factors[name] = first, second
        self._transposed[name] = embedding or bool(self._config.get("fan_in_fan_out"))
        self._scale[name] = _lora_scale(self._config, module)
        self._flat[name] = (b.shape[0], a.numel // max(a.shape[0], 1))
        if b.numel != b.shape[0] * a.shape[0]:
            raise _foreign(self.label, first, f"factors {list(b.shape)} and {list(a.shape)}")

    def _check_factors(self) -> None:
        shapes = self.shapes
        for name, (outputs, inputs) in self._flat.items():
            shape = shapes[name]
            expected = (inputs, outputs) if self._transposed[name] else (outputs, inputs)
            if (shape[0], math.prod(shape[1:])) != expected:
                found = f"factors for {list(expected)}, and {name!r} of shape {list(shape)}"
                raise _foreign(self.label, self._factors[name][0], found)

    def delta(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        if name not in self._replaced:
            return self._product(name, start, stop, base)
        saved = self._replaced[name]
        values = self.checkpoint.read(saved, start, stop).to(base.device, base.dtype)
        require_finite(values, str(self.checkpoint.file(saved)), saved)
        values.sub_(base)
        if name in self._factors:  # PEFT saves adapted embeddings as they are, and the factors
            values.add_(self._product(name, start, stop, base))
        return values

    def _product(self, name: str, start: int, stop: int, like: Tensor) -> Tensor:
        """Numbers of B A times its scale, from the rows that hold them."""
        left, right = self._sides(name, like)
        width = right.shape[1]
        top = start // width
        rows = left[top : -(-stop // width)] @ right
        return rows.flatten()[start - top * width : stop - top * width].mul_(self._scale[name])

    def factors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor] | None:
        if name in self._replaced:
            return None
        left, right = self._sides(name, like)
        return left * self._scale[name], right

    def _sides(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self._factors[name]
        a, b = self._factor(first, like).flatten(1), self._factor(second, like).flatten(1)
        return (a.t(), b.t()) if self._transposed[name] else (b, a)

    def _factor(self, key: str, like: Tensor) -> Tensor:
        values = self.checkpoint.read(key).to(like.device, like.dtype)
        require_finite(values, str(self.checkpoint.file(key)), key)
        return values.view(self.checkpoint.tensors[key].shape)


def _lora_scale(config: dict[str, Any], module: str) -> float:
    from peft.utils.other import get_pattern_key

    name = module.removeprefix("base_model.model.")

    def option(pattern: str, default: str) -> float:
        table = config.get(pattern) or {}
        return float(table.get(get_pattern_key(list(table), name), config[default]))

    rank, alpha = option("rank_pattern", "r"), option("alpha_pattern", "lora_alpha")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def base_name(key: str, base: Checkpoint, label: str) -> str:
    """The base's tensor that an adapter's key means.

    PEFT puts `base_model.model.` before the names of the model; checkpoints may leave out the
    model's own first word (`transformer.`) or have it where the adapter does not.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = name.replace(".modules_to_save.", ".")
    if name in base.tensors:
        return name
    shorter = name.partition(".")[2]
    found = [other for other in base.tensors if other == shorter or other.partition(".")[2] == name]
    if len(found) != 1:
        raise _foreign(label, key, "no tensor of the base that it belongs to")
    return found[0]


def _foreign(label: str, key: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"adapter tensor {key!r} of {label}",
        expected="an adapter of this base",
        found=found,
        mend="Merge it into its own base with merge_and_unload and give the whole model.",
    )


def require_finite(values: Tensor, file: str, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: there are some.
    """
    # A sum is much cheaper than looking at every number; it may overflow, so look then.
    if not math.isfinite(float(values.sum())) and not torch.isfinite(values).all():
        raise CheckpointError(
            f"tensor {name!r} in {file}",
            expected="finite numbers",
            found="NaN or infinity",
            mend="Leave that model out, or save it again from a healthy state.",
        )


def open_expert(name: str | Path, base: Checkpoint, folder: Path) -> Expert:
    """Open a model or an adapter.

    Arguments:
        name: a folder, a safetensors file or a hub id.
        base: the base model.
        folder: where the base model is.

    Raises:
        ConfigError: no such model.
        CheckpointError: damaged files, pickles, or an adapter of another base.
    """
    path, label = locate(name), str(name)
    if not (path / ADAPTER_CONFIG).is_file():
        return FullExpert(label, path)
    config = read_json(path / ADAPTER_CONFIG)
    if _is_plain_lora(config):
        return LoraExpert(label, path, config, base)
    from sparing.merge.tuner_expert import TunerExpert

    return TunerExpert(label, path, base, folder)


def _is_plain_lora(config: dict[str, Any]) -> bool:
    """Whether the update is B A times a number; other kinds go through PEFT."""
    special = (
        "use_dora",
        "lora_bias",
        "use_qalora",
        "alora_invocation_tokens",
        "target_parameters",
    )
    initial = config.get("init_lora_weights", True)
    return (
        config.get("peft_type") == "LORA"
        and not any(config.get(option) for option in special)
        and (isinstance(initial, bool) or str(initial) in ("gaussian", "eva", "orthogonal"))
    )


def shared_files(experts: Sequence[Expert]) -> list[tuple[str, str]]:
    """Pairs of experts that are the same files."""
    seen: dict[tuple[Path, ...], str] = {}
    twice = []
    for expert in experts:
        key = tuple(file.resolve() for file in expert.files)
        if key in seen:
            twice.append((seen[key], expert.label))
        seen[key] = expert.label
    return twice
