"""Bottlenecks and where they are put: every setting that changes what a layer reads or returns."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.adapt._unified_config import Slot
from sparing.errors import ConfigError
from sparing.surgery import Projection
from sparing.tuners import AdditiveAdapter, LayerAdapter, TunerLayer, generator_for

BERT_DEVIATION = 0.02


class Scale(nn.Module):
    """Composition with s: plain (1), scaled (a constant) or learned (a trainable scalar).

    Attributes:
        factor: () float32, or a float.
    """

    factor: Tensor | float

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        start = slot.scale if slot.composes in ("scaled", "learned") else 1.0
        if slot.composes == "learned":
            self.factor = nn.Parameter(torch.tensor(start, dtype=torch.float32, device="cpu"))
        else:
            self.factor = start

    def forward(self, delta: Tensor) -> Tensor:
        """s Δh."""
        if isinstance(self.factor, float):
            return delta if self.factor == 1 else delta * self.factor
        return delta * self.factor.to(delta.dtype)


class Bottleneck(nn.Module):
    """s g(z): an adapter's g(z) = ReLU(z W_down + b_down) W_up + b_up, or LoRA's z W_down W_up
    (paper, eqs. 3 and 4).

    r (inputs + outputs) weights, and twice as many FLOPs a token; an adapter also has r + outputs
    biases, and a layer norm twice its width. Computed in float32, or in float64 for such inputs.

    Arguments:
        slot: its settings; `form` is "adapter" or "lora".
        width: r.
        inputs, outputs: widths of z and of the result.
        seed: of the adapter.
        name: of the layer, for the seed.

    Attributes:
        down: (r, inputs) float32.
        up: (outputs, r) float32.
        down_bias, up_bias: (r,) and (outputs,) float32, or None.
    """

    def __init__(
        self, slot: Slot, width: int, inputs: int, outputs: int, seed: int, name: str
    ) -> None:
        super().__init__()
        down = torch.empty(width, inputs, dtype=torch.float32, device="cpu")
        up = torch.zeros(outputs, width, dtype=torch.float32, device="cpu")
        generator = generator_for(seed, f"{name} bottleneck")
        is_adapter = slot.form == "adapter"
        if is_adapter and slot.init == "bert":
            down.normal_(std=BERT_DEVIATION, generator=generator)
            up.normal_(std=BERT_DEVIATION, generator=generator)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias = nn.Parameter(_zeros(width)) if is_adapter else None
        self.up_bias = nn.Parameter(_zeros(outputs)) if is_adapter else None
        self.rectified = is_adapter
        self.norm_in = _norm(inputs) if slot.layernorm == "in" else None
        self.norm_out = _norm(outputs) if slot.layernorm == "out" else None
        self.dropout = slot.dropout
        self.scale = Scale(slot)

    def forward(self, z: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        exact = torch.promote_types(z.dtype, torch.float32)
        z = _normed(self.norm_in, z.to(exact))
        if not self.rectified:
            z = self._dropped(z)
        hidden = F.linear(z, self.down.to(exact), _cast(self.down_bias, exact))
        if self.rectified:
            hidden = self._dropped(F.relu(hidden))
        delta = F.linear(hidden, self.up.to(hidden.dtype), _cast(self.up_bias, hidden.dtype))
        return self.scale(_normed(self.norm_out, delta))

    def weight(self) -> Tensor:
        """(outputs, inputs): the matrix of a LoRA, with its scale."""
        return self.scale(self.up @ self.down)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def _zeros(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float32, device="cpu")


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, dtype=torch.float32, device="cpu")


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _normed(norm: nn.LayerNorm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


class Reading:
    """What one layer of a sub-layer read, until the last one needs it in the same forward.

    Gradient checkpointing runs both layers again, so it finds what it needs. Copies start empty.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def put(self, x: Tensor) -> None:
        self._seen = x

    def take(self) -> Tensor:
        """What was read last; kept no longer."""
        seen, self._seen = self._seen, None
        if seen is None:
            raise ConfigError(
                "parallel adapter",
                expected="a sub-layer whose first projection runs before its output layer",
                found="an output layer that ran alone",
                mend="Use insertion='sequential' on this architecture.",
            )
        return seen

    def __deepcopy__(self, memo: dict[int, Any]) -> "Reading":
        return Reading()

    def __reduce__(self) -> tuple[Any, ...]:
        return Reading, ()


class Tap(LayerAdapter):
    """Keeps what a sub-layer's first projection reads: x of a parallel adapter, which is what W_1
    or W_q reads, after a pre-norm."""

    mergeable: ClassVar[bool] = False

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        self.reading.put(x)
        return layer(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


class _Unmergeable(LayerAdapter):
    mergeable: ClassVar[bool] = False

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(
            type(self).__name__,
            expected="a method that is a fixed matrix",
            found="one that depends on its input",
            mend="Keep the adapter as it is; it cannot be merged.",
        )


class InputSide(_Unmergeable):
    """Changes what a layer reads: h + s g(x) or h + s g(h) for the concatenated heads h.

    Arguments:
        bottleneck: s g.
        reading: of x; None for a sequential adapter.
    """

    def __init__(self, bottleneck: Bottleneck, reading: Reading | None) -> None:
        super().__init__()
        self.bottleneck, self.reading = bottleneck, reading

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        source = x if self.reading is None else self.reading.take()
        return layer(x + self.bottleneck(source).to(x.dtype))


class OutputSide(_Unmergeable):
    """Changes what a layer returns: h + s g(x) or h + s g(h); arguments as for `InputSide`."""

    def __init__(self, bottleneck: Bottleneck, reading: Reading | None) -> None:
        super().__init__()
        self.bottleneck, self.reading = bottleneck, reading

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        h = layer(x)
        source = h if self.reading is None else self.reading.take()
        return h + self.bottleneck(source).to(h.dtype)


class AfterNorm(_Unmergeable):
    """Pfeiffer's adapter on the norm after the feed-forward network: u = LN(v), then
    LN(v + s g(u)), the same norm twice."""

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        return layer(x + self.bottleneck(layer(x)).to(x.dtype))


class _OnProjections(nn.Module):
    """Bottlenecks on projections of one linear layer; several where a layer is fused.

    Attributes:
        bottlenecks: by the name of the projection, in the order of their outputs.
        slices: (start, stop) of each.
        outputs: of the layer.
    """

    def __init__(self, parts: dict[str, tuple[Projection, Bottleneck]], outputs: int) -> None:
        super().__init__()
        ordered = sorted(parts.items(), key=lambda item: item[1][0].start)
        self.bottlenecks = nn.ModuleDict({name: part for name, (_, part) in ordered})
        self.slices = [(projection.start, projection.stop) for _, (projection, _) in ordered]
        self.outputs = outputs

    def _assembled(self, pieces: list[Tensor], dim: int) -> Tensor:
        """Pieces side by side with zeros between: the layer's outputs along `dim`."""
        if self.slices == [(0, self.outputs)]:
            return pieces[0]
        filled, end = [], 0
        for (start, stop), piece in zip(self.slices, pieces, strict=True):
            filled += [_gap(piece, start - end, dim), piece]
            end = stop
        filled.append(_gap(pieces[-1], self.outputs - end, dim))
        return torch.cat(filled, dim)


def _gap(like: Tensor, width: int, dim: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = width
    return like.new_zeros(shape)


class LowRank(_OnProjections, AdditiveAdapter):
    """LoRA on projections of a linear layer: s x W_down W_up is added to their outputs."""

    def delta(self, x: Tensor) -> Tensor:
        return self._assembled([part(x) for part in self.bottlenecks.values()], -1)

    def delta_weight(self) -> Tensor:
        return self._assembled([part.weight() for part in self.bottlenecks.values()], 0)  # type: ignore[operator]


class OnLayer(_OnProjections, _Unmergeable):
    """Adapters with a ReLU on projections of a linear layer, in parallel to it or after it."""

    def __init__(
        self, parts: dict[str, tuple[Projection, Bottleneck]], outputs: int, sequential: bool
    ) -> None:
        super().__init__(parts, outputs)
        self.sequential = sequential

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        h = layer(x)
        pieces = [
            part(h[..., start:stop] if self.sequential else x)
            for (start, stop), part in zip(self.slices, self.bottlenecks.values(), strict=True)
        ]
        return h + self._assembled(pieces, -1).to(h.dtype)


class Bias(AdditiveAdapter):
    """BitFit: a trained change of a layer's bias.

    Attributes:
        change: (outputs,) float32, zero at first.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer.bias, Tensor)
        self.change = nn.Parameter(_zeros(len(layer.bias)))
        self.trailing = 2 if isinstance(layer, nn.Conv2d) else 0

    def delta(self, x: Tensor) -> Tensor:
        return self.change.view(-1, *(1,) * self.trailing)

    def delta_weight(self) -> Tensor:
        return torch.zeros((), device=self.change.device)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert bias is not None
        exact = torch.promote_types(bias.dtype, torch.float32)
        return weight, (bias.to(exact) + self.change.to(exact)).to(bias.dtype)


class UnifiedLayer(TunerLayer):
    """A layer with parts of adapters; those of several adapters wrap each other in their order."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        call: Callable[..., Tensor] = self.base_layer
        for part in self.active_parts:
            call = partial(part, layer=call)
        return call(x)

    @property
    def active_parts(self) -> list[Any]:
        """What the active adapters have on this layer, in their order."""
        if self.disable_adapters:
            return []
        return [self.adapters[name] for name in self.active_adapters if name in self.adapters]


class UnifiedLinear(UnifiedLayer):
    """A linear layer. PEFT's "all-linear" looks for "Linear" in the class name."""
