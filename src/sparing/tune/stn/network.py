"""The self-tuning network: a model, its hyperparameters, and the two kinds of steps."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.checkpoint import atomic_path, read_json, write_json
from sparing.errors import CheckpointError, ConfigError, near_matches
from sparing.tune.stn.hparams import HParam, Hyperparameters, Values
from sparing.tune.stn.layers import Responsive, respond
from sparing.tune.stn.linearized import Linearized
from sparing.tune.stn.regularized import (
    Loss,
    RegularizedNetwork,
    default_loss,
    finite,
    rows_of,
)
from sparing.tune.stn.regularizers import detach
from sparing.tuners import generator_for

KINDS = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding, nn.LSTM)
WEIGHTS, OPTIONS = "stn.safetensors", "stn.json"


class SelfTuningNetwork(RegularizedNetwork):
    """Tunes regularisation hyperparameters while it trains (STN, eqs. 1 to 3).

    Layers respond to the hyperparameters: weights become a function ŵ(λ), learned by training under
    random perturbations of λ. Steps on validation data then move λ, and the scales σ of the
    perturbation, through that function; hyperparameters need not be differentiable. The model is
    changed in place; `fold` returns a plain one.

    Arguments:
        model: any; the batch has to be on the first axis of what its layers see.
        hparams: what is tuned.
        layers: that respond: "all" that can, names (or their last parts), or a regular expression
            of whole names.
        loss: from model and batch to a scalar; by default `default_loss`. Regularisation is added
            by the network. A loss that needs values reads `network.values` while `model.training`.
        tune: perturb and tune; False trains at the start values, with all responses frozen at 0.
        perturbation: σ at the start, 0.5 in the paper's CNN, 1 in its LSTM; in unbounded units.
        tune_scales: tune σ too, and perturb λ on validation data.
        entropy_weight: τ >= 0. 1e-3 in the paper's CNN. Without it tuned scales go to 0, and no
            response is learned any more.
        hyper_lr: Adam's rate for λ; 3e-3 in the paper's CNN, 1e-2 in its LSTM.
        scale_lr: Adam's rate for the scales; 3e-3.
        response_input: what U is fed: "raw", the unbounded λ, or "squashed", its sigmoid or
            softplus. The released code has both and recommends the first.
        centre: feed λ_b - λ instead, so that W alone are the weights at λ (Δ-STN).
        linearize: train W at λ, and the response on outputs linearised in it (Δ-STN); needs
            `centre`, and a loss that is computed from the outputs.
        factor: a trainable scalar on every elementary part, as in the released code.
        seed: of the responses, perturbations and augmentations.

    Attributes:
        hyper: λ and σ.

    Raises:
        ConfigError: an option cannot work, or a layer cannot respond.

    Source: MacKay et al., "Self-Tuning Networks", arXiv 1903.03088; Bae & Grosse, "Delta-STN",
    arXiv 2010.13514, for `centre` and `linearize`, which are reconstructed from its idea.
    """

    def __init__(
        self,
        model: nn.Module,
        hparams: Sequence[HParam],
        *,
        layers: str | Sequence[str] = "all",
        loss: Loss = default_loss,
        tune: bool = True,
        perturbation: float = 0.5,
        tune_scales: bool = True,
        entropy_weight: float = 1e-3,
        hyper_lr: float = 3e-3,
        scale_lr: float = 3e-3,
        response_input: Literal["raw", "squashed"] = "raw",
        centre: bool = False,
        linearize: bool = False,
        factor: bool = True,
        seed: int = 0,
    ) -> None:
        _require(entropy_weight >= 0, "entropy_weight", entropy_weight, "at least 0", "Use 1e-3.")
        for name, rate in (("hyper_lr", hyper_lr), ("scale_lr", scale_lr)):
            _require(rate > 0, name, rate, "above 0", "Use 3e-3.")
        kinds = ("raw", "squashed")
        _require(response_input in kinds, "response_input", response_input, kinds, "Use 'raw'.")
        _require(centre or not linearize, "linearize", linearize, "with centre=True", "Set both.")
        _require(
            not linearize or loss is not default_loss,
            "loss",
            "the default",
            "your own where outputs are linearised",
            "Compute it from the outputs; one that the model computes would be linearised too.",
        )
        self._layers, self._factor = layers, factor
        hyper = Hyperparameters(hparams, perturbation)  # before the model is changed
        _check_fast_path(model)
        super().__init__(model, hparams, loss=loss, seed=seed)
        _warn_of_batch_norm(model)
        if tune_scales and entropy_weight == 0:
            warnings.warn(
                "tune_scales without entropy_weight lets the scales go to 0.", stacklevel=2
            )
        self.tune, self.tune_scales, self.entropy_weight = tune, tune_scales, entropy_weight
        self.response_input, self.centre, self.linearize = response_input, centre, linearize
        self.hyper = hyper.to(self.device)
        self.generator = generator_for(seed, "perturbation")
        self.hyper_optimizer = torch.optim.Adam([self.hyper.raw], lr=hyper_lr)
        self.scale_optimizer = torch.optim.Adam([self.hyper.raw_scale], lr=scale_lr)
        self._checked = False
        if not tune:
            self.freeze_response()

    def _prepare_layers(self) -> None:
        self.response_layers = tuple(_chosen(self.model, self._layers))
        for name in self.response_layers:
            layer = self.model.get_submodule(name)
            respond(
                layer,
                self.setting,
                len(self.hparams),
                name=name,
                seed=self.seed,
                factor=self._factor,
            )

    def freeze_response(self) -> None:
        """Set every U to 0 and stop training it: the plain network, for controls."""
        for parameter in self.gates():
            parameter.requires_grad_(False).zero_()

    def gates(self) -> Iterator[nn.Parameter]:
        """All U."""
        return (p for name, p in self.model.named_parameters() if _is_gate(name))

    def response_parameters(self) -> list[nn.Parameter]:
        """W', β' and U of all layers."""
        parts = ("response_", "gate")
        return [
            parameter
            for name, parameter in self.model.named_parameters()
            if name.rpartition(".")[2].startswith(parts) and parameter.requires_grad
        ]

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for the optimiser of the weights: everything but λ and σ. U is in a group without
        weight decay, which would fade the response (reconstructed)."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for n, p in named if not _is_gate(n)],
                "weight_decay": weight_decay,
            },
            {"params": [p for n, p in named if _is_gate(n)], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def current(self) -> dict[str, float]:
        """The values of the hyperparameters, by name."""
        return self.hyper.current()

    def scales(self) -> dict[str, float]:
        """σ by name, in unbounded units."""
        return {
            p.name: float(s) for p, s in zip(self.hparams, self.hyper.scale.detach(), strict=True)
        }

    def response_norms(self) -> dict[str, float]:
        """How much weights respond to each hyperparameter: the norm of ∂ŵ/∂h over all layers; 0
        means that nothing responds."""
        total = torch.zeros(len(self.hparams), dtype=torch.float64)
        for module in self.model.modules():
            if not isinstance(module, Responsive):
                continue
            own = dict(module.named_parameters(recurse=False))
            for name, gate in own.items():
                if not name.startswith("gate"):
                    continue
                end = name.removeprefix("gate")
                weight = own[f"response_weight{end}"].detach().double().cpu()
                axis = 1 if isinstance(module, Conv1D | nn.Embedding) else 0
                by_unit = weight.movedim(axis, 0).flatten(1).square().sum(1)
                u = gate.detach().double().cpu()
                total += (u[: len(by_unit)].square() * by_unit[:, None]).sum(0)
                if f"response_bias{end}" in own:
                    bias = own[f"response_bias{end}"].detach().double().cpu()
                    total += (u[len(by_unit) :].square() * bias[:, None].square()).sum(0)
        return {p.name: float(t) for p, t in zip(self.hparams, total.sqrt(), strict=True)}

    def response_rows(self, raw: Tensor) -> Tensor:
        """h of (4) for unbounded hyperparameters: (rows, h) -> (rows, h), differentiable."""
        feed: Callable[[Tensor], Tensor] = (
            self.hyper.squash if self.response_input == "squashed" else lambda x: x
        )
        return feed(raw) - feed(self.hyper.raw.detach()[None]) if self.centre else feed(raw)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output at λ, without perturbation; differentiable in λ."""
        raw = self.hyper.raw[None]
        with self.setting.during(self.response_rows(raw), self.hyper.project(raw)):
            return self.model(*args, **kwargs)

    def train_step(  # type: ignore[override]
        self, batch: Any, optimizer: torch.optim.Optimizer, clip: float | None = None
    ) -> float:
        """One step on the weights under perturbed hyperparameters (STN, eq. 2); λ and σ stay.

        Arguments:
            batch: of training data.
            optimizer: of `parameter_groups`.
            clip: largest norm of the gradient.

        Returns:
            the regularised loss before the step.

        Raises:
            ConfigError: a hyperparameter has no effect on the forward.
            DivergedError: the loss is not finite; nothing was changed.
        """
        here = self.hyper.raw.detach()[None]
        raw = here
        if self.tune:
            raw = self.hyper.sample(rows_of(batch), self.generator).detach()
        values = self.hyper.project(raw)
        self.model.train()
        if self.linearize:
            return self._linearized_step(batch, optimizer, clip, raw, values)
        with self.setting.during(self.response_rows(raw), values):
            loss = self._regularized(batch, self.loss, self.model)
            self._check_read(values)
            return self._step(loss, optimizer, clip)

    def _linearized_step(
        self,
        batch: Any,
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        raw: Tensor,
        values: Values,
    ) -> float:
        """W, β at λ, and the response on linearised outputs with W fixed, in one step (Δ-STN)."""
        response = self.response_parameters()
        with self.setting.during(self.response_rows(raw), values):
            linear: Any = Linearized(self.model, self.setting)
            loss = self._regularized(batch, self.loss, linear)
            self._check_read(values)
            finite(loss, "linearised training loss")
            slopes = torch.autograd.grad(loss, response, allow_unused=True)
        here = self.hyper.raw.detach()[None]
        with self.setting.during(self.response_rows(here), self.hyper.project(here)):
            loss = self._regularized(batch, self.loss, self.model)
            found = finite(loss, "training loss")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        for parameter, slope in zip(response, slopes, strict=True):
            parameter.grad = slope
        if clip is not None:
            chosen = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(chosen, clip)
        optimizer.step()
        return found

    def validation_step(self, batch: Any) -> float:
        """One step on λ and σ (STN, eq. 3); weights and their optimiser stay.

        The loss is that of evaluation mode, without regularisation, so that λ acts through the
        weights alone.

        Returns:
            the validation loss before the step.

        Raises:
            ConfigError: `tune` is off, or no layer that responds took part in the forward.
            DivergedError: loss or gradient is not finite; nothing was changed.
        """
        _require(self.tune, "tune", False, "True, for a step on hyperparameters", "Set it.")
        training = self.model.training
        self.model.eval()
        try:
            loss = self.validation_loss(batch)
            found = finite(loss, "validation loss")
            goal = loss - self.entropy_weight * self.hyper.entropy() if self.tune_scales else loss
            asked = [self.hyper.raw] + ([self.hyper.raw_scale] if self.tune_scales else [])
            gradients = torch.autograd.grad(goal, asked, allow_unused=True)
        finally:
            self.model.train(training)
        if gradients[0] is None:
            raise ConfigError(
                "validation loss",
                expected="to depend on the hyperparameters through a layer that responds",
                found="no such layer in the forward",
                mend="Name layers that the loss uses, and do not detach its outputs.",
            )
        for gradient in gradients:
            finite(gradient.sum(), "gradient of the hyperparameters")
        self.hyper.raw.grad = gradients[0]
        self.hyper_optimizer.step()
        self.hyper.raw.grad = None
        if self.tune_scales:
            self.hyper.raw_scale.grad = gradients[1]
            self.scale_optimizer.step()
            self.hyper.raw_scale.grad = None
        return found

    def validation_loss(self, batch: Any) -> Tensor:
        """L_V(ŵ(λ + ε)), or at λ if scales are not tuned; differentiable in λ and σ."""
        raw = self.hyper.raw[None]
        if self.tune_scales:
            raw = self.hyper.sample(rows_of(batch), self.generator)
        with self.setting.during(self.response_rows(raw), None):
            return self.loss(self.model, batch)

    def _evaluated(self, batch: Any) -> Tensor:
        with self.setting.during(self.response_rows(self.hyper.raw[None]), None):
            return self.loss(self.model, batch)

    def _check_read(self, values: Values) -> None:
        """A hyperparameter that no forward reads would drift on noise."""
        unread = [name for name in values if name not in values.read]
        if self._checked or not unread:
            self._checked = True
            return
        raise ConfigError(
            f"hyperparameter {unread[0]!r}",
            expected="a regulariser that takes part in the training forward",
            found="that nothing read its value",
            mend="Check its places. Attention that runs fused ignores its dropout module: load "
            "transformers' models with attn_implementation='eager'.",
        )

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """A plain model with the weights at λ: cW + diag(Uλ)W', and its logits; no overhead.

        Dropout modules keep the rates at λ. Tied weights part where their layers respond.
        """
        model = copy.deepcopy(self.model)
        rows = self.response_rows(self.hyper.raw.detach()[None])
        for module in list(model.modules()):
            if isinstance(module, Responsive):
                module.fold(rows)
        detach(model, self.current())
        _untie(model)
        return model

    def save(self, folder: str | Path) -> None:
        """Write weights, responses, λ and σ to `folder`, atomically."""
        with atomic_path(Path(folder)) as fresh:
            fresh.mkdir()
            save_model(self, str(fresh / WEIGHTS))
            write_json(fresh / OPTIONS, self._description())

    def load(self, folder: str | Path) -> "SelfTuningNetwork":
        """Read what `save` wrote into this network, which has to be built as that one was.

        Raises:
            CheckpointError: the files are missing, damaged, or of another network.
        """
        saved, mine = read_json(Path(folder) / OPTIONS), self._description()
        for key in mine:
            if not isinstance(saved, dict) or saved.get(key) != mine[key]:
                raise CheckpointError(
                    f"{folder}, {key}",
                    expected=repr(mine[key]),
                    found=repr(saved.get(key) if isinstance(saved, dict) else saved),
                    mend="Build the network as it was when it was saved.",
                )
        try:
            load_model(self, str(Path(folder) / WEIGHTS))
        except Exception as error:  # safetensors and torch have errors of their own
            raise CheckpointError(
                str(Path(folder) / WEIGHTS),
                expected="the weights of this network",
                found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                mend="Save it again, or build the network as it was when it was saved.",
            ) from error
        return self

    def _description(self) -> dict[str, Any]:
        return {
            "hparams": [hparam.to_json() for hparam in self.hparams],
            "layers": list(self.response_layers),
            "response_input": self.response_input,
            "centre": self.centre,
            "factor": self._factor,
        }


def _is_gate(name: str) -> bool:
    return name.rpartition(".")[2].startswith("gate_") or name.rpartition(".")[2] == "gate"


def _require(good: bool, option: str, found: Any, expected: Any, mend: str) -> None:
    if not good:
        raise ConfigError(
            f"SelfTuningNetwork.{option}", expected=str(expected), found=repr(found), mend=mend
        )


def _chosen(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    modules = dict(model.named_modules())
    able = [name for name, module in modules.items() if type(module) in KINDS]
    if layers == "all":
        found = able
    elif isinstance(layers, str):
        found = [name for name in modules if name and re.fullmatch(layers, name)]
    else:
        found = []
        for asked in layers:
            matches = [n for n in modules if n == asked or n.endswith(f".{asked}")]
            if not matches:
                mend = near_matches(asked, able)
                _require(False, "layers", asked, "names of modules", mend)
            found += [name for name in matches if name not in found]
    _require(bool(found), "layers", layers, "at least one layer that can respond", "Use 'all'.")
    return found


def _check_fast_path(model: nn.Module) -> None:
    """torch's own transformer layers skip the forward of their parts in evaluation."""
    fast = any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
    if fast and torch.backends.mha.get_fastpath_enabled():
        raise ConfigError(
            type(model).__name__,
            expected="layers whose forward runs in evaluation too",
            found="nn.TransformerEncoderLayer, whose fast path reads weights and skips forwards",
            mend="Call torch.backends.mha.set_fastpath_enabled(False) first.",
        )


def _warn_of_batch_norm(model: nn.Module) -> None:
    """Rows with other hyperparameters meet in the statistics of a batch."""
    kinds = nn.modules.batchnorm._BatchNorm
    found = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if found:
        warnings.warn(
            f"{found[0]} and {len(found) - 1} more normalise over the batch: rows with different "
            "hyperparameters mix in their statistics. LayerNorm or GroupNorm keep rows apart.",
            stacklevel=3,
        )


def _untie(model: nn.Module) -> None:
    """A transformers model whose head no longer is its embedding must not be tied when loaded."""
    tied: Any = model
    config = getattr(tied, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(
        tied, "get_output_embeddings"
    ):
        return
    head, embedding = tied.get_output_embeddings(), tied.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        tied.config.tie_word_embeddings = False
        if isinstance(getattr(tied, "all_tied_weights_keys", None), Mapping):
            tied.all_tied_weights_keys = {}
