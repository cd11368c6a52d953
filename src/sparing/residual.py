"""The residual stream: what a feed-forward network's sub-layer reads before it is normalised."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import ConfigError


class ResidualStream:
    """Catches x of x + FFN(norm(x)) as it passes by, for a branch that reads x itself.

    A block is pre-norm if one of its norms reads what the block reads; then x is what went into
    the norm whose very output the network reads. In all other blocks (post-norm, as in BERT, or
    norms inside the residual branch) x is what the network reads.

    x is not kept alive: the block itself holds it, as it has yet to add to it. Gradient
    checkpointing runs the inside of a block again, so x is caught again.

    Arguments:
        block: whose forward adds to the stream.
        first: the network's first linear layer.
    """

    def __init__(self, block: nn.Module, first: nn.Module) -> None:
        self._forget()
        self._handles: list[Any] = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            first.register_forward_pre_hook(self._reach_network),
        ]
        for module in block.modules():
            if "norm" in type(module).__name__.lower() and next(module.children(), None) is None:
                self._handles.append(module.register_forward_hook(self._normalise))

    def read(self) -> Tensor:
        """x: (..., width), while the network runs.

        Raises:
            ConfigError: the network runs outside of its block.
        """
        x = self._x()
        if x is None:
            raise ConfigError(
                "residual stream",
                expected="a feed-forward network that runs inside its block",
                found="its last layer called by itself",
                mend="Call the model, or the whole block.",
            )
        return x

    def remove(self) -> None:
        """Leave the block as it was."""
        for handle in self._handles:
            handle.remove()

    def _forget(self) -> None:
        self._start: Callable[[], Tensor | None] = _nothing
        self._is_pre_norm = False  # found in a forward, and still known where a part is run again
        self._normed: list[tuple[Tensor, Tensor]] = []
        self._x: Callable[[], Tensor | None] = _nothing

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if tensors:
            self._start = _reference(tensors[0])

    def _normalise(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor):
            self._is_pre_norm |= args[0] is self._start()
            self._normed.append((args[0], output))

    def _reach_network(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if self._is_pre_norm:
            sources = [before for before, normed in self._normed if normed is x]
            x = sources[-1] if sources else x
        self._x, self._normed = _reference(x), []

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": self._handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.__dict__.update(state)


def _nothing() -> None:
    return None


def _reference(x: Tensor) -> Callable[[], Tensor | None]:
    if torch.compiler.is_compiling():  # a traced tensor is no object that could be referred to
        return lambda: x
    return weakref.ref(x)
