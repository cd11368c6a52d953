"""Which step Muon++ takes for every parameter of a model, and how each is initialised."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from sparing.errors import ConfigError
from sparing.scale.decay import SteadyState
from sparing.scale.muon_mup import DEFAULT_RADIUS, decay_of, spectral_unit
from sparing.scale.parameters import ParameterInfo, Role, classify, matrices
from sparing.scale.planning import Plan, PlannedParameter, pairs
from sparing.scale.settings import PlanSettings
from sparing.scale.singular import largest_singular_values
from sparing.surgery import attentions, block_names

HIDDEN = ("matrix", "expert", "router")
EMBEDDING_STD = 1.0  # a row has one-hot input, so its own RMS is that of the features
_INTERLEAVED = re.compile(r"query_key_value")  # of GPT-NeoX, Falcon and BLOOM
Head = Literal["scaled", "zero"]


def muon_mup_plan(
    model: nn.Module,
    *,
    lr: float = 0.02,
    radius: float = DEFAULT_RADIUS,
    aux_lr: float | None = None,
    gain: float = 1.0,
    head: Head = "scaled",
    base_width: int | None = None,
    base_depth: int | None = None,
    depth_exponent: float = 0.0,
    overrides: dict[str, Role] | None = None,
) -> Plan:
    """What Muon++ does with every parameter (eq. 2 and 10). No rate depends on the width.

    Hidden matrices, experts and routers take Muon++ steps, with blocks that are fused in one (q, k,
    v; gate and up) as matrices of their own. Embeddings and vectors take AdamW steps without decay.
    A head's logits are multiplied by d₀/d; under AdamW that is the same as d₀/d times its rate and
    its initialisation, which is done here, so that the model needs no change.

    Arguments:
        model: on any device, the meta device included.
        lr: η of matrices.
        radius: see `MuonPlusPlus`.
        aux_lr: rate of everything else; None for `lr`.
        gain: w₀, reduced norm of matrices at the start.
        head: "scaled" starts it with logits of RMS 1 at the base width; "zero" with none.
        base_width: d₀, inputs of the head in the base run; None for those of this model.
        base_depth: blocks of the base run; None for those of this model.
        depth_exponent: α of a branch multiplier (L₀/L)^α, folded into the last matrix of every
            branch: ½ or 1; 0, as the paper has no such thing, for none.
        overrides: roles of parameters that are not known.

    Raises:
        ConfigError: an option out of range, or parameters that no rule knows.
    """
    for name, value in {"lr": lr, "aux_lr": lr if aux_lr is None else aux_lr, "gain": gain}.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(
                name, expected="a number above 0", found=repr(value), mend="Choose such a value."
            )
    if head not in ("scaled", "zero"):
        raise ConfigError(
            "head", expected='"scaled" or "zero"', found=repr(head), mend="Choose one of the two."
        )
    infos = classify(model, overrides)
    parts = fused_parts(model)
    branch = 1.0
    if depth_exponent:
        depth = len(block_names(model))
        branch = ((base_depth or depth) / depth) ** depth_exponent if depth else 1.0
    decay, rest = decay_of(radius), lr if aux_lr is None else aux_lr

    def planned(info: ParameterInfo) -> PlannedParameter:
        if info.role in HIDDEN:
            scale = branch if info.ends_branch else 1.0
            return _hidden(info, parts.get(info.name), lr, decay, gain, scale)
        if info.role == "vector":
            return PlannedParameter(info, "adamw", rest, 0.0, "vector, AdamW")
        ratio = (base_width or info.inputs) / info.inputs
        logits = 1 / math.sqrt(base_width or info.inputs)  # std of entries: logits of RMS 1
        if info.role == "head":
            why = "head, AdamW; logits times d₀/d, folded into rate and initialisation"
            std = 0.0 if head == "zero" else ratio * logits
            return PlannedParameter(info, "adamw", rest * ratio, 0.0, why, std)
        if info.tied:
            why = "embedding and head, AdamW; logits times d₀/d, for the model to do"
            return PlannedParameter(info, "adamw", rest, 0.0, why, logits, ratio)
        return PlannedParameter(info, "adamw", rest, 0.0, "embedding, AdamW", EMBEDDING_STD)

    rows = tuple(planned(info) for info in infos.values())
    return Plan("muon-mup", rows, tuple(_notes(rows, lr, decay)))


def muon_mup_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Groups for `MuonPlusPlus`; see `muon_mup_plan` for the options.

    Raises:
        ConfigError: see there; or a tied head that needs a multiplier, see `install_multipliers`.
    """
    return muon_mup_plan(model, **options).param_groups(model)


def muon_mup_planner(base: nn.Module, target: nn.Module, settings: PlanSettings) -> Plan:
    """The plan of a target model: the base's rate and radius, the head by the width of the base."""
    found = [p.base.inputs for p in pairs(base, target) if p.target.role == "head" or p.target.tied]
    plan = muon_mup_plan(
        target,
        lr=settings.lr,
        radius=1 / settings.weight_decay if settings.weight_decay else math.inf,
        aux_lr=settings.aux_lr,
        base_width=found[0] if found else None,
    )
    notes = list(plan.notes)
    if settings.tokens is not None and settings.batch is not None:
        state = SteadyState(settings.lr, settings.weight_decay, settings.tokens / settings.batch)
        if not state.reached:
            notes.append(
                f"{state.steps:,.0f} steps are too few for decay to act: norms will still depend"
                " on the length of the run"
            )
    return Plan(plan.method, plan.parameters, tuple(notes))


def fused_parts(model: nn.Module) -> dict[str, list[int]]:
    """Outputs of query, key and value where they are parts of one linear layer, by weight."""
    try:
        found = attentions(model)
    except ConfigError:
        return {}
    parts: dict[str, list[int]] = {}
    for attention in found:
        projections = (attention.query, attention.key, attention.value)
        for layer in {each.layer for each in projections}:
            sizes = [each.width for each in projections if each.layer == layer]
            if len(sizes) > 1:
                parts[f"{layer}.weight"] = sizes
    return parts


@torch.no_grad()
def exact_init(model: nn.Module, plan: Plan, gain: float = 1.0) -> None:
    """Scale every hidden matrix to the reduced norm `gain` exactly, after `plan.initialize`.

    Arguments:
        model: initialised; changed in place.
        plan: of it.
        gain: w₀.

    Raises:
        ConfigError: a matrix of zeros.
    """
    named = dict(model.named_parameters())
    for row in plan.parameters:
        if row.algorithm != "matrix":
            continue
        for matrix in pieces_of(named[row.info.name], row):
            norms = largest_singular_values(matrix).values
            if not bool((norms > 0).all()):
                raise ConfigError(
                    f"parameter {row.info.name}",
                    expected="a matrix that is not zero",
                    found="norm 0",
                    mend="Call plan.initialize(model) first.",
                )
            unit = unit_of(matrix, row)
            matrix.mul_((gain * unit / norms).view(-1, 1, 1))


def pieces_of(weight: torch.Tensor, row: PlannedParameter) -> Sequence[torch.Tensor]:
    """The matrices of a planned parameter: views (stack, outputs, inputs), one for each shape."""
    whole = weight.detach()
    view = matrices(whole, transposed=row.info.transposed, blocks=row.options.get("blocks", 1))
    split = row.options.get("split")
    pieces = (view,) if split is None else view.split(split, dim=-2)
    return [piece.unsqueeze(0) if piece.ndim == 2 else piece.flatten(0, -3) for piece in pieces]


def unit_of(matrix: torch.Tensor, row: PlannedParameter) -> float:
    """ρ of the matrices of a planned parameter, branch multiplier included."""
    outputs, inputs = matrix.shape[-2:]
    unit = spectral_unit(outputs, inputs // row.info.area, row.info.area)
    return unit * float(row.options.get("scale", 1.0))


def _hidden(
    info: ParameterInfo,
    parts: list[int] | None,
    lr: float,
    decay: float,
    gain: float,
    scale: float,
) -> PlannedParameter:
    if parts is None and _INTERLEAVED.search(info.name) and info.blocks > 1:
        raise ConfigError(
            f"parameter {info.name}",
            expected="query, key and value one after the other",
            found="a layer that may hold them interleaved, head by head",
            mend=f'Take it for one matrix with overrides={{"{info.name}": "matrix"}}.',
        )
    options: dict[str, Any] = {}
    outputs, blocks = info.outputs, info.blocks
    if parts is not None and len(set(parts)) > 1:
        options["split"], outputs = parts, max(parts)
    elif blocks > 1 or parts is not None:
        options["blocks"] = blocks = len(parts or ()) or blocks
        outputs //= blocks
    if scale != 1.0:
        options["scale"] = scale
    unit = scale * spectral_unit(outputs, info.inputs // info.area, info.area)
    std = gain * unit / (math.sqrt(outputs) + math.sqrt(info.inputs))
    why = f"{info.role}, Muon++ with ρ = √({outputs}/{info.inputs})"
    why += f"·{scale:.3g}" if scale != 1.0 else ""
    return PlannedParameter(info, "matrix", lr, decay, why, std, options=options)


def _notes(rows: Sequence[PlannedParameter], lr: float, decay: float) -> list[str]:
    if decay:
        notes = [
            f"reduced norms stay below {1 / decay:.3g}; decay needs about"
            f" {SteadyState(lr, decay).needed:,.0f} steps at the peak rate to act in full"
        ]
    else:
        notes = ["without decay reduced norms may grow by the rate at every step, without end"]
    notes += [
        f"{row.info.name} is tied to the head: multiply logits by {row.multiplier:.3g}"
        for row in rows
        if row.info.tied and row.multiplier != 1.0
    ]
    notes += [
        f"{row.info.name} is fused of unequal parts: call exact_init after initialising"
        for row in rows
        if "split" in row.options
    ]
    return notes
