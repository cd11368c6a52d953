"""Queryable LoRA: between A and B of every layer sits an operator looked up in a shared memory.

All layers share one bank of r×r atoms. For each token, and once for each block of transformer
layers, a query made of the block's low-rank state and of a summary of earlier blocks attends to the
atoms; a written instruction may add a prior. The atoms' convex combination R goes between the
layers' own A and B: Δy = (α/r) B R(x) A x.

Per token a layer costs LoRA's two products and r² more; a block d_q r (twice with a summary) +
M d_q + M r² for its one routing. Nothing is formed per layer.

Vaidya, Jerzak, Ho, Bajaj, "Queryable LoRA: Instruction-Regularized Routing Over Shared Low-Rank
Update Atoms", arXiv 2605.08423 (2026). Only the abstract and a summary were available to our
specification, whose equation numbers are used here. Reconstructed are: sizes, the block state, both
summaries, the mixing of the query, the residual form, initial values, the two losses, low-rank
atoms, described atoms, and the way atoms are appended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.adapt._queryable_blocks import place_layers
from sparing.adapt._queryable_instruction import Encoder, embed, embedding_width
from sparing.adapt._queryable_memory import Memory
from sparing.errors import ConfigError, DataError
from sparing.tuners import (
    AdditiveAdapter,
    Tuner,
    TunerConfig,
    generator_for,
    layer_shape,
    register_tuner,
)

MOST_ATOMS_MIXED_DENSELY = 16


@dataclass
class QueryableLoRAConfig(TunerConfig):
    """Options of Queryable LoRA.

    Trainable parameters (eq. 12), for widths in_l and out_l of the layers, M atoms and N_b blocks:
    Σ r (in_l + out_l) + M (r² + d_q) + 2 d_q r + d_q + N_b r; with an instruction prior d_q d_e + M
    d_q more, with an instruction in the query d_q d_e more.

    Arguments:
        r: rank of every layer, >= 1; one for all, as they share r×r atoms.
        num_atoms: M, >= 1; at least twice the regimes that are expected, or routing gets stuck.
        atom_rank: None for dense atoms, or ρ >= 1 for C = U Vᵀ of this rank.
        lora_alpha: above 0; the update is scaled by lora_alpha / r.
        block_size: transformer layers that are routed together, >= 1.
        top_k: k, atoms mixed for a token, 1 <= k <= num_atoms; None for all of up to 16 atoms and
            2 of more.
        d_query: width of queries and keys, >= 1.
        depth_summary: "attention" over earlier blocks' states, "ema" of them, or "none".
        ema_decay: of the past, 0 <= decay < 1.
        block_state: "first", A x of the block's first layer, or "mean", with the mean A of the
            layers of the block's first transformer layer that are as wide as the first.
        standardize_state: give states mean 0 and variance 1; None does so from r = 8 on.
        residual: R = I + Σ p_m C_m, which keeps the path of a plain LoRA; else R = Σ p_m C_m.
        granularity: "token", or "sequence" for one routing from the mean over prompt tokens.
        routing: "state", or "constant" for weights that depend on no input, as a control; without
            an instruction it merges.
        shared_memory: one memory for all blocks, or, as a control, one for each.
        instruction: "none", or what it changes: "prior" of the weights, "query", or "both".
        instruction_width: d_e; None for the width of the base model's embeddings.
        described_atoms: κ_m is made from a description of the atom, given by
            `model.describe_atoms`, instead of being learned.
        prior_beta: β >= 0, the weight of the prior; 0 ignores it.
        balance_weight: of the load-balance loss, >= 0; acts if k < M. 0.01 is common.
        entropy_weight: of the loss for weights whose entropy is below the floor, >= 0.
        entropy_floor: share of the largest entropy, log k, in [0, 1].
        dense_steps: optimiser steps in which all atoms are mixed, so that all of them learn, >= 0.
            Needs our training loop, or `TunerCallback` in a `Trainer`.
        frozen_atoms: set by `extend_atoms`: how many atoms are of earlier tasks.
    """

    method: ClassVar[str] = "queryable_lora"
    size_option: ClassVar[str] = "r"
    smaller_options: ClassVar[tuple[dict[str, Any], ...]] = ({"num_atoms": 4, "d_query": 8},)
    learning_rates: ClassVar[tuple[float, ...]] = (5e-4, 2e-3, 5e-3)

    r: int = 8
    num_atoms: int = 8
    atom_rank: int | None = None
    lora_alpha: float = 16
    block_size: int = 4
    top_k: int | None = None
    d_query: int = 32
    depth_summary: Literal["attention", "ema", "none"] = "attention"
    ema_decay: float = 0.5
    block_state: Literal["first", "mean"] = "first"
    standardize_state: bool | None = None
    residual: bool = True
    granularity: Literal["token", "sequence"] = "token"
    routing: Literal["state", "constant"] = "state"
    shared_memory: bool = True
    instruction: Literal["none", "prior", "query", "both"] = "none"
    instruction_width: int | None = None
    described_atoms: bool = False
    prior_beta: float = 1.0
    balance_weight: float = 0.0
    entropy_weight: float = 0.0
    entropy_floor: float = 0.5
    dense_steps: int = 0
    frozen_atoms: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            "r",
            isinstance(self.r, int) and self.r >= 1,
            "one whole number of at least 1 for all layers, as they share r×r atoms",
            "Use 8.",
        )
        for option in ("num_atoms", "block_size", "d_query"):
            self.require(option, getattr(self, option) >= 1, "at least 1", "Try the default.")
        for option in ("atom_rank", "instruction_width"):
            value = getattr(self, option)
            self.require(option, value is None or value >= 1, "None or at least 1", "Use None.")
        self.require("lora_alpha", self.lora_alpha > 0, "above 0", "Use 16.")
        self.require(
            "top_k",
            self.top_k is None or 1 <= self.top_k <= self.num_atoms,
            f"None or from 1 to num_atoms = {self.num_atoms}",
            "Lower it, or add atoms.",
        )
        for option, choices in _CHOICES.items():
            expected = " or ".join(map(repr, choices))
            mend = f"Use {choices[0]!r}."
            self.require(option, getattr(self, option) in choices, expected, mend)
        self.require("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1", "Use 0.5.")
        self.require("entropy_floor", 0 <= self.entropy_floor <= 1, "from 0 to 1", "Use 0.5.")
        for option in ("prior_beta", "balance_weight", "entropy_weight", "dense_steps"):
            self.require(option, getattr(self, option) >= 0, "at least 0", "Use the default.")
        self.require(
            "frozen_atoms",
            0 <= self.frozen_atoms < self.num_atoms,
            f"from 0 to below num_atoms = {self.num_atoms}",
            "Leave it to sparing.adapt.extend_atoms.",
        )
        self.require(
            "described_atoms",
            not self.described_atoms or self.has_prior,
            "False, as nothing reads the descriptions without an instruction prior",
            "Set instruction='prior'.",
        )

    @property
    def has_prior(self) -> bool:
        """Whether an instruction changes the weights through a prior."""
        return self.instruction in ("prior", "both")

    @property
    def has_instruction_query(self) -> bool:
        """Whether an instruction is part of the query."""
        return self.instruction in ("query", "both")

    @property
    def active_atoms(self) -> int:
        """k, atoms that are mixed for a token."""
        if self.top_k is not None:
            return self.top_k
        return self.num_atoms if self.num_atoms <= MOST_ATOMS_MIXED_DENSELY else 2

    @property
    def is_static(self) -> bool:
        """Whether the adapter amounts to a fixed change of the weights."""
        return self.routing == "constant" and self.instruction == "none"


_CHOICES: dict[str, tuple[str, ...]] = {
    "depth_summary": ("attention", "ema", "none"),
    "block_state": ("first", "mean"),
    "granularity": ("token", "sequence"),
    "routing": ("state", "constant"),
    "instruction": ("none", "prior", "query", "both"),
}


class QueryableLoRAAdapter(AdditiveAdapter):
    """Adds (α/r) B R A x (eq. 11). Products are formed in float32, or float64 for such inputs.

    A starts uniform within ±1/√inputs, B at zero, so that a new adapter changes nothing.

    Arguments:
        config: of the adapter.
        layer: the base layer.
        name: of the layer.
        memory: that it shares.

    Attributes:
        a: (r, inputs) float32.
        b: (outputs, r) float32.
    """

    mergeable: ClassVar[bool] = False
    instead_of_merging: ClassVar[str] = (
        "Keep the adapter as it is, or export its best static approximation as a LoRA with "
        "sparing.adapt.freeze_routing, and merge that."
    )
    memory: Memory

    def __init__(
        self, config: QueryableLoRAConfig, layer: nn.Module, name: str, memory: Memory
    ) -> None:
        super().__init__()
        object.__setattr__(self, "memory", memory)  # the tuner registers it, once
        self.name, self.block = name, memory.places[name].block
        outputs, inputs = layer_shape(layer)
        a = torch.empty(config.r, inputs, dtype=torch.float32, device="cpu")
        bound = inputs**-0.5
        self.a = nn.Parameter(
            a.uniform_(-bound, bound, generator=generator_for(config.seed, f"{name} a"))
        )
        self.b = nn.Parameter(torch.zeros(outputs, config.r, dtype=torch.float32, device="cpu"))
        self.scaling = config.lora_alpha / config.r

    def delta(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        x = x.to(exact)
        u = F.linear(x, self.a.to(exact))
        routed = self.memory.routing(self, x, u).apply(u, self.name)
        return F.linear(routed * self.scaling, self.b.to(exact))

    def delta_weight(self) -> Tensor:
        raise ConfigError(
            f"module {self.name!r}",
            expected="a change of the weights that is the same for every input",
            found="a routed one",
            mend=self.instead_of_merging,
        )

    def factors(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """R A and B, the LoRA that the layer is for fixed weights over the atoms.

        Arguments:
            weights: p, (M,).

        Returns:
            (r, inputs) and (outputs, r).
        """
        table = self.memory.atoms.table()[self.memory.group(self.block)]
        operator = (weights.to(table) @ table).view(len(self.a), -1)
        return operator.mT @ self.a, self.b


class StaticallyRoutedAdapter(QueryableLoRAAdapter):
    """The control whose weights depend on nothing: a LoRA with factors R A and B."""

    mergeable: ClassVar[bool] = True

    def delta_weight(self) -> Tensor:
        a, b = self.factors(self.memory.constant_weights(self.block))
        return self.scaling * (b @ a)


class QueryableLoRATuner(Tuner):
    """Puts Queryable LoRA on the linear layers of a model.

    The model's call takes two more keywords: `instruction`, e_I as (d_e,) or (batch, d_e), in place
    of the one that was set; and `prompt_mask`, (batch, tokens), for granularity "sequence".
    """

    prefix = "queryable_lora_"
    uses_passes = True
    forward_inputs = ("instruction", "prompt_mask")

    def new_shared(
        self, config: QueryableLoRAConfig, layers: dict[str, nn.Module]
    ) -> Memory | None:
        if not layers:
            return None  # PEFT says that nothing matched
        for name, layer in layers.items():
            self._check_layer(layer, name)
        self._check_architecture()
        generates = getattr(self.model, "can_generate", None)
        memory = Memory(
            config,
            place_layers(self.model, list(layers), config.block_size),
            self.passes,
            self._instruction_width(config),
            causal=bool(generates and generates()),
        )
        device = next(next(iter(layers.values())).parameters()).device
        on_meta = memory.router.b_q.is_meta or device.type == "meta"
        return memory if on_meta else memory.to(device)

    def new_adapter(
        self,
        config: QueryableLoRAConfig,
        layer: nn.Module,
        module_name: str,
        shared: nn.Module | None,
    ) -> QueryableLoRAAdapter:
        assert isinstance(shared, Memory)
        kind = StaticallyRoutedAdapter if config.is_static else QueryableLoRAAdapter
        adapter = kind(config, layer, module_name, shared)
        shared.add(adapter)
        return adapter

    def memory(self, adapter_name: str = "default") -> Memory:
        """What the layers of one adapter share.

        Raises:
            ConfigError: there is no such adapter.
        """
        if adapter_name not in self.shared:
            raise ConfigError(
                "adapter_name",
                expected=f"one of the model's adapters: {', '.join(self.shared)}",
                found=repr(adapter_name),
                mend="Name one of them.",
            )
        return self.shared[adapter_name]  # type: ignore[return-value]

    def set_instruction(
        self,
        instruction: str | Sequence[str] | Tensor | None,
        *,
        tokenizer: Any = None,
        encoder: Encoder | None = None,
        adapter_name: str = "default",
    ) -> None:
        """Use an instruction in all forwards to come; reachable as `model.set_instruction`.

        It is not saved. A call's own `instruction` goes before it.

        Arguments:
            instruction: text, a text for each row of the batch, e_I as (d_e,) or (batch, d_e), or
                None for none.
            tokenizer: of the base model; by default loaded by the model's name.
            encoder: maps n texts to (n, d_e); by default the mean of the base model's token
                embeddings, standardised.
            adapter_name: of the adapter.

        Raises:
            ConfigError: the adapter takes no instruction, or its atoms have no descriptions yet.
            DataError: the width is not `instruction_width`.
        """
        memory = self.memory(adapter_name)
        memory.instruction = (
            None
            if instruction is None
            else self.embedded_instruction(instruction, tokenizer, encoder, adapter_name)
        )

    def embedded_instruction(
        self,
        instruction: str | Sequence[str] | Tensor,
        tokenizer: Any = None,
        encoder: Encoder | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """e_I, checked and on the memory's device; arguments and errors of `set_instruction`."""
        memory = self.memory(adapter_name)
        if not memory.instruction_width:
            raise ConfigError(
                "QueryableLoRAConfig.instruction",
                expected="'prior', 'query' or 'both', to take an instruction",
                found="'none'",
                mend="Create the adapter with instruction='prior'.",
            )
        described = memory.atoms.descriptions
        if described is not None and not described.any(dim=1).all():
            raise ConfigError(
                "descriptions of atoms",
                expected="one for each atom, as described_atoms is set",
                found="some without",
                mend="Call model.describe_atoms first.",
            )
        if not isinstance(instruction, Tensor):
            instruction = embed(self.model, instruction, tokenizer, encoder)
        return memory.checked_instruction(instruction).detach().to(memory.router.b_q)

    @torch.no_grad()
    def describe_atoms(
        self,
        descriptions: Sequence[str] | Tensor,
        *,
        tokenizer: Any = None,
        encoder: Encoder | None = None,
        adapter_name: str = "default",
    ) -> None:
        """Say what each atom is for; saved with the adapter. Needs `described_atoms`.

        Arguments:
            descriptions: a text for each atom, or (M, d_e).
            tokenizer, encoder, adapter_name: as for `set_instruction`.

        Raises:
            ConfigError: the adapter's prior keys are learned.
            DataError: their number or width does not suit.
        """
        held = self.memory(adapter_name).atoms.descriptions
        if held is None:
            raise ConfigError(
                "QueryableLoRAConfig.described_atoms",
                expected="True, to describe atoms",
                found="False",
                mend="Create the adapter with described_atoms=True.",
            )
        if not isinstance(descriptions, Tensor):
            descriptions = embed(self.model, list(descriptions), tokenizer, encoder)
        if descriptions.shape != held.shape:
            raise DataError(
                "descriptions of atoms",
                expected=f"{len(held)} of width {held.shape[1]}",
                found=f"shape {tuple(descriptions.shape)}",
                mend="Give one for each atom.",
            )
        held.copy_(descriptions)

    def extend_atoms(self, count: int, adapter_name: str = "default") -> None:
        """Continual routing: keep the learned atoms and train new ones for another task.

        Atoms, keys and prior keys learned so far are frozen, and so are all A and B; new atoms and
        their keys are appended and train together with the router. The output changes at once, as
        the new atoms take part in the softmax. Make the optimiser afterwards.

        Arguments:
            count: of new atoms, >= 1; described ones still need their descriptions.
            adapter_name: of the adapter.

        Raises:
            ConfigError: `count` is below 1, or the model has no such adapter.
        """
        if count < 1:
            raise ConfigError(
                "extend_atoms", expected="at least 1 new atom", found=str(count), mend="Try 4."
            )
        self.memory(adapter_name).extend(count)
        self._set_shared_trainable()

    def after_step(self, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        """End the dense warm-up once `dense_steps` steps are taken."""
        for memory in self.shared.values():
            assert isinstance(memory, Memory)
            memory.router.dense = step < memory.config.dense_steps

    def _set_shared_trainable(self, frozen: bool = False) -> None:
        super()._set_shared_trainable(frozen)
        for memory in self.shared.values():
            assert isinstance(memory, Memory)
            if memory.config.frozen_atoms:
                memory.freeze_factors()

    def _instruction_width(self, config: QueryableLoRAConfig) -> int:
        if config.instruction == "none":
            return 0
        width = config.instruction_width or embedding_width(self.model)
        if width is None:
            raise ConfigError(
                "QueryableLoRAConfig.instruction_width",
                expected="the width of the instructions, as the model has no token embeddings",
                found="None",
                mend="Set it to the width of your encoder.",
            )
        return width

    def _check_architecture(self) -> None:
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise ConfigError(
                type(self.model).__name__,
                expected="a model whose layers all see the same tokens: a decoder or an encoder",
                found="an encoder and a decoder, whose cross-attention mixes two sequences",
                mend="Adapt one of the two as a model of its own, or use another method.",
            )


register_tuner(QueryableLoRAConfig, QueryableLoRATuner)
