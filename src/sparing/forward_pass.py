"""What the adapted layers of a model share during one forward: inputs, notes and extra losses.

Some methods need more than a layer's input: the task of each row, a summary of earlier blocks, a
loss that is summed over layers. A `ForwardPass` carries these. It is opened by hooks on the base
model, so that plain calls, `generate` and `Trainer` all work, and it is replayed when gradient
checkpointing runs a block again.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import ConfigError


class ForwardPass:
    """One forward of the base model.

    Attributes:
        inputs: keyword arguments of the call that are meant for the tuner, by name.
        attention_mask: of the call, (batch, tokens), or None.
        notes: what layers left for later layers.
        losses: to be added to the model's own loss, scalars.
    """

    def __init__(
        self, inputs: dict[str, Any] | None = None, attention_mask: Tensor | None = None
    ) -> None:
        self.inputs = inputs or {}
        self.attention_mask = attention_mask
        self.notes: dict[Hashable, Any] = {}
        self.losses: list[Tensor] = []
        self.replaying = False

    def real_tokens(self, shape: torch.Size) -> Tensor | None:
        """Which tokens are no padding, (batch, tokens) bool, if the call's mask says so.

        Arguments:
            shape: of what is to be masked, (batch, tokens, width); other shapes have no such axis.
        """
        mask = self.attention_mask
        if mask is None or mask.dim() != 2 or len(shape) != 3 or mask.shape[1] < shape[1]:
            return None
        return mask[:, -shape[1] :].bool()

    def leave(self, key: Hashable, value: Any) -> None:
        """Leave a note. A replayed block changes nothing: later blocks have read the first."""
        if not self.replaying:
            self.notes[key] = value

    def add_loss(self, value: Tensor) -> None:
        """Add a scalar to the model's loss; once, however often the block is replayed."""
        if not self.replaying:
            self.losses.append(value)


class Passes:
    """Opens a `ForwardPass` for every forward of a model.

    Arguments:
        names: keyword arguments of the model's call to keep from it and put into `inputs`.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        self._open: ForwardPass | None = None
        self._last: ForwardPass | None = None
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Passes":
        # Hooks of a copied model are copied by torch; tensors of a past forward cannot be.
        copied = memo[id(self)] = Passes(self.names)
        copied._handles = list(self._handles)
        return copied

    @property
    def current(self) -> ForwardPass:
        """The pass that the calling layer belongs to; an empty one outside of any model."""
        if self._open is not None:
            return self._open
        if self._last is None:
            return ForwardPass()
        self._last.replaying = True
        return self._last

    @property
    def running(self) -> ForwardPass | None:
        """The pass under way, or in its backward, where blocks are replayed, that one; else None,
        as in a call of a part of the model."""
        if self._open is not None:  # asked first, as torch.compile cannot trace what follows
            return self._open
        return self.current if torch._C._current_graph_task_id() != -1 else None

    def auxiliary_loss(self) -> Tensor | None:
        """The sum of the losses that the layers added in the last forward, or None."""
        if self._last is None or not self._last.losses:
            return None
        first, *others = self._last.losses
        return sum((loss.to(first.device) for loss in others), start=first)

    def watch(self, model: nn.Module) -> None:
        """Open a pass in every forward of `model`, and add its losses to `output.loss`."""
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def unwatch(self, model: nn.Module) -> None:
        """Leave the model as it was before `watch`."""
        for handle in self._handles:
            handle.remove()
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, _Replaying) and function.passes is self:
                module._gradient_checkpointing_func = function.function  # type: ignore[assignment]

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = {name: kwargs.pop(name) for name in self.names if name in kwargs}
        self._open = ForwardPass(inputs, kwargs.get("attention_mask"))
        if model.training:
            self._replay_checkpoints(model)
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._open, self._last = None, self._open
        extra = self.auxiliary_loss()
        if extra is not None and model.training and getattr(output, "loss", None) is not None:
            output.loss = output.loss + extra.to(output.loss.device)
        return output

    def _replay_checkpoints(self, model: nn.Module) -> None:
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            wrapped = isinstance(function, _Replaying) and function.passes is self
            if function is not None and not wrapped:
                module._gradient_checkpointing_func = _Replaying(self, function)  # type: ignore[assignment]

    @contextmanager
    def during(self, one: ForwardPass) -> Iterator[None]:
        """Inside, `one` is the current pass; replayed, unless it is still open."""
        outer = self._open
        one.replaying = outer is not one
        self._open = one
        try:
            yield
        finally:
            self._open = outer


class _Replaying:
    """A checkpointing function that remembers which pass the block ran in."""

    def __init__(self, passes: Passes, function: Callable[..., Any]) -> None:
        self.passes, self.function = passes, function

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        one = self.passes.current
        if getattr(self.function, "keywords", {}).get("use_reentrant"):
            raise ConfigError(
                "gradient_checkpointing_kwargs",
                expected="use_reentrant=False, as gradients flow between blocks",
                found="use_reentrant=True, whose first run keeps no gradients",
                mend='Enable checkpointing with {"use_reentrant": False}.',
            )

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.passes.during(one):
                return block(*args, **kwargs)

        return self.function(run, *args, **kwargs)
