"""Regularisers whose strength is read from the hyperparameters, row by row if they can."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.errors import ConfigError, near_matches
from sparing.tune.stn.hparams import HParam
from sparing.tune.stn.layers import Responsive, respond
from sparing.tune.stn.setting import Setting

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class RowDropout(nn.Module):
    """Dropout with a rate for every row: x ⊙ Bernoulli(1 - p_b) / (1 - p_b).

    One mask entry for every number, for a channel (`Dropout1d` to `Dropout3d`) or, if locked, for
    a unit at all times (axis 1). Where all rows share the rate of plain dropout, it is torch's own,
    with its random numbers. Random numbers are torch's global ones, as in every dropout module; the
    training loop seeds them.

    Attributes:
        hparam: that is the rate.
        locked: one mask for all times.
        plain_class: of the module before.
    """

    setting: Setting
    hparam: str
    locked: bool
    plain_class: type[nn.Module]
    p: float

    def forward(self, x: Tensor) -> Tensor:
        values = self.setting.values
        if not self.training or values is None:
            return x
        rate = values[self.hparam].to(x.device)
        if rate.dim() == 0 and self.plain_class is nn.Dropout and not self.locked:
            return F.dropout(x, float(rate), training=True)
        rows = max(rate.numel(), x.shape[0])
        self.setting.check_rows(x.shape[0], rows)
        keep = (1 - rate).to(x.dtype).expand(rows).view(-1, *[1] * (x.dim() - 1))
        mask = torch.bernoulli(keep.expand(rows, *self._mask_shape(x)))
        return x * (mask / keep.clamp_min(torch.finfo(keep.dtype).tiny))

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        if self.locked:
            return (1, *x.shape[2:])
        if self.plain_class is nn.Dropout:
            return tuple(x.shape[1:])
        return (x.shape[1], *[1] * (x.dim() - 2))

    def plain(self, rate: float) -> None:
        """Become the module before, at a fixed rate."""
        self.__class__ = self.plain_class  # type: ignore[assignment]
        for name in ("setting", "hparam", "locked", "plain_class"):
            delattr(self, name)
        self.p = rate


class ActivationPenalty:
    """A forward hook that adds value · mean(h²), or value · mean((h_t - h_{t-1})²), in training.

    Arguments:
        hparam: the value.
        setting: of the network.
        temporal: the second form; time is axis 1.
    """

    def __init__(self, hparam: str, setting: Setting, temporal: bool) -> None:
        self.hparam, self.setting, self.temporal = hparam, setting, temporal

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        values = self.setting.values
        if not module.training or values is None:
            return
        states = output[0] if isinstance(output, tuple) else output
        if self.temporal:
            states = states[:, 1:] - states[:, :-1]
        strength = values[self.hparam].to(states.device)
        self.setting.penalties.append(strength * states.float().square().mean())


def attach(model: nn.Module, hparams: Sequence[HParam], setting: Setting) -> None:
    """Put the regularisers of all hyperparameters into a model, in place.

    Layers that respond must respond already.

    Raises:
        ConfigError: a place does not exist, does not suit, or is taken.
    """
    modules = dict(model.named_modules())
    named = {place for hparam in hparams for place in hparam.places}
    for hparam in hparams:
        if not isinstance(hparam.apply, str):
            continue
        for place in _places(hparam, modules, named):
            _attach_one(modules[place], place, hparam, setting)


def _places(hparam: HParam, modules: dict[str, nn.Module], named: set[str]) -> Sequence[str]:
    for place in hparam.places:
        if place not in modules:
            raise ConfigError(
                f"hyperparameter {hparam.name!r}, place {place!r}",
                expected="the name of a module",
                found="none of that name",
                mend=near_matches(place, [name for name in modules if name]),
            )
    if hparam.places:
        return hparam.places
    free = [n for n, m in modules.items() if type(m) in DROPOUTS and n not in named]
    if hparam.apply != "dropout" or not free:
        raise ConfigError(
            f"hyperparameter {hparam.name!r}",
            expected="places, the names of the modules where it acts",
            found="none" if hparam.apply != "dropout" else "none, and no free dropout module",
            mend="Give places=('name',); model.named_modules() lists them.",
        )
    return free


def _attach_one(module: nn.Module, place: str, hparam: HParam, setting: Setting) -> None:
    if hparam.apply in ("dropout", "locked-dropout"):
        _require(type(module) in DROPOUTS, place, hparam, "a dropout module", module)
        replaced: Any = module
        replaced.plain_class = type(module)
        replaced.__class__ = RowDropout
        replaced.setting, replaced.hparam = setting, hparam.name
        replaced.locked = hparam.apply == "locked-dropout"
    elif hparam.apply in ("activation-penalty", "temporal-penalty"):
        temporal = hparam.apply == "temporal-penalty"
        module.register_forward_hook(ActivationPenalty(hparam.name, setting, temporal))
    elif hparam.apply in ("dropconnect", "embedding-dropout"):
        if not isinstance(module, Responsive):
            respond(module, setting, 0, name=place, seed=0, factor=False)
        assert isinstance(module, Responsive)
        words = isinstance(module, nn.Embedding)
        expected = "an embedding" if hparam.apply == "embedding-dropout" else "no embedding"
        _require(words == (hparam.apply == "embedding-dropout"), place, hparam, expected, module)
        _require(module.dropped is None, place, hparam, "a layer of one such rate", module)
        module.dropped = hparam.name
    elif not isinstance(module, Responsive):  # weight-penalty
        respond(module, setting, 0, name=place, seed=0, factor=False)


def _require(good: bool, place: str, hparam: HParam, expected: str, module: nn.Module) -> None:
    if not good:
        raise ConfigError(
            f"hyperparameter {hparam.name!r}, place {place!r}",
            expected=f"{expected}, for {hparam.apply}",
            found=type(module).__name__,
            mend="Name another module, or give it another `apply`.",
        )


def weight_penalty(
    model: nn.Module, hparams: Sequence[HParam], rows: Tensor | None, setting: Setting
) -> Tensor | None:
    """½ Σ value_b |Ŵ(λ_b)|², averaged over rows b and summed over layers; None where no
    hyperparameter is one.

    Arguments:
        rows: (rows or 1, h) inputs of the response, or None for a plain network.
    """
    found: list[Tensor] = []
    for hparam in hparams:
        if hparam.apply != "weight-penalty":
            continue
        assert setting.values is not None
        strength = setting.values[hparam.name]
        for place in hparam.places:
            layer = model.get_submodule(place)
            assert isinstance(layer, Responsive)
            inputs = strength.new_zeros(1, 0) if rows is None else rows
            norms = layer.squared_norms(inputs)
            found.append(0.5 * (strength.to(norms.device) * norms).mean())
    return torch.stack(found).sum() if found else None


def detach(model: nn.Module, values: dict[str, float]) -> None:
    """Take all regularisers out of a model; dropout stays, at the given rates."""
    for module in model.modules():
        if isinstance(module, RowDropout):
            module.plain(values[module.hparam])
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, ActivationPenalty):
                del module._forward_hooks[key]
