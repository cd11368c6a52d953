"""Tell base models apart without reading all of their weights."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLES_PER_TENSOR = 1024
_COMPARABLE = (torch.bfloat16, torch.float32, torch.float64)


def fingerprint(tensors: Iterable[Tensor]) -> str | None:
    """A short digest of shapes and evenly spaced values, the same in float32 and bfloat16.

    Values are rounded to bfloat16 first, so that a model loaded in lower precision counts as the
    same base. Other types round differently and cannot be compared.

    Returns:
        16 hexadecimal digits, or None if a tensor cannot be compared (float16, packed weights) or
        has no data (meta device).
    """
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor.is_meta or tensor.dtype not in _COMPARABLE:
            return None
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        sample = flat[::stride].to(torch.bfloat16).cpu().contiguous()
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
