"""How much of an update reaches the features: the data-dependent part of Muon++ (eq. 12).

A bound on the spectral norm of an update bounds the change of features; how near they come to it
depends on whether inputs lie in the directions that the update acts on.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparing.errors import ConfigError
from sparing.surgery import LINEAR


def alignment(orthogonal: Tensor, features: Tensor) -> Tensor:
    """a = ‖O Hᵀ‖ / ‖H‖ in Frobenius norms, over the features of all processes; 0 without any.

    Arguments:
        orthogonal: (…, outputs, inputs) of spectral norm 1.
        features: (tokens, inputs).

    Returns:
        (…,) float32, 0 to 1.
    """
    exact = features.to(orthogonal)
    moved = (orthogonal @ exact.mT).square().sum((-2, -1))
    total = exact.square().sum().expand_as(moved)
    both = torch.stack([moved, total])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(both)
    return (both[0] / both[1].clamp_min(torch.finfo(both.dtype).tiny)).sqrt()


class FeatureProbe:
    """Keeps some inputs of every linear layer whose weight is watched, when they are due.

    Arguments:
        model: in training mode when it matters; evaluation is not looked at.
        weights: to watch.
        tokens: kept of a forward pass, evenly spaced over its tokens.
        due: whether the next step wants features.

    Attributes:
        features: (tokens, inputs) by weight, of the last forward pass.

    Raises:
        ConfigError: no linear layer has one of the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Collection[Tensor],
        tokens: int,
        due: Callable[[], bool],
    ) -> None:
        self.features: dict[Tensor, Tensor] = {}
        self._tokens, self._due = tokens, due
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            # Under FSDP2 a module has another weight inside of its forward: it is looked up here.
            if isinstance(module, LINEAR) and module.weight in weights:
                self._handles.append(module.register_forward_pre_hook(self._keeps(module.weight)))
        if not self._handles:
            raise ConfigError(
                f"watched {type(model).__name__}",
                expected="linear layers whose weights are in a matrix group of the optimizer",
                found="none",
                mend="Watch the model that the optimizer was made for, after sharding it.",
            )

    def _keeps(self, weight: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not module.training or not self._due():
                return
            rows = inputs[0].detach().flatten(0, -2)
            stride = max(1, -(-len(rows) // self._tokens))
            self.features[weight] = rows[::stride].float()

        return hook

    def clear(self) -> None:
        """Forget the features, after a step."""
        self.features.clear()

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
