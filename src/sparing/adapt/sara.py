"""SaRA: fine-tune only the pre-trained weights that are nearest to zero.

Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
Adaptation", arXiv 2409.06633, ICLR 2025. Weights below a threshold are taken to be free capacity:
they are trained, all others stay as they are. Half-way, those that have grown past the threshold
are frozen and the rest is trained on; a nuclear-norm term may pull the trained part to low rank.

The paper trains every parameter tensor of the model. A PEFT adapter sits on layers, so here it is
the weights of the target modules and, with `train_bias`, their biases; norms and embeddings can be
trained in full through `modules_to_save`.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.adapt._sara_selection import (
    Select,
    choose,
    level_of,
    magnitude_bits,
    nth_lowest,
    theta_above,
)
from sparing.adapt._sara_tensors import MaskedTensor, Solver, patched_conv2d, tensor_view
from sparing.errors import ConfigError
from sparing.sparsity import Pattern
from sparing.tuners import (
    LayerAdapter,
    Tuner,
    TunerConfig,
    TunerLayer,
    generator_for,
    matrix_view,
    product_type,
    register_tuner,
)

Result = TypeVar("Result")

DEFAULT_THETA = 2e-3
MIN_RANK_SIDE = 64  # (eq. 5): smaller matrices are left out of the nuclear-norm term

# `target_modules` for diffusers' UNet2DModel and UNet2DConditionModel: all Linear and Conv2d.
DIFFUSERS_UNET_TARGETS = (
    r"(.*\.)?(conv(\d|_in|_out|_shortcut)?|to_[qkv]|to_out\.0|proj(_in|_out)?"
    r"|time_emb_proj|linear_\d|net\.2)"
)


@dataclass
class SaRAConfig(TunerConfig):
    """Options of SaRA.

    Arguments:
        theta: train entries with |p| < θ (strict), θ > 0; not together with `n_params`. 2e-3, as in
            the paper, if neither is given.
        n_params: train exactly this many entries, the smallest of all target modules together
            (ties by position); ≥ 1. The paper's sizes for SD 1.5 are about 5, 20 and 50 million.
        train_bias: also train the small entries of the target modules' biases, as the paper does;
            default False, because zero-initialised biases win every place in a small budget.
        progressive_at: share of all steps after which entries that have grown past θ are frozen,
            within (0, 1), or None; default 0.5 (eq. 6).
        keep_moments: keep the optimiser's moments at that point; default False, they restart.
        lambda_rank: λ of the nuclear-norm term, ≥ 0; default 5e-4 (eq. 5).
        rank_matrices: the term on "one" random matrix a step (default, eq. 5) or on "all".
        rank_of: the term on the trained "values" (default, eq. 5) or on their change, "delta".
        rank_convolutions: count convolution kernels, as (out, in·height·width), among the matrices;
            default False [reconstructed].
        rank_every: apply the term every so many steps, ≥ 1, as many times as strongly, which leaves
            its mean as it is; default 20. Paper: 1, at an SVD a step, which on a 576 x 1536 matrix
            takes as long as the step itself.
        rank_solver: "svd" (default, exact) or "newton-schulz" (matrix products only).
        select: which entries `n_params` takes: "smallest" (default), or "largest" and "random", the
            paper's controls, which have no θ and so need `progressive_at=None`.
    """

    method: ClassVar[str] = "sara"
    bound_to_base: ClassVar[bool] = True
    size_option: ClassVar[str] = "n_params"
    learning_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)

    theta: float | None = None
    n_params: int | None = None
    train_bias: bool = False
    progressive_at: float | None = 0.5
    keep_moments: bool = False
    lambda_rank: float = 5e-4
    rank_matrices: Literal["one", "all"] = "one"
    rank_of: Literal["values", "delta"] = "values"
    rank_convolutions: bool = False
    rank_every: int = 20
    rank_solver: Solver = "svd"
    select: Select = "smallest"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            "theta",
            self.theta is None or self.theta > 0,
            "a threshold above 0",
            "With θ = 0 no weight is trained; the paper uses 2e-4 to 2e-3.",
        )
        self.require(
            "n_params",
            self.n_params is None or self.n_params >= 1,
            "at least one trainable entry",
            "Give a positive number of entries.",
        )
        self.require(
            "theta",
            self.theta is None or self.n_params is None,
            "nothing beside n_params",
            "Give either theta or n_params.",
        )
        self.require(
            "progressive_at",
            self.progressive_at is None or 0 < self.progressive_at < 1,
            "a share of the steps between 0 and 1, or None",
            "The paper uses 0.5.",
        )
        self.require(
            "lambda_rank",
            0 <= self.lambda_rank < math.inf,
            "a finite number from 0",
            "The paper's script uses 5e-4; 0 turns the term off.",
        )
        self.require("rank_every", self.rank_every >= 1, "a number of steps from 1", "Try 1.")
        for option, choices in (
            ("rank_matrices", ("one", "all")),
            ("rank_of", ("values", "delta")),
            ("rank_solver", ("svd", "newton-schulz")),
            ("select", ("smallest", "largest", "random")),
        ):
            found = getattr(self, option) in choices
            self.require(option, found, f"one of {', '.join(choices)}", "Choose one of them.")
        plain = self.n_params is not None and self.progressive_at is None
        self.require(
            "select",
            self.select == "smallest" or plain,
            "'smallest', unless n_params is given and progressive_at is None",
            "The other selections have no threshold; set n_params and progressive_at=None.",
        )

    @property
    def threshold(self) -> float | None:
        """θ, or None if the number of entries is given instead."""
        if self.n_params is not None:
            return None
        return DEFAULT_THETA if self.theta is None else self.theta


class SaRAAdapter(LayerAdapter):
    """The smallest entries of one layer, trained in place of the frozen ones (SaRA, eqs. 1-3).

    Arguments:
        weight: trained entries of the layer's weight.
        bias: trained entries of its bias, or None.
        theta: the threshold that entries must stay below to be trained in stage 2; NaN if there is
            none.
    """

    def __init__(self, weight: MaskedTensor, bias: MaskedTensor | None, theta: float) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.theta = theta

    def parts(self) -> list[MaskedTensor]:
        """The trained tensors."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def forward(self, x: Tensor, layer: Any) -> Tensor:
        x = x.to(product_type(x, x.dtype))
        weight = layer.weight.to(product_type(x, layer.weight.dtype))
        bias: Any = layer.bias
        if bias is not None:
            bias = bias.to(product_type(x, bias.dtype))
        trained = None
        if self.bias is not None:
            # The product takes the value and this zero the gradient: adding the bias afterwards
            # would round differently from the base layer.
            full = self.bias.pattern.scatter(bias[None], self.bias.entries())[0]
            bias = full.detach()
            trained = full - bias
        if isinstance(layer, nn.Conv2d):
            y = patched_conv2d(layer, x, weight, bias, self.weight)
            return y if trained is None else y + trained[:, None, None]
        matrix = matrix_view(layer, weight)
        y = self.weight.pattern.patched_linear(x, matrix, bias, self.weight.entries())
        return y if trained is None else y + trained

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the entries replaced, exactly as trained."""
        if self.bias is not None and bias is not None:
            bias = self.bias.replace(bias[None])[0]
        return self.weight.replace(weight), bias


class SaRATuner(Tuner):
    """Puts `SaRAAdapter`s on a model, re-selects half-way and adds the nuclear-norm gradient.

    The re-selection and the nuclear-norm term need a training loop that calls `after_step` and
    `before_step`, such as ours, or `Trainer` with `sparing.adapt.TunerCallback`.
    """

    prefix = "sara_"
    layer_types = (nn.Linear, Conv1D, nn.Conv2d)

    _theta: float
    _patterns: dict[str, Pattern]
    _steps: int = 0

    def new_shared(self, config: SaRAConfig, layers: dict[str, nn.Module]) -> None:
        """Choose the entries of the whole model; nothing is shared."""
        tensors: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        for name, layer in layers.items():
            self._check_layer(layer, name)
            _check_weight(layer, name, owners)
            tensors[f"{name}.weight"] = tensor_view(layer, "weight")
            if config.train_bias and layer.bias is not None:
                tensors[f"{name}.bias"] = tensor_view(layer, "bias")
        if tensors:
            _warn_of_rounding(tensors)
            self._patterns, self._theta = choose(
                tensors, config.n_params, config.threshold, config.select, config.seed
            )

    def new_adapter(
        self, config: SaRAConfig, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> SaRAAdapter:
        parts = {
            name: MaskedTensor(self._patterns.pop(f"{module_name}.{name}"), layer, name)
            for name in ("weight", "bias")
            if f"{module_name}.{name}" in self._patterns
        }
        return SaRAAdapter(parts["weight"], parts.get("bias"), self._theta)

    def counts(self, adapter_name: str = "default") -> dict[str, int]:
        """How many entries of each tensor an adapter trains, by the tensor's name.

        Worth a look: zero-initialised biases are below every threshold.
        """
        return {
            f"{name}.{part.name}": len(part.pattern)
            for name, _, adapter in self._on_layers(adapter_name)
            for part in adapter.parts()
        }

    def before_step(self) -> None:
        """Add the gradient of the nuclear-norm term (SaRA, eq. 5)."""
        self._steps += 1
        for name, config in self._active():
            if config.lambda_rank == 0 or (self._steps - 1) % config.rank_every:
                continue
            kinds = self.layer_types if config.rank_convolutions else (nn.Linear, Conv1D)
            matrices = [
                adapter.weight
                for _, layer, adapter in self._on_layers(name)
                if isinstance(layer, kinds)
                and min(adapter.weight.pattern.shape) > MIN_RANK_SIDE
                and len(adapter.weight.pattern)
            ]
            if config.rank_matrices == "one" and matrices:
                generator = generator_for(config.seed, f"step {self._steps}")
                drawn = int(torch.randint(len(matrices), (), generator=generator))
                matrices = [matrices[drawn]]
            strength = config.lambda_rank * config.rank_every
            for matrix in matrices:
                matrix.add_rank_gradient(strength, config.rank_of, config.rank_solver)

    def after_step(self, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Freeze what has grown past θ, once, at `progressive_at` (SaRA, eq. 6)."""
        self._steps = step
        for name, config in self._active():
            if config.progressive_at is None:
                continue
            switch = max(1, round(config.progressive_at * total_steps))
            if step != switch:
                continue
            if switch >= total_steps:
                warnings.warn(
                    f"SaRA adapter {name!r}: {total_steps} steps are too few for a second stage.",
                    stacklevel=2,
                )
                continue
            self._start_second_stage(name, config, optimizer)

    def _start_second_stage(
        self, name: str, config: SaRAConfig, optimizer: torch.optim.Optimizer
    ) -> None:
        free = 0
        for _, _, adapter in self._on_layers(name):
            for part in adapter.parts():
                if not part.values.requires_grad:
                    return
                part.freeze_grown(adapter.theta)
                free += part.free()
                if not config.keep_moments:
                    optimizer.state.pop(part.values, None)
        if free == 0:
            warnings.warn(
                f"SaRA adapter {name!r}: every entry has grown past θ, so nothing is left to train "
                "in the second stage. Lower the learning rate or set progressive_at=None.",
                stacklevel=3,
            )

    def _active(self) -> Iterator[tuple[str, SaRAConfig]]:
        for name in self.active_adapters:
            config = self.peft_config[name]
            assert isinstance(config, SaRAConfig)
            yield name, config

    def _on_layers(self, adapter_name: str) -> Iterator[tuple[str, nn.Module, SaRAAdapter]]:
        for name, module in self.model.named_modules():
            if isinstance(module, TunerLayer) and adapter_name in module.adapters:
                adapter = module.adapters[adapter_name]
                assert isinstance(adapter, SaRAAdapter)
                yield name, module.get_base_layer(), adapter

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        named = super(Tuner, cls)._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        for name, module in model.named_modules():
            if isinstance(module, MaskedTensor):
                module.fit(named, f"{name}.")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_weight(layer: nn.Module, name: str, owners: dict[int, str]) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if resolve_quantization_backend(layer) is not None or not weight.is_floating_point():
        raise ConfigError(
            f"module {name!r}",
            expected="a plain floating-point weight, whose entries can be trained",
            found=f"a quantised one ({type(layer).__name__}, {weight.dtype})",
            mend="Load the base model unquantised, or leave the module out.",
        )
    owner = owners.setdefault(id(weight), name)
    if owner != name:
        raise ConfigError(
            f"module {name!r}",
            expected="a weight of its own",
            found=f"the weight of {owner!r}, shared",
            mend="Name one of the two in exclude_modules.",
        )


def _warn_of_rounding(tensors: dict[str, Tensor]) -> None:
    types = {tensor.dtype for tensor in tensors.values()} & {torch.bfloat16, torch.float16}
    if types:
        warnings.warn(
            f"SaRA on {', '.join(sorted(str(t) for t in types))} weights: rounding moves entries "
            "across the threshold and rounds what is trained. Prefer a float32 base and autocast.",
            stacklevel=2,
        )


def default_learning_rate(theta: float) -> float:
    """1e-3 · exp(−350 θ): the paper's learning rate if none is given (SaRA, eq. 4)."""
    return 1e-3 * math.exp(-350 * theta)


def theta_for(model: nn.Module, n_params: int) -> float:
    """The threshold below which a model has `n_params` parameters, tied ones counted once.

    All floating-point parameters count, as in the paper; `SaRAConfig(n_params=…)` counts those of
    the target modules. Exact unless several entries tie at the threshold: then those are all below.

    Raises:
        ConfigError: the model has fewer parameters, or none were asked for.
    """
    tensors = [p for p in model.parameters() if p.is_floating_point()]
    total = sum(p.numel() for p in tensors)
    if not 1 <= n_params <= total:
        raise ConfigError(
            "n_params",
            expected=f"between 1 and the model's {total:,} parameters",
            found=str(n_params),
            mend="Ask for a number in that range.",
        )
    return theta_above(nth_lowest(lambda: map(magnitude_bits, tensors), n_params)[0])


def set_scale(model: nn.Module, scale: float, adapter_name: str | None = None) -> None:
    """Use P⁰ + s (P − P⁰) from now on: the base model at 0, the tuned one at 1.

    Arguments:
        model: with SaRA adapters.
        scale: s, any finite number; merging takes it into account, saving does not.
        adapter_name: only this adapter.
    """
    for module in model.modules():
        if isinstance(module, TunerLayer):
            for name, adapter in module.adapters.items():
                if isinstance(adapter, SaRAAdapter) and adapter_name in (None, name):
                    for part in adapter.parts():
                        part.scale = float(scale)


@torch.no_grad()
def probe(model: nn.Module, theta: float, evaluate: Callable[[nn.Module], Result]) -> Result:
    """What `evaluate(model)` gives with every parameter |p| < θ set to zero; puts them back after.

    Shows whether the smallest weights of a model are free to be trained.

    Arguments:
        model: any model with parameters in memory; changed in place for the time being.
        theta: the threshold.
        evaluate: a loss or a metric of the model.
    """
    level = level_of(theta)
    zeroed = [
        (p, mask, p[mask])
        for p in model.parameters()
        if p.is_floating_point() and (mask := magnitude_bits(p) < level).any()
    ]
    try:
        for p, mask, _ in zeroed:
            p[mask] = 0
        return evaluate(model)
    finally:
        for p, mask, values in zeroed:
            p[mask] = values


register_tuner(SaRAConfig, SaRATuner)
