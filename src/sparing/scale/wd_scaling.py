"""Weight decay that grows as the square root of the width, so that AdamW's hyperparameters hold.

Matrices whose two sides grow get η ∝ 1/d and λ ∝ √d; embeddings, heads, norms and biases keep their
rate and have no decay. In the steady state of decay, where training of language models spends most
of its steps, σ₁ of every matrix, and with it every layer's gain, is then the same at every width.

Fan, Liu, Zhao, Yuan, Gu, "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning", arXiv
2510.15262. Equation numbers are those of our specification, made from the abstract and four
summaries. Reconstructed there, and so here: initialisation, the logit and attention multipliers,
matrices of which one side grows, and those whose sides grow unequally.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from sparing.errors import ConfigError
from sparing.scale.base_shapes import Shapes, narrowed, pairs_with
from sparing.scale.decay import Decay, SteadyState, lost_to_rounding, to_decoupled
from sparing.scale.parameters import Role
from sparing.scale.planning import Pair, Plan, PlannedParameter
from sparing.scale.settings import PlanSettings
from sparing.scale.spectra import Spectra, fit_width_exponent
from sparing.scale.width_multipliers import WidthMultipliers

Head = Literal["multiplier", "folded", "plain"]
_MATRICES = ("matrix", "expert", "router")
_INSTALL = "WidthMultipliers.between(base, model).install(model)"


class ScalingWarning(UserWarning):
    """A plan that will not do what it promises unless something is changed."""


@dataclass(frozen=True)
class DecayRule:
    """The rule and the base run ("wd-scaling", eq. 1-4 and 11).

    Arguments:
        lr: η₂⁰, peak rate of matrices tuned in the base run, above 0.
        weight_decay: λ₂⁰ of matrices tuned in the base run, 0 or more, as `decay` says.
        vector_lr: η₁⁰ of everything else; None for `lr`.
        vector_decay: λ₁ of everything else; the paper has 0.
        p: λ₂ ∝ d^p. ½ is the paper's; 0 is μP with a constant λ, 1 keeps ηλ, as "independent"
            decay does; "auto" takes 2a - 1 from measured spectra.
        lr_exponent: η₂ ∝ d^-lr_exponent; 0 with p=0 and head="plain" is the standard
            parameterisation.
        one_sided_p: p of matrices of which one side grows, such as keys and values of a fixed
            number of heads; nobody has measured it, so it must be said where there are any. p/2 is
            what the geometric mean of both sides gives.
        head: how logits stay of one size. "multiplier" leaves η₁⁰ and has the model multiply
            logits by d⁰/d; "folded" divides the head's rate and initialisation instead, which is
            the same under Adam, and impossible for a tied head; "plain" does neither.
        zero_head: initialise an untied head with zeros.
        decay: "decoupled" if a step multiplies W by 1 - ηλ, as `torch.optim.AdamW` does;
            "independent" if by 1 - λ. See `decay_convention`.
    """

    lr: float
    weight_decay: float
    vector_lr: float | None = None
    vector_decay: float = 0.0
    p: float | Literal["auto"] = 0.5
    lr_exponent: float = 1.0
    one_sided_p: float | None = None
    head: Head = "multiplier"
    zero_head: bool = False
    decay: Decay = "decoupled"

    def __post_init__(self) -> None:
        for name in ("lr", "vector_lr", "weight_decay", "vector_decay", "lr_exponent"):
            value = getattr(self, name)
            rate = name.endswith("lr")
            if value is None and name == "vector_lr":
                continue
            if not math.isfinite(value) or value < 0 or (rate and value == 0):
                self._refuse(name, "a number above 0" if rate else "a number, 0 or more")
        for name in ("p", "one_sided_p"):
            value = getattr(self, name)
            words = (None, "auto") if name == "p" else (None,)
            if value not in words and not (isinstance(value, int | float) and math.isfinite(value)):
                self._refuse(name, 'a number or "auto"' if name == "p" else "a number")
        if self.head not in ("multiplier", "folded", "plain"):
            self._refuse("head", "multiplier, folded or plain")
        if self.decay not in ("decoupled", "independent"):
            self._refuse(
                "decay",
                "decoupled or independent",
                "An L2 term in Adam is rescaled with the gradient, so no rule fits it: take AdamW.",
            )

    def _refuse(self, name: str, expected: str, mend: str = "Choose such a value.") -> None:
        raise ConfigError(
            f"DecayRule.{name}", expected=expected, found=repr(getattr(self, name)), mend=mend
        )

    def matrix_lr(self, ratio: float) -> float:
        """η₂ at a fan-in of `ratio` times the base's (eq. 1)."""
        return float(self.lr * ratio**-self.lr_exponent)

    def matrix_decay(self, ratio: float, *, inputs: float | None = None, p: float) -> float:
        """λ₂ at a width of `ratio` times the base's (eq. 2), in the optimizer's convention.

        Arguments:
            ratio: of the width that decay follows.
            inputs: of the fan-in, which the rate follows; as `ratio` where not given.
            p: exponent.
        """
        scaled = self.weight_decay * ratio**p
        if self.decay == "independent":  # holds ηλ, so the rate's own factor comes in
            scaled *= (ratio if inputs is None else inputs) ** -self.lr_exponent
        return float(scaled)


class _Scaled(NamedTuple):
    """A planned parameter, and what is to be said about it."""

    row: PlannedParameter
    unequal: bool = False
    one_sided: bool = False


def wd_scaled_plan(
    model: nn.Module,
    base: nn.Module | Shapes | Path,
    rule: DecayRule,
    *,
    measured: Sequence[Spectra] = (),
    steps: float | None = None,
    base_std: float | None = None,
    overrides: dict[str, Role] | None = None,
) -> Plan:
    """What the rule does with every parameter of a model; warnings are among the plan's notes.

    Arguments:
        model: to be trained; the meta device will do.
        base: the model that was tuned, or its shapes; see `pairs_with`.
        rule: with the base run.
        measured: spectra of trained models of two or more widths, for p="auto".
        steps: of training at the peak rate, to see whether decay has time to act (eq. 13).
        base_std: of the base's matrices at initialisation; None for what its configuration says.
        overrides: roles of parameters that are not known.

    Raises:
        ConfigError: another architecture, a one-sided matrix and no `one_sided_p`, p="auto" and
            nothing measured, or a folded head that is tied.
    """
    plan, cautions = _plan(model, base, rule, measured, steps, base_std, overrides)
    return replace(plan, notes=plan.notes + cautions)


def wd_scaled_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    base: nn.Module | Shapes | Path | None = None,
    base_width: int | None = None,
    kv_heads: int | None = None,
    measured: Sequence[Spectra] = (),
    steps: float | None = None,
    overrides: dict[str, Role] | None = None,
    **rule: Any,
) -> list[dict[str, Any]]:
    """Groups for `torch.optim.AdamW` and its like; warns of whatever stands in the way.

    Arguments:
        model: to be trained.
        lr, weight_decay: tuned in the base run.
        base: the model that was tuned, its shapes, or a `.bsh` file of `mup`; or give
        base_width: its hidden size, all else in proportion, with heads of the same size.
        kv_heads: with `base_width`, where keys and values have fewer heads than queries.
        measured, steps, overrides: see `wd_scaled_plan`.
        rule: further options of `DecayRule`, such as p.

    Raises:
        ConfigError: see `wd_scaled_plan`; or neither or both of base and base_width.
    """
    if (base is None) == (base_width is None):
        raise ConfigError(
            "base and base_width",
            expected="one of the two: the model that was tuned, or its width",
            found="none" if base is None else "both",
            mend="The rule scales from the width at which the hyperparameters were tuned.",
        )
    known = {field.name for field in fields(DecayRule)}
    unknown = sorted(set(rule) - known)
    if unknown:
        raise ConfigError(
            f"option {unknown[0]!r}",
            expected=f"one of {', '.join(sorted(known))}",
            found="an unknown one",
            mend="See DecayRule.",
        )
    if base_width is not None:
        base = narrowed(model, base_width, kv_heads)
    assert base is not None
    decided = DecayRule(lr, weight_decay, **rule)
    plan, cautions = _plan(model, base, decided, measured, steps, None, overrides)
    for caution in cautions:
        warnings.warn(caution, ScalingWarning, stacklevel=2)
    return plan.param_groups(model)


def wd_scaling_planner(base: nn.Module, target: nn.Module, settings: PlanSettings) -> Plan:
    """The plan of `sparing plan --method wd-scaling`; one-sided matrices get p/2, and a note."""
    p = settings.decay_exponent
    stated = settings.one_sided_exponent
    rule = DecayRule(
        settings.lr,
        settings.weight_decay,
        settings.aux_lr,
        p=p,
        one_sided_p=p / 2 if stated is None else stated,
    )
    steps = settings.tokens / settings.batch if settings.tokens and settings.batch else None
    return wd_scaled_plan(target, base, rule, steps=steps)


def _plan(
    model: nn.Module,
    base: nn.Module | Shapes | Path,
    rule: DecayRule,
    measured: Sequence[Spectra],
    steps: float | None,
    base_std: float | None,
    overrides: dict[str, Role] | None,
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with its remarks, and apart from them what the user should not overlook."""
    p, remarks, cautions = _decided(rule, measured)
    if base_std is None:
        base_std = getattr(getattr(model, "config", None), "initializer_range", None) or 0.02
    together = pairs_with(base, model, overrides)
    scaled = [_scaled(pair, rule, p, base_std) for pair in together]
    _require_stated(scaled, rule)
    multipliers = WidthMultipliers.between(base, model, overrides)
    rows = [each.row for each in scaled]
    remarks += _remarks(rows, scaled, rule)
    cautions += list(_cautions(model, rows, scaled, rule, steps))
    if rule.head != "multiplier":
        multipliers = replace(multipliers, logits=1.0)
    if multipliers != WidthMultipliers():
        cautions.append(f"the model has to multiply {multipliers.describe()}: {_INSTALL}")
    return Plan("wd-scaling", tuple(rows), tuple(remarks)), tuple(cautions)


def _decided(rule: DecayRule, measured: Sequence[Spectra]) -> tuple[float, list[str], list[str]]:
    """p, and what there is to say about it."""
    if rule.p != "auto":
        return rule.p, [], []
    if not measured:
        raise ConfigError(
            'p="auto"',
            expected="measured=[…], spectra of trained models of two or more widths",
            found="none",
            mend="measure_spectra(model, lr=…, weight_decay=…) after training at each width.",
        )
    fit = fit_width_exponent(measured)
    p = fit.decay_exponent(rule.lr_exponent)
    remark = f"σ₁ ∝ d^{fit.exponent:.3f} ± {fit.error:.3f} at fixed η/λ: weight decay ∝ d^{p:.3f}"
    if 0 <= p <= 1:
        return p, [remark], []
    return p, [], [f"{remark}, outside of 0 to 1: were the runs stationary?"]


def _scaled(pair: Pair, rule: DecayRule, p: float, base_std: float) -> _Scaled:
    if pair.target.role in _MATRICES:
        return _matrix(pair, rule, p, base_std)
    return _Scaled(_vector(pair, rule, base_std))


def _matrix(pair: Pair, rule: DecayRule, p: float, base_std: float) -> _Scaled:
    """The role decides where nothing grows, so that the base's own plan is plain AdamW."""
    inputs, outputs = pair.input_ratio, pair.output_ratio
    one_sided = (inputs == 1) != (outputs == 1)
    unequal = not one_sided and inputs != outputs
    if one_sided:
        grown = inputs * outputs
        used = rule.one_sided_p if rule.one_sided_p is not None else math.nan
        why = f"one side grows {grown:.4g}x: decay as its power {used:.3g}, as stated"
    else:
        grown, used = math.sqrt(inputs * outputs), p
        why = f"both sides grow {inputs:.4g}x: rate 1/that, decay its power {used:.3g}"
        if unequal:
            why = f"inputs grow {inputs:.4g}x, outputs {outputs:.4g}x: decay by their mean"
    row = PlannedParameter(
        pair.target,
        "adamw",
        rule.matrix_lr(inputs),
        rule.matrix_decay(grown, inputs=inputs, p=used),
        why,
        base_std / math.sqrt(inputs),
        options={"scaling": "matrix-like"},
    )
    return _Scaled(row, unequal, one_sided)


def _vector(pair: Pair, rule: DecayRule, base_std: float) -> PlannedParameter:
    info = pair.target
    rate = rule.lr if rule.vector_lr is None else rule.vector_lr
    decay, std, multiplier = rule.vector_decay, None, 1.0
    why = f"{info.why}: rate and decay of the base"
    if info.role == "embedding":
        std = base_std
        if info.tied and rule.head == "folded":
            raise ConfigError(
                'head="folded"',
                expected="a head of its own",
                found=f"{info.name!r}, which is embedding and head at once",
                mend='Use head="multiplier"; the lookup must not be scaled.',
            )
        if info.tied and rule.head == "multiplier":
            multiplier = 1 / pair.input_ratio
            why += "; tied, logits times base over width"
    if info.role == "head":
        std = base_std / math.sqrt(pair.input_ratio)
        if rule.head == "multiplier":
            multiplier = 1 / pair.input_ratio
            why += "; logits times base over width"
        elif rule.head == "folded":
            rate, std = rate / pair.input_ratio, std / pair.input_ratio
            why = f"{info.why}: rate and initialisation hold the multiplier base over width"
        std = 0.0 if rule.zero_head else std
    return PlannedParameter(
        info, "adamw", rate, decay, why, std, multiplier, {"scaling": "vector-like"}
    )


def _require_stated(scaled: Sequence[_Scaled], rule: DecayRule) -> None:
    one_sided = [each.row.info.name for each in scaled if each.one_sided]
    if one_sided and rule.one_sided_p is None:
        raise ConfigError(
            "one_sided_p",
            expected="the exponent of decay for matrices of which only one side grows",
            found=f"none, for {len(one_sided)} of them: {', '.join(one_sided[:4])}",
            mend="Say one_sided_p=, such as p/2; or call them vectors with overrides=.",
        )


def _remarks(
    rows: Sequence[PlannedParameter], scaled: Sequence[_Scaled], rule: DecayRule
) -> list[str]:
    sizes = {"matrix-like": 0, "vector-like": 0}
    for row in rows:
        sizes[row.options["scaling"]] += row.info.count
    notes = [f"{sizes['matrix-like']:,} matrix-like and {sizes['vector-like']:,} vector-like"]
    ends = [each.row.info for each in scaled if each.one_sided]
    if ends:
        kinds = sorted({info.name.split(".")[-2] for info in ends})
        notes.append(
            f"one side grows of {len(ends)} matrices ({', '.join(kinds)}):"
            f" decay as its power {rule.one_sided_p}, which nobody has measured"
        )
    if rule.decay == "independent":
        notes.append(
            "independent decay: the optimizer's own λ is ηλ of the rule, so it follows"
            " d^(p - 1); compared with the base, it falls where AdamW's would rise"
        )
    return notes


def _cautions(
    model: nn.Module,
    rows: Sequence[PlannedParameter],
    scaled: Sequence[_Scaled],
    rule: DecayRule,
    steps: float | None,
) -> Iterator[str]:
    unequal = [each.row.info.name for each in scaled if each.unequal]
    if unequal:
        yield (
            f"sides grow unequally in {len(unequal)} matrices, such as {unequal[0]}: the rate"
            " follows the inputs, decay the geometric mean"
        )
    slowest = _slowest(rows, rule, steps)
    if slowest is None:
        return
    if slowest.reached is False:
        yield slowest.describe()
    coarse = {p.dtype for p in model.parameters()}
    if any(lost_to_rounding(slowest.lr, slowest.weight_decay, dtype) for dtype in coarse):
        yield (
            f"ηλ = {slowest.lr * slowest.weight_decay:.2g} is below what weights in 16 bits can"
            " hold: keep float32 masters"
        )


def _slowest(
    rows: Sequence[PlannedParameter], rule: DecayRule, steps: float | None
) -> SteadyState | None:
    """The matrices that settle last, in AdamW's convention."""
    found = []
    for row in rows:
        if row.options["scaling"] == "matrix-like":
            decay = row.weight_decay
            if rule.decay == "independent":
                decay = to_decoupled(row.lr, decay)
            found.append(SteadyState(row.lr, decay, steps))
    return max(found, key=lambda state: state.needed, default=None)
