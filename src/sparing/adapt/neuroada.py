"""NeuroAda: give each neuron's strongest input connections a trainable bypass, freeze the rest.

Equations are numbered as in our notes on the paper (NeuroAda, arXiv 2510.18940).
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from peft import PeftModel, get_peft_model
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from sparing.adapt.neuroada_gradients import Calibration, transformers_loss
from sparing.errors import CheckpointError, ConfigError
from sparing.sparsity import Pattern, top_entries
from sparing.tuners import (
    AdditiveAdapter,
    Tuner,
    TunerConfig,
    TunerLayer,
    generator_for,
    layer_shape,
    matrix_view,
    option_for,
    product_type,
    register_tuner,
)

Score = Literal["magnitude", "gradient", "gradient_abs", "reverse", "random"]
Scope = Literal["neuron", "layer", "block", "global"]
_BY_GRADIENT = ("gradient", "gradient_abs")
_CALIBRATION: ContextVar[Calibration | None] = ContextVar("calibration", default=None)


@dataclass
class NeuroAdaConfig(TunerConfig):
    """Options of NeuroAda; the shared ones are those of `TunerConfig`.

    To leave blocks out (the paper's `skip_layer`) use `layers_to_transform` or `exclude_modules`;
    to train a task head in full (its `select_all_head`) use `modules_to_save`.

    Arguments:
        k: bypasses per neuron (row of the weight), at least 1 and cut to the number of inputs.
            Paper: 1 or 20.
        score: what makes a connection worth a bypass. "magnitude" (paper): the largest |w|.
            "reverse": the smallest. "random": by chance, from `seed` and the module's name.
            "gradient": the largest |Σ ∂L/∂w| over calibration batches; "gradient_abs": the largest
            Σ |∂L/∂w|. The last two need `select_by_gradient`.
        scope: where connections compete for the k·neurons bypasses. "neuron" (paper): within each
            neuron. "layer": within a weight. "block": within the modules whose names agree up to
            their first number. "global": among all target modules.
        neuron_ratio: share of each layer's neurons, drawn by chance, that get bypasses; above 0 and
            at most 1 (paper); below 1 only with scope "neuron". k is not rescaled.
        structured: all neurons of a layer share the k inputs that the selection picks most often
            (the paper's `appr`); only with scope "neuron". Paper: False.
        tune_bias: also train the biases of the target layers in full. Paper: False.
        k_pattern: `k` for some modules, by the end of their names or a regular expression.
        selected: set by `select_by_gradient`; the positions are then read from the saved adapter.
    """

    method: ClassVar[str] = "neuroada"
    bound_to_base: ClassVar[bool] = True
    size_option: ClassVar[str] = "k"
    size_pattern_option: ClassVar[str | None] = "k_pattern"
    learning_rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 9e-3)

    k: int = 1
    score: Score = "magnitude"
    scope: Scope = "neuron"
    neuron_ratio: float = 1.0
    structured: bool = False
    tune_bias: bool = False
    k_pattern: dict[str, int] | None = None
    selected: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, counts in (
            ("k", [self.k]),
            ("k_pattern", list((self.k_pattern or {}).values())),
        ):
            self.require(
                option,
                all(isinstance(count, int) and count >= 1 for count in counts),
                "whole numbers of at least 1",
                "Use 1, the paper's smallest size.",
            )
        for option, choices in (("score", get_args(Score)), ("scope", get_args(Scope))):
            self.require(
                option,
                getattr(self, option) in choices,
                f"one of {', '.join(choices)}",
                f"The paper's own is {choices[0]!r}.",
            )
        self.require(
            "neuron_ratio", 0 < self.neuron_ratio <= 1, "above 0 and at most 1", "Leave it at 1."
        )
        for option, default in (("neuron_ratio", 1), ("structured", False)):
            self.require(
                option,
                self.scope == "neuron" or getattr(self, option) == default,
                f"{default} where connections of several neurons compete",
                f"Leave it at {default}, or use scope='neuron'.",
            )

    def entries_per_neuron(self, module_name: str, inputs: int) -> int:
        """k of one module, cut to its number of inputs."""
        return min(option_for(self.k_pattern, module_name, self.k), inputs)

    def active_neurons(self, neurons: int) -> int:
        """How many of a layer's neurons get bypasses; at least one."""
        return max(1, round(self.neuron_ratio * neurons))


class NeuroAdaAdapter(AdditiveAdapter):
    """Trainable entries δ at fixed positions of one weight: y = (W + Δ) x + b (NeuroAda, eq. 3).

    W + Δ is rounded once to the type of the product, so that a merged model computes the same.
    The gradient of δ is one dot product over the tokens per entry (eq. 4).

    Attributes:
        pattern: the positions.
        bypass: (entries,) float32 δ, row by row; zero at first (eq. 2).
        bias_bypass: (outputs,) float32 added to the bias, or None; zero at first.

    Arguments:
        pattern: the positions.
        packed: whether the base weight is quantised; Δ x is then added to the layer's output.
        tune_bias: whether the bias trains too.
    """

    def __init__(self, pattern: Pattern, *, packed: bool, tune_bias: bool) -> None:
        super().__init__()
        self.packed = packed
        self.place(pattern)
        self.bias_bypass = nn.Parameter(torch.zeros(pattern.shape[0])) if tune_bias else None

    def place(self, pattern: Pattern) -> None:
        """Take these positions, with δ = 0."""
        self.pattern = pattern
        self.bypass = nn.Parameter(torch.zeros(len(pattern), device=pattern.columns.device))

    def forward(self, x: Tensor, layer: Any) -> Tensor:
        if self.pattern.columns.is_meta and not x.is_meta:
            raise ConfigError(
                "NeuroAda adapter",
                expected="positions read from a saved adapter",
                found="none",
                mend="Call select_by_gradient with a fresh config, or load the adapter.",
            )
        if self.packed:
            return super().forward(x, layer)
        weight = matrix_view(layer, layer.weight)
        x = x.to(product_type(x, weight.dtype))
        y = self.pattern.patched_linear(x, weight, layer.bias, self.bypass, added=True)
        return y if self.bias_bypass is None else y + self.bias_bypass.to(y.dtype)

    def delta(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, self.bypass.dtype)
        y = self.pattern.linear(x, self.bypass.to(exact))
        return y if self.bias_bypass is None else y + self.bias_bypass

    def delta_weight(self) -> Tensor:
        return self.pattern.dense(self.bypass)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + Δ (eq. 5), and b plus its own change."""
        weight, bias = super().merged(weight, bias)
        if bias is not None and self.bias_bypass is not None:
            bias = (bias + self.bias_bypass).to(bias.dtype)
        return weight, bias


class NeuroAdaTuner(Tuner):
    """Chooses the connections of every target layer once, before any of them is adapted (eq. 1)."""

    prefix = "neuroada_"

    def new_shared(self, config: Any, layers: dict[str, nn.Module]) -> None:
        """Choose positions; nothing trainable is shared.

        Raises:
            ConfigError: a layer is no linear layer, has a tied or unreadable weight, or the score
                needs gradients and no calibration is at hand.
        """
        self._positions: dict[str, Tensor] = {}
        for name, layer in layers.items():
            self._check_layer(layer, name)
        self._refuse_tied(layers)
        if config.tune_bias and layers and not any(_has_bias(layer) for layer in layers.values()):
            config.require("tune_bias", False, "a target layer with a bias", "Leave it at False.")
        loading = config.selected and _CALIBRATION.get() is None
        if loading or any(layer.weight.is_meta for layer in layers.values()):
            return  # positions come from the saved adapter, or only their number matters
        scores = _finite(self._scores(config, layers))
        if config.scope in ("block", "global"):
            self._positions = _choose_in_pools(config, scores, layers)
        else:
            self._positions = {name: _choose(config, name, score) for name, score in scores}
        config.selected = config.score in _BY_GRADIENT

    def new_adapter(
        self, config: Any, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> NeuroAdaAdapter:
        neurons, inputs = shape = layer_shape(layer)
        if module_name in self._positions:
            pattern = Pattern.at(self._positions.pop(module_name), shape)
        else:
            each = config.entries_per_neuron(module_name, inputs)
            pattern = Pattern.unplaced(config.active_neurons(neurons) * each, shape)
        packed = resolve_quantization_backend(layer) is not None
        return NeuroAdaAdapter(
            pattern, packed=packed, tune_bias=config.tune_bias and _has_bias(layer)
        )

    def _scores(self, config: Any, layers: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """The score of every connection, (outputs, inputs), layer by layer."""
        if config.score in _BY_GRADIENT:
            calibration = _CALIBRATION.get()
            if calibration is None:
                config.require(
                    "score",
                    False,
                    "calibration batches to take gradients from",
                    "Use sparing.adapt.select_by_gradient in place of peft.get_peft_model.",
                )
            assert calibration is not None
            for name, sums in calibration.scores(self.model, layers, seed=config.seed):
                yield name, sums.signed.abs() if config.score == "gradient" else sums.absolute
            return
        for name, layer in layers.items():
            if config.score == "random":
                yield (
                    name,
                    torch.rand(layer_shape(layer), generator=generator_for(config.seed, name)),
                )
            else:
                size = _readable_weight(layer, name).abs()
                yield name, -size if config.score == "reverse" else size

    def _refuse_tied(self, layers: dict[str, nn.Module]) -> None:
        owners = defaultdict(set)
        for name, module in self.model.named_modules(remove_duplicate=False):
            if (weight := module._parameters.get("weight")) is not None:
                owners[id(weight)].add(name.removesuffix(".base_layer"))
        for name, layer in layers.items():
            if others := owners[id(layer.weight)] - {name}:
                raise ConfigError(
                    f"module {name!r}",
                    expected="a weight of its own",
                    found=f"one tied to {', '.join(sorted(others))}",
                    mend="Leave it out of target_modules, or name it in exclude_modules.",
                )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        container = f"{cls.prefix}adapter"
        for name, module in model.named_modules():
            if not isinstance(module, TunerLayer) or adapter_name not in module.adapters:
                continue
            saved = f"{name}.{container}.pattern.stored_"
            if (columns := state_dict.get(f"{saved}columns")) is not None:
                counts = state_dict.get(f"{saved}counts")
                _take_saved_positions(module, adapter_name, config, name, columns, counts)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _take_saved_positions(
    module: TunerLayer,
    adapter_name: str,
    config: NeuroAdaConfig,
    name: str,
    columns: Tensor,
    counts: Tensor | None,
) -> None:
    """Make room for saved positions whose number the config alone does not tell."""
    adapter = module.adapters[adapter_name]
    if not isinstance(adapter, NeuroAdaAdapter):
        return
    pattern = adapter.pattern
    known = config.scope == "neuron"
    if known and (len(columns) != len(pattern) or not pattern.columns.is_meta):
        return
    height, width = pattern.shape
    total = columns.numel() if counts is None else int(counts.long().sum())
    rows = height if counts is None else len(counts)
    if rows != height or total != len(columns) or (total and int(columns.long().max()) >= width):
        raise CheckpointError(
            f"positions of {name!r}",
            expected=f"entries of a weight of {height} neurons with {width} inputs",
            found=f"{len(columns)} entries that do not fit it",
            mend="The adapter belongs to another base architecture; load it there.",
        )
    trains = adapter.bypass.requires_grad
    adapter.place(Pattern.stored(columns, counts, pattern.shape))
    adapter.bypass.requires_grad_(trains)
    module._move_adapter_to_device_of_base_layer(adapter_name)


def _has_bias(layer: nn.Module) -> bool:
    return getattr(layer, "bias", None) is not None


def _readable_weight(layer: Any, name: str) -> Tensor:
    """(outputs, inputs) floating point, dequantised if need be."""
    backend = resolve_quantization_backend(layer)
    if backend is None:
        return matrix_view(layer, layer.weight.detach())
    try:
        return backend.get_base_weight(layer).detach()
    except (TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"module {name!r}",
            expected="a weight that can be dequantised",
            found=f"{type(layer).__name__}: {error}",
            mend="Use score='random', or another quantisation.",
        ) from error


def _finite(scores: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, score in scores:
        if not torch.isfinite(score).all():
            raise ConfigError(
                f"module {name!r}",
                expected="finite weights and gradients to choose connections by",
                found="NaN or infinity",
                mend="Check the base model's weights and the calibration loss.",
            )
        yield name, score


def _choose(config: NeuroAdaConfig, name: str, score: Tensor) -> Tensor:
    """Ascending positions in the flattened weight, on the CPU, of one layer's own best entries."""
    neurons, inputs = score.shape
    k = config.entries_per_neuron(name, inputs)
    if config.scope == "layer":
        return _positions(top_entries(score, k * neurons, scope="matrix"))
    mask = top_entries(score, k, scope="row")
    if config.structured:
        times_chosen = mask.sum(dim=0, keepdim=True).float()
        mask = top_entries(times_chosen, k, scope="row").expand_as(mask)
    if (active := config.active_neurons(neurons)) < neurons:
        order = torch.randperm(neurons, generator=generator_for(config.seed, f"{name} neurons"))
        mask = mask.clone()
        mask[order[active:].to(mask.device)] = False
    return _positions(mask)


def _positions(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero()[:, 0].cpu()


class _Pool:
    """The best `size` entries among several layers seen one after another, ties to the earlier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values = torch.empty(0)
        self.owners = torch.empty(0, dtype=torch.int32)
        self.positions = torch.empty(0, dtype=torch.int64)

    def offer(self, owner: int, score: Tensor) -> None:
        positions = _positions(top_entries(score, self.size, scope="matrix"))
        values = torch.cat([self.values, score.cpu().flatten()[positions].float()])
        owners = torch.cat([self.owners, torch.full((len(positions),), owner, dtype=torch.int32)])
        best = values.argsort(descending=True, stable=True)[: self.size]
        self.values, self.owners = values[best], owners[best]
        self.positions = torch.cat([self.positions, positions])[best]


def _choose_in_pools(
    config: NeuroAdaConfig, scores: Iterable[tuple[str, Tensor]], layers: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """Positions by module name; memory is that of the chosen entries and one layer's scores."""
    names = list(layers)
    sizes: dict[str, int] = defaultdict(int)
    for name, layer in layers.items():
        neurons, inputs = layer_shape(layer)
        sizes[_pool_name(config, name)] += neurons * config.entries_per_neuron(name, inputs)
    pools = {pool: _Pool(size) for pool, size in sizes.items()}
    for name, score in scores:
        pools[_pool_name(config, name)].offer(names.index(name), score)
    chosen = {}
    for owner, name in enumerate(names):
        pool = pools[_pool_name(config, name)]
        chosen[name] = pool.positions[pool.owners == owner]
    return chosen


def _pool_name(config: NeuroAdaConfig, module_name: str) -> str:
    if config.scope == "global":
        return ""
    numbered = re.match(r"(.*?\.)?\d+(?=\.|$)", module_name)
    return numbered[0] if numbered else ""


def select_by_gradient(
    model: nn.Module,
    config: NeuroAdaConfig,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = transformers_loss,
    layers_at_once: int = 8,
) -> PeftModel:
    """`peft.get_peft_model` for the scores "gradient" and "gradient_abs".

    Arguments:
        model: as for `gradient_scores`.
        config: left as it is; the returned model holds a copy.
        batches: as for `gradient_scores`, on the model's device.
        loss: as for `gradient_scores`.
        layers_at_once: as for `gradient_scores`.

    Returns:
        The adapted model, whose adapter saves its positions.
    """
    token = _CALIBRATION.set(Calibration(batches, loss, layers_at_once))
    try:
        return get_peft_model(model, copy.copy(config))
    finally:
        _CALIBRATION.reset(token)


def lost_to_rounding(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, adapter_name: str = "default"
) -> dict[str, float]:
    """The share of nonzero δ that merging into weights of a lower precision would round away.

    The strongest weights are also the ones with the coarsest rounding, so look before merging.

    Arguments:
        model: with NeuroAda adapters, unmerged.
        dtype: of the merged weights.
        adapter_name: of the adapter.

    Returns:
        By module name, between 0 and 1; 0 where nothing was trained.

    Raises:
        ConfigError: the adapter is merged already.
    """
    shares = {}
    for name, module in model.named_modules():
        if not isinstance(module, TunerLayer) or adapter_name not in module.adapters:
            continue
        adapter = module.adapters[adapter_name]
        if not isinstance(adapter, NeuroAdaAdapter):
            continue
        if module.merged:
            raise ConfigError(
                f"module {name!r}",
                expected="an unmerged adapter",
                found="a merged one",
                mend="Call unmerge_adapter() first.",
            )
        weight = matrix_view(module.get_base_layer(), module.get_base_weight())
        before, change = adapter.pattern.gather(weight), adapter.bypass.detach()
        trained = change != 0
        lost = trained & ((before + change).to(dtype) == before.to(dtype))
        shares[name] = lost.sum().item() / max(1, trained.sum().item())
    return shares


register_tuner(NeuroAdaConfig, NeuroAdaTuner)
