"""A value computed from tensors, kept until one of them changes."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")
_steps_taken = 0  # by all optimisers


def _count_step(*_: Any) -> None:
    """Fused optimisers write into parameters without a trace, as of torch 2.13."""
    global _steps_taken
    _steps_taken += 1


register_optimizer_step_post_hook(_count_step)


class Kept(Generic[T]):
    """Keeps what was computed from some tensors for as long as they stay what they were.

    Nothing is kept where gradients are recorded or a graph is traced, or from one step of any
    optimiser to the next. Writing through `parameter.data` leaves no trace that could be noticed;
    call `forget` after doing so. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Compute anew at the next `get`."""
        self._state: tuple[Any, ...] | None = None
        self._sources: tuple[Tensor, ...] = ()
        self._value: Any = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], T], *of: Any) -> T:
        """`make()`, or what it returned before.

        Arguments:
            sources: all tensors that `make` reads.
            make: computes the value.
            of: whatever else the value depends on, such as a type.
        """
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if learns or torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return make()
        state = (
            *of,
            _steps_taken,
            torch.is_inference_mode_enabled(),
            *((t.data_ptr(), t._version) for t in sources),
        )
        if self._state != state:
            # The sources are kept alive, lest another tensor come to lie at the same address.
            self._sources = tuple(t.detach() for t in sources)
            self._value = make()
            self._state = state
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept[T]":
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
