"""The router of Queryable LoRA: from a block's state to weights over the atoms (eqs. 3 to 9).

All is computed in float32, or float64 for such states: a softmax over large logits loses atoms in
16 bits.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.routing import sparse_softmax, standardized
from sparing.tuners import generator_for

if TYPE_CHECKING:
    from sparing.adapt.queryable_lora import QueryableLoRAConfig

LOWEST_LOG_PRIOR = -30.0
FEWEST_NUMBERS_TO_STANDARDIZE = 8  # of two numbers, only a sign would be left


class Router(nn.Module):
    """The query of a block and the prior of an instruction.

    Numbers that could have no effect are not created: `w_z` needs a block with one before it, and
    `w_b` a block with two, as a softmax over one state is 1.

    Arguments:
        config: of the adapter.
        depth: the most blocks before any block.
        num_blocks: N_b.
        instruction_width: d_e, or 0 without instructions.

    Attributes:
        b_q: (d_q,) float32.
        w_h, w_z: (d_q, r) float32, or None.
        w_b: (N_b, r) float32, or None.
        w_e, w_i: (d_q, d_e) float32, or None: the instruction's share of the query, and the
            projection of its prior.
    """

    w_h: nn.Parameter | None
    w_z: nn.Parameter | None
    w_b: nn.Parameter | None
    w_e: nn.Parameter | None
    w_i: nn.Parameter | None

    def __init__(
        self, config: "QueryableLoRAConfig", depth: int, num_blocks: int, instruction_width: int
    ) -> None:
        super().__init__()
        self.seed = config.seed
        self.top_k = config.active_atoms
        self.prior_beta = config.prior_beta
        self.depth_summary = config.depth_summary
        self.ema_decay = config.ema_decay
        self.dense = config.dense_steps > 0
        standardize = config.standardize_state
        self.standardize = (
            config.r >= FEWEST_NUMBERS_TO_STANDARDIZE if standardize is None else standardize
        )
        r, d_q, d_e = config.r, config.d_query, instruction_width
        by_state = config.routing == "state"
        summary = by_state and depth >= 1 and config.depth_summary != "none"
        attention = summary and depth >= 2 and config.depth_summary == "attention"
        self.b_q = self._linear("b_q", (d_q,), r)
        self.w_h = self._linear("w_h", (d_q, r), r) if by_state else None
        self.w_z = self._linear("w_z", (d_q, r), r) if summary else None
        self.w_b = self._small("w_b", (num_blocks, r)) if attention else None
        self.w_e = self._linear("w_e", (d_q, d_e), d_e) if config.has_instruction_query else None
        self.w_i = self._linear("w_i", (d_q, d_e), d_e) if config.has_prior else None

    def state(self, u: Tensor) -> Tensor:
        """h_b, from the low-rank state u (eq. 3): (..., r) -> (..., r), at least float32."""
        if self.standardize:
            return standardized(u)
        return u.to(torch.promote_types(u.dtype, torch.float32))

    def summary(self, block: int, earlier: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
        """z_b of the earlier blocks' states for the same token (eq. 4), or None for z_1 = 0.

        Arguments:
            block: b.
            earlier: (h_j, z_j) for j < b, each (..., r).
        """
        if self.w_z is None or not earlier:
            return None
        if self.depth_summary == "ema":
            state, before = earlier[-1]
            fresh = (1 - self.ema_decay) * state
            return fresh if before is None else self.ema_decay * before + fresh
        if len(earlier) == 1:
            return earlier[0][0]
        assert self.w_b is not None
        states = torch.stack([state for state, _ in earlier], dim=-2)
        scores = states @ self.w_b[block].to(states) / states.shape[-1] ** 0.5
        return (scores.softmax(-1).unsqueeze(-2) @ states).squeeze(-2)

    def query(
        self, state: Tensor | None, summary: Tensor | None, instruction: Tensor | None
    ) -> Tensor:
        """q_b (eq. 5).

        Arguments:
            state, summary: (..., r), or None where nothing is read.
            instruction: e_I (d_e,) or (batch, d_e), or None.

        Returns:
            (..., d_q); (batch, d_q) or (d_q,) if only the instruction, or nothing, is read.
        """
        like = self.b_q if state is None else state
        query = self.b_q.to(like)
        if state is not None and self.w_h is not None:
            query = F.linear(state, self.w_h.to(like), query)
        if summary is not None and self.w_z is not None:
            query = query + F.linear(summary.to(like), self.w_z.to(like))
        if instruction is not None and self.w_e is not None:
            query = _per_row(query, F.linear(instruction.to(like), self.w_e.to(like)))
        return query

    def log_prior(self, instruction: Tensor, keys: Tensor) -> Tensor:
        """log π(I), not below -30 (eq. 7).

        Arguments:
            instruction: e_I, (d_e,) or (batch, d_e).
            keys: κ, (M, d_q).

        Returns:
            (M,) or (batch, M).
        """
        assert self.w_i is not None
        asked = F.linear(instruction.to(keys), self.w_i.to(keys))
        return (_scores(asked, keys)).log_softmax(-1).clamp(min=LOWEST_LOG_PRIOR)

    def weights(self, query: Tensor, keys: Tensor, log_prior: Tensor | None) -> Tensor:
        """p over the atoms (eqs. 6, 8, 9): at least 0, at most k of them above, summing to 1.

        Arguments:
            query: (..., d_q).
            keys: (M, d_q).
            log_prior: (M,) or (batch, M), or None.

        Returns:
            (..., M).
        """
        logits = _scores(query, keys.to(query))
        if log_prior is not None:
            logits = _per_row(logits, self.prior_beta * log_prior.to(logits))
        return sparse_softmax(logits, None if self.training and self.dense else self.top_k)

    def embedded_keys(self, descriptions: Tensor) -> Tensor:
        """κ of described atoms, W_I e(description): (M, d_e) -> (M, d_q). Like texts meet."""
        assert self.w_i is not None
        return F.linear(descriptions.to(self.w_i), self.w_i)

    def _linear(self, name: str, shape: tuple[int, ...], inputs: int) -> nn.Parameter:
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
        bound = inputs**-0.5
        return nn.Parameter(drawn.uniform_(-bound, bound, generator=self._generator(name)))

    def _small(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        drawn = torch.randn(shape, generator=self._generator(name), device="cpu")
        return nn.Parameter(0.1 * drawn)

    def _generator(self, name: str) -> torch.Generator:
        return generator_for(self.seed, f"router {name}")


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """ℓ = qᵀk / √d_q (eq. 6)."""
    return F.linear(query, keys) / keys.shape[-1] ** 0.5


def _per_row(values: Tensor, of_row: Tensor) -> Tensor:
    """Add (width,) or (batch, width), which the row decides, to (batch, ..., width) or (width,)."""
    if of_row.dim() == 2 and values.dim() > 2:
        of_row = of_row.view(of_row.shape[0], *[1] * (values.dim() - 2), of_row.shape[1])
    return values + of_row
