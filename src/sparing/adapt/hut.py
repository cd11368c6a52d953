"""HUT: the frozen weight multiplied entry by entry with two cheap factors.

(HUT, arXiv 2409.13501.) A layer of k outputs and d inputs gets r(d + k) multipliers: a weight is
scaled by one number that its input has for the block of outputs it leads to, and by one that its
output has for the block of inputs it comes from. The new weight is a function of the old one: it
keeps full rank and zeros, and it merges exactly.

Matrices are stored as torch stores weights, (outputs, inputs); the paper writes their transposes.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparing.errors import ConfigError
from sparing.tuners import (
    LayerAdapter,
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

Form = Literal["block", "tile", "product", "affine"]

# How many entries of a rebuilt weight cost as much as one entry of the small per-block products:
# measured on CPU for widths 576 to 1536, ranks 2 to 8 and 1 to 256 tokens.
REBUILT_ENTRIES_PER_PRODUCT = 4


@dataclass
class HUTConfig(TunerConfig):
    """Options of HUT (Hadamard updated transformation).

    Arguments:
        r: rank, 1 to the smaller width of each adapted layer; r(d + k) multipliers a layer.
        form: how the factors spread over a weight. "block": neighbouring columns and rows share
            (HUT, eq. 2) [rec]; "tile": every r-th ones do; "product": W ⊙ (1 + α/r M_B M_A),
            HiRA's algebra; "affine": that plus a LoRA, W ⊙ (1 + α/r M_B M_A) + α/r Q_B Q_A.
        scale_shift: trainable output scale γ ("scale"), shift β ("shift"), "both" (the paper) or
            "none" (HUT, eq. 3).
        factors: train "both", or for "block" and "tile" only M_A ("input") or M_B ("output").
        mode: for "block" and "tile". "weight" rebuilds the weight in forward and backward and
            keeps only the layer's input; "activation" scales inputs and outputs instead, and keeps
            r outputs a token, but saves the dense gradient (HUT, eq. 8); "auto" takes the cheaper.
        bounded: keep multipliers of weights, γ included, in (0, 2), so that no sign can flip.
        strict: refuse an r that does not divide the widths; by default some blocks are then one
            wider than others.
        lora_alpha: α of "product" and "affine", above 0.
        rank_pattern: r by module name or regular expression.
    """

    method: ClassVar[str] = "hut"
    size_option: ClassVar[str] = "r"
    size_pattern_option: ClassVar[str | None] = "rank_pattern"
    smaller_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {"scale_shift": "shift"},
        {"scale_shift": "none"},
    )
    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)

    r: int = 8
    form: Form = "block"
    scale_shift: Literal["both", "scale", "shift", "none"] = "both"
    factors: Literal["both", "input", "output"] = "both"
    mode: Literal["auto", "weight", "activation"] = "auto"
    bounded: bool = False
    strict: bool = False
    lora_alpha: float = 8.0
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("form", "block", "tile", "product", "affine")
        self._require_one_of("scale_shift", "both", "scale", "shift", "none")
        self._require_one_of("factors", "both", "input", "output")
        self._require_one_of("mode", "auto", "weight", "activation")
        blocks = self.form in ("block", "tile")
        self.require("r", _is_rank(self.r), "an integer of at least 1", "Try r=8.")
        self.require(
            "rank_pattern",
            all(_is_rank(rank) for rank in self.rank_pattern.values()),
            "integers of at least 1",
            "Leave modules that should not be adapted to exclude_modules.",
        )
        self.require("lora_alpha", self.lora_alpha > 0, "a number above 0", "Try lora_alpha=r.")
        self.require(
            "factors",
            blocks or self.factors == "both",
            f"'both' with form={self.form!r}, whose product needs two factors",
            "Use form='block' to train one factor alone.",
        )
        self.require(
            "mode",
            blocks or self.mode != "activation",
            f"'auto' or 'weight' with form={self.form!r}",
            "Only blocks can be scaled outside of the weight; leave mode='auto'.",
        )
        self.require(
            "bounded",
            not (self.bounded and self.form == "affine"),
            "False with form='affine', whose added term can flip any sign",
            "Use form='product'.",
        )

    def _require_one_of(self, option: str, *choices: str) -> None:
        expected = f"one of {', '.join(map(repr, choices))}"
        self.require(option, getattr(self, option) in choices, expected, "Choose one of these.")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class _RebuiltLinear(torch.autograd.Function):
    """x W_newᵀ + bias with W_new = rebuild(W, factors), formed twice rather than kept.

    The dense gradient of W_new lives inside the backward only, where it is reduced to the
    factors' (HUT, eq. 6). It is formed in the type of x and reduced in float32.
    """

    # The contexts are untyped because torch's own are.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rebuild: Callable[..., Tensor],
        *factors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *factors)
        ctx.rebuild = rebuild
        return F.linear(x, rebuild(weight, *factors).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        for_x, _, for_bias, _, *for_factors = ctx.needs_input_grad
        leaves: list[Any] = [f if f is None else f.detach() for f in factors]
        wanted = [leaf.requires_grad_() for leaf, w in zip(leaves, for_factors, strict=True) if w]
        with torch.enable_grad():
            rebuilt = ctx.rebuild(weight, *leaves)
        grad_x = grad @ rebuilt.detach().to(grad.dtype) if for_x else None
        flat = grad.flatten(0, -2)
        grad_bias = flat.sum(dim=0) if for_bias else None
        reduced: tuple[Tensor, ...] = ()
        if wanted:
            dense = flat.t() @ x.flatten(0, -2)
            reduced = torch.autograd.grad(rebuilt, wanted, dense.to(rebuilt.dtype))
        found = iter(reduced)
        return grad_x, None, grad_bias, None, *(next(found) if w else None for w in for_factors)


class HUTAdapter(LayerAdapter):
    """What all forms share: two factors, an output scale and a shift, and the rebuilt weight.

    Trainable, float32, and such that an untrained adapter changes nothing:
        input_factor: (r, inputs) or None, M_A as deviation from one, or as it is in products.
        output_factor: (outputs, r) or None, M_B likewise.
        scale: (outputs,) or None, γ as deviation from one.
        shift: (outputs,) or None, β.

    Weight decay therefore pulls to the pre-trained model (HUT, eq. 4) [rec].
    """

    def __init__(self, config: HUTConfig, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.bounded = config.bounded
        self.input_factor = _zeros(rank, inputs) if config.factors != "output" else None
        self.output_factor = _zeros(outputs, rank) if config.factors != "input" else None
        self.scale = _zeros(outputs) if config.scale_shift in ("both", "scale") else None
        self.shift = _zeros(outputs) if config.scale_shift in ("both", "shift") else None

    def multiplier(self, deviation: Tensor) -> Tensor:
        """1 + deviation, kept inside (0, 2) if bounded."""
        return 1 + (torch.tanh(deviation) if self.bounded else deviation)

    @abstractmethod
    def factors(self) -> tuple[Tensor | None, ...]:
        """What `rebuild` multiplies by: small float32 tensors, differentiable."""

    @abstractmethod
    def rebuild(self, weight: Tensor, *factors: Tensor | None) -> Tensor:
        """The new weight, output scale included, in at least float32; differentiable.

        Arguments:
            weight: (outputs, inputs), frozen, any strides.
            factors: of `factors`.
        """

    def rebuilt_bias(self, bias: Tensor | None) -> Tensor | None:
        """γ ⊙ bias + β in float32, or None if there is neither (HUT, eq. 3) [rec]."""
        if bias is not None:
            bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
            if self.scale is not None:
                bias = bias * self.multiplier(self.scale)
        if self.shift is None:
            return bias
        return self.shift if bias is None else bias + self.shift

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        x = x.to(product_type(x, x.dtype))
        bias = self.rebuilt_bias(_bias(layer))
        if bias is not None:
            bias = bias.to(x.dtype)
        weight = matrix_view(layer, layer.weight)  # type: ignore[arg-type]
        return _RebuiltLinear.apply(x, weight, bias, self.rebuild, *self.factors())

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rebuilt = self.rebuild(weight, *self.factors()).to(weight.dtype)
        if self.scale is None and self.shift is None:
            return rebuilt, bias
        new_bias = self.rebuilt_bias(bias)
        return rebuilt, None if new_bias is None else new_bias.to(weight.dtype)


class BlockAdapter(HUTAdapter):
    """Block and tile forms: W_new[j, i] = M_A[q(j), i] W[j, i] M_B[j, p(i)] γ[j].

    Blocks: q(j) = ⌊jr/k⌋ and p(i) = ⌊ir/d⌋ (HUT, eq. 2) [rec]; tiles: j mod r and i mod r.
    """

    def __init__(self, config: HUTConfig, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(config, inputs, outputs, rank)
        self.inputs, self.outputs = inputs, outputs
        self.tiled = config.form == "tile"
        self.even = inputs % rank == 0 and outputs % rank == 0
        self.mode = config.mode

    def factors(self) -> tuple[Tensor, Tensor]:
        """(r, inputs) and (outputs, r), with γ in the latter."""
        present = next(p for p in (self.input_factor, self.output_factor) if p is not None)
        one = torch.ones((), device=present.device)
        into = one.expand(self.rank, self.inputs)
        if self.input_factor is not None:
            into = self.multiplier(self.input_factor)
        out = one.expand(self.outputs, self.rank)
        if self.output_factor is not None:
            out = self.multiplier(self.output_factor)
        if self.scale is not None:
            out = out * self.multiplier(self.scale).unsqueeze(1)
        return into, out

    def rebuild(self, weight: Tensor, *factors: Tensor | None) -> Tensor:
        into, out = factors
        assert into is not None
        assert out is not None
        r = self.rank
        if not self.even:
            rows, columns = (self._block_of(n, weight.device) for n in weight.shape)
            return weight * (into[rows] * out[:, columns])
        if self.tiled:
            multiplier = into.reshape(1, r, -1, r) * out.reshape(-1, r, 1, r)
        else:
            multiplier = into.reshape(r, 1, r, -1) * out.reshape(r, -1, r, 1)
        return weight * multiplier.reshape(weight.shape)

    def _block_of(self, width: int, device: torch.device) -> Tensor:
        index = torch.arange(width, device=device)
        return index % self.rank if self.tiled else index * self.rank // width

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        if self._by_activation(x):
            return self._through_layer(x, layer) if self.rank == 1 else self._blocks(x, layer)
        return super().forward(x, layer)

    def _by_activation(self, x: Tensor) -> bool:
        """Whether to scale activations: always for r = 1, which needs two vectors only; beyond,
        where the r(d + 2k) entries a token cost less than the d k entries of a new weight."""
        if self.mode != "auto" or self.rank == 1:
            return self.mode != "weight"
        entries = x.numel() // self.inputs * self.rank * (self.inputs + 2 * self.outputs)
        rebuilt = self.inputs * self.outputs
        return self.even and REBUILT_ENTRIES_PER_PRODUCT * entries < rebuilt

    def _through_layer(self, x: Tensor, layer: nn.Module) -> Tensor:
        """r = 1: scale what goes into the base layer and what comes out, of any layer type."""
        into, out = self.factors()
        if self.input_factor is not None:
            x = (x * into[0]).to(x.dtype)
        y = layer(x)
        out, bias = out[:, 0], _bias(layer)
        shift = self.rebuilt_bias(bias)
        if shift is None:
            return (y * out).to(y.dtype)
        if bias is not None:
            shift = shift - out * bias
        if torch.is_grad_enabled() or y.dtype != shift.dtype:
            return torch.addcmul(shift, y, out).to(y.dtype)
        return torch.addcmul(shift, y, out, out=y)

    def _blocks(self, x: Tensor, layer: nn.Module) -> Tensor:
        """y_q = Σ_p M_B[p, q] ⊙ ((x_p ⊙ M_A[p, q]) W[p, q]) (HUT, eq. 8).

        Autograd keeps the products of every block, r outputs a token. Recomputing them would take
        as long as the dense gradient of "weight", which needs no memory either.
        """
        x = x.to(product_type(x, x.dtype))
        # A width splits into (block, within it), or for tiles into (turn, tile).
        split, block = ((-1, self.rank), 1) if self.tiled else ((self.rank, -1), 0)
        into, out = self.factors()
        weight = matrix_view(layer, layer.weight).to(x.dtype)  # type: ignore[arg-type]
        tokens = x.reshape(-1, self.inputs)
        columns = []
        for vector, weights, scales in zip(
            into,
            weight.unflatten(0, split).unbind(block),
            out.unflatten(0, split).unbind(block),
            strict=True,
        ):
            scaled = (tokens * vector).to(x.dtype).unflatten(1, split).movedim(1 + block, 0)
            blocks = weights.unflatten(1, split).movedim(1 + block, 0)
            products = scaled @ blocks.transpose(1, 2)
            columns.append((products * scales.t().unsqueeze(1)).sum(dim=0))
        y = torch.stack(columns, dim=1 + block).flatten(1)
        bias = self.rebuilt_bias(_bias(layer))
        if bias is not None:
            y = y + bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.outputs)


class ProductAdapter(HUTAdapter):
    """W_new = γ ⊙ W ⊙ (1 + α/r M_B M_A): HiRA's algebra [rec]. M_A starts in U(-1, 1), M_B at 0."""

    def __init__(
        self, config: HUTConfig, inputs: int, outputs: int, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, inputs, outputs, rank)
        self.scaling = config.lora_alpha / rank
        assert self.input_factor is not None
        nn.init.uniform_(self.input_factor, -1, 1, generator=generator)

    def factors(self) -> tuple[Tensor | None, ...]:
        """γ or None, then M_A and α/r M_B."""
        assert self.output_factor is not None
        scale = None if self.scale is None else self.multiplier(self.scale)
        return scale, self.input_factor, self.output_factor * self.scaling

    def rebuild(self, weight: Tensor, *factors: Tensor | None) -> Tensor:
        scale, into, out, *added = factors
        # Under autocast the small products would be rounded to half precision.
        with torch.autocast(weight.device.type, enabled=False):
            rebuilt = weight * self.multiplier(out @ into)  # type: ignore[operator]
            if added:
                rebuilt = rebuilt + added[1] @ added[0]  # type: ignore[operator]
            return rebuilt if scale is None else rebuilt * scale.unsqueeze(1)


class AffineAdapter(ProductAdapter):
    """W_new = γ ⊙ (W ⊙ (1 + α/r M_B M_A) + α/r Q_B Q_A): the product form plus a LoRA [rec].

    Trainable besides: added_input (r, inputs), Q_A, initialised as LoRA's A; added_output
    (outputs, r), Q_B, zero.
    """

    def __init__(
        self, config: HUTConfig, inputs: int, outputs: int, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, inputs, outputs, rank, generator)
        self.added_input, self.added_output = _zeros(rank, inputs), _zeros(outputs, rank)
        nn.init.kaiming_uniform_(self.added_input, a=math.sqrt(5), generator=generator)

    def factors(self) -> tuple[Tensor | None, ...]:
        """γ or None, M_A, α/r M_B, Q_A, α/r Q_B."""
        return *super().factors(), self.added_input, self.added_output * self.scaling


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def _bias(layer: nn.Module) -> Tensor | None:
    return getattr(layer, "bias", None)


class HUTTuner(Tuner):
    """Puts HUT adapters on linear layers.

    On a fused projection (GPT-2's `c_attn`) blocks keep to q, k or v only if r is a multiple of
    three. Quantised layers take the block form with r = 1, which needs no weight.
    """

    prefix = "hut_"

    def new_adapter(
        self, config: HUTConfig, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> HUTAdapter:
        rank = option_for(config.rank_pattern, module_name, config.r)
        outputs, inputs = layer_shape(layer)
        self._check_rank(config, rank, inputs, outputs, module_name)
        if resolve_quantization_backend(layer) is not None:
            _check_quantised(config, rank, layer, module_name)
        if config.form in ("block", "tile"):
            return BlockAdapter(config, inputs, outputs, rank)
        kind = ProductAdapter if config.form == "product" else AffineAdapter
        return kind(config, inputs, outputs, rank, generator_for(config.seed, module_name))

    def _check_rank(
        self, config: HUTConfig, rank: int, inputs: int, outputs: int, name: str
    ) -> None:
        where = f"HUTConfig.r on module {name!r}"
        if rank > min(inputs, outputs):
            raise ConfigError(
                where,
                expected=f"at most the smaller of the widths {inputs} and {outputs}",
                found=str(rank),
                mend="Lower r, or rank_pattern for this module.",
            )
        even = inputs % rank == 0 and outputs % rank == 0
        if config.form in ("block", "tile") and not even:
            if config.strict:
                raise ConfigError(
                    where,
                    expected=f"a divisor of both widths, {inputs} inputs and {outputs} outputs",
                    found=str(rank),
                    mend=f"Use a divisor of {math.gcd(inputs, outputs)} here through rank_pattern, "
                    "or strict=False for unequal blocks.",
                )
            if config.mode == "activation":
                raise ConfigError(
                    f"HUTConfig.mode on module {name!r}",
                    expected="'auto' or 'weight' where blocks are unequal",
                    found="'activation'",
                    mend=f"Use an r that divides {math.gcd(inputs, outputs)}, or mode='auto'.",
                )

    def new_shared(self, config: HUTConfig, layers: dict[str, nn.Module]) -> None:
        """Nothing is shared; here the layers are looked at together.

        Raises:
            ConfigError: a layer's weight is also an embedding, which the multipliers would change.
        """
        embeddings = {
            id(module.weight): name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding)
        }
        for name, layer in layers.items():
            if id(getattr(layer, "weight", None)) in embeddings:
                raise ConfigError(
                    f"module {name!r}",
                    expected="a layer with a weight of its own",
                    found=f"one tied to {embeddings[id(layer.weight)]!r}",
                    mend="Leave it out of target_modules, or untie the embeddings.",
                )
        if not config.inference_mode:
            _warn_of_dead_units(layers)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        names = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, TunerLayer)
            and _bias(module.get_base_layer()) is None
            and any(_shifts(module.adapters[key]) for key in module.adapters)
        ]
        if names:
            warnings.warn(
                f"Merging gives a bias to {len(names)} layers that had none: {', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}. Architectures whose configuration has no such "
                "bias (Llama without attention_bias and mlp_bias) drop it without a word when the "
                "merged model is saved and loaded again. Save the adapter instead, or train with "
                "scale_shift='scale'.",
                stacklevel=4,
            )


def _shifts(adapter: Any) -> bool:
    return adapter.shift is not None and bool(adapter.shift.any())


def _check_quantised(config: HUTConfig, rank: int, layer: nn.Module, name: str) -> None:
    through_layer = config.form in ("block", "tile") and rank == 1 and config.mode != "weight"
    if not through_layer:
        raise ConfigError(
            f"module {name!r}",
            expected="form='block', r=1 and mode='auto' on a quantised layer",
            found=f"form={config.form!r}, r={rank}, mode={config.mode!r} "
            f"on {type(layer).__name__}, whose weight is packed",
            mend="Set r=1, or load the base model unquantised.",
        )


def _warn_of_dead_units(layers: dict[str, nn.Module]) -> None:
    dead = total = 0
    for layer in layers.values():
        weight = getattr(layer, "weight", None)
        if weight is None or weight.is_meta or not weight.is_floating_point():
            continue
        if weight.dim() == 2:
            for dim in (0, 1):
                alive = weight.detach().any(dim=dim)
                dead += int((~alive).sum())
                total += alive.numel()
    if dead:
        warnings.warn(
            f"{dead} of {total} inputs and outputs of the adapted layers ({dead / total:.1%}) have "
            "only zero weights, which multipliers leave at zero for ever.",
            stacklevel=2,
        )


register_tuner(HUTConfig, HUTTuner)
