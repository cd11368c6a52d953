"""Bi-Adapter files: the paper's compact layout, and the plain LoRA that a Bi-LoRA amounts to.

The compact layout has no names. For every matrix, in the model's order: its codes, the first in the
lowest bits of the first byte, row by row; then mean and deviation as float32. A head in full
precision follows as float32, weight before bias (Bi-Adapter, section 7 and eq. 6).
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.adapt._bi_adapter_matrix import Packed, QuantizedMatrix
from sparing.adapt.bi_adapter import (
    BiAdapterConfig,
    BiAdapterTuner,
    BiLoRAAdapter,
    BinaryHead,
    matrices,
)
from sparing.checkpoint import atomic_path
from sparing.errors import CheckpointError, ConfigError
from sparing.lora_files import write_lora
from sparing.quantizers import packed_bytes
from sparing.tuners import TunerLayer

MAGIC = b"BiAd"
VERSION = 1
_HEADER = struct.Struct("<4sHHI")  # magic, version, flags (0), number of matrices
_ENTRY = struct.Struct("<IIHH")  # rows, columns, bits, spare (0)
_MOMENTS = 8  # bytes
_CARRIED_OVER = ("task_type", "base_model_name_or_path", "revision")


def compact_bytes(model: nn.Module, adapter_name: str = "default") -> int:
    """Size of the compact file without header: Σ (⌈n · bits / 8⌉ + 8) over matrices of n numbers,
    and 4 bytes for every number of heads in full precision (Bi-Adapter, eq. 6).

    Raises:
        ConfigError: the model has no Bi-Adapter of that name, or one without codes.
    """
    found = _checked(model, adapter_name)
    codes = sum(packed_bytes(m.latent.numel(), m.bits) + _MOMENTS for _, m in found)
    return codes + 4 * sum(t.numel() for t in _heads(model, adapter_name))


def export_compact(
    model: nn.Module, path: str | Path, adapter_name: str = "default", *, header: bool = False
) -> int:
    """Write an adapter in the paper's layout.

    Arguments:
        model: with a Bi-Adapter.
        path: of the file.
        adapter_name: of the adapter.
        header: write first what the paper's files leave out: a version, and the rows, columns and
            bits of every matrix; 12 bytes and 12 more a matrix.

    Returns:
        the size of the file in bytes: `compact_bytes`, and that of the header.

    Raises:
        ConfigError: the model has no such adapter; it has moments by row or no codes, or, without
            header, matrices whose codes do not fill their bytes, which the layout cannot hold.
        DataError: a matrix is constant.
        CheckpointError: the file cannot be written.
    """
    found = _checked(model, adapter_name)
    parts = [_header(found)] if header else []
    for name, matrix in found:
        if not header and matrix.latent.numel() * matrix.bits % 8:
            raise ConfigError(
                f"matrix {name!r}",
                expected="codes that fill whole bytes, as the paper's layout has no counts",
                found=f"{matrix.latent.numel():,} codes of {matrix.bits} bits",
                mend="Use header=True, or choose h as a multiple of 8 / bits.",
            )
        codes, moments = matrix.pack(matrix.latent.detach())
        parts += [_bytes_of(codes), _bytes_of(moments)]
    parts += [_bytes_of(tensor.detach().float()) for tensor in _heads(model, adapter_name)]
    content = b"".join(parts)
    with atomic_path(Path(path)) as fresh:
        fresh.write_bytes(content)
    return len(content)


@torch.no_grad()
def import_compact(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Read a file of `export_compact`, or one that the paper's authors released, into a model that
    was adapted with the same options. It then computes exactly what the saved one did.

    Arguments:
        model: with a Bi-Adapter.
        path: of the file; a header is recognised.
        adapter_name: of the adapter.

    Raises:
        ConfigError: the model has no such adapter.
        CheckpointError: the file has not the length or the matrices of this adapter.
    """
    found, path = _checked(model, adapter_name), Path(path)
    content = _read(path)
    described = _header(found)
    if content.startswith(MAGIC):
        if content[: len(described)] != described:
            raise _unsuitable(path, "a header with the matrices of this adapter", "another one")
        content = content[len(described) :]
    expected = compact_bytes(model, adapter_name)
    if len(content) != expected:
        raise _unsuitable(path, f"{expected:,} bytes", f"{len(content):,} bytes")
    place = 0

    def take(size: int) -> bytes:
        nonlocal place
        place += size
        return content[place - size : place]

    latent = []
    for name, matrix in found:
        codes = np.frombuffer(take(packed_bytes(matrix.latent.numel(), matrix.bits)), np.uint8)
        moments = torch.tensor([struct.unpack("<2f", take(_MOMENTS))])
        packed = Packed(torch.from_numpy(codes.copy()), moments)
        latent.append(matrix.unpack(packed, f"{path}: {name}"))
    for (_, matrix), numbers in zip(found, latent, strict=True):
        matrix.latent.copy_(numbers)
    for tensor in _heads(model, adapter_name):
        numbers = torch.from_numpy(np.frombuffer(take(4 * tensor.numel()), "<f4").copy())
        tensor.copy_(numbers.view(tensor.shape))


def export_peft(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Write a Bi-LoRA as a plain PEFT LoRA with dense float32 factors, for other tools.

    The scale s is part of B. A layer that computes queries and values at once has twice the rank.
    A binary head is written as a fully trained module. The folder is replaced as a whole.

    Arguments:
        model: with a Bi-Adapter of kind "lora".
        folder: to write `adapter_config.json` and `adapter_model.safetensors` to.
        adapter_name: of the adapter.

    Raises:
        ConfigError: the model has no such adapter.
        CheckpointError: the folder cannot be written.
    """
    config = _config(model, adapter_name)
    if config.kind != "lora":
        raise ConfigError(
            f"adapter {adapter_name!r}",
            expected="kind='lora'",
            found=f"kind={config.kind!r}, whose ReLU no LoRA has",
            mend="Use save_pretrained or export_compact.",
        )
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    extra = {key: value for key, value in saved.items() if f".{BiAdapterTuner.prefix}" not in key}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    kept, transposed = set(config.modules_to_save or []), False
    with torch.no_grad():
        for name, layer in model.get_base_model().named_modules():
            if not isinstance(layer, TunerLayer) or adapter_name not in layer.adapters:
                continue
            adapter = layer.adapters[adapter_name]
            if isinstance(adapter, BinaryHead):
                kept.add(name)
                extra |= _as_plain_layer(name, layer, adapter)
            elif isinstance(adapter, BiLoRAAdapter):
                factors[name] = adapter.factors()
                transposed |= isinstance(layer.get_base_layer(), Conv1D)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    write_lora(
        folder,
        factors,
        transposed=transposed,
        extra=extra,
        r=config.h,
        lora_alpha=config.h,  # with alpha = rank everywhere, B A is the update
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(factors),
        modules_to_save=sorted(kept) or None,
        **{option: getattr(config, option) for option in _CARRIED_OVER},
    )


def _as_plain_layer(name: str, layer: TunerLayer, head: BinaryHead) -> dict[str, Tensor]:
    base: Any = layer.get_base_layer()
    tensors = {f"base_model.model.{name}.weight": head.matrix.weight()}
    if base.bias is not None:
        tensors[f"base_model.model.{name}.bias"] = torch.zeros_like(base.bias)
    return tensors


def _config(model: nn.Module, adapter_name: str) -> BiAdapterConfig:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, BiAdapterConfig):
        raise ConfigError(
            f"adapter {adapter_name!r}",
            expected="a Bi-Adapter of this model",
            found="none" if config is None else type(config).__name__,
            mend="Give the model from peft.get_peft_model and the name of its adapter.",
        )
    return config


def _checked(model: nn.Module, adapter_name: str) -> list[tuple[str, QuantizedMatrix]]:
    """The matrices of an adapter that the compact layout can hold."""
    config = _config(model, adapter_name)
    if config.granularity != "matrix" or config.bits == 32:
        raise ConfigError(
            f"adapter {adapter_name!r}",
            expected="codes with one mean and one deviation a matrix",
            found=f"bits={config.bits}, granularity={config.granularity!r}",
            mend="Use save_pretrained.",
        )
    return list(matrices(model, adapter_name))


def _heads(model: nn.Module, adapter_name: str) -> list[Tensor]:
    """Parameters of the modules trained in full, weight before bias."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for parameter in module.modules_to_save[adapter_name].parameters()
    ]


def _header(found: list[tuple[str, QuantizedMatrix]]) -> bytes:
    entries = [_ENTRY.pack(*matrix.latent.shape, matrix.bits, 0) for _, matrix in found]
    return b"".join([_HEADER.pack(MAGIC, VERSION, 0, len(found)), *entries])


def _bytes_of(tensor: Tensor) -> bytes:
    numbers = tensor.cpu().contiguous().numpy()
    return numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unsuitable(path, "a file that can be read", str(error)) from error


def _unsuitable(path: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        str(path),
        expected=expected,
        found=found,
        mend="Adapt the model with the kind, h, bits, head and base that the file was made with.",
    )
