"""SqrtGate in the mixtures of experts of transformers: the root of every routing weight."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparing.errors import ConfigError
from sparing.routing import sqrt_gate


def install_sqrt_gate(model: nn.Module) -> list[RemovableHandle]:
    """Let every router of a model return √g for its chosen experts (HyperP, eq. 15).

    For models whose router modules return logits, weights and indices, as Mixtral's and Qwen's do
    in transformers 5. Weights that do not sum to 1 are made to first.

    Arguments:
        model: with mixtures of experts; changed by hooks only.

    Returns:
        handles, one a router; `remove()` undoes it.

    Raises:
        ConfigError: the model has no such router.
    """
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    if not routers:
        raise ConfigError(
            type(model).__name__,
            expected="mixtures of experts with a …TopKRouter",
            found="none",
            mend="SqrtGate is for models such as Mixtral or Qwen3-MoE.",
        )
    return [router.register_forward_hook(_rooted) for router in routers]


def _rooted(
    router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    logits, weights, indices = output
    exact = weights.float()
    rooted = sqrt_gate(exact / exact.sum(dim=-1, keepdim=True))
    return logits, rooted.to(weights.dtype), indices
