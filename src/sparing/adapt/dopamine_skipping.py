"""Conditional computation: closed neurons cost nothing where few tokens are decoded at a time.

With one token at hand a linear layer is as slow as its weights are to read. Of a neuron that is
zero, neither its column of the last layer nor, in a gated network, its row of the second first
layer has to be read: two of three matrices shrink to the open share.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.adapt.dopamine import GatedActivation, networks
from sparing.adapt.dopamine_hard_model import HardGate
from sparing.errors import ConfigError
from sparing.tuners import matrix_view

TYPES = (torch.float32, torch.float64)  # that torch's sparse products are sure to know


@contextmanager
def skip_closed_neurons(
    model: nn.Module, tokens: int = 4, most_open: float = 0.25
) -> Iterator[None]:
    """Inside, forwards without gradients read only the weights of open neurons.

    Outputs are equal up to the order of summation. Meanwhile the last layers are laid out with
    their columns together, in place. Larger inputs, fuller ones and other types than float32 and
    float64 are multiplied as ever. Zeros of a ReLU count as closed.

    Finding the open neurons costs some ten small operations a network, so that time is only saved
    where the weights are large and few neurons are open: measure it.

    Arguments:
        model: with a mode, or what `hard_model` returned; its networks lie in blocks.
        tokens: the largest number of tokens, over all rows, to look for zeros in.
        most_open: the largest share of open neurons for which it is tried, above 0 to 1.

    Raises:
        ConfigError: the model has no hard gates in blocks; an option out of range.
    """
    if tokens < 1 or not 0 < most_open <= 1:
        raise ConfigError(
            "tokens, most_open",
            expected="at least 1, and above 0 to 1",
            found=f"{tokens}, {most_open}",
            mend="Use the defaults.",
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {
        name: network
        for name, network in networks(base).items()
        if isinstance(base.get_submodule(name), GatedActivation | HardGate)
    }
    if not found:
        raise ConfigError(
            type(base).__name__,
            expected="gated activations",
            found="none",
            mend="Use a model with a TauGate mode, or the result of hard_model.",
        )
    with ExitStack() as stack:
        for name, network in found.items():
            skipping = _Skipping(tokens, most_open)
            handle = base.get_submodule(name).register_forward_hook(skipping.see)
            stack.callback(handle.remove)
            last = base.get_submodule(network.last)
            stack.enter_context(_columns_together(last))
            stack.enter_context(_replaced_forward(last, skipping.read_columns))
            if len(network.first) == 2:
                for layer in network.first:
                    module = base.get_submodule(layer)
                    stack.enter_context(_replaced_forward(module, skipping.make_rows))
        yield


class _Skipping:
    """What the layers of one network tell each other: the open neurons of the tokens at hand."""

    def __init__(self, tokens: int, most_open: float) -> None:
        self.tokens, self.most_open = tokens, most_open
        self.open: Tensor | None = None

    def see(self, module: nn.Module, inputs: Any, a: Tensor) -> None:
        """The activation has run; a layer that runs after it only has to make what is open."""
        self.open = self.few(a)

    def few(self, a: Tensor) -> Tensor | None:
        """(tokens, neurons) bool of what is not zero, or None if it is not worth looking."""
        flat = a.detach().flatten(0, -2)
        if torch.is_grad_enabled() or len(flat) > self.tokens or a.dtype not in TYPES:
            return None
        nonzero = flat != 0
        return nonzero if float(nonzero.float().mean()) <= self.most_open else None

    def make_rows(self, dense: Callable[[Tensor], Tensor], layer: Any, x: Tensor) -> Tensor:
        """Outputs of a layer where they will be multiplied by an open neuron; zero elsewhere."""
        if self.open is None or layer.weight.dtype not in TYPES:
            return dense(x)
        starts, columns = _compressed(self.open)
        blank = torch.zeros(len(columns), dtype=x.dtype, device=x.device)
        wanted = torch.sparse_csr_tensor(
            starts, columns, blank, self.open.shape, check_invariants=False
        )
        weight = matrix_view(layer, layer.weight)
        made = torch.sparse.sampled_addmm(wanted, x.flatten(0, -2), weight.t(), beta=0.0)
        y = made.to_dense().view(*x.shape[:-1], -1)
        return y if layer.bias is None else y + layer.bias

    def read_columns(self, dense: Callable[[Tensor], Tensor], layer: Any, x: Tensor) -> Tensor:
        """Outputs of a layer, reading only the columns whose input is not zero."""
        self.open = None
        nonzero = self.few(x) if layer.weight.dtype in TYPES else None
        if nonzero is None:
            return dense(x)
        starts, columns = _compressed(nonzero)
        y = F.embedding_bag(
            columns,
            matrix_view(layer, layer.weight).t(),
            starts[:-1],
            mode="sum",
            per_sample_weights=x.flatten(0, -2)[nonzero],
        )
        y = y.view(*x.shape[:-1], -1)
        return y if layer.bias is None else y + layer.bias


def _compressed(nonzero: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row starts, (rows + 1,), and the columns, (entries,): int64."""
    counts = nonzero.sum(dim=1)
    starts = F.pad(counts.cumsum(0), (1, 0))
    return starts, nonzero.nonzero()[:, 1].contiguous()


@contextmanager
def _replaced_forward(layer: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    own = layer.forward
    layer.forward = partial(forward, own, layer)
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def _columns_together(layer: Any) -> Iterator[None]:
    """The same weight with the numbers of a column side by side in memory."""
    strides = layer.weight.data.stride()
    view = matrix_view(layer, layer.weight.data)
    together = view.t().contiguous()
    layer.weight.data = (
        matrix_view(layer, together.t()) if isinstance(layer, Conv1D) else together.t()
    )
    try:
        yield
    finally:
        restored = torch.empty_strided(
            layer.weight.shape, strides, dtype=layer.weight.dtype, device=layer.weight.device
        )
        layer.weight.data = restored.copy_(layer.weight.data)
