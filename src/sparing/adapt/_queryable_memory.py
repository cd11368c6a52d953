"""What all layers of one Queryable LoRA share, and one routing for every block and forward."""

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.adapt._queryable_atoms import Atoms
from sparing.adapt._queryable_blocks import Place
from sparing.adapt._queryable_router import Router
from sparing.errors import ConfigError, DataError
from sparing.forward_pass import ForwardPass, Passes
from sparing.routing import entropy

if TYPE_CHECKING:
    from sparing.adapt.queryable_lora import QueryableLoRAAdapter, QueryableLoRAConfig

_tags = itertools.count()


@dataclass(frozen=True)
class Routing:
    """How one block is routed in one forward.

    Arguments:
        owner: the module that found it; only this one finds it again when a block is replayed.
        weights: p, (..., M); without the token axis where all tokens share it.
        operator: Rᵀ, (..., r, r), of the type of the low-rank states.
        state: h_b, (..., r), or None if nothing reads it.
        summary: z_b, (..., r), or None.
    """

    owner: str
    weights: Tensor
    operator: Tensor
    state: Tensor | None = None
    summary: Tensor | None = None

    def apply(self, u: Tensor, module: str) -> Tensor:
        """R u (eq. 11): (..., r) -> (..., r).

        Raises:
            ConfigError: the module sees other tokens than the one that routed the block.
        """
        each = self.operator.dim() == u.dim() + 1
        shared_with = self.operator.shape[:-2]
        if shared_with != (u.shape[:-1] if each else u.shape[: len(shared_with)]):
            raise ConfigError(
                f"module {module!r}",
                expected=f"the tokens {tuple(shared_with)} of {self.owner!r}, which routed the "
                "block",
                found=f"tokens {tuple(u.shape[:-1])}",
                mend="Leave it out of target_modules, or name it in exclude_modules.",
            )
        operator = self.operator.to(u.device)
        return (u.unsqueeze(-2) @ operator).squeeze(-2) if each else u @ operator


class Memory(nn.Module):
    """Atoms and router, held once on the tuner, and what was set for the forwards to come.

    Arguments:
        config: of the adapter.
        places: of the adapted layers, by module name.
        passes: of the tuner.
        instruction_width: d_e, or 0.
        causal: whether later tokens must not be seen by earlier ones.

    Attributes:
        instruction: e_I, (d_e,) or (batch, d_e), until another one is set; not saved.
        adapters: of the layers; the model registers them.
        openers: those in the first transformer layer of a block, by block.
        kept: p by block, (batch, M), while the routing of a prompt is kept; see `prompt_routing`.
    """

    instruction: Tensor | None

    def __init__(
        self,
        config: "QueryableLoRAConfig",
        places: dict[str, Place],
        passes: Passes,
        instruction_width: int,
        causal: bool,
    ) -> None:
        super().__init__()
        self.config, self.places, self.passes, self.causal = config, places, passes, causal
        self.instruction_width = instruction_width
        self.num_blocks = 1 + max(place.block for place in places.values())
        groups = 1 if config.shared_memory else self.num_blocks
        self.atoms = Atoms(config, groups, instruction_width if config.described_atoms else 0)
        depth = max(len(place.before) for place in places.values())
        self.router = Router(config, depth, self.num_blocks, instruction_width)
        self.register_buffer("instruction", None, persistent=False)
        self.kept: dict[int, Tensor] | None = None
        self.adapters: list[QueryableLoRAAdapter] = []
        self.openers: dict[int, list[QueryableLoRAAdapter]] = {}
        self.tag = next(_tags)

    def add(self, adapter: "QueryableLoRAAdapter") -> None:
        """Know one more layer."""
        self.adapters.append(adapter)
        if self.places[adapter.name].opens_block:
            self.openers.setdefault(adapter.block, []).append(adapter)

    def group(self, block: int) -> int:
        """Which group of atoms a block uses."""
        return 0 if self.config.shared_memory else block

    def modules_of(self, block: int) -> list[str]:
        """Names of the adapted layers of a block."""
        return [name for name, place in self.places.items() if place.block == block]

    def found(self, one: ForwardPass) -> dict[int, Routing]:
        """The routings of a forward by block, in the order of blocks."""
        notes = {block: one.notes.get(self._key(block)) for block in range(self.num_blocks)}
        return {block: note for block, note in notes.items() if note is not None}

    def routing(self, adapter: "QueryableLoRAAdapter", x: Tensor, u: Tensor) -> Routing:
        """The routing of the layer's block: found by the first layer that asks, read by others.

        Arguments:
            adapter: of the layer.
            x: its input, (..., inputs).
            u: its low-rank state A x (eq. 1), (..., r).

        Raises:
            ConfigError: the layer is called outside of the adapted model's forward.
        """
        one = self._current(adapter.name)
        block = self.places[adapter.name].block
        note: Routing | None = one.notes.get(self._key(block))
        if note is not None and note.owner != adapter.name:
            return note
        with torch.autocast(u.device.type, enabled=False):
            note = self._route(one, adapter, x, u)
        one.leave(self._key(block), note)
        return note

    def prior(self, instruction: Tensor, group: int = 0) -> Tensor:
        """log π(I) (eq. 7): (M,) or (batch, M)."""
        if self.atoms.descriptions is not None:
            keys = self.router.embedded_keys(self.atoms.descriptions)
        else:
            keys = self.atoms.every("prior_keys")[group]
        return self.router.log_prior(instruction, keys)

    def constant_weights(self, block: int) -> Tensor:
        """p of constant routing: (M,)."""
        keys = self.atoms.every("keys")[self.group(block)]
        return self.router.weights(self.router.query(None, None, None), keys, None)

    def freeze_factors(self) -> None:
        """Train none of A and B: with atoms of earlier tasks, they belong to those."""
        for adapter in self.adapters:
            adapter.a.requires_grad_(False)
            adapter.b.requires_grad_(False)

    def extend(self, count: int) -> None:
        """Freeze what was learned, but for the router, and append `count` atoms."""
        config, before, mixed = self.config, self.config.num_atoms, self.config.active_atoms
        config.frozen_atoms, config.num_atoms = before, before + count
        config.top_k = config.num_atoms if mixed == before else mixed
        self.router.top_k = config.active_atoms
        self.atoms.extend(count)
        self.freeze_factors()

    def operator(self, weights: Tensor, group: int, one: ForwardPass, owner: str) -> Tensor:
        """Rᵀ = Σ p_m C_mᵀ, plus the identity if `residual` (eq. 10): (..., M) -> (..., r, r)."""
        table = self._table(one, owner)[group].to(weights)
        return (weights @ table).unflatten(-1, (self.config.r, self.config.r))

    def checked_instruction(self, instruction: Any) -> Tensor:
        """The instruction as a tensor that the router takes.

        Raises:
            DataError: it is no tensor (d_e,) or (batch, d_e).
        """
        fits = isinstance(instruction, Tensor) and instruction.dim() in (1, 2)
        if not fits or instruction.shape[-1] != self.instruction_width:
            found = tuple(instruction.shape) if isinstance(instruction, Tensor) else instruction
            raise DataError(
                "instruction",
                expected=f"a tensor ({self.instruction_width},) or "
                f"(batch, {self.instruction_width})",
                found=repr(found),
                mend="Set QueryableLoRAConfig.instruction_width to the width of your encoder.",
            )
        return instruction

    def _current(self, module: str) -> ForwardPass:
        one = self.passes.running
        if one is None:
            raise ConfigError(
                f"module {module!r}",
                expected="a call within the forward of the adapted model, whose blocks it reads",
                found="a call of a part of the model",
                mend="Call the model itself; output_hidden_states=True gives inner states.",
            )
        return one

    def _key(self, block: int) -> tuple[int, int]:
        return self.tag, block

    def _table(self, one: ForwardPass, owner: str) -> Tensor:
        """`Atoms.table`, built once a forward; a replay builds it where the forward did."""
        key = (self.tag, "atoms")
        note = one.notes.get(key)
        if note is None or note[0] == owner:
            note = (owner, self.atoms.table())
            one.leave(key, note)
        return note[1]

    def _route(
        self, one: ForwardPass, adapter: "QueryableLoRAAdapter", x: Tensor, u: Tensor
    ) -> Routing:
        place = self.places[adapter.name]
        group = self.group(place.block)
        state = summary = None
        if self.kept is not None:
            weights = _expanded(self.kept[place.block], u.shape[0], "the kept routing of a prompt")
        else:
            if self.config.routing == "state":
                state = self._state(one, adapter, x, u)
                summary = self._summary(one, place, state)
            weights = self._weights(one, group, state, summary, rows=u.shape[0])
            self._add_losses(one, weights)
        operator = self.operator(weights, group, one, adapter.name).to(u.dtype)
        return Routing(adapter.name, weights, operator, state, summary)

    def _state(
        self, one: ForwardPass, adapter: "QueryableLoRAAdapter", x: Tensor, u: Tensor
    ) -> Tensor:
        if self.config.block_state == "mean":
            u = F.linear(x, self._mean_a(adapter).to(x))
        if self.config.granularity == "sequence":
            u = self._mean_over_prompt(one, u)
        return self.router.state(u)

    def _mean_a(self, adapter: "QueryableLoRAAdapter") -> Tensor:
        like = [o.a for o in self.openers[adapter.block] if o.a.shape == adapter.a.shape]
        return torch.stack([a.to(adapter.a) for a in like]).mean(0)

    def _summary(self, one: ForwardPass, place: Place, state: Tensor) -> Tensor | None:
        earlier = []
        for block in place.before:
            note: Routing | None = one.notes.get(self._key(block))
            if note is not None and note.state is not None and note.state.shape == state.shape:
                summary = None if note.summary is None else note.summary.to(state)
                earlier.append((note.state.to(state), summary))
        return self.router.summary(place.block, earlier)

    def _weights(
        self,
        one: ForwardPass,
        group: int,
        state: Tensor | None,
        summary: Tensor | None,
        rows: int,
    ) -> Tensor:
        instruction = log_prior = None
        if self.instruction_width:
            asked = one.inputs.get("instruction", self.instruction)
            if asked is not None:
                instruction = self.checked_instruction(asked)
        if instruction is not None:
            if instruction.dim() == 2:
                instruction = _expanded(instruction, rows, "the instructions")
            if self.config.has_prior:
                log_prior = self.prior(instruction, group)
        query = self.router.query(state, summary, instruction)
        return self.router.weights(query, self.atoms.every("keys")[group], log_prior)

    def _mean_over_prompt(self, one: ForwardPass, u: Tensor) -> Tensor:
        """(batch, tokens, r) -> (batch, r), over prompt tokens that are no padding."""
        if u.dim() == 2:
            return u  # no token axis: a pooler's input, of one token a row
        mask = one.inputs.get("prompt_mask")
        if mask is None and self.causal:
            raise DataError(
                "prompt_mask",
                expected="which tokens are the prompt, as later ones must not be looked at",
                found="none",
                mend="Call the model with prompt_mask=(batch, tokens), or generate within "
                "sparing.adapt.prompt_routing(model, **prompt).",
            )
        if mask is not None and mask.shape != u.shape[:2]:
            raise DataError(
                "prompt_mask",
                expected=f"shape {tuple(u.shape[:2])}, as the tokens",
                found=f"shape {tuple(mask.shape)}",
                mend="Mark every token of the call with True or False.",
            )
        masks = [m for m in (mask, one.real_tokens(u.shape)) if m is not None]
        if not masks:
            return u.mean(1)
        chosen = torch.stack([m.to(u.device).bool() for m in masks]).all(0).to(u).unsqueeze(-1)
        return (u * chosen).sum(1) / chosen.sum(1).clamp(min=1)

    def _add_losses(self, one: ForwardPass, weights: Tensor) -> None:
        """Load balance M Σ f_m P_m over the k chosen atoms, and a floor under the entropy."""
        config = self.config
        if not self.training or not (config.balance_weight or config.entropy_weight):
            return
        real = one.real_tokens(weights.shape)
        per_token = weights.reshape(-1, weights.shape[-1])
        counted = torch.ones_like(per_token[:, 0]) if real is None else real.flatten().to(per_token)
        if config.balance_weight and config.active_atoms < config.num_atoms:
            chosen = counted @ (per_token > 0).to(per_token)
            mean = counted @ per_token / counted.sum()
            balance = config.num_atoms * (chosen / chosen.sum() * mean).sum()
            one.add_loss(config.balance_weight / self.num_blocks * balance)
        if config.entropy_weight:
            floor = config.entropy_floor * math.log(config.active_atoms)
            below = (floor - entropy(per_token)).relu() @ counted / counted.sum()
            one.add_loss(config.entropy_weight / self.num_blocks * below)


def _expanded(rows: Tensor, batch: int, what: str) -> Tensor:
    """Repeat rows for beams and several returned sequences, as `generate` does."""
    if rows.dim() == 1 or rows.shape[0] == batch:
        return rows
    if batch % rows.shape[0]:
        raise DataError(
            what,
            expected=f"one for each of the {batch} rows of the batch, or one for all",
            found=f"{rows.shape[0]}",
            mend="Give as many as there are rows.",
        )
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)
