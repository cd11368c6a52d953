"""The trainable numbers of one adapter on one layer, and how they change its output."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparing.errors import ConfigError


class LayerAdapter(nn.Module, ABC):
    """One adapter on one layer.

    Trainable parameters are float32 whatever the type of the base model.

    Attributes:
        mergeable: whether the effect is a fixed change of weight and bias.
        instead_of_merging: what to do if it is not.
    """

    mergeable: ClassVar[bool] = True
    instead_of_merging: ClassVar[str] = "Keep the adapter as it is; it cannot be merged."

    @abstractmethod
    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The adapted output.

        Arguments:
            x: the layer's input, (..., inputs).
            layer: the frozen base layer.

        Returns:
            (..., outputs), of the type that `layer(x)` has.
        """

    @abstractmethod
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a plain layer with the same effect; differentiable.

        Arguments:
            weight: (outputs, inputs), not to be changed in place.
            bias: (outputs,) or None.
        """


class AdditiveAdapter(LayerAdapter):
    """An adapter whose output is added to the base layer's; several of them simply add up."""

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """What is added to the base layer's output: (..., inputs) -> (..., outputs)."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """(outputs, inputs) float: the weight change with the same effect."""

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        y = layer(x)
        return y + self.delta(x).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        exact = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(exact) + self.delta_weight().to(exact)).to(weight.dtype), bias


class ModuleAdapter(nn.Module, ABC):
    """One adapter on a module that is not a linear layer: an activation, a feed-forward network.

    Trainable parameters are float32 whatever the type of the base model.
    """

    mergeable: ClassVar[bool] = False
    instead_of_merging: ClassVar[str] = LayerAdapter.instead_of_merging

    @abstractmethod
    def forward(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The adapted output.

        Arguments:
            module: the base module, or the one already changed by another active adapter.
            args, kwargs: of the module's call.
        """


def unmergeable(name: str, adapter: LayerAdapter | ModuleAdapter) -> ConfigError:
    """The error that names an adapter which cannot be merged."""
    return ConfigError(
        f"adapter {name!r}",
        expected="a change of the weights that is the same for every input",
        found=f"{type(adapter).__name__}, which depends on its input",
        mend=adapter.instead_of_merging,
    )
