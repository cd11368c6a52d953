"""LoRA adapters as PEFT keeps them in folders: read tensor by tensor, written atomically."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparing.checkpoint import atomic_path, read_json
from sparing.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARRIED_OVER = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)  # options of an adapter that the LoRA in its place keeps
_ROOT = "base_model.model."
_INITIAL_VALUES_THAT_LEAVE_THE_BASE_ALONE = ("gaussian", "eva", "orthogonal")


class Factors(NamedTuple):
    """The update scale · b a of one layer: a (rank, inputs), b (outputs, rank)."""

    a: Tensor
    b: Tensor
    scale: float


class FactorShape(NamedTuple):
    """What `Factors` measure."""

    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class LoraFolder:
    """A plain LoRA on disk, of which nothing but names and shapes has been read.

    Arguments:
        path: of the folder.
        config: its `adapter_config.json`.
        shapes: by module name.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, FactorShape]

    def read(self, module: str) -> Factors:
        """The factors of one module, of the type they were saved in.

        Raises:
            CheckpointError: the file is damaged, or a number in it is not finite.
        """
        a = self._tensor(f"{_ROOT}{module}.lora_A.weight")
        b = self._tensor(f"{_ROOT}{module}.lora_B.weight")
        return Factors(a, b, lora_scale(self.config, module, rank=a.shape[0]))

    def _tensor(self, key: str) -> Tensor:
        file = self.path / WEIGHTS_FILE
        try:
            with safe_open(file, framework="pt") as tensors:
                tensor: Tensor = tensors.get_tensor(key)
        except Exception as error:
            raise _damaged(file, f"{type(error).__name__}: {error}") from error
        if not torch.isfinite(tensor).all():
            raise _damaged(file, f"NaN or infinity in {key!r}")
        return tensor


def open_lora(folder: str | Path) -> LoraFolder:
    """Look at a LoRA adapter.

    Arguments:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        CheckpointError: it is no LoRA whose whole effect is scale · B A on linear layers (DoRA,
            biases, modules trained in full, changed embeddings), or its files are damaged.
    """
    path = Path(folder)
    config = read_json(path / CONFIG_FILE)
    fault = _fault(config)
    if fault:
        raise CheckpointError(
            str(path),
            expected="a LoRA adapter that does nothing but add scale · B A to linear layers",
            found=fault,
            mend="Train or export the adapter as plain LoRA.",
        )
    return LoraFolder(path, config, _shapes(path / WEIGHTS_FILE))


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of a module, or alpha / √rank for rank-stabilised LoRA.

    Arguments:
        config: the adapter's `adapter_config.json`.
        module: name in the model.
        rank: of the module's factors.
    """
    table = config.get("alpha_pattern") or {}
    alpha = table.get(get_pattern_key(list(table), module), config["lora_alpha"])
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def write_lora(
    folder: str | Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    transposed: bool = False,
    extra: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Write factors as a LoRA that plain PEFT loads. The folder is replaced as a whole.

    Arguments:
        folder: to write to.
        factors: by module name: a (rank, inputs) and b (outputs, rank), any floating type.
        transposed: whether the layers store their weights as (inputs, outputs), as GPT-2's do.
        extra: other tensors to write along, by their names in the file.
        options: of `LoraConfig`, with the `r` and `lora_alpha` that scale the product.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    tensors = dict(extra or {})
    for module, (a, b) in factors.items():
        tensors[f"{_ROOT}{module}.lora_A.weight"] = a
        tensors[f"{_ROOT}{module}.lora_B.weight"] = b
    config = LoraConfig(fan_in_fan_out=transposed, inference_mode=True, **options)
    with atomic_path(Path(folder)) as fresh:
        fresh.mkdir()
        config.save_pretrained(str(fresh))
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(plain, fresh / WEIGHTS_FILE, metadata={"format": "pt"})


def exact_targets(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """`target_modules` that select these modules and no others.

    PEFT takes a name for the end of any longer name too. Where that would select more, the result
    is a regular expression for the whole names.

    Arguments:
        names: of modules.
        model: that has them.
    """
    wanted = set(names)
    others = [name for name, _ in model.named_modules() if name not in wanted]
    if any(other.endswith(f".{name}") for name in wanted for other in others):
        return "|".join(re.escape(name) for name in sorted(wanted))
    return sorted(wanted)


def _fault(config: Mapping[str, Any]) -> str | None:
    """Why an adapter is not a plain LoRA, or None."""
    if config.get("peft_type") != "LORA":
        return f"an adapter of type {config.get('peft_type')}"
    if config.get("use_dora"):
        return "DoRA (use_dora), which also rescales the weights' columns"
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        return "trained biases (bias or lora_bias)"
    for option in (
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
    ):
        if config.get(option):
            return f"{option} = {config[option]!r}"
    initial = config.get("init_lora_weights", True)
    if not isinstance(initial, bool) and initial not in _INITIAL_VALUES_THAT_LEAVE_THE_BASE_ALONE:
        return f"init_lora_weights = {initial!r}, which also changes the base"
    return None


def _shapes(file: Path) -> dict[str, FactorShape]:
    if not file.is_file():
        pickled = file.with_suffix(".bin").exists()
        raise CheckpointError(
            str(file),
            expected="the adapter's weights as safetensors",
            found="a pickle (.bin), which can run code" if pickled else "nothing",
            mend="Save the adapter again with a current peft.",
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except Exception as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    shapes: dict[str, FactorShape] = {}
    for key, shape in found.items():
        module, kind, rest = key.removeprefix(_ROOT).partition(".lora_A")
        if not kind:
            if ".lora_B." not in key:
                raise _damaged(file, f"a tensor that is no factor of a linear layer: {key!r}")
            continue
        other = found.get(f"{_ROOT}{module}.lora_B{rest}")
        fits = other is not None and len(shape) == len(other) == 2 and other[1] == shape[0]
        if rest != ".weight" or other is None or not fits:
            raise _damaged(file, f"{key!r} of shape {list(shape)} without a matching lora_B")
        shapes[module] = FactorShape(shape[0], shape[1], other[0])
    return shapes


def _damaged(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        str(file),
        expected="factors lora_A (rank, inputs) and lora_B (outputs, rank) of linear layers",
        found=found,
        mend="Save the adapter again, as plain LoRA on linear layers.",
    )
