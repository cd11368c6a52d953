"""What experts are recognised by, and the files beside an adapter that keep it."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparing.checkpoint import atomic_path
from sparing.data.blocks import Blocks
from sparing.errors import CheckpointError, ConfigError
from sparing.lora_files import WEIGHTS_FILE

KEY_FILES = {"gate": "gates.safetensors", "average": "average_inputs.safetensors"}
MOST_EXAMPLES = 1000

Batches = Blocks | Iterable[Mapping[str, Tensor]]


def arrow_key(a: Tensor, b: Tensor) -> Tensor:
    """The direction of the input that b a magnifies most: its first right singular vector.

    The product is never formed. The sign, which has no meaning, is such that the entry largest in
    size is positive.

    Arguments:
        a: (rank, inputs).
        b: (outputs, rank).

    Returns:
        (inputs,) float32, of length 1; 0 if the product is 0.
    """
    inner, right = torch.linalg.qr(a.double().t())
    left = torch.linalg.qr(b.double(), mode="r").R
    values, directions = torch.linalg.svd(left @ right.t())[1:]
    if values.numel() == 0 or values[0] == 0:
        return torch.zeros(a.shape[1])
    key = inner @ directions[0]
    return (key * key[key.abs().argmax()].sign()).float()


def mean_row_key(a: Tensor) -> Tensor:
    """The mean of the rows of a (rank, inputs): (inputs,) float32."""
    return a.float().mean(dim=0)


@torch.no_grad()
def average_inputs(
    model: nn.Module, batches: Batches, modules: Iterable[str], batch_size: int = 8
) -> dict[str, Tensor]:
    """The mean input of modules over the tokens of at most 1,000 examples.

    Padding is left out, except in the decoder of an encoder-decoder, where the paper's code takes
    a plain mean.

    Arguments:
        model: the base model.
        batches: blocks of text, or batches of keyword arguments of the model, in which
            `attention_mask` tells tokens from padding.
        modules: names of linear layers.
        batch_size: rows at a time of blocks.

    Returns:
        (inputs,) float32 by module name.

    Raises:
        ConfigError: there is no batch, or a module is never called.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: Tensor | None = None

    def hook(name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = tokens_of(args[0], None if in_decoder(model, name) else mask)
            total = tokens.double().sum(dim=0).cpu()
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + len(tokens)

        return observe

    modules = list(modules)
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in _limited(batches, batch_size):
                given = {key: tensor.to(device) for key, tensor in batch.items()}
                mask = given.get("attention_mask")
                model(**given)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name in modules if not counts.get(name)]
    if unseen:
        raise ConfigError(
            f"module {unseen[0]!r}",
            expected="examples that make the model call it",
            found="none",
            mend="Give at least one batch, with all that the model's forward needs.",
        )
    return {name: (sums[name] / counts[name]).float() for name in modules}


def tokens_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens (n, width) of x (..., width) that a mask (...) of the same shape keeps; all of
    them if the mask has another shape, as it does not speak of these tokens then."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def in_decoder(model: nn.Module, name: str) -> bool:
    """Whether a module belongs to the decoder of an encoder-decoder, whose tokens are others than
    those of `input_ids`."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder" in name.split(".")


def _limited(batches: Batches, batch_size: int) -> Iterator[Mapping[str, Tensor]]:
    if isinstance(batches, Blocks):
        for start in range(0, min(len(batches), MOST_EXAMPLES), batch_size):
            rows = batches.take(slice(start, min(start + batch_size, MOST_EXAMPLES)))
            yield {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
        return
    seen = 0
    for batch in batches:
        if seen >= MOST_EXAMPLES:
            return
        yield batch
        seen += len(next(iter(batch.values())))


def save_keys(folder: str | Path, kind: str, keys: Mapping[str, Tensor], **notes: Any) -> Path:
    """Write one key a module beside the adapter that they belong to, atomically.

    Arguments:
        folder: of the adapter.
        kind: "gate" or "average".
        keys: (inputs,) by module name.
        notes: kept in the file's header.

    Returns:
        the file.
    """
    path = Path(folder)
    header = {"format": "pt", "kind": kind, "adapter": digest(path)}
    header |= {name: str(value) for name, value in notes.items()}
    tensors = {name: key.detach().float().cpu().contiguous() for name, key in keys.items()}
    with atomic_path(path / KEY_FILES[kind]) as fresh:
        save_file(tensors, fresh, metadata=header)
    return path / KEY_FILES[kind]


def load_keys(folder: str | Path, kind: str) -> dict[str, Tensor] | None:
    """Read what `save_keys` wrote; None if there is no such file.

    Raises:
        CheckpointError: the file is damaged, or belongs to other weights of the adapter.
    """
    path = Path(folder)
    file = path / KEY_FILES[kind]
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            header = content.metadata() or {}
            keys = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(
            str(file),
            expected="one key for each module, as safetensors",
            found=f"{type(error).__name__}: {error}",
            mend="Delete the file and make it again.",
        ) from error
    for name, key in keys.items():
        if key.dim() != 1 or not torch.isfinite(key).all():
            raise CheckpointError(
                f"{name!r} in {file}",
                expected="a vector of finite numbers",
                found=f"shape {list(key.shape)}" if key.dim() != 1 else "NaN or infinity",
                mend="Delete the file and make it again.",
            )
    if header.get("adapter", digest(path)) != digest(path):
        raise CheckpointError(
            str(file),
            expected="keys made for the adapter's present weights",
            found="keys of other weights: the adapter has been trained or replaced since",
            mend="Delete the file and make it again.",
        )
    return keys


def digest(folder: Path) -> str:
    """Of the adapter's weights, to know whether keys belong to them.

    Raises:
        CheckpointError: there are none.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(
            str(file),
            expected="the adapter's weights as safetensors",
            found="nothing",
            mend="Give the folder that save_pretrained wrote.",
        )
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
