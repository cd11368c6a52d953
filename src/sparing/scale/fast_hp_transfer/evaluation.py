"""Evaluate a model at other weights, and leave everything as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def evaluating(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """The model in evaluation mode, with these weights and without gradients.

    Afterwards weights, gradients, buffers, modes and random numbers are what they were, to the bit.

    Arguments:
        model: whose parameters are replaced; sharded by FSDP2 or not.
        weights: in the order of its parameters, cast to their types.
    """
    _reshard(model)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    raw = [p.detach().clone() for p in parameters]
    kept = [b.detach().clone() for b in buffers]
    gradients = [p.grad for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            _put(parameters, weights)
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            _reshard(model)
            _put(parameters, raw)
            _put(buffers, kept)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode


@torch.no_grad()
def _put(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value.to(tensor.dtype))


def _reshard(model: nn.Module) -> None:
    """FSDP2 keeps the root's weights gathered after a forward pass, and would use stale ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
