"""TauGate (Dopamine): one threshold and one gain for each hidden neuron, all weights frozen.

A gate sits on the activation of a feed-forward network and reads its input z: the threshold decides
whether a neuron takes part, the gain how much, a = γ ⊙ σ(s (z - τ)) ⊙ φ(z). In a gated network
(SwiGLU) φ(z) is the gate path, so that the product with the other path is gated too. A mode is one
adapter of PEFT: a vector τ and a vector γ a layer; `set_adapter` switches modes, and
`adapter_names` gives every row of a batch its own.

Shervin Ghasemlou, "Brain Modes, Not Brains: Activation-Gated PEFT via Threshold-and-Gain Tuning",
arXiv 2602.11726. Only the abstract and two summaries were at hand: equation numbers are those of
our specification, and what is marked [rec] is reconstructed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparing.adapt._dopamine_gate import gated, soft_gate
from sparing.errors import ConfigError, near_matches
from sparing.forward_pass import Passes
from sparing.surgery import ACTIVATIONS, LINEAR, FeedForward, feed_forwards, widths
from sparing.tuners import (
    AdaptedModule,
    ModuleAdapter,
    Tuner,
    TunerConfig,
    option_for,
    register_tuner,
)

BASE = "__base__"  # PEFT's name for rows without an adapter


@dataclass
class DopamineConfig(TunerConfig):
    """Options of TauGate, the method of the paper whose file is called Dopamine.

    A gated layer of h neurons gets 2h numbers (TauGate, eq. 4), float32. What is stored is their
    distance from the start, so that weight decay pulls to the base model and not to zero.

    Arguments:
        target_modules: activation modules by name; None or "all-linear" takes those of all
            feed-forward networks that are found.
        layers: gate only the last so many of them, >= 1; None gates all. The last ones, because
            nothing has to be back-propagated below the first gate. Ours.
        learn: "both", or only thresholds ("tau") or gains ("gain"); the other stays at its start.
        steepness: s, above 0. None is 5 where φ vanishes below zero, as ReLU does [rec], and 2
            elsewhere (ours: thresholds then start far below most z, where a steeper gate has no
            gradient).
        final_steepness: anneal s towards this in training, s_t = s (s_T / s)^(t/T) (TauGate, eq.
            6); the paper's range is 5 to 30 [rec]. None keeps s. Needs `sparing.train`, or
            `TunerCallback` in `Trainer`.
        tau_init: τ at the start. None is -0.5 where φ vanishes below zero [rec], and -4 elsewhere,
            as a higher one would cut off the negative lobe of GELU and SiLU (ours).
        tau_scale: "raw", or "std": τ in units of each neuron's standard deviation of z, which
            `sparing.adapt.calibrate_thresholds` measures before training.
        gain_position: "after" the activation [rec], or "before": φ(γ ⊙ g ⊙ z), which is the same
            for ReLU and γ > 0.
        train_gate: "soft", or "ste": a hard forward with the gradient of the soft gate.
        eval_gate: outside training: "hard" gates, or "soft" ones; `sparing.adapt.set_gate` changes
            it later. Gradients are those of the soft gate in any case.
        sparsity: λ >= 0 of the penalty λ Σ_layers mean g (TauGate, eq. 5); padding does not count
            where the model is given an attention mask. Off in the paper.
        max_gain: keep γ within [0, max_gain] after every step, above 0 [rec]: 10. None is off.
        widths: neurons of activation modules by name, as in PEFT's `rank_pattern`, where they
            cannot be told from the layers around.
    """

    method: ClassVar[str] = "dopamine"
    size_option: ClassVar[str] = "layers"
    smaller_options: ClassVar[tuple[dict[str, Any], ...]] = ({"learn": "gain"},)
    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)

    layers: int | None = None
    learn: Literal["both", "tau", "gain"] = "both"
    steepness: float | None = None
    final_steepness: float | None = None
    tau_init: float | None = None
    tau_scale: Literal["raw", "std"] = "raw"
    gain_position: Literal["after", "before"] = "after"
    train_gate: Literal["soft", "ste"] = "soft"
    eval_gate: Literal["hard", "soft"] = "hard"
    sparsity: float = 0.0
    max_gain: float | None = None
    widths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            "train_gate",
            self.train_gate != "hard",
            "'soft' or 'ste'",
            "Hard gates have no gradient; 'ste' is hard forwards and soft backwards.",
        )
        for option, *choices in (
            ("learn", "both", "tau", "gain"),
            ("tau_scale", "raw", "std"),
            ("gain_position", "after", "before"),
            ("train_gate", "soft", "ste"),
            ("eval_gate", "hard", "soft"),
        ):
            expected = f"one of {', '.join(map(repr, choices))}"
            self.require(option, getattr(self, option) in choices, expected, "Choose one of these.")
        for option in ("steepness", "final_steepness", "max_gain"):
            value = getattr(self, option)
            fine = value is None or 0 < value < math.inf
            self.require(option, fine, "None or a number above 0", "Leave the default.")
        self.require(
            "tau_init",
            self.tau_init is None or math.isfinite(self.tau_init),
            "None or a number",
            "Use -1e4 for gates that never close.",
        )
        self.require("sparsity", 0 <= self.sparsity < math.inf, "at least 0", "Try 0.05.")
        self.require(
            "layers", self.layers is None or self.layers >= 1, "None or at least 1", "Use None."
        )
        self.require(
            "widths", all(w >= 1 for w in self.widths.values()), "at least 1 each", "Count again."
        )


class NeuronGate(ModuleAdapter):
    """The thresholds and gains of one activation in one mode.

    Costs a token and neuron: forward a subtraction, a sigmoid and three products (hard: a
    comparison, a product, a fill), backward about as much again; nothing but z and φ(z) is kept.

    Arguments:
        config: of the mode.
        activation: φ, a module without parameters.
        neurons: h.
        name: of the activation in its model.
        beside: the linear layer before it, whose device is that of the gate; an activation has no
            weights of its own to tell it.
        passes: of the tuner.

    Attributes:
        tau_change: (h,) float32, τ minus its start, in units of `unit` if there is one; None where
            thresholds are not learned.
        gain_change: (h,) float32, γ - 1; None where gains are not learned.
        steepness: () float32, s at present; saved if it is annealed.
        unit: (h,) float32, the standard deviations for tau_scale="std", zero until calibrated.
        tau_init: τ at the start, in units of `unit` if there is one.
        follows_mask: whether the model's attention mask is about this gate's tokens.
    """

    instead_of_merging: ClassVar[str] = (
        "Thresholds cannot be merged. sparing.adapt.fold_gains moves gains into the weights, "
        "prune_neurons takes closed neurons out, hard_model keeps the thresholds that are left."
    )
    beside: nn.Module | None
    steepness: Tensor
    start: Tensor
    one: Tensor
    unit: Tensor | None

    def __init__(
        self,
        config: DopamineConfig,
        activation: nn.Module,
        neurons: int,
        name: str,
        beside: nn.Module | None = None,
        passes: Passes | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "beside", beside)  # it has its own place in the model
        vanishes = vanishes_below_zero(activation)
        self.name, self.neurons, self.passes = name, neurons, passes or Passes()
        self.follows_mask = True
        self.tau_init = _or_default(config.tau_init, -0.5 if vanishes else -4.0)
        self.first_steepness = _or_default(config.steepness, 5.0 if vanishes else 2.0)
        self.final_steepness = config.final_steepness
        self.sparsity, self.max_gain = config.sparsity, config.max_gain
        self.train_gate, self.eval_gate = config.train_gate, config.eval_gate
        self.gain_position = config.gain_position
        self.tau_change = _zeros(neurons) if config.learn != "gain" else None
        self.gain_change = _zeros(neurons) if config.learn != "tau" else None
        self.register_buffer(
            "steepness",
            torch.tensor(self.first_steepness, dtype=torch.float32),
            persistent=config.final_steepness is not None,
        )
        constant = partial(torch.full, (neurons,), dtype=torch.float32)
        self.register_buffer("start", constant(self.tau_init), persistent=False)
        self.register_buffer("one", constant(1.0), persistent=False)
        self.register_buffer("unit", constant(0.0) if config.tau_scale == "std" else None)
        self._calibrated = self.unit is None

    @property
    def tau(self) -> Tensor:
        """τ, (h,) float32, in units of z; differentiable."""
        tau = self.start if self.tau_change is None else self.start + self.tau_change
        return tau if self.unit is None else tau * self.unit

    @property
    def gain(self) -> Tensor:
        """γ, (h,) float32; differentiable."""
        return self.one if self.gain_change is None else 1 + self.gain_change

    @property
    def is_hard(self) -> bool:
        """Whether the next forward is that of hard gates."""
        return self.train_gate == "ste" if self.training else self.eval_gate == "hard"

    def forward(self, module: Callable[..., Any], z: Tensor) -> Tensor:
        """γ ⊙ g ⊙ φ(z), or φ(γ ⊙ g ⊙ z); (..., h) as z."""
        self.check(z)
        return self.through(module, z, self.tau, self.gain, self.steepness)

    def through(
        self, module: Callable[..., Any], z: Tensor, tau: Tensor, gain: Tensor, steepness: Tensor
    ) -> Tensor:
        """`forward` with numbers from outside, of shapes that spread to that of z."""
        if self.training and self.sparsity:
            self._penalise(z, tau, steepness)
        gate = partial(gated, z, tau=tau, gain=gain, steepness=steepness, hard=self.is_hard)
        return module(gate(z)) if self.gain_position == "before" else gate(module(z))

    def check(self, z: Tensor) -> None:
        """Raise a `ConfigError` unless z suits the gate and the gate has been calibrated."""
        if z.shape[-1] != self.neurons:
            raise ConfigError(
                f"activation {self.name!r}",
                expected=f"an input of {self.neurons} neurons, as its thresholds and gains have",
                found=f"one of shape {tuple(z.shape)}",
                mend=f"Name its width: DopamineConfig(widths={{{self.name!r}: {z.shape[-1]}}}).",
            )
        if not self._calibrated and self.unit is not None:
            if not self.unit.all():
                raise ConfigError(
                    f"activation {self.name!r}",
                    expected="the standard deviation of every neuron, for tau_scale='std'",
                    found="none",
                    mend="Call sparing.adapt.calibrate_thresholds(model, batches) before training.",
                )
            self._calibrated = True

    def token_weights(self, z: Tensor) -> Tensor | None:
        """(batch, tokens) float32 with mean 1 that leaves padding out, or None if nothing tells
        it: the mask of an encoder-decoder is the encoder's."""
        mask = self.passes.current.attention_mask
        if mask is None or not self.follows_mask or z.dim() != 3 or mask.shape != z.shape[:2]:
            return None
        weights = mask.to(torch.float32)
        return weights / weights.mean()

    def _penalise(self, z: Tensor, tau: Tensor, steepness: Tensor) -> None:
        shares = soft_gate(z, tau, steepness).mean(dim=-1)
        weights = self.token_weights(z)
        share = shares.mean() if weights is None else (shares * weights).mean()
        self.passes.current.add_loss(self.sparsity * share)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Anneal the steepness and keep the gains in their range.

        Arguments:
            progress: t / T, from 0 to 1.
        """
        if self.final_steepness is not None:
            ratio = self.final_steepness / self.first_steepness
            self.steepness.fill_(self.first_steepness * ratio**progress)
        if self.max_gain is not None and self.gain_change is not None:
            self.gain_change.clamp_(-1.0, self.max_gain - 1.0)


class GatedActivation(AdaptedModule):
    """An activation and its gates by mode.

    Attributes:
        row_modes: during a call with `adapter_names`, the mode of every row.
    """

    row_modes: tuple[str, ...] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.row_modes is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        return self._by_row(self.row_modes, *args, **kwargs)

    def _by_row(self, names: Sequence[str], z: Tensor) -> Tensor:
        """Every row through the gate of its own mode, all at once (a gather from modes × h)."""
        present = [name for name in dict.fromkeys(names) if name in self.adapters]
        if not present:
            return self.base_layer(z)
        gates = [self.adapters[name] for name in present]
        first = gates[0]
        for gate in gates:
            gate.check(z)
        kinds = {(gate.eval_gate, gate.gain_position) for gate in gates}
        if len(kinds) > 1 or z.shape[0] % len(names):
            alike = len(kinds) == 1
            raise ConfigError(
                "adapter_names",
                expected="one name a row" if alike else "modes with the same kind of gate",
                found=f"{len(names)} names for {z.shape[0]} rows" if alike else str(sorted(kinds)),
                mend="Give as many names as rows."
                if alike
                else "Make them alike with sparing.adapt.set_gate, or run them one by one.",
            )
        places = {name: place for place, name in enumerate(present)}
        rows = torch.tensor([places.get(name, len(present)) for name in names], device=z.device)
        rows = rows.repeat_interleave(z.shape[0] // len(names))  # beams, or tokens laid in a row

        def spread(tensors: list[Tensor], base: float) -> Tensor:
            # The last row of the table is the untouched network.
            table = torch.stack([*tensors, torch.full_like(tensors[0], base)])
            return table[rows].view(len(rows), *[1] * (z.dim() - 2), -1)

        return first.through(
            self.base_layer,
            z,
            spread([gate.tau for gate in gates], -math.inf),
            spread([gate.gain for gate in gates], 1.0),
            spread([gate.steepness for gate in gates], 1.0),
        )

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if adapter_name in self.adapters and device is None:
            weight = getattr(self.adapters[adapter_name].beside, "weight", None)
            device = weight.device if isinstance(weight, Tensor) else None
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)


class DopamineTuner(Tuner):
    """Puts gates on the activations of a model."""

    prefix = "dopamine_"
    layer_types = (*ACTIVATIONS, nn.Identity)
    uses_passes = True
    _networks: dict[str, FeedForward]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config: Any = self.peft_config[adapter_name]
        try:
            self._networks = networks(model)
        except ConfigError:
            if config.target_modules in (None, "all-linear"):
                raise
            self._networks = {}  # a plain network, whose activations the user names
        self._choose(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _choose(self, config: Any) -> None:
        """Turn the options into names of activations."""
        if config.target_modules in (None, "all-linear"):
            wanted = config.layers_to_transform
            wanted = [wanted] if isinstance(wanted, int) else wanted
            config.target_modules = {
                network.activation
                for network in self._networks.values()
                if not wanted or network.block in wanted
            }
        if config.layers is None:
            return
        found = list(self.targets(config))
        if config.layers > len(found):
            raise ConfigError(
                "DopamineConfig.layers",
                expected=f"at most {len(found)}, the activations there are to gate",
                found=str(config.layers),
                mend="Use None for all.",
            )
        config.target_modules = set(found[-config.layers :])

    def new_adapter(
        self,
        config: DopamineConfig,
        layer: nn.Module,
        module_name: str,
        shared: nn.Module | None,
    ) -> NeuronGate:
        beside = self._beside(module_name)
        neurons = option_for(config.widths, module_name, None)
        if neurons is None and beside is None:
            raise ConfigError(
                f"activation {module_name!r}",
                expected="a linear layer before it that tells its width",
                found="none",
                mend=f"Name the width: DopamineConfig(widths={{{module_name!r}: ...}}).",
            )
        if neurons is None:
            assert beside is not None
            neurons = widths(beside)[1]
        gate = NeuronGate(config, layer, neurons, module_name, beside, self.passes)
        two_sided = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        gate.follows_mask = not (two_sided and "decoder" in module_name.split("."))
        return gate.train(layer.training)  # its kind depends on it, and PEFT leaves it at True

    def wrapper_type(self, layer: nn.Module, adapter: nn.Module) -> type[GatedActivation]:
        return GatedActivation

    def _beside(self, name: str) -> nn.Module | None:
        """The linear layer whose outputs an activation reads."""
        if name in self._networks:
            return self.model.get_submodule(self._networks[name].first[0])
        before: nn.Module | None = None
        for other, module in self.model.named_modules():
            if other == name:
                return before
            if isinstance(module, LINEAR):
                before = module
        return None

    def after_step(self, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        for module in self.model.modules():
            if isinstance(module, GatedActivation):
                for name in module.active_adapters:
                    if name in module.adapters:
                        module.adapters[name].after_step(step / total_steps)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's argument `adapter_names`: one mode a row, "__base__" for none."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ConfigError(
                "adapter_names",
                expected="a model in evaluation",
                found="one in training",
                mend="Train one mode at a time: model.set_adapter(name).",
            )
        known = [*self.peft_config, BASE]
        for name in names:
            if name not in known:
                raise ConfigError(
                    "adapter_names",
                    expected="modes that the model has",
                    found=repr(name),
                    mend=near_matches(name, known),
                )
        wrappers = [m for m in self.model.modules() if isinstance(m, GatedActivation)]
        for wrapper in wrappers:
            wrapper.row_modes = tuple(names)
        try:
            yield
        finally:
            for wrapper in wrappers:
                wrapper.row_modes = None


def networks(model: nn.Module) -> dict[str, FeedForward]:
    """The feed-forward networks of a model by the name of their activation, gated or not.

    Raises:
        ConfigError: there is none.
    """
    found = {}
    for network in feed_forwards(model):
        activation = network.activation.removesuffix(".base_layer")
        found[activation] = replace(network, activation=activation)
    return found


@torch.no_grad()
def vanishes_below_zero(activation: nn.Module) -> bool:
    """Whether φ(z) = 0 for negative z, as for ReLU: then closing a gate at τ <= 0 changes
    nothing."""
    below = torch.tensor([-16.0, -4.0, -1.0, -0.25, -0.01], device="cpu")
    return bool((activation(below) == 0).all())


def _zeros(neurons: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(neurons, dtype=torch.float32))


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value


register_tuner(DopamineConfig, DopamineTuner)
