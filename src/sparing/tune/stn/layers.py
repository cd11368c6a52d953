"""Layers whose weights respond to hyperparameters, row by row (STN, eqs. 4 to 6).

A layer keeps its identity, its parameters, hooks and ties: only its class changes and the response
is added, as `torch.nn.utils.parametrize` does it. `plain` takes both back.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.errors import ConfigError
from sparing.tune.stn.setting import Setting
from sparing.tuners import generator_for

GATE_STD = 0.01
EMBEDDING_BOUND = 0.1


class Responsive(nn.Module):
    """What all response layers have in common.

    Attributes:
        setting: what the layer is told for a forward.
        plain_class: of the layer before.
        dropped: the hyperparameter that drops its weights, if any.
    """

    setting: Setting
    plain_class: type[nn.Module]
    dropped: str | None
    added: tuple[str, ...]  # names of the parameters that `plain` takes away

    def add(self, name: str, tensor: Tensor | None) -> None:
        """Register a parameter of the response."""
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.added = (*self.added, name)

    def fold(self, rows: Tensor) -> None:
        """Write the weights at `rows` (1, h) into the layer's own, and become plain again."""
        raise NotImplementedError

    def squared_norms(self, rows: Tensor) -> Tensor:
        """(rows,) squared Frobenius norms of the weights at (rows, h) response inputs."""
        raise NotImplementedError

    def plain(self) -> None:
        """Take the response away."""
        for name in self.added:
            delattr(self, name)
        kept: Any = self.plain_class
        for name in ("setting", "plain_class", "dropped", "added"):
            delattr(self, name)
        self.__class__ = kept

    def own(self, parameter: str, tensor: Tensor) -> None:
        """Give the layer a parameter of its own, so that what it was tied to stays as it is."""
        old = getattr(self, parameter)
        setattr(self, parameter, nn.Parameter(tensor.detach().to(old.dtype), old.requires_grad))


def gates(gate: Tensor, rows: Tensor, setting: Setting) -> Tensor:
    """U h, in at least float32 whatever autocast says (STN, eq. 4).

    Arguments:
        gate: (units, h).
        rows: (rows, h).

    Returns:
        (rows, units).
    """
    with torch.autocast(rows.device.type, enabled=False):
        exact = torch.promote_types(gate.dtype, torch.float32)
        found = F.linear(rows.to(exact), gate.to(exact))
    return found if setting.tangent is None else found * setting.tangent


def weight_mask(module: Responsive, weight: Tensor, by_word: bool = False) -> Tensor | None:
    """Ones that are dropped and scaled, for the elementary and the response weights alike."""
    values = module.setting.values
    if module.dropped is None or values is None or not module.training:
        return None
    shape = (weight.shape[0], 1) if by_word else weight.shape
    return F.dropout(weight.new_ones(shape), float(values[module.dropped]))


class ResponseLayer(Responsive):
    """y = c (W x + β) + z^w ⊙ (W' x) + z^b ⊙ β' with (z^w, z^b) = U h (STN, eqs. 4 and 5).

    The input has the rows of the batch on its first axis, or 1 for all. Where all rows share h,
    the weights are formed once and used as a plain layer uses them. Products are of the type of the
    input, the gates are formed in float32 or float64.

    Attributes:
        weight, bias: W and β, those of the layer before.
        response_weight, response_bias: W' and β', as they.
        gate: U, (2 · outputs, h) or (outputs, h) without bias; float32.
        factor: c, a scalar that starts as 1, or None for the constant 1.
    """

    weight: Any
    bias: Any
    response_weight: nn.Parameter | None
    response_bias: nn.Parameter | None
    gate: nn.Parameter | None
    factor: nn.Parameter | None
    unit_axis: ClassVar[int] = 0

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's linear map with other weights."""
        raise NotImplementedError

    def on_output(self, units: Tensor, y: Tensor) -> Tensor:
        """(rows, units) shaped to multiply an output."""
        return units.view(len(units), *[1] * (y.dim() - 2), -1).to(y.dtype)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """z^w and z^b, each (rows, outputs)."""
        assert self.gate is not None
        z = gates(self.gate, rows, self.setting)
        if self.response_bias is None:
            return z, None
        weight, bias = z.chunk(2, dim=-1)
        return weight, bias

    def masked(self) -> tuple[Tensor, Tensor]:
        """W and W', with the same entries dropped where DropConnect is on."""
        assert self.response_weight is not None
        mask = weight_mask(self, self.weight)
        if mask is None:
            return self.weight, self.response_weight
        return self.weight * mask, self.response_weight * mask

    def materialised(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """c W + diag(z^w) W' and c β + z^b ⊙ β' for one row of h (1, h), differentiable."""
        weight, response = self.masked()
        z_w, z_b = self.split(rows)
        shape = [1] * weight.dim()
        shape[self.unit_axis] = -1
        weight = self.scaled(weight) + z_w[0].to(weight.dtype).view(shape) * response
        if self.bias is None:
            return weight, None
        assert z_b is not None
        assert self.response_bias is not None
        return weight, self.scaled(self.bias) + z_b[0].to(self.bias.dtype) * self.response_bias

    def scaled(self, y: Tensor) -> Tensor:
        """c y."""
        return y if self.factor is None else y * self.factor.to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.setting.rows
        if self.gate is None or rows is None:
            mask = weight_mask(self, self.weight)
            weight = self.weight if mask is None else self.weight * mask
            return self.scaled(self.product(x, weight, self.bias))
        if len(rows) == 1:
            return self.product(x, *self.materialised(rows))
        self.setting.check_rows(x.shape[0], len(rows))
        weight, response = self.masked()
        z_w, z_b = self.split(rows)
        y = self.scaled(self.product(x, weight, self.bias))
        y = y + self.on_output(z_w, y) * self.product(x, response, None)
        if z_b is None:
            return y
        assert self.response_bias is not None
        return y + self.on_output(z_b.to(y.dtype) * self.response_bias.to(y.dtype), y)

    def squared_norms(self, rows: Tensor) -> Tensor:
        def by_unit(one: Tensor, other: Tensor) -> Tensor:
            product = (one * other).movedim(self.unit_axis, 0)
            return product.flatten(1).sum(1)

        weight, response = self.scaled(self.weight), self.response_weight
        if self.gate is None or response is None:
            return by_unit(weight, weight).sum().expand(len(rows))
        z, _ = self.split(rows)
        cross = 2 * z * by_unit(weight, response) + z.square() * by_unit(response, response)
        return by_unit(weight, weight).sum() + cross.sum(1)

    @torch.no_grad()
    def fold(self, rows: Tensor) -> None:
        self.dropped = None
        if self.gate is not None:
            weight, bias = self.materialised(rows)
            self.own("weight", weight)
            if bias is not None:
                self.own("bias", bias)
        self.plain()


class ResponseLinear(ResponseLayer, nn.Linear):
    """A linear layer (STN, eq. 4): (rows, ..., inputs) -> (rows, ..., outputs)."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class ResponseConv1D(ResponseLayer, Conv1D):
    """GPT-2's linear layer, whose weight is (inputs, outputs)."""

    unit_axis: ClassVar[int] = 1

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t(), bias)


class ResponseConv2d(ResponseLayer, nn.Conv2d):
    """A convolution with a gate for every output channel (STN, eq. 5)."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def on_output(self, units: Tensor, y: Tensor) -> Tensor:
        return units[:, :, None, None].to(y.dtype)


class ResponseEmbedding(Responsive, nn.Embedding):
    """E[x] + E'[x] ⊙ (U h), without a bias (STN, eq. 6): (rows or 1, ...) int -> (..., width).

    Attributes:
        weight, response_weight: E and E'.
        gate: U, (width, h) float32.
    """

    response_weight: nn.Parameter | None
    gate: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        mask = weight_mask(self, self.weight, by_word=True)
        y = self._look_up(x, self.weight, mask)
        rows = self.setting.rows
        if self.gate is None or rows is None:
            return y
        if len(rows) > 1:
            self.setting.check_rows(x.shape[0], len(rows))
        assert self.response_weight is not None
        z = gates(self.gate, rows, self.setting).to(y.dtype)
        z = z.view(len(z), *[1] * (y.dim() - 2), -1)
        return y + self._look_up(x, self.response_weight, mask) * z

    def _look_up(self, x: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        found = F.embedding(
            x, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )
        return found if mask is None else found * F.embedding(x, mask)

    def squared_norms(self, rows: Tensor) -> Tensor:
        weight, response = self.weight, self.response_weight
        if self.gate is None or response is None:
            return weight.square().sum().expand(len(rows))
        z = gates(self.gate, rows, self.setting)
        cross = 2 * z * (weight * response).sum(0) + z.square() * response.square().sum(0)
        return weight.square().sum() + cross.sum(1)

    @torch.no_grad()
    def fold(self, rows: Tensor) -> None:
        if self.gate is not None and self.response_weight is not None:
            z = gates(self.gate, rows, self.setting).to(self.weight.dtype)
            self.own("weight", self.weight + self.response_weight * z)
        self.plain()


_KINDS: dict[type[nn.Module], type[Responsive]] = {
    nn.Linear: ResponseLinear,
    Conv1D: ResponseConv1D,
    nn.Conv2d: ResponseConv2d,
    nn.Embedding: ResponseEmbedding,
}


def respond(
    layer: nn.Module, setting: Setting, inputs: int, *, name: str, seed: int, factor: bool
) -> Responsive:
    """Give a layer a response, in place.

    W' and β' start uniform within ±1/√fan_in (±0.1 in an embedding), U normal with standard
    deviation 0.01; W and β stay what they are.

    Arguments:
        layer: exactly an `nn.Linear`, `Conv1D`, `nn.Conv2d`, `nn.Embedding` or `nn.LSTM`.
        setting: of the network.
        inputs: h; 0 for a layer without a response, to be regularised only.
        name: of the layer, for the seed and for errors.
        seed: of the response.
        factor: whether the elementary part has a trainable factor c.

    Raises:
        ConfigError: the layer cannot respond.
    """
    from sparing.tune.stn.lstm import respond_lstm

    if type(layer) is nn.LSTM:
        return respond_lstm(layer, setting, inputs, name=name, seed=seed, factor=factor)
    kind = _KINDS.get(type(layer))
    if kind is None:
        raise ConfigError(
            f"module {name!r}",
            expected="a Linear, Conv1D, Conv2d, Embedding or LSTM, and no subclass of them",
            found=type(layer).__name__,
            mend="Leave it out of `layers`; its weights then do not respond, but still train.",
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise ConfigError(
            f"module {name!r}",
            expected="an embedding without max_norm, which rewrites weights in the forward",
            found=f"max_norm {layer.max_norm}",
            mend="Set max_norm to None, or leave it out of `layers`.",
        )
    prepare(layer, kind, setting)
    assert isinstance(layer, Responsive)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    draw = Draw(weight, generator_for(seed, f"{name} response"))
    if isinstance(layer, ResponseEmbedding):
        response = draw.uniform(weight.shape, EMBEDDING_BOUND) if inputs else None
        if response is not None and layer.padding_idx is not None and not response.is_meta:
            response[layer.padding_idx] = 0.0
        layer.add("response_weight", response)
        layer.add("gate", draw.gate(weight.shape[1], inputs) if inputs else None)
        return layer
    assert isinstance(layer, ResponseLayer)
    outputs = weight.shape[layer.unit_axis]
    bound = (weight.numel() / outputs) ** -0.5
    bias = layer.bias is not None and inputs > 0
    layer.add("response_weight", draw.uniform(weight.shape, bound) if inputs else None)
    layer.add("response_bias", draw.uniform((outputs,), bound) if bias else None)
    layer.add("gate", draw.gate(outputs * (1 + bias), inputs) if inputs else None)
    layer.add("factor", draw.one() if factor and inputs else None)
    return layer


def prepare(layer: Any, kind: type[Responsive], setting: Setting) -> None:
    """Change the class of a layer, remembering the old one."""
    layer.plain_class = type(layer)
    layer.__class__ = kind
    layer.setting, layer.dropped, layer.added = setting, None, ()


class Draw:
    """Starting values of a response, of the type and on the device of a weight.

    Drawn on the CPU, so that they are the same for every device.
    """

    def __init__(self, like: Tensor, generator: torch.Generator) -> None:
        self.like, self.generator = like, generator

    def uniform(self, shape: Sequence[int], bound: float) -> Tensor:
        """Uniform within ±bound."""
        drawn = self._empty(shape)
        if not drawn.is_meta:
            drawn.uniform_(-bound, bound, generator=self.generator)
        return drawn.to(self.like.device, self.like.dtype)

    def gate(self, units: int, inputs: int) -> Tensor:
        """U, in at least float32."""
        drawn = self._empty((units, inputs))
        if not drawn.is_meta:
            drawn.normal_(0.0, GATE_STD, generator=self.generator)
        return drawn.to(self.like.device, self._exact)

    def one(self) -> Tensor:
        """c at its start."""
        return torch.ones((), device=self.like.device, dtype=self._exact)

    @property
    def _exact(self) -> torch.dtype:
        return torch.promote_types(self.like.dtype, torch.float32)

    def _empty(self, shape: Sequence[int]) -> Tensor:
        device = "meta" if self.like.is_meta else "cpu"
        return torch.empty(*shape, dtype=torch.float32, device=device)
