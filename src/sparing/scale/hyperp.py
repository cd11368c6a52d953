"""HyperP: one learning rate, tuned on a small model, for every width, depth, batch and token count.

(arXiv 2603.28743.) Matrices live on spheres (`MuonH`), so width drops out; what is left is the law
η = η₀ √(B/B₀) √(L₀/L) (T/T₀)^-0.32 (eq. 7).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sparing.errors import ConfigError
from sparing.scale.parameters import ParameterInfo, Role, classify
from sparing.scale.planning import Plan, PlannedParameter
from sparing.scale.settings import PlanSettings
from sparing.surgery import block_names

EMBEDDING_STD, TIED_STD, HEAD_STD = 1e-4, 0.02, 0.02


@dataclass(frozen=True)
class HyperP:
    """The law of the learning rate (HyperP, eq. 7).

    Arguments:
        eta0: learning rate tuned on the base run.
        depth, tokens, batch: of the base run: blocks, training tokens, tokens a step.
        token_exponent: of matrices on spheres.
        token_exponent_aux: of everything else: 0 in the paper's table, the same in its code.
        depth_exponent, batch_exponent: fitted as -0.5 and 0.558, rounded to ½ in the code.
    """

    eta0: float
    depth: int = 8
    tokens: float = 10.4e9
    batch: float = 2**21
    token_exponent: float = -0.32
    token_exponent_aux: float = -0.32
    depth_exponent: float = -0.5
    batch_exponent: float = 0.5

    def __post_init__(self) -> None:
        for name in ("eta0", "depth", "tokens", "batch"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"HyperP.{name}",
                    expected="a number above 0",
                    found=repr(value),
                    mend="Describe the run in which eta0 was tuned.",
                )

    def lr(
        self,
        *,
        depth: int | None = None,
        tokens: float | None = None,
        batch: float | None = None,
        aux: bool = False,
    ) -> float:
        """The peak learning rate of another run.

        Arguments:
            depth, tokens, batch: of that run; those of the base run where not given.
            aux: for embeddings, vectors and heads instead of matrices.
        """
        exponent = self.token_exponent_aux if aux else self.token_exponent
        return float(
            self.eta0
            * ((depth or self.depth) / self.depth) ** self.depth_exponent
            * ((tokens or self.tokens) / self.tokens) ** exponent
            * ((batch or self.batch) / self.batch) ** self.batch_exponent
        )


def ladder_parameters(
    depth: int, *, aspect: int = 128, vocabulary: int = 32_000, head: int = 128, kv_heads: int = 4
) -> int:
    """Parameters of the ladder at a depth: width aspect · depth, 2 · depth heads (eq. 9)."""
    width = aspect * depth
    return int(
        12 * aspect**2 * depth**3
        + 2 * width * vocabulary
        + 2 * width * depth * (2 * depth) * head
        + 2 * width * depth * kv_heads * head
    )


def ladder_tokens(depth: int, *, base_depth: int = 8, base_tokens: float = 10.4e9) -> float:
    """Training tokens at a depth: as many a parameter as the base run has (HyperP, eq. 9)."""
    return base_tokens * ladder_parameters(depth) / ladder_parameters(base_depth)


def ladder_flops_per_token(depth: int, *, context: int = 4096, head: int = 128) -> float:
    """Training operations a token: 3 (2n + 4 L H h context)."""
    return 3.0 * (2 * ladder_parameters(depth) + 4 * depth * (2 * depth) * head * context)


def hyperp_plan(
    model: nn.Module,
    law: HyperP,
    *,
    tokens: float | None = None,
    batch: float | None = None,
    aux_eta0: float | None = None,
    overrides: dict[str, Role] | None = None,
) -> Plan:
    """What HyperP does with every parameter of a model.

    The residual multiplier 1/√(2L) (eq. 6) is folded into the norm of the last matrix of every
    branch: on a sphere the two are the same, step by step.

    Arguments:
        model: on any device, the meta device included; its blocks are its depth.
        law: with the base run.
        tokens, batch: of the run to come; those of the base run where not given.
        aux_eta0: base learning rate off the spheres and of the head; None for `law.eta0`, which
            is the paper's single rate.
        overrides: roles of parameters that are not known.
    """
    depth = _depth(model)
    run: dict[str, Any] = {"depth": depth, "tokens": tokens, "batch": batch}
    aux = law if aux_eta0 is None else replace(law, eta0=aux_eta0)
    rates = law.lr(**run), aux.lr(**run, aux=True)
    infos = classify(model, overrides)
    rows = tuple(_planned(info, rates, 1 / math.sqrt(2 * depth)) for info in infos.values())
    notes = [f"{depth} blocks: learning rate {rates[0]:.3g} on spheres, {rates[1]:.3g} elsewhere"]
    notes += [
        f"{row.info.name} is tied to the head: it stays off the sphere, with AdamW"
        for row in rows
        if row.info.tied
    ]
    return Plan("hyperp", rows, tuple(notes))


def hyperp_param_groups(model: nn.Module, law: HyperP, **options: Any) -> list[dict[str, Any]]:
    """Groups for `MuonH`; see `hyperp_plan` for the options."""
    return hyperp_plan(model, law, **options).param_groups(model)


def hyperp_planner(base: nn.Module, target: nn.Module, settings: PlanSettings) -> Plan:
    """HyperP's plan of a target model, by the depth of the base and the sizes of both runs."""
    law = HyperP(
        settings.lr,
        depth=_depth(base),
        tokens=settings.base_tokens or HyperP.tokens,
        batch=settings.base_batch or HyperP.batch,
    )
    return hyperp_plan(
        target, law, tokens=settings.tokens, batch=settings.batch, aux_eta0=settings.aux_lr
    )


def _depth(model: nn.Module) -> int:
    depth = len(block_names(model))
    if not depth:
        raise ConfigError(
            type(model).__name__,
            expected="a model of repeated blocks",
            found="none",
            mend="HyperP scales with depth; give the model a ModuleList of blocks.",
        )
    return depth


def _planned(info: ParameterInfo, rates: tuple[float, float], residual: float) -> PlannedParameter:
    sphere, aux = rates
    if info.role in ("matrix", "expert", "router"):
        std = (residual if info.ends_branch else 1.0) / math.sqrt(3 * info.inputs)
        why = "hidden matrix on a sphere, Kaiming-uniform"
        why += ", times 1/√(2L) at the end of its branch" if info.ends_branch else ""
        return PlannedParameter(info, "matrix", sphere, 0.0, why, std, distribution="uniform")
    if info.role == "head":
        return PlannedParameter(
            info, "adam_sphere", aux, 0.0, "head on a sphere, with Adam's direction", HEAD_STD
        )
    if info.role == "embedding":
        std = TIED_STD if info.tied else EMBEDDING_STD
        return PlannedParameter(info, "adamw", aux, 0.0, "embedding, plain AdamW", std)
    return PlannedParameter(info, "adamw", aux, 0.0, "vector, plain AdamW")
