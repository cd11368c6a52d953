"""PHATGOOSE: independently trained LoRA experts, and a router that none of them was trained for.

Whoever trains a LoRA also trains, on the same data, one vector per adapted layer: a gate that
learns which tokens the expert helps. Anybody can later stack experts and gates. Each layer then
sends every token to the experts whose gates resemble it most; nothing is trained jointly and no
data is needed.

Muqeeth, Liu, Liu, Raffel: "Learning to Route Among Specialized Experts for Zero-Shot
Generalization", arXiv 2402.05859 (ICML 2024). Equation numbers are those of our specification,
which was made from the released code.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sparing.adapt._phatgoose_dispatch import Stack, mixture
from sparing.adapt._phatgoose_scores import Score, prepared_keys, score
from sparing.errors import ConfigError, near_matches
from sparing.kept import Kept
from sparing.routing import sparse_softmax, top_experts
from sparing.tuners import (
    AdditiveAdapter,
    Tuner,
    TunerConfig,
    TunerLayer,
    generator_for,
    layer_shape,
    product_type,
    register_tuner,
)

Mode = Literal["single", "gate_train", "routed", "merged"]
Key = Literal["gate", "average", "arrow", "mean_row", "random"]
Router = Literal["soft", "top1"]

HOTTEST, COLDEST = 10.0, 0.5  # temperatures of noisy gates, first and last step


@dataclass
class PhatgooseConfig(TunerConfig):
    """Options of PHATGOOSE.

    As it is, this is step 1 of the paper: a LoRA of rank 16 scaled by 1 / rank, to be trained and
    shared. `sparing.adapt.train_gates` is step 2, `sparing.adapt.assemble` steps 3 and 4; they
    fill in the options below the line.

    Arguments:
        r: rank, >= 1; 16 in the paper.
        lora_alpha: above 0; a new expert is scaled by lora_alpha / r. 1 in the paper.
        experts: names of the experts, at least one, all different.
        ranks: by full module name, the rank of every expert there; 0 for one that does not adapt
            the module. Modules that are not listed have rank r throughout.
        key: what experts are recognised by: "gate", the paper's; "average", the mean input of the
            module on the expert's data; "arrow", the direction that the expert magnifies most;
            "mean_row", the mean of A's rows; "random", for control. None for one expert that is
            not routed.
        mode: "single" applies one expert, "gate_train" one with its gate (eq. 2), "routed" routes
            (eqs. 3 to 6), "merged" adds the mean of all experts' updates.
        expert: the one that mode "single" applies; None for the first.
        top_k: experts a token, from 1 to their number; 2 in the paper.
        score: "original", standardised dot product / √inputs (eqs. 3 and 4); "dot", plain
            dot product / √inputs; "cosine", cosine / √inputs; "arrow", |dot product| / temperature.
            None means "arrow" for arrow keys, whose sign is arbitrary, and else "original".
        temperature: above 0, of the "arrow" score.
        router: "soft", softmax over the top_k; "top1", the best expert times its softmax
            probability among all, as in Switch. Both are in the released code.
        use_input_gate: also multiply each expert by the sigmoid of its gate, as a variant in the
            released code does; needs gates.
        gate_noise: in gate_train, add the difference of two Gumbel variables to the gate's input
            and divide by a temperature that falls from 10 to 0.5. Reconstructed: the released code
            anneals over another clock; the paper's results have no noise.
        expert_dtype: storage of stacked experts: "float32", "bfloat16" or "float16". What trains
            is float32.
    """

    method: ClassVar[str] = "phatgoose"
    starts_fresh: ClassVar[bool] = False  # as it starts, it is a LoRA
    size_option: ClassVar[str] = "r"
    learning_rates: ClassVar[tuple[float, ...]] = (2e-3, 5e-3, 1e-2)

    r: int = 16
    lora_alpha: float = 1.0
    experts: list[str] = field(default_factory=lambda: ["expert"])
    ranks: dict[str, list[int]] = field(default_factory=dict, repr=False)
    key: Key | None = None
    mode: Mode = "single"
    expert: str | None = None
    top_k: int = 2
    score: Score | None = None
    temperature: float = 1.0
    router: Router = "soft"
    use_input_gate: bool = False
    gate_noise: bool = False
    expert_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.experts)
        self.require("r", self.r >= 1, "at least 1", "Use 16.")
        self.require("lora_alpha", self.lora_alpha > 0, "above 0", "Use 1.")
        self.require("temperature", self.temperature > 0, "above 0", "Use 1.")
        for option, choices in (
            ("mode", get_args(Mode)),
            ("key", (None, *get_args(Key))),
            ("score", (None, *get_args(Score))),
            ("router", get_args(Router)),
            ("expert_dtype", ("float32", "bfloat16", "float16")),
        ):
            known = getattr(self, option) in choices
            self.require(option, known, f"one of {choices}", "Choose one of these.")
        distinct = count >= 1 and len(set(self.experts)) == count
        self.require("experts", distinct, "one or more different names", "Rename one.")
        self._check_expert(self.expert)
        self.require(
            "ranks",
            all(len(r) == count and min(r) >= 0 and max(r) >= 1 for r in self.ranks.values()),
            f"{count} ranks for each module, not all of them 0",
            "Build the adapter with sparing.adapt.assemble.",
        )
        self.require(
            "key",
            self.key is not None or (count == 1 and self.mode in ("single", "merged")),
            "a kind of key, as there is something to route",
            "Use 'gate', or 'arrow' for experts without gates.",
        )
        self.require(
            "top_k",
            self.top_k >= 1
            and (self.key is None or self.trains != "nothing" or self.top_k <= count),
            f"1 to {count}, the number of experts",
            "Lower it, or add experts.",
        )
        self.require(
            "use_input_gate",
            not self.use_input_gate or self.key == "gate",
            "gates (key='gate') to take the sigmoid of",
            "Train gates, or leave it off.",
        )
        self.require(
            "mode",
            self.mode != "gate_train" or (self.key == "gate" and count == 1),
            "one expert with key='gate' for gate_train, as gates are trained apart",
            "Use sparing.adapt.gate_model.",
        )
        if self.score is None and self.key is not None:
            self.score = "arrow" if self.key == "arrow" else "original"

    @property
    def trains(self) -> Literal["expert", "gate", "nothing"]:
        """What is trainable in an adapter created with these options."""
        if self.mode == "gate_train":
            return "gate"
        return "expert" if self.key is None else "nothing"

    def index(self, expert: str | None) -> int:
        """The place of an expert; that of the first for None.

        Raises:
            ConfigError: there is none of that name.
        """
        self._check_expert(expert)
        return 0 if expert is None else self.experts.index(expert)

    def _check_expert(self, expert: str | None) -> None:
        if expert is not None and expert not in self.experts:
            raise ConfigError(
                f"{type(self).__name__}.expert",
                expected="the name of an expert",
                found=repr(expert),
                mend=near_matches(expert, self.experts),
            )


class PhatgooseAdapter(AdditiveAdapter):
    """The experts of one layer and their keys.

    What trains is a parameter, the rest buffers: the factors of a new expert, or the key in
    gate_train, or nothing. Scores and weights are formed in float32 (float64 for such inputs), the
    experts' products in the wider of the types of input and expert.

    Arguments:
        config: of the adapter; the mode and the options of the router are read at every call.
        inputs: of the layer.
        outputs: of the layer.
        name: of the module.

    Attributes:
        a: (Σ ranks, inputs) the experts' first factors, one after the other.
        b: (Σ ranks, outputs) their second factors, transposed.
        scales: (experts,) float32, alpha / rank of each.
        keys: (experts, inputs) float32, or None.
        ranks: by expert.
        observer: called with the weights (tokens, experts) of every routed call, or None.
    """

    a: Tensor
    b: Tensor
    keys: Tensor | None
    scales: Tensor
    owner: Tensor

    def __init__(self, config: PhatgooseConfig, inputs: int, outputs: int, name: str) -> None:
        super().__init__()
        self.config = config
        self.ranks = config.ranks.get(name, [config.r] * len(config.experts))
        rows, experts = sum(self.ranks), len(self.ranks)
        trains = config.trains
        dtype = torch.float32 if trains == "expert" else getattr(torch, config.expert_dtype)
        a = torch.zeros(rows, inputs, dtype=dtype, device="cpu")
        if trains == "expert":
            a.normal_(0.0, 0.01, generator=generator_for(config.seed, f"{name} a"))
        self._hold("a", a, trains == "expert")
        b = torch.zeros(rows, outputs, dtype=dtype, device="cpu")
        self._hold("b", b, trains == "expert")
        if config.key is None:
            self.keys = None
        else:
            keys = torch.zeros(experts, inputs, dtype=torch.float32, device="cpu")
            if config.key == "random":
                keys.normal_(generator=generator_for(config.seed, f"{name} key"))
            self._hold("keys", keys, trains == "gate")
        scales = torch.tensor(
            [config.lora_alpha / max(rank, 1) for rank in self.ranks],
            dtype=torch.float32,
            device="cpu",
        )
        # A new expert's scale follows from its options, a stacked one's came with it.
        self.register_buffer("scales", scales, persistent=config.key is not None)
        owner = torch.arange(experts, device="cpu").repeat_interleave(
            torch.tensor(self.ranks, device="cpu")
        )
        self.register_buffer("owner", owner, persistent=False)
        self.observer: Any = None
        self.gate_temperature = HOTTEST
        self._step, self._name = 0, name
        self._prepared: Kept[Tensor] = Kept()

    def _hold(self, name: str, tensor: Tensor, trainable: bool) -> None:
        if trainable:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    @property
    def stack(self) -> Stack:
        """The experts as the dispatcher wants them."""
        return Stack(self.a, self.b, self.owner, self.ranks)

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether the effect is a fixed matrix: it is not, where tokens are routed or gated."""
        config = self.config
        alone = len(self.ranks) == 1 and config.router == "soft" and not config.use_input_gate
        return config.mode in ("single", "merged") or (config.mode == "routed" and alone)

    def scores(self, x: Tensor) -> Tensor:
        """How well every expert suits every token (eqs. 3 and 4).

        Arguments:
            x: (..., inputs), any floating type.

        Returns:
            (..., experts) float32 or float64; minus infinity for experts absent from the layer.
        """
        assert self.keys is not None
        kind = self.config.score
        assert kind is not None
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            scores = score(exact, self._ready_keys(exact.dtype), kind, self.config.temperature)
        if min(self.ranks) == 0:
            absent = torch.tensor([rank == 0 for rank in self.ranks], device=x.device)
            scores = scores.masked_fill(absent, -torch.inf)
        return scores

    def _ready_keys(self, dtype: torch.dtype) -> Tensor:
        """The keys as the score wants them, kept until they change."""
        keys, kind = self.keys, self.config.score
        assert keys is not None
        assert kind is not None
        return self._prepared.get((keys,), lambda: prepared_keys(keys.to(dtype), kind), kind, dtype)

    def routing_weights(self, x: Tensor) -> Tensor:
        """How much every expert takes part (eq. 5).

        The softmax runs over the chosen experts alone, which is the paper's renormalised softmax
        without its 1e-6.

        Arguments:
            x: (..., inputs).

        Returns:
            (..., experts) float32 or float64; at most top_k are not 0.
        """
        scores = self.scores(x)
        if self.config.router == "top1":
            best = top_experts(scores.detach(), 1)
            weights = torch.zeros_like(scores)
            weights = weights.scatter(-1, best, scores.softmax(dim=-1).gather(-1, best))
        else:
            weights = sparse_softmax(scores, self.config.top_k)
        return weights * self._gate(x) if self.config.use_input_gate else weights

    def _gate(self, x: Tensor) -> Tensor:
        """σ(v·u) for every expert, on the raw input (eq. 2): (..., inputs) -> (..., experts)."""
        assert self.keys is not None
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            inner = x.to(dtype) @ self.keys.to(dtype).t()
            if self.config.gate_noise and self.config.mode == "gate_train" and self.training:
                inner = (inner + self._logistic(inner)) / self.gate_temperature
            return inner.sigmoid()

    def _logistic(self, like: Tensor) -> Tensor:
        """The difference of two Gumbel variables, drawn on the CPU anew in every step; within a
        step it is the same, as gradient checkpointing runs a block twice."""
        generator = generator_for(self.config.seed, f"{self._name} gate noise {self._step}")
        uniform = torch.rand(like.shape, generator=generator, device="cpu")
        return uniform.clamp(1e-6, 1 - 1e-6).logit().to(like)

    def cool(self, step: int, total_steps: int) -> None:
        """Lower the temperature of noisy gates to where it is after a step of training."""
        self.gate_temperature = HOTTEST * (COLDEST / HOTTEST) ** (step / total_steps)
        self._step = step

    def delta(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        return self._delta(tokens).view(*x.shape[:-1], self.b.shape[1])

    def _delta(self, x: Tensor) -> Tensor:
        mode = self.config.mode
        if mode == "single":
            return self._alone(x, self.config.index(self.config.expert))
        if mode == "merged":
            share = self.scales / len(self.ranks)
            return self._mixture(x, share.expand(len(x), -1), len(self.ranks))
        if mode == "gate_train":
            return self._mixture(x, self._gate(x) * self.scales, 1)
        weights = self.routing_weights(x)
        if self.observer is not None:
            self.observer(weights.detach())
        most = 1 if self.config.router == "top1" else self.config.top_k
        return self._mixture(x, weights * self.scales, most)

    def _alone(self, x: Tensor, expert: int) -> Tensor:
        dtype = self._product_type(x)
        a, b = self.stack.only(expert)
        with torch.autocast(x.device.type, enabled=False):
            return x.to(dtype) @ a.to(dtype).t() @ b.to(dtype) * self.scales[expert].to(dtype)

    def _mixture(self, x: Tensor, weights: Tensor, most: int) -> Tensor:
        dtype = self._product_type(x)
        stack = self.stack._replace(a=self.a.to(dtype), b=self.b.to(dtype))
        with torch.autocast(x.device.type, enabled=False):
            return mixture(x.to(dtype), stack, weights, min(most, len(self.ranks)))

    def _product_type(self, x: Tensor) -> torch.dtype:
        return product_type(x, torch.promote_types(x.dtype, self.a.dtype))

    def delta_weight(self) -> Tensor:
        """(outputs, inputs) float32: one expert's update, or the mean of all for mode "merged",
        in which an expert that is absent counts as 0.

        Raises:
            ConfigError: the update depends on the input.
        """
        if not self.mergeable:
            raise ConfigError(
                f"PHATGOOSE adapter in mode {self.config.mode!r}",
                expected="a change of the weights that is the same for every input",
                found="experts that are chosen for each token",
                mend="Keep it as it is, or set_mode(model, 'merged' or 'single') first.",
            )
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        if self.config.mode == "merged":
            share = self.scales.to(dtype)[self.owner] / len(self.ranks)
            return (self.b.to(dtype) * share[:, None]).t() @ self.a.to(dtype)
        expert = self.config.index(self.config.expert)
        a, b = (factor.to(dtype) for factor in self.stack.only(expert))
        return b.t() @ a * self.scales[expert].to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"observer": None}


class PhatgooseTuner(Tuner):
    """Puts experts on the linear layers of a model."""

    prefix = "phatgoose_"

    def new_adapter(
        self, config: PhatgooseConfig, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> PhatgooseAdapter:
        outputs, inputs = layer_shape(layer)
        return PhatgooseAdapter(config, inputs, outputs, module_name)

    def after_step(self, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        for module in self.model.modules():
            if isinstance(module, PhatgooseAdapter):
                module.cool(step, total_steps)


def expert_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, PhatgooseAdapter]:
    """The adapters of a model by the names of their modules in the base model.

    Raises:
        ConfigError: the model has no PHATGOOSE adapter of that name.
    """
    tuner = next((module for module in model.modules() if isinstance(module, PhatgooseTuner)), None)
    found: dict[str, PhatgooseAdapter] = {}
    if tuner is not None:
        for name, module in tuner.model.named_modules():
            if isinstance(module, TunerLayer) and adapter_name in module.adapters:
                found[name] = module.adapters[adapter_name]
    if not found:
        raise ConfigError(
            f"adapter {adapter_name!r}",
            expected="a PHATGOOSE adapter of this model",
            found="none",
            mend="Give the model from sparing.adapt.assemble and the name of its adapter.",
        )
    return found


def set_mode(
    model: nn.Module, mode: Mode, expert: str | None = None, adapter_name: str = "default"
) -> None:
    """Choose what an adapter does: "routed", "single" (one expert) or "merged".

    Arguments:
        model: with a PHATGOOSE adapter.
        mode: see `PhatgooseConfig`; an adapter for gate training is made by `gate_model`.
        expert: name of the one that "single" applies; None for the first.
        adapter_name: of the adapter.

    Raises:
        ConfigError: no such mode, expert or adapter.
    """
    adapter = next(iter(expert_layers(model, adapter_name).values()))
    config = adapter.config
    allowed = [m for m in get_args(Mode) if m != "gate_train" and (m != "routed" or config.key)]
    if mode not in allowed:
        raise ConfigError(
            "mode", expected=f"one of {allowed}", found=repr(mode), mend=near_matches(mode, allowed)
        )
    config.index(expert)
    config.mode, config.expert = mode, expert


register_tuner(PhatgooseConfig, PhatgooseTuner)
