"""A network linearised in its response, for Δ-STN."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from sparing.tune.stn.setting import Setting


class Linearized:
    """Calls a model and returns f(x, w₀) + J_w f(x, w₀) Δw, where Δw is the response (Δ-STN).

    The response enters as t Δw, and the outputs are taken to first order in t at 0, by forward-mode
    differentiation in one pass; gradients flow through both terms. Everything else is the model's.

    Arguments:
        model: with response layers.
        setting: of the network, with its rows set.
    """

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self._model, self._setting = model, setting

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._setting.rows
        assert rows is not None
        zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
        with forward_ad.dual_level():
            self._setting.tangent = forward_ad.make_dual(zero, torch.ones_like(zero))
            try:
                output = self._model(*args, **kwargs)
                return tree_map(_first_order, output)
            finally:
                self._setting.tangent = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _first_order(part: Any) -> Any:
    if not isinstance(part, Tensor) or not part.is_floating_point():
        return part
    value, slope = forward_ad.unpack_dual(part)
    return value if slope is None else value + slope
