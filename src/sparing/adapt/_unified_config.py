"""The design space of parameter-efficient tuning as options, and its named points.

He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366
(ICLR 2022), section 3 and tables 1 and 6.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import peft

from sparing.errors import ConfigError, near_matches
from sparing.tuners import TunerConfig

Form = Literal["none", "adapter", "lora", "prefix", "mh_adapter"]
Insertion = Literal["parallel", "sequential"]
Position = Literal["heads", "output", "layers", "norm"]
Composition = Literal["plain", "scaled", "learned", "gated"]
Place = Literal["attn", "ffn"]

PROJECTIONS: dict[Place, tuple[str, ...]] = {
    "attn": ("query", "key", "value", "output"),
    "ffn": ("first", "last"),
}
DEFAULT_PROJECTIONS: dict[Place, tuple[str, ...]] = {
    "attn": ("query", "value"),
    "ffn": ("first", "last"),
}
# Everything that has sub-layers; PEFT saves embeddings that target_modules names.
EVERYTHING = r"(?!.*(embed_tokens|lm_head)$).*\..+"


@dataclass(frozen=True)
class Slot:
    """What is done to one kind of sub-layer: a point of the design space (paper, table 1).

    Arguments:
        form: Δh as a function of its input z.
            "adapter": ReLU(z W_down + b_down) W_up + b_up (paper, eq. 3);
            "lora": z W_down W_up (eq. 4);
            "prefix": softmax(z W_q P_kᵀ) P_v, a head (eq. 5), attention only;
            "mh_adapter": ReLU(z W_q P_kᵀ) P_v, a head, attention only;
            "none": the sub-layer stays as it is.
        insertion: "parallel" takes Δh = g(x) from the sub-layer's input, "sequential" Δh = g(h)
            from what is modified.
        modifies: the h that Δh is added to. In attention "heads", the concatenated head outputs
            before W_o; "output", after W_o; or "layers", single projections. In feed-forward
            networks "output"; "layers"; or "norm", after add and norm, as Pfeiffer's adapter does
            (BERT and its kin only). None: "layers" for "lora"; in attention "heads" if parallel
            and "output" if sequential; "output" in feed-forward networks.
        bottleneck: r, or l for a prefix, >= 1; None: the config's `bottleneck`.
        composition: "plain" h + Δh, "scaled" h + s Δh, "learned" the same with a trainable s that
            starts at `scale`, "gated" (1 - λ) h + λ Δh (prefix only; eqs. 6 and 7). None: "gated"
            for a prefix, else "plain" for `scale` 1 and "scaled" for others.
        scale: s, above 0; 4 in the paper's MAM adapter, α / r in LoRA.
        projections: with modifies="layers", which: of "query", "key", "value", "output", or of
            "first", "last". None: ("query", "value"), or both of a feed-forward network; a gate
            counts as first.
        init: "lora": W_down Kaiming-uniform, W_up and biases 0, so that nothing changes at first;
            "bert": weights N(0, 0.02), biases 0, nearly the identity. "lora" forms always start
            with W_up = 0.
        layernorm: of an adapter's input ("in"), of its Δh ("out"), or "none".
        dropout: after the ReLU, or of LoRA's input; 0 <= dropout < 1. 0.1 in the released code.
    """

    form: Form = "none"
    insertion: Insertion = "parallel"
    modifies: Position | None = None
    bottleneck: int | None = None
    composition: Composition | None = None
    scale: float = 1.0
    projections: tuple[str, ...] | None = None
    init: Literal["lora", "bert"] = "lora"
    layernorm: Literal["none", "in", "out"] = "none"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.projections, list):  # from JSON
            object.__setattr__(self, "projections", tuple(self.projections))
        choices: dict[str, tuple[Any, ...]] = {
            "form": get_args(Form),
            "insertion": get_args(Insertion),
            "modifies": (None, *get_args(Position)),
            "composition": (None, *get_args(Composition)),
            "init": ("lora", "bert"),
            "layernorm": ("none", "in", "out"),
        }
        for option, allowed in choices.items():
            self._require(
                option,
                getattr(self, option) in allowed,
                f"one of {', '.join(map(repr, allowed))}",
                "Choose one of them.",
            )
        self._require(
            "bottleneck",
            self.bottleneck is None or _is_width(self.bottleneck),
            "None or an integer of at least 1",
            "To leave the sub-layer alone, use form='none'.",
        )
        self._require("scale", self.scale > 0, "above 0", "The paper uses 1, 2 or 4.")
        self._require("dropout", 0 <= self.dropout < 1, "from 0 to below 1", "Use 0 or 0.1.")
        self._require(
            "insertion",
            self.insertion == "parallel" or self.form in ("none", "adapter"),
            f"'parallel' with form={self.form!r}, which is computed from the sub-layer's input",
            "A sequential LoRA or prefix does not exist; use form='adapter'.",
        )
        self._require(
            "composition",
            self.composition != "gated" or self.form == "prefix",
            f"'plain', 'scaled' or 'learned' with form={self.form!r}: only a softmax has a gate",
            "Use form='prefix' for a gate.",
        )
        self._require(
            "layernorm",
            self.layernorm == "none" or self.form == "adapter",
            f"'none' with form={self.form!r}",
            "Only adapters are normalised.",
        )
        self._require(
            "dropout",
            self.dropout == 0 or self.form in ("adapter", "lora"),
            f"0 with form={self.form!r}",
            "Attention has a dropout of its own.",
        )

    def _require(self, option: str, holds: bool, expected: str, mend: str) -> None:
        if not holds:
            raise ConfigError(
                f"Slot.{option}", expected=expected, found=repr(getattr(self, option)), mend=mend
            )

    @property
    def composes(self) -> Composition:
        """The composition, with None resolved."""
        if self.composition is not None:
            return self.composition
        if self.form == "prefix":
            return "gated"
        return "plain" if self.scale == 1 else "scaled"

    def position(self, place: Place) -> Position:
        """What is modified, with None resolved."""
        if self.modifies is not None:
            return self.modifies
        if self.form == "lora":
            return "layers"
        return "heads" if place == "attn" and self.insertion == "parallel" else "output"

    def chosen_projections(self, place: Place) -> tuple[str, ...]:
        """The projections, with None resolved."""
        return DEFAULT_PROJECTIONS[place] if self.projections is None else self.projections

    def check(self, place: Place) -> None:
        """Raise a `ConfigError` if the slot cannot be at this kind of sub-layer."""
        if self.form == "none":
            return
        attention_only = self.form in ("prefix", "mh_adapter")
        where, position = f"UnifiedPeftConfig.{place}", self.position(place)
        if attention_only and place == "ffn":
            raise ConfigError(
                where,
                expected="'adapter' or 'lora'",
                found=f"form={self.form!r}, which needs attention heads",
                mend="Use it for attn.",
            )
        positions: tuple[str, ...] = ("output", "layers")
        if attention_only:
            positions = ("heads",)
        elif place == "attn":
            positions = ("heads", "output", "layers")
        elif self.form == "adapter" and self.insertion == "sequential":
            positions = ("output", "layers", "norm")
        if position not in positions:
            raise ConfigError(
                where,
                expected=f"modifies as one of {', '.join(positions)}",
                found=f"{position!r} with form={self.form!r}, insertion={self.insertion!r}",
                mend="Leave modifies out for the paper's position.",
            )
        if self.projections is None:
            return
        if position != "layers" or not self.projections:
            raise ConfigError(
                where,
                expected="projections only with modifies='layers', and at least one",
                found=f"projections={self.projections!r} with modifies={position!r}",
                mend="Leave projections out.",
            )
        for name in self.projections:
            if name not in PROJECTIONS[place]:
                raise ConfigError(
                    f"{where}, projections",
                    expected=f"some of {', '.join(PROJECTIONS[place])}",
                    found=repr(name),
                    mend=near_matches(name, list(PROJECTIONS[place])),
                )


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass
class UnifiedPeftConfig(TunerConfig):
    """Options of the unified view; the defaults are the MAM adapter (paper, section 4.6).

    A sub-layer is adapted if one of its linear layers is among `target_modules`; None and
    "all-linear" mean all. The class methods are the named points of the design space.

    Arguments:
        attn: what is done to attention; by default a gated prefix of 30 vectors.
        ffn: what is done to feed-forward networks; by default a parallel adapter scaled by 4.
        bottleneck: r (or l) of the slots that give none, >= 1; 512 in the paper.
        prefix_mlp_dim: width of the network that the prefixes come from while training, >= 1; None
            trains the vectors themselves. 800 in the paper. See `fold_prefix`.
        biases: train all biases, and nothing else (BitFit).
    """

    method: ClassVar[str] = "unified_peft"
    size_option: ClassVar[str] = "bottleneck"
    smaller_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {"prefix_mlp_dim": 32},
        {"attn": {"form": "none"}},
    )
    learning_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)

    attn: Slot = field(default_factory=lambda: Slot("prefix", bottleneck=30))
    ffn: Slot = field(default_factory=lambda: Slot("adapter", scale=4.0))
    bottleneck: int = 512
    prefix_mlp_dim: int | None = 800
    biases: bool = False

    def __post_init__(self) -> None:
        # PEFT would replace "all-linear" by the names of one model's layers.
        if self.target_modules is None or self.target_modules == "all-linear":
            self.target_modules = EVERYTHING
        super().__post_init__()
        self.attn, self.ffn = _slot("attn", self.attn), _slot("ffn", self.ffn)
        self.attn.check("attn")
        self.ffn.check("ffn")
        self.require(
            "bottleneck", _is_width(self.bottleneck), "an integer of at least 1", "Try 512."
        )
        self.require(
            "prefix_mlp_dim",
            self.prefix_mlp_dim is None or _is_width(self.prefix_mlp_dim),
            "None or an integer of at least 1",
            "Use 800, or None to train the prefixes themselves.",
        )
        nothing = self.attn.form == self.ffn.form == "none"
        self.require(
            "biases",
            self.biases == nothing,
            "True if and only if both slots have the form 'none'",
            "Fill a slot, or use UnifiedPeftConfig.bitfit().",
        )

    def width(self, place: Place) -> int:
        """r, or l, of a slot."""
        given = getattr(self, place).bottleneck
        return self.bottleneck if given is None else given

    @classmethod
    def _at(cls, where: str, slot: Slot, **options: Any) -> "UnifiedPeftConfig":
        if where not in ("attn", "ffn", "both"):
            raise ConfigError(
                "where", expected="'attn', 'ffn' or 'both'", found=repr(where), mend="Use 'ffn'."
            )
        attn = slot if where != "ffn" else Slot()
        return cls(attn=attn, ffn=slot if where != "attn" else Slot(), **options)

    @classmethod
    def mam(
        cls,
        prefix_length: int = 30,
        bottleneck: int = 512,
        scale: float = 4.0,
        dropout: float = 0.0,
        **options: Any,
    ) -> "UnifiedPeftConfig":
        """MAM adapter: a short prefix on every attention and a wide scaled parallel adapter on
        every feed-forward network (paper, section 4.6). l = 16, r = 16, s = 2 for GLUE."""
        return cls(
            attn=Slot("prefix", bottleneck=prefix_length),
            ffn=Slot("adapter", scale=scale, dropout=dropout),
            bottleneck=bottleneck,
            **options,
        )

    @classmethod
    def adapter(
        cls, bottleneck: int = 512, where: str = "ffn", init: str = "bert", **options: Any
    ) -> "UnifiedPeftConfig":
        """Sequential adapter (SA) on "attn", "ffn" or "both"."""
        slot = Slot("adapter", "sequential", init=init)  # type: ignore[arg-type]
        return cls._at(where, slot, bottleneck=bottleneck, **options)

    @classmethod
    def houlsby(cls, bottleneck: int = 200, **options: Any) -> "UnifiedPeftConfig":
        """Houlsby's adapter: sequential, after attention and after the feed-forward network."""
        return cls.adapter(bottleneck, "both", **options)

    @classmethod
    def pfeiffer(cls, bottleneck: int = 600, **options: Any) -> "UnifiedPeftConfig":
        """Pfeiffer's adapter: sequential, after add and norm of the feed-forward network. For
        BERT, RoBERTa and their kin."""
        slot = Slot("adapter", "sequential", "norm", init="bert")
        return cls._at("ffn", slot, bottleneck=bottleneck, **options)

    @classmethod
    def parallel_adapter(
        cls, bottleneck: int = 512, where: str = "ffn", **options: Any
    ) -> "UnifiedPeftConfig":
        """Parallel adapter (PA), h + g(x)."""
        return cls._at(where, Slot("adapter"), bottleneck=bottleneck, **options)

    @classmethod
    def scaled_parallel_adapter(
        cls, bottleneck: int = 512, scale: float = 4.0, where: str = "ffn", **options: Any
    ) -> "UnifiedPeftConfig":
        """Scaled parallel adapter, h + s g(x)."""
        return cls._at(where, Slot("adapter", scale=scale), bottleneck=bottleneck, **options)

    @classmethod
    def multi_head_adapter(cls, bottleneck: int = 200, **options: Any) -> "UnifiedPeftConfig":
        """Multi-head parallel adapter: a prefix with ReLU for softmax and without a gate."""
        return cls._at("attn", Slot("mh_adapter"), bottleneck=bottleneck, **options)

    @classmethod
    def prefix(
        cls, length: int = 200, mlp_dim: int | None = 800, **options: Any
    ) -> "UnifiedPeftConfig":
        """Prefix tuning; `mlp_dim=None` trains the vectors themselves."""
        return cls._at("attn", Slot("prefix"), bottleneck=length, prefix_mlp_dim=mlp_dim, **options)

    @classmethod
    def lora(
        cls,
        r: int = 16,
        lora_alpha: float = 32.0,
        where: str = "attn",
        dropout: float = 0.0,
        **options: Any,
    ) -> "UnifiedPeftConfig":
        """LoRA with s = α / r, on query and value, or on all layers of the feed-forward
        networks."""
        slot = Slot("lora", scale=lora_alpha / r, dropout=dropout)
        return cls._at(where, slot, bottleneck=r, **options)

    @classmethod
    def bitfit(cls, **options: Any) -> "UnifiedPeftConfig":
        """BitFit: every bias that the model has, as a trained change of it."""
        return cls(attn=Slot(), ffn=Slot(), biases=True, **options)

    @staticmethod
    def prompt(length: int = 1, **options: Any) -> peft.PromptTuningConfig:
        """Prompt tuning, a baseline outside of the design space: PEFT's own, with vectors before
        the input of the encoder only where there is one."""
        if options.get("task_type") == "SEQ_2_SEQ_LM":
            options.setdefault("num_transformer_submodules", 1)
        return peft.PromptTuningConfig(num_virtual_tokens=length, **options)

    def resized(self, bottleneck: int) -> "UnifiedPeftConfig":
        """The same with another `bottleneck`."""
        return replace(self, bottleneck=bottleneck)


def _slot(place: str, given: Any) -> Slot:
    """A slot from itself or from what JSON made of it."""
    if isinstance(given, Slot):
        return given
    known = list(Slot.__dataclass_fields__)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"UnifiedPeftConfig.{place}",
            expected="a Slot, or its options as a dictionary",
            found=repr(given),
            mend="Write Slot('adapter'), for instance.",
        )
    for option in given:
        if option not in known:
            raise ConfigError(
                f"UnifiedPeftConfig.{place}",
                expected="options of Slot",
                found=repr(option),
                mend=near_matches(str(option), known),
            )
    return Slot(**given)
