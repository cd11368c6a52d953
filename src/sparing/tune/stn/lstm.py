"""An LSTM whose weights respond to hyperparameters (STN, eq. 7)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.errors import ConfigError, DataError
from sparing.tune.stn.layers import Draw, Responsive, gates, prepare, weight_mask
from sparing.tune.stn.setting import Setting
from sparing.tuners import generator_for

State = tuple[Tensor, Tensor]


class ResponseLSTM(Responsive, nn.LSTM):
    """Input-to-hidden and hidden-to-hidden maps are both of (4), with 4H outputs each.

    Units keep torch's order (input, forget, cell, output); the paper's code orders them otherwise,
    which is the same up to names, as every unit has gates of its own. Where all rows share h, the
    weights are formed once and torch's LSTM runs with them; else it is a loop over time with one
    product a step for both parts.

    Input (rows, time, inputs), output (rows, time, hidden) and ((layers, rows, hidden), …) as in
    `nn.LSTM` with `batch_first`. DropConnect masks the hidden-to-hidden weights, once a forward.
    """

    def forward(self, x: Tensor, hx: State | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise DataError(
                "input of an LSTM",
                expected="a tensor (rows, time, inputs)",
                found=type(x).__name__ if not isinstance(x, Tensor) else f"shape {tuple(x.shape)}",
                mend="Pad the sequences, with the batch on the first axis.",
            )
        rows = self.setting.rows if self.responds else None
        if rows is None or len(rows) == 1:
            return self._shared(x, hx, rows)
        self.setting.check_rows(x.shape[0], len(rows))
        return self._by_row(x.expand(len(rows), -1, -1), hx, rows)

    @property
    def responds(self) -> bool:
        """Whether there is a response, or only regularisers."""
        return hasattr(self, "gate_ih_l0")

    def suffixes(self) -> list[list[str]]:
        """Suffixes of the parameters of each layer, by direction."""
        both = ("", "_reverse") if self.bidirectional else ("",)
        return [[f"l{layer}{end}" for end in both] for layer in range(self.num_layers)]

    def part(self, name: str, suffix: str) -> dict[str, Tensor | None]:
        """Parameters of one map, such as hh of l0; masked by DropConnect where that is on."""
        found: dict[str, Tensor | None] = {
            "weight": getattr(self, f"weight_{name}_{suffix}"),
            "bias": getattr(self, f"bias_{name}_{suffix}", None),
            "response_weight": getattr(self, f"response_weight_{name}_{suffix}", None),
            "response_bias": getattr(self, f"response_bias_{name}_{suffix}", None),
            "gate": getattr(self, f"gate_{name}_{suffix}", None),
            "factor": getattr(self, f"factor_{name}_{suffix}", None),
        }
        weight = found["weight"]
        assert weight is not None
        mask = weight_mask(self, weight) if name == "hh" else None
        if mask is not None:
            for key in ("weight", "response_weight"):
                tensor = found[key]
                found[key] = None if tensor is None else tensor * mask
        return found

    def materialised(self, name: str, suffix: str, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one map for one row of h (1, h), differentiable."""
        part = self.part(name, suffix)
        weight, bias, gate = part["weight"], part["bias"], part["gate"]
        response, response_bias = part["response_weight"], part["response_bias"]
        assert weight is not None
        assert response is not None
        assert gate is not None
        z = gates(gate, rows, self.setting)[0].to(weight.dtype)
        units = len(weight)
        folded = _scaled(weight, part["factor"]) + z[:units, None] * response
        if bias is None or response_bias is None:
            return folded, None
        return folded, _scaled(bias, part["factor"]) + z[units:] * response_bias

    def _shared(self, x: Tensor, hx: State | None, rows: Tensor | None) -> tuple[Tensor, State]:
        """torch's own LSTM, with other weights."""
        if rows is None and self.dropped is None:
            return nn.LSTM.forward(self, x, hx)
        flat: list[Tensor] = []
        for suffix in (suffix for layer in self.suffixes() for suffix in layer):
            if rows is None:
                parts = [self.part(name, suffix) for name in ("ih", "hh")]
                weights = [(part["weight"], part["bias"]) for part in parts]
            else:
                weights = [self.materialised(name, suffix, rows) for name in ("ih", "hh")]
            flat += [weight for weight, _ in weights if weight is not None]
            flat += [bias for _, bias in weights if bias is not None]
        own = self._flat_weights
        self._flat_weights = flat  # type: ignore[assignment]
        try:
            return nn.LSTM.forward(self, x, hx)
        finally:
            self._flat_weights = own

    def _by_row(self, x: Tensor, hx: State | None, rows: Tensor) -> tuple[Tensor, State]:
        directions = 2 if self.bidirectional else 1
        zeros = x.new_zeros(self.num_layers * directions, x.shape[0], self.hidden_size)
        first, cells = hx if hx is not None else (zeros, zeros)
        last_h, last_c = [], []
        for layer, suffixes in enumerate(self.suffixes()):
            outputs = []
            for direction, suffix in enumerate(suffixes):
                number = layer * directions + direction
                backwards = direction == 1
                y, (h, c) = self._scan(
                    x.flip(1) if backwards else x, (first[number], cells[number]), suffix, rows
                )
                outputs.append(y.flip(1) if backwards else y)
                last_h.append(h)
                last_c.append(c)
            x = torch.cat(outputs, dim=-1)
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, (torch.stack(last_h), torch.stack(last_c))

    def _scan(self, x: Tensor, state: State, suffix: str, rows: Tensor) -> tuple[Tensor, State]:
        """One layer in one direction, over time."""
        into, (h, c) = self.part("ih", suffix), state
        given = _Map(into, gates(_present(into["gate"]), rows, self.setting))(x)
        recurrent = self.part("hh", suffix)
        again = _Map(recurrent, gates(_present(recurrent["gate"]), rows, self.setting))
        outputs = []
        for t in range(x.shape[1]):
            i, f, g, o = (given[:, t] + again(h)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, dim=1), (h, c)

    def squared_norms(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(rows))
        for suffix in (suffix for layer in self.suffixes() for suffix in layer):
            for name in ("ih", "hh"):
                part = self.part(name, suffix)
                weight = _scaled(_present(part["weight"]), part["factor"])
                total = total + weight.square().sum()
                if part["gate"] is not None:
                    response = _present(part["response_weight"])
                    z = gates(part["gate"], rows, self.setting)[:, : len(weight)]
                    total = total + (2 * z * (weight * response).sum(1)).sum(1)
                    total = total + (z.square() * response.square().sum(1)).sum(1)
        return total

    @torch.no_grad()
    def fold(self, rows: Tensor) -> None:
        self.dropped = None
        if self.responds:
            for suffix in (suffix for layer in self.suffixes() for suffix in layer):
                for name in ("ih", "hh"):
                    weight, bias = self.materialised(name, suffix, rows)
                    self.own(f"weight_{name}_{suffix}", weight)
                    if bias is not None:
                        self.own(f"bias_{name}_{suffix}", bias)
        self.plain()
        self.flatten_parameters()


class _Map:
    """(4) for rows with gates (rows, units or 2 · units), as one product for W and W'."""

    def __init__(self, part: dict[str, Tensor | None], z: Tensor) -> None:
        weight, response = _present(part["weight"]), _present(part["response_weight"])
        units = len(weight)
        self.both = torch.cat([_scaled(weight, part["factor"]), response]).t()
        self.gate = z[:, :units].to(weight.dtype)
        self.shift: Tensor | None = None
        if part["bias"] is not None and part["response_bias"] is not None:
            bias = _scaled(part["bias"], part["factor"])
            self.shift = bias + z[:, units:].to(weight.dtype) * part["response_bias"]

    def __call__(self, x: Tensor) -> Tensor:
        elementary, response = (x @ self.both).chunk(2, dim=-1)
        lift = (slice(None), *[None] * (x.dim() - 2))
        y = elementary + self.gate[lift] * response
        return y if self.shift is None else y + self.shift[lift]


def _scaled(tensor: Tensor, factor: Tensor | None) -> Tensor:
    return tensor if factor is None else tensor * factor.to(tensor.dtype)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def respond_lstm(
    layer: nn.LSTM, setting: Setting, inputs: int, *, name: str, seed: int, factor: bool
) -> ResponseLSTM:
    """Give an LSTM a response, in place; see `respond`.

    Raises:
        ConfigError: the batch is not on its first axis, or it projects its states.
    """
    if not layer.batch_first or layer.proj_size:
        raise ConfigError(
            f"module {name!r}",
            expected="an LSTM with batch_first=True and without proj_size",
            found=f"batch_first={layer.batch_first}, proj_size={layer.proj_size}",
            mend="Build it so, or leave it out of `layers`.",
        )
    prepare(layer, ResponseLSTM, setting)
    lstm: Any = layer
    if not inputs:
        return lstm
    draw = Draw(lstm.weight_ih_l0, generator_for(seed, f"{name} response"))
    for suffix in (suffix for both in lstm.suffixes() for suffix in both):
        for part in ("ih", "hh"):
            weight = getattr(layer, f"weight_{part}_{suffix}")
            units, bound = len(weight), weight.shape[1] ** -0.5
            lstm.add(f"response_weight_{part}_{suffix}", draw.uniform(weight.shape, bound))
            if layer.bias:
                lstm.add(f"response_bias_{part}_{suffix}", draw.uniform((units,), bound))
            lstm.add(f"gate_{part}_{suffix}", draw.gate(units * (1 + layer.bias), inputs))
            if factor:
                lstm.add(f"factor_{part}_{suffix}", draw.one())
    return lstm
