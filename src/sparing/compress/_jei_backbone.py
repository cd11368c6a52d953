"""A frozen classifier run block by block, with rows that leave on the way.

The model's own forward is used, watched by hooks: what lies before, between and behind the blocks
is the model's business, so every architecture whose blocks follow each other works.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from sparing.errors import ConfigError, DataError

Pool = Literal["cls", "mean", "last"]
Inputs = Any  # a tensor, or a mapping of keyword arguments
_GATHER_BELOW = 0.9  # of rows still there; above, moving them costs more than computing them


class _EveryoneLeftError(Exception):
    """Ends a forward from inside."""


@dataclass
class Rows:
    """Which rows of a batch a forward still carries.

    Arguments:
        batch: rows at the start.
        index: (rows,) int64, which those carried are.
        alive: (rows,) bool, which of those have not left yet.
        mask: attention mask of the whole batch, (batch, tokens), or None.
    """

    batch: int
    index: Tensor
    alive: Tensor
    mask: Tensor | None

    def compact(self) -> Tensor | None:
        """Positions to keep, or None where nearly all are alive.

        Raises:
            _EveryoneLeftError: none is.
        """
        count = int(self.alive.sum())
        if count == 0:
            raise _EveryoneLeftError
        if count > _GATHER_BELOW * len(self.index):
            return None
        kept = self.alive.nonzero_static(size=count)[:, 0]
        self.index = self.index.index_select(0, kept)
        self.alive = self.alive.index_select(0, kept)
        return kept

    def selected(self, value: Any) -> Any:
        """A tensor of the whole batch (two axes or more, the first of that length) cut down."""
        full = isinstance(value, Tensor) and value.dim() >= 2 and len(value) == self.batch
        if full and len(self.index) < self.batch:
            return value.index_select(0, self.index)
        return value


AtExit = Callable[[int, Tensor, Rows], None]


@dataclass
class Backbone:
    """A classifier and where its exits are.

    Arguments:
        model: in eval mode; it is never changed.
        blocks: names of its blocks, in order.
        exits: numbers of the blocks with an exit behind them, ascending, without the last.
        pool: one vector of a row's tokens: the first, the mean of the real ones, or the last real
            one. Feature maps (batch, channels, height, width) are always averaged.
        norm: name of the norm that features pass first, or None.
    """

    model: nn.Module
    blocks: Sequence[str]
    exits: Sequence[int]
    pool: Pool
    norm: str | None

    def call(self, inputs: Inputs) -> Tensor:
        """The model's own logits, (batch, classes)."""
        self.require_eval()
        named = dict(inputs) if hasattr(inputs, "items") else None
        config = getattr(self.model, "config", None)
        with torch.no_grad():
            if named is None:
                output = self.model(inputs)
            else:
                if getattr(config, "use_cache", False):
                    named.setdefault("use_cache", False)
                output = self.model(**named)
        logits = output if isinstance(output, Tensor) else output.logits
        return self._pool(logits, attention_mask(inputs), "last") if logits.dim() == 3 else logits

    def require_eval(self) -> None:
        """Raise a `ConfigError` if any part of the model is in training mode."""
        if any(module.training for module in self.model.modules()):
            raise ConfigError(
                "backbone",
                expected="a model in eval mode, as dropout would make its features noisy",
                found="train mode",
                mend="Call model.eval().",
            )

    @torch.no_grad()
    def pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """z (rows, width) float32, of a block's output."""
        if hidden.dim() == 4:  # a feature map; norms of tokens do not apply to it
            return hidden.float().mean((2, 3))
        norm = self.model.get_submodule(self.norm) if self.norm else nn.Identity()
        if hidden.dim() == 2:
            return norm(hidden).float()
        if self.pool == "mean":
            return self._pool(norm(hidden), mask, "mean")
        return norm(self._pool(hidden, mask, self.pool)).float()

    @staticmethod
    def _pool(tokens: Tensor, mask: Tensor | None, pool: Pool) -> Tensor:
        if pool == "cls":
            return tokens[:, 0]
        if mask is None:
            return tokens[:, -1] if pool == "last" else tokens.float().mean(1)
        real = mask.bool()
        if pool == "last":
            places = torch.arange(mask.shape[1], device=mask.device)
            last = places.expand_as(mask).masked_fill(~real, 0).amax(1)
            return tokens[torch.arange(len(tokens), device=tokens.device), last]
        weights = real.float()[..., None]
        return (tokens.float() * weights).sum(1) / weights.sum(1).clamp_min(1)

    @contextmanager
    def _watched(self, rows: Rows, at_block: Callable[[int, Tensor], Any]) -> Iterator[None]:
        handles = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            # The hidden state is cut down already, and no longer as long as the batch.
            return tree_map(rows.selected, args), tree_map(rows.selected, kwargs)

        def after(number: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                hidden = output if isinstance(output, Tensor) else output[0]
                changed = at_block(number, hidden)
                if changed is None:
                    return None
                return changed if isinstance(output, Tensor) else (changed, *output[1:])

            return hook

        try:
            for number, name in enumerate(self.blocks):
                block = self.model.get_submodule(name)
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(block.register_forward_hook(after(number)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, inputs: Inputs, at_exit: AtExit) -> tuple[Tensor | None, Rows]:
        """One forward; rows that `at_exit` marks as not alive are computed no further.

        Arguments:
            inputs: of the model.
            at_exit: called with the exit's number, z of the rows carried, and the rows.

        Returns:
            the final logits of the whole batch, of which only rows still alive mean anything, or
            None if everyone left; and the rows.
        """
        rows = first_rows(inputs)

        def at_block(number: int, hidden: Tensor) -> Tensor | None:
            kept = None
            if number in self.exits:
                mask = rows.selected(rows.mask)
                at_exit(self.exits.index(number), self.pooled(hidden, mask), rows)
                kept = rows.compact()
            if kept is not None:
                return hidden.index_select(0, kept)
            if number == len(self.blocks) - 1 and len(rows.index) < rows.batch:
                whole = hidden.new_zeros((rows.batch, *hidden.shape[1:]))
                return whole.index_copy(0, rows.index, hidden)
            return None

        with self._watched(rows, at_block):
            try:
                return self.call(inputs), rows
            except _EveryoneLeftError:
                return None, rows

    def features(self, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
        """z of every exit, (batch, width) float32, and the final logits, float32."""
        pooled: list[Tensor] = []
        logits, _ = self.run(inputs, lambda exit, z, rows: pooled.append(z))
        assert logits is not None
        return pooled, logits.float()

    def mult_adds(self, inputs: Inputs) -> list[float]:
        """Multiply-adds a row up to every exit, and of the whole model, without any heads.

        Counted by torch: matrix products, convolutions and attention, not norms or activations.
        """
        counter = FlopCounterMode(display=False)
        reached: list[int] = []
        # Only this backend is made of products that the counter knows on every device.
        with sdpa_kernel(SDPBackend.MATH), counter:
            self.run(inputs, lambda exit, z, rows: reached.append(counter.get_total_flops()))
        batch = first_rows(inputs).batch
        return [flops / 2 / batch for flops in (*reached, counter.get_total_flops())]


def attention_mask(inputs: Inputs) -> Tensor | None:
    """The attention mask (batch, tokens) among a model's inputs, if there is one."""
    mask = inputs.get("attention_mask") if hasattr(inputs, "items") else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def first_rows(inputs: Inputs) -> Rows:
    """All rows of a batch.

    Raises:
        DataError: the inputs hold no tensor.
    """
    tensors = inputs.values() if hasattr(inputs, "items") else [inputs]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            index = torch.arange(len(tensor), device=tensor.device)
            alive = torch.ones_like(index, dtype=torch.bool)
            return Rows(len(tensor), index, alive, attention_mask(inputs))
    raise DataError(
        "inputs",
        expected="a tensor, or a mapping of the model's keyword arguments",
        found=type(inputs).__name__,
        mend="Give what the model is called with.",
    )


def final_norm(model: nn.Module, blocks: Sequence[str]) -> str | None:
    """The name of the first norm behind the blocks, or None where there is none (as in BERT)."""
    names = [name for name, _ in model.named_modules()]
    start = names.index(blocks[-1])
    for name in names[start:]:
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        if not inside and type(model.get_submodule(name)).__name__.endswith("Norm"):
            return name
    return None
