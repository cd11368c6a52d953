"""Bi-Adapter: adapters whose weights are trained and stored in 1, 2, 4 or 8 bits.

Jie, Wang and Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of
Precision Redundancy", arXiv 2307.16867 (ICCV 2023). Adapters tolerate coarse weights, so bytes are
better spent on their width than on precision: one bit and 32 times the width instead of float32.
Equation numbers are those of our specification, which was made from the released code.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from sparing.adapt._bi_adapter_matrix import Packed, QuantizedMatrix
from sparing.adapt._bi_adapter_places import Places, within_chosen_blocks
from sparing.errors import CheckpointError, ConfigError
from sparing.quantizers import (
    CODEBOOKS,
    GRANULARITIES,
    Codebook,
    Granularity,
    NormalQuantizer,
)
from sparing.residual import ResidualStream
from sparing.surgery import FeedForward, Projection, attentions, feed_forwards
from sparing.tuners import (
    AdditiveAdapter,
    LayerAdapter,
    Tuner,
    TunerConfig,
    generator_for,
    layer_shape,
    option_for,
    product_type,
    register_tuner,
)

Kind = Literal["adaptformer", "lora"]
BITS = (1, 2, 4, 8, 32)
_FULLY_TRAINED_HEADS = ("SEQ_CLS", "TOKEN_CLS")
_UP_DEVIATION = 1e-3


@dataclass
class BiAdapterConfig(TunerConfig):
    """Options of Bi-Adapter.

    A new adapter is near the identity, not exactly: a matrix of zeros has no signs. At equal h it
    has as many parameters as an ordinary adapter; what it saves is bytes in files, and in memory
    where many adapters are kept packed.

    Arguments:
        kind: "adaptformer" adds a bottleneck with ReLU beside every feed-forward network, and
            cannot be merged; "lora" adds one without activation to linear layers.
        h: width of the bottleneck, >= 1. Paper: 1 to 32.
        h_pattern: another width for layers whose names match, as in PEFT's `rank_pattern`.
        bits: of a weight: 1, 2, 4, 8, or 32 for an ordinary adapter. Paper: 1.
        scale: s, finite; multiplies what is added, in place of alpha / r. The paper searches 0.01,
            0.1, 1, 10 and 100 for every task; one bit leaves the weights near their initial size,
            so that without this search it looks worse than it is.
        dropout: of the bottleneck, 0 <= dropout < 1. Paper: 0.1.
        codebook: levels of a weight, see `sparing.quantizers.codebook`. Paper: "k-median".
        granularity: mean and deviation of the whole "matrix", as in the paper, or of every "row";
            rows need h >= 2.
        binary_head: names of classifiers to be replaced by new matrices of one bit without bias, as
            in the paper's Bi-Head; None leaves them. Name them in `modules_to_save` instead for
            heads in full precision. Reconstructed: they start as a new `nn.Linear` does.
        pack: write codes; False writes the latent float32 numbers, from which training can be
            resumed exactly. Checkpoints of `sparing.train` always hold the latter.
    """

    method: ClassVar[str] = "bi_adapter"
    size_option: ClassVar[str] = "h"
    size_pattern_option: ClassVar[str | None] = "h_pattern"
    learning_rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)

    kind: Kind = "adaptformer"
    h: int = 32
    h_pattern: dict[str, int] = field(default_factory=dict)
    bits: int = 1
    scale: float = 1.0
    dropout: float = 0.1
    codebook: Codebook = "k-median"
    granularity: Granularity = "matrix"
    binary_head: list[str] | None = None
    pack: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.binary_head is not None:
            self.binary_head = sorted(self.binary_head)
        kinds = ("adaptformer", "lora")
        self.require("kind", self.kind in kinds, " or ".join(map(repr, kinds)), "Use 'lora'.")
        self.require("h", self.h >= 1, "at least 1", "Try 32.")
        widths = (self.h, *self.h_pattern.values())
        self.require("h_pattern", min(widths) >= 1, "widths of at least 1", "Raise the others.")
        self.require("bits", self.bits in BITS, f"one of {', '.join(map(str, BITS))}", "Try 1.")
        self.require("scale", math.isfinite(self.scale), "a finite number", "Try 1.")
        self.require("dropout", 0 <= self.dropout < 1, "from 0 to below 1", "Use 0 or 0.1.")
        one_bit = self.codebook != "sign" or self.bits in (1, 32)
        self.require(
            "codebook",
            self.codebook in CODEBOOKS and one_bit,
            f"one of {', '.join(CODEBOOKS)}; 'sign' has one bit",
            "Use 'k-median'.",
        )
        self.require(
            "granularity", self.granularity in GRANULARITIES, "'matrix' or 'row'", "Use 'matrix'."
        )
        self.require(
            "granularity",
            self.granularity == "matrix" or min(widths) >= 2,
            "'matrix' where h is 1, as a row of one number does not vary",
            "Raise h, or use 'matrix'.",
        )
        self.require(
            "binary_head",
            self.binary_head is None or self.task_type not in _FULLY_TRAINED_HEADS,
            "None with this task_type, for which PEFT trains the head in full",
            "Leave task_type out to train a binary head.",
        )

    def quantizer(self, bits: int | None = None) -> NormalQuantizer | None:
        """What quantises its matrices; None for 32 bits."""
        bits = self.bits if bits is None else bits
        return None if bits == 32 else NormalQuantizer(bits, self.codebook, self.granularity)


class Bottleneck(nn.Module):
    """s W_u dropout(act(W_d x)), with quantised W_d and W_u and without biases.

    (inputs + outputs) · h multiplications a token, as many as an ordinary adapter; and a dozen
    operations on h · inputs and h · outputs numbers at every optimiser step, to quantise them.
    Products are formed in float32, or in float64 for such inputs.

    Arguments:
        config: of the adapter.
        inputs, outputs: widths.
        module_name: of the layer, for `h_pattern`.
        name: of the bottleneck, for the seed.

    Attributes:
        down: W_d (h, inputs), starts as `nn.Linear` does.
        up: W_u (outputs, h), starts normal with deviation 1e-3, cut off at twice that; at zero for
            32 bits.
    """

    def __init__(
        self, config: BiAdapterConfig, inputs: int, outputs: int, module_name: str, name: str
    ) -> None:
        super().__init__()
        h = option_for(config.h_pattern, module_name, config.h)
        up = torch.zeros(outputs, h, dtype=torch.float32, device="cpu")
        if config.bits != 32:
            nn.init.trunc_normal_(
                up,
                std=_UP_DEVIATION,
                a=-2 * _UP_DEVIATION,
                b=2 * _UP_DEVIATION,
                generator=generator_for(config.seed, f"{name} up"),
            )
        down = _like_linear(h, inputs, generator_for(config.seed, f"{name} down"))
        self.down = QuantizedMatrix(down, config.quantizer())
        self.up = QuantizedMatrix(up, config.quantizer())
        self.activation = F.relu if config.kind == "adaptformer" else None
        self.dropout, self.scale = config.dropout, config.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        z = F.linear(x.to(exact), self.down.weight().to(exact))
        if self.activation is not None:
            z = self.activation(z)
        if self.dropout:
            z = F.dropout(z, self.dropout, self.training)
        return F.linear(z, (self.scale * self.up.weight()).to(z.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """W_d (h, inputs) and s W_u (outputs, h)."""
        return self.down.weight(), self.scale * self.up.weight()


def _like_linear(outputs: int, inputs: int, generator: torch.Generator) -> Tensor:
    weight = torch.empty(outputs, inputs, dtype=torch.float32, device="cpu")
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


class BiLoRAAdapter(AdditiveAdapter):
    """Adds s W_u dropout(W_d x) to a layer; in one that computes queries, keys and values at once,
    to queries and values, each with matrices of its own (Bi-Adapter, section 4).

    Arguments:
        bottlenecks: by name, in the order of the outputs they are for.
        slices: (start, stop) of these outputs.
        outputs: of the layer.
    """

    def __init__(
        self, bottlenecks: dict[str, Bottleneck], slices: list[tuple[int, int]], outputs: int
    ) -> None:
        super().__init__()
        self.bottlenecks = nn.ModuleDict(bottlenecks)
        self.margins = [(start, outputs - stop) for start, stop in slices]

    def parts(self) -> Iterator[tuple[Bottleneck, tuple[int, int]]]:
        """Every bottleneck, with the numbers of outputs before and after its own."""
        for bottleneck, margins in zip(self.bottlenecks.values(), self.margins, strict=True):
            yield cast(Bottleneck, bottleneck), margins

    def delta(self, x: Tensor) -> Tensor:
        first, *others = (F.pad(part(x), margins) for part, margins in self.parts())
        return sum(others, start=first)

    def delta_weight(self) -> Tensor:
        a, b = self.factors()
        return b @ a

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, inputs) and B (outputs, rank) of the LoRA with the same effect."""
        pairs = [(*part.factors(), margins) for part, margins in self.parts()]
        b = [F.pad(up, (0, 0, *margins)) for _, up, margins in pairs]
        return torch.cat([down for down, _, _ in pairs]), torch.cat(b, dim=1)


class BiAdaptFormerAdapter(AdditiveAdapter):
    """Adds s W_u dropout(ReLU(W_d x)) to the output of a feed-forward network, where x is what its
    sub-layer reads before the norm (Bi-Adapter, section 4).

    It joins at the network's last layer, so a dropout or drop path that the model applies to the
    network's output applies to it too; the paper adds it after drop path.

    Arguments:
        bottleneck: of the network's width.
        stream: where x is caught.
    """

    mergeable: ClassVar[bool] = False
    instead_of_merging: ClassVar[str] = (
        "Keep the adapter as it is: its ReLU makes it depend on the input. kind='lora' merges."
    )

    def __init__(self, bottleneck: Bottleneck, stream: ResidualStream) -> None:
        super().__init__()
        self.bottleneck, self.stream = bottleneck, stream

    def delta(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.stream.read())

    def delta_weight(self) -> Tensor:
        raise ConfigError(
            type(self).__name__,
            expected="an adapter that is a fixed matrix",
            found="one with a ReLU, which depends on its input",
            mend=self.instead_of_merging,
        )


class BinaryHead(LayerAdapter):
    """A classifier of one bit a weight, without bias, in place of the model's (Bi-Adapter,
    section 5).

    Arguments:
        config: of the adapter.
        outputs, inputs: classes, and width.
        name: of the layer, for the seed.
    """

    def __init__(self, config: BiAdapterConfig, outputs: int, inputs: int, name: str) -> None:
        super().__init__()
        start = _like_linear(outputs, inputs, generator_for(config.seed, f"{name} head"))
        self.matrix = QuantizedMatrix(start, config.quantizer(bits=1))

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        y = F.linear(x.to(exact), self.matrix.weight().to(exact))
        return y.to(product_type(x, x.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.matrix.weight().to(weight.dtype), None


class BiAdapterTuner(Tuner):
    """Puts quantised adapters on a model."""

    prefix = "bi_adapter_"

    def new_shared(self, config: BiAdapterConfig, layers: dict[str, nn.Module]) -> None:
        """Check the names of heads; nothing is shared."""
        for head in config.binary_head or []:
            if not any(_is_named(head, name) for name in layers):
                raise ConfigError(
                    "BiAdapterConfig.binary_head",
                    expected="names of classifiers that the model has",
                    found=repr(head),
                    mend="Look for the last linear layer in model.named_modules().",
                )

    def new_adapter(
        self, config: BiAdapterConfig, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> LayerAdapter:
        outputs, inputs = layer_shape(layer)
        if _is_head(config, module_name):
            return BinaryHead(config, outputs, inputs, module_name)
        if config.kind == "adaptformer":
            network = self._places.networks.get(module_name)
            if network is None:
                raise ConfigError(
                    f"module {module_name!r}",
                    expected="the last layer of a feed-forward network, for kind='adaptformer'",
                    found="another layer",
                    mend="Leave target_modules out, or use kind='lora'.",
                )
            bottleneck = Bottleneck(config, network.width, outputs, module_name, module_name)
            return BiAdaptFormerAdapter(bottleneck, self._stream(network))
        parts = self._places.fused.get(module_name) or {"all": Projection(module_name, 0, outputs)}
        bottlenecks = {
            part: Bottleneck(config, inputs, place.width, module_name, f"{module_name} {part}")
            for part, place in parts.items()
        }
        slices = [(place.start, place.stop) for place in parts.values()]
        return BiLoRAAdapter(bottlenecks, slices, outputs)

    @property
    def _places(self) -> Places:
        """Of the bare model, whatever has been put on it since."""
        if "_found_places" not in self.__dict__:
            self.__dict__["_found_places"] = Places.of(self.model)
        return self.__dict__["_found_places"]

    def _stream(self, network: FeedForward) -> ResidualStream:
        streams: dict[str, ResidualStream] = self.__dict__.setdefault("_streams", {})
        if network.last not in streams:
            first = self.model.get_submodule(network.first[0])
            base = first.get_base_layer() if isinstance(first, BaseTunerLayer) else first
            block = self.model.get_submodule(self._places.blocks[network.block])
            streams[network.last] = ResidualStream(block, base)
        return streams[network.last]

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """The paper's places where no others are named: every feed-forward network, or queries and
        values. With kind="adaptformer", "all-linear" also means every network."""
        config: BiAdapterConfig = peft_config
        places = self._places
        if config.kind == "adaptformer" and config.target_modules in (None, "all-linear"):
            names = list(places.networks) or [network.last for network in feed_forwards(self.model)]
        elif config.target_modules is None:
            names = list(places.projections) or [a.query.layer for a in attentions(self.model)]
        else:
            return config
        config.target_modules = cast(Any, within_chosen_blocks(config, names))
        return config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return _is_head(peft_config, key) or check_target_module_exists(peft_config, key)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for stream in self.__dict__.pop("_streams", {}).values():
            stream.remove()
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        latent = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if not config.pack:
            return latent
        packed = dict(latent)
        for name, matrix in matrices(model, adapter_name):
            if matrix.quantizer is not None:
                codes, moments = matrix.pack(packed.pop(f"{name}.latent").detach())
                packed |= {f"{name}.codes": codes, f"{name}.moments": moments}
                if matrix.latent.numel() * matrix.bits % 8:
                    packed[f"{name}.count"] = _count(matrix).to(codes.device)
        return packed

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        latent = dict(state_dict)
        for name, matrix in matrices(model, adapter_name):
            saved = cls._remove_adapter_name_from_key(f"{name}.latent", adapter_name)
            root = "" if name.startswith("base_model.model.") else "base_model.model."
            place = f"{root}{saved}".removesuffix("latent")
            if f"{place}codes" in latent:
                codes, moments = latent.pop(f"{place}codes"), latent.pop(f"{place}moments")
                _check_count(name, matrix, latent.pop(f"{place}count", None))
                latent[f"{place}latent"] = matrix.unpack(Packed(codes, moments), name)
            elif f"{place}latent" not in latent:
                raise CheckpointError(
                    f"matrix {name!r}",
                    expected="its codes, or its latent numbers, in the file",
                    found="neither",
                    mend="The adapter belongs to another base model or other options.",
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, latent)


def matrices(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Name and module of every matrix of an adapter, in the model's order: W_d before W_u."""
    container = f".{BiAdapterTuner.prefix}adapter"
    for name, module in model.named_modules():
        if isinstance(module, QuantizedMatrix) and f"{container}.{adapter_name}." in name:
            yield name, module


def _is_named(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _is_head(config: BiAdapterConfig, name: str) -> bool:
    return any(_is_named(head, name) for head in config.binary_head or [])


def _count(matrix: QuantizedMatrix) -> Tensor:
    return torch.tensor([matrix.latent.numel()], dtype=torch.int32, device="cpu")


def _check_count(name: str, matrix: QuantizedMatrix, count: Tensor | None) -> None:
    """The last byte may be partly empty; how many numbers there are is then stored."""
    if count is not None and int(count) != matrix.latent.numel():
        raise CheckpointError(
            f"matrix {name!r}",
            expected=f"{matrix.latent.numel():,} numbers",
            found=f"{int(count):,}",
            mend="The adapter belongs to another base model or other options; load it there.",
        )


register_tuner(BiAdapterConfig, BiAdapterTuner)
