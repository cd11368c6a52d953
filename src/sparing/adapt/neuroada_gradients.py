"""Sum the gradients of frozen weights over a data set, to choose by them which entries to train."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from sparing.errors import ConfigError
from sparing.tuners import matrix_view


class GradientSums(NamedTuple):
    """Gradients of one weight over calibration batches, (outputs, inputs) float32 each.

    Attributes:
        signed: Σ ∂L/∂W over the batches; its size is the score "gradient".
        absolute: Σ |∂L/∂W|, the score "gradient_abs".
    """

    signed: Tensor
    absolute: Tensor


def transformers_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss that a Hugging Face model returns for a batch with labels."""
    return model(**batch).loss


@dataclass(frozen=True)
class Calibration:
    """Batches and a loss to take gradients of; see `gradient_scores` for the fields."""

    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    layers_at_once: int

    def scores(
        self, model: nn.Module, layers: dict[str, nn.Module], seed: int
    ) -> Iterator[tuple[str, GradientSums]]:
        """The sums of every layer, a group of layers at a time."""
        names = list(layers)
        if iter(self.batches) is self.batches and len(names) > self.layers_at_once:
            raise ConfigError(
                "calibration batches",
                expected=f"batches to read once for every {self.layers_at_once} layers",
                found=f"{type(self.batches).__name__}, which can be read only once",
                mend="Give a list or a data loader, or raise layers_at_once.",
            )
        for start in range(0, len(names), self.layers_at_once):
            group = {name: layers[name] for name in names[start : start + self.layers_at_once]}
            yield from self._sums(model, group, seed).items()

    def _sums(
        self, model: nn.Module, layers: dict[str, nn.Module], seed: int
    ) -> dict[str, GradientSums]:
        weights = [_trainable_weight(layer, name) for name, layer in layers.items()]
        zeros = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
        sums = [GradientSums(zero, zero.clone()) for zero in zeros]
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        modes = [(module, module.training) for module in model.modules()]
        gpus = {parameter.device for parameter, _ in flags if parameter.is_cuda}
        try:
            model.requires_grad_(False).train()
            for weight in weights:
                weight.requires_grad_(True)
            with torch.random.fork_rng(devices=gpus), torch.enable_grad():
                torch.manual_seed(seed)  # of dropout, which the paper leaves on
                for batch in self.batches:
                    gradients = torch.autograd.grad(self.loss(model, batch), weights)
                    for total, gradient in zip(sums, gradients, strict=True):
                        total.signed.add_(gradient)
                        total.absolute.add_(gradient.abs())
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode
        for name, total in zip(layers, sums, strict=True):
            if not total.absolute.any():
                raise ConfigError(
                    f"module {name!r}",
                    expected="calibration batches that give its weight a gradient",
                    found="no batches, or only zero gradients",
                    mend="Give batches with labels that use this module, or leave it out.",
                )
        return {
            name: GradientSums(*(matrix_view(layers[name], part) for part in total))
            for name, total in zip(layers, sums, strict=True)
        }


def _trainable_weight(layer: Any, name: str) -> nn.Parameter:
    if resolve_quantization_backend(layer) is not None:
        raise ConfigError(
            f"module {name!r}",
            expected="a plain floating-point weight to take gradients of",
            found=f"{type(layer).__name__} with a quantised weight",
            mend="Choose by score='magnitude', or select on an unquantised base.",
        )
    return layer.weight


def gradient_scores(
    model: nn.Module,
    batches: Iterable[Any],
    target_names: Iterable[str],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = transformers_loss,
    layers_at_once: int = 8,
    seed: int = 0,
) -> Iterator[tuple[str, GradientSums]]:
    """Sum the gradients of some weights over a data set, a few layers at a time.

    The model is in training mode meanwhile and is not changed. Every `layers_at_once` layers need
    one pass over the batches, and two float32 copies of their weights.

    Arguments:
        model: the base model, not yet adapted.
        batches: for `loss`; read once per group of layers.
        target_names: full names of linear layers.
        loss: maps the model and a batch to a scalar. The paper sums over batches, so it matters
            whether this is a mean.
        layers_at_once: at least 1.
        seed: of dropout.

    Returns:
        Pairs of module name and sums, in the order of `target_names`.

    Raises:
        ConfigError: a weight is quantised or gets no gradient, or batches can be read only once.
    """
    layers = {name: model.get_submodule(name) for name in target_names}
    return Calibration(batches, loss, layers_at_once).scores(model, layers, seed)
