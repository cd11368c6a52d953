"""What the paper looks at to show that adapters need no precision: rounding, and noise."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparing.adapt.bi_adapter import matrices
from sparing.errors import ConfigError
from sparing.quantizers import Codebook, Granularity, NormalQuantizer
from sparing.tuners import generator_for


@torch.no_grad()
def round_weights(
    model: nn.Module,
    bits: int,
    adapter_name: str = "default",
    *,
    codebook: Codebook = "k-median",
    granularity: Granularity = "matrix",
) -> None:
    """Round a trained 32-bit adapter to few levels, in place: quantisation after training, which
    is what training with quantised weights is compared with.

    Arguments:
        model: with a Bi-Adapter of 32 bits.
        bits: of a weight, 1 to 8.
        adapter_name: of the adapter.
        codebook, granularity: as for `BiAdapterConfig`.

    Raises:
        ConfigError: the model has no such adapter, or one that is quantised already.
    """
    quantizer = NormalQuantizer(bits, codebook, granularity)
    found = [matrix for _, matrix in matrices(model, adapter_name)]
    if not found or any(matrix.quantizer is not None for matrix in found):
        raise ConfigError(
            f"adapter {adapter_name!r}",
            expected="a Bi-Adapter with bits=32, without a binary head",
            found="one that is quantised already" if found else "none of that name",
            mend="Train with bits=32 to round afterwards.",
        )
    for matrix in found:
        matrix.latent.copy_(quantizer.decode(quantizer.encode(matrix.latent)))


@contextmanager
def relative_noise(model: nn.Module, size: float, seed: int = 0) -> Iterator[None]:
    """Inside, all trainable matrices carry Gaussian noise of `size` times their own deviation: the
    flatter the minimum, the less the loss rises.

    A quantised adapter would round the noise away; use one of 32 bits, or a fully trained model.

    Arguments:
        model: whose parameters of two or more axes that require gradients are changed.
        size: of the noise, relative to the standard deviation of each matrix.
        seed: of the noise.
    """
    before = {}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and parameter.dim() > 1:
                    before[name] = parameter.clone()
                    noise = torch.empty(parameter.shape, device="cpu")
                    noise.normal_(generator=generator_for(seed, name))
                    parameter.add_(noise.to(parameter) * size * parameter.std())
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])
