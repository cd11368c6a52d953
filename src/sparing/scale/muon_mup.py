"""Muon++: a Muon whose steps have exactly the spectral size that μP asks for, for the whole run.

A matrix with o outputs and i inputs has the unit ρ = √(o/i): a spectral norm of ρ leaves the RMS of
activations what it is. Every update has spectral norm ηρ, whatever the width, and decay bounds the
weights at ρ/λ for good, without any projection of them.

Zhao, "Towards a Principled Muon under μP: Ensuring Spectral Conditions throughout Training", arXiv
2601.01306. Equation numbers are those of our specification, which was made from the abstract: all
formulas are reconstructions, from the spectral condition of μP and the algebra of decoupled decay.
"""

import math
import re
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparing.errors import ConfigError
from sparing.scale.alignment import FeatureProbe, alignment
from sparing.scale.matrix_optimizer import MatrixOptimizer, Piece
from sparing.scale.muon import Rule, step_factor
from sparing.scale.orthogonalize import Orthogonalizer, spectral_norm
from sparing.scale.singular import largest_singular_values

DEFAULT_RADIUS = 10.0
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe)(\.|$)", re.IGNORECASE)
# Below it an orthogonalised update is not at full size, as the gradient was all but zero; dividing
# by its norm would blow rounding up.
_LEAST_UPDATE = 0.5
_COLD_ITERATIONS = 30
_MEMORY = 0.99  # of the mean alignment, per measurement
_FAR_OUTSIDE = 1.1  # times the radius, at the start, that is worth a warning


class SpectralWarning(UserWarning):
    """Weights that decay will pull far from where they are."""


def spectral_unit(outputs: int, inputs: int, area: int = 1) -> float:
    """ρ = √(o/i), the spectral norm that leaves RMS(Wx) = RMS(x) at most; Muon++, eq. 1 and 10.

    Arguments:
        outputs, inputs: sides of the matrix that acts as W x; channels of a convolution.
        area: places of a kernel. Summed over them, ρ/area each is enough for any input.
    """
    return math.sqrt(outputs / inputs) / area


class MuonPlusPlus(MatrixOptimizer):
    """W ← (1 - ηλ) W - ηρ O, where O is the momentum, orthogonalised to spectral norm 1 (eq. 6).

    So the reduced norm w = ‖W‖/ρ obeys w ≤ max(w₀, 1/λ) at every step, for any gradients, and the
    radius 1/λ is a constant of the width (eq. 7). To reach it takes some 3/(ηλ) steps.

    Groups with algorithm "matrix" are treated so, those with "adamw" by AdamW; `muon_mup_groups`
    makes them. Everything is computed in float32, products of the orthogonalisation in bfloat16 on
    a GPU; 16-bit parameters have float32 masters. Experts (3-D) are matrices of their own, kernels
    of convolutions (4-D, 5-D) are flattened to (outputs, inputs · area).

    Arguments:
        params: tensors or groups, see `MatrixOptimizer`. Groups may also have `radius`, `split`
            (outputs of the matrices fused in one, such as [q, k, v]) and `scale` (of ρ, for a
            branch multiplier folded into the weights).
        lr: η.
        radius: 1/λ, the largest reduced norm in the long run; infinite for no decay. 10 by default.
        weight_decay: λ, instead of the radius.
        rule: "spectral" ρ is the method; "jordan" and "moonlight" are other factors, to compare.
        orthogonalizer: see `orthogonalize`. "sharp" costs what "ns5" does, and σ₁(O) is 1 by
            itself: within 6e-4 in float32, within bfloat16's 1 % on a GPU. With "ns5" it is 0.7
            to 1.21.
        exact_update: divide O by its norm, estimated by warm-started power iteration (eq. 5), as
            the specification has it for "ns5". "sharp" does not need it. The estimate is from
            below, and "ns5" leaves many singular values near the largest: with gradients that are
            mostly noise, 2 iterations fall 5 to 15 % short.
        power_iterations: of it, 1 or more.
        reference: decay towards "zero" or towards the weights at the start, "init", which bounds
            ‖W - W₀‖ by ρ/λ: for fine-tuning.
        weight_norm: reduced norm that every matrix is set to after each step; the baseline that
            normalises weights too. None leaves weights alone, which is the method.
        adaptive: divide steps by the mean alignment of updates with features (eq. 12), see `watch`.
        max_gain: that it may multiply a step by, 1 or more; also the bound (7).
        on_nan: "skip" a step with NaN gradients and count it in `skipped`, or "raise".
        options: of `MatrixOptimizer`; momentum 0.95 and Nesterov by default.

    Raises:
        ConfigError: an option out of range, decay and radius both, or a vector or an embedding in
            a matrix group.

    Warns:
        SpectralWarning: weights far outside the radius, as a model trained by AdamW may have.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        radius: float | None = None,
        weight_decay: float | None = None,
        rule: Rule = "spectral",
        orthogonalizer: Orthogonalizer = "sharp",
        exact_update: bool = False,
        power_iterations: int = 2,
        reference: Literal["zero", "init"] = "zero",
        weight_norm: float | None = None,
        adaptive: bool = False,
        max_gain: float = 4.0,
        on_nan: Literal["raise", "skip"] = "skip",
        **options: Any,
    ) -> None:
        if radius is not None and weight_decay is not None:
            raise ConfigError(
                "MuonPlusPlus",
                expected="radius or weight_decay, one being the inverse of the other",
                found="both",
                mend="Leave one out.",
            )
        if weight_decay is None:
            weight_decay = decay_of(DEFAULT_RADIUS if radius is None else radius)
        self._probe: FeatureProbe | None = None
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            orthogonalizer=orthogonalizer,
            on_nan=on_nan,
            rule=rule,
            exact_update=exact_update,
            power_iterations=power_iterations,
            reference=reference,
            weight_norm=weight_norm,
            adaptive=adaptive,
            max_gain=max_gain,
            split=None,
            scale=1.0,
            steps=0,
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "radius" in param_group:
            param_group = dict(param_group)
            param_group["weight_decay"] = decay_of(param_group.pop("radius"))
        super().add_param_group(param_group)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        norm = group["weight_norm"]
        ranges = {
            "rule": (group["rule"] in ("spectral", "jordan", "moonlight"), "a known rule"),
            "reference": (group["reference"] in ("zero", "init"), '"zero" or "init"'),
            "power_iterations": (group["power_iterations"] >= 1, "1 or more"),
            "max_gain": (group["max_gain"] >= 1, "1 or more"),
            "scale": (group["scale"] > 0, "above 0"),
            "weight_norm": (norm is None or norm > 0, "None or above 0"),
            "lr times weight_decay": (group["lr"] * group["weight_decay"] <= 1, "1 or less"),
        }
        for option, (holds, expected) in ranges.items():
            if not holds:
                raise ConfigError(
                    f"MuonPlusPlus group, {option}",
                    expected=expected,
                    found=repr(group.get(option, group["lr"] * group["weight_decay"])),
                    mend="Choose such a value.",
                )
        if group["algorithm"] != "adamw":
            self._check_matrices(group)

    def _check_matrices(self, group: dict[str, Any]) -> None:
        outside: list[tuple[float, str]] = []
        for name, parameter in zip(self.names(group), group["params"], strict=True):
            role = group.get("role") or ("embedding" if _EMBEDDING.search(name) else "matrix")
            if role in ("embedding", "vector"):
                raise ConfigError(
                    f"MuonPlusPlus group, parameter {name}",
                    expected="a matrix, whose inputs are features",
                    found=f"role {role}",
                    mend='Put it into a group with "algorithm": "adamw", or say "role": "matrix".',
                )
            if parameter.is_meta:
                continue
            # Not `whole`, which keeps a state: FSDP2 replaces the parameters afterwards.
            weight = self.gathered(parameter.detach())
            total, split = self.views(weight, group).shape[-2], group["split"]
            if split is not None and sum(split) != total:
                raise ConfigError(
                    f"MuonPlusPlus group, split of {name}",
                    expected=f"sizes that add up to its {total} outputs",
                    found=repr(list(split)),
                    mend="Give the outputs of each of the fused matrices.",
                )
            outside += [(w, name) for w in self._start(weight, name, parameter, group)]
        if outside:
            worst, name = max(outside)
            warnings.warn(
                f"{len(outside)} matrices start outside the radius {1 / group['weight_decay']:g},"
                f" such as {name} with reduced norm {worst:.3g}; decay will pull them in. To keep"
                ' what a model has learnt, choose reference="init" or radius=math.inf.',
                SpectralWarning,
                stacklevel=5,
            )

    def _start(
        self, weight: Tensor, name: str, parameter: Tensor, group: dict[str, Any]
    ) -> list[float]:
        """Reduced norms that are far outside the radius."""
        decays = group["weight_decay"] and group["reference"] == "zero"
        if not decays and group["weight_norm"] is None:
            return []
        found: list[float] = []
        for matrix in self.pieces(weight.float(), group):
            stack = matrix.reshape(-1, *matrix.shape[-2:])
            unit = self.unit(parameter, matrix, group)
            values = largest_singular_values(stack, steps=8).values / unit
            if group["weight_norm"] is not None:
                if not bool((values > 0).all()):
                    raise ConfigError(
                        f"parameter {name}",
                        expected="a matrix that is not zero, as its norm is set",
                        found="norm 0",
                        mend="Initialise it, or leave weight_norm out.",
                    )
            else:
                found += values[values > _FAR_OUTSIDE / group["weight_decay"]].tolist()
        return found

    def pieces(self, tensor: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        view = self.views(tensor, group)
        return (view,) if group["split"] is None else view.split(list(group["split"]), dim=-2)

    @staticmethod
    def unit(parameter: Tensor, matrix: Tensor, group: dict[str, Any]) -> float:
        """ρ of a piece of a parameter, (…, outputs, inputs), times the group's `scale`."""
        area = math.prod(parameter.shape[2:]) if parameter.ndim > 3 else 1
        outputs, inputs = matrix.shape[-2:]
        return spectral_unit(outputs, inputs // area, area) * float(group["scale"])

    def watch(self, model: nn.Module, *, tokens: int = 256, every: int = 10) -> FeatureProbe:
        """Measure how updates align with the inputs of their layers; needed by `adaptive`.

        Arguments:
            model: whose linear layers have weights in a matrix group; others keep plain steps.
            tokens: inputs kept of a forward pass, evenly spaced.
            every: steps between measurements.

        Returns:
            the hooks; `remove()` ends it.
        """
        watched = {p for g in self.param_groups if g["algorithm"] != "adamw" for p in g["params"]}
        due = lambda: min(group["steps"] for group in self.param_groups) % every == 0  # noqa: E731
        self._probe = FeatureProbe(model, watched, tokens, due)
        return self._probe

    def step(self, closure: Any = None) -> Any:
        """Take one step; with NaN in any gradient, none, counted in `skipped`."""
        skipped = self.skipped
        loss = super().step(closure)
        if self.skipped == skipped:
            for group in self.param_groups:
                group["steps"] += 1
        if self._probe is not None:
            self._probe.clear()
        return loss

    def step_group(self, group: dict[str, Any]) -> None:
        if group["adaptive"] and self._probe is None:
            raise ConfigError(
                "MuonPlusPlus, adaptive",
                expected="features to align updates with",
                found="no model that is watched",
                mend="Call optimizer.watch(model) before training.",
            )
        super().step_group(group)

    def orthogonal(
        self, stack: Tensor, owners: list[Piece], sizes: list[int], group: dict[str, Any]
    ) -> Tensor:
        found = super().orthogonal(stack, owners, sizes, group)
        if not group["exact_update"]:
            return found
        start = self._kept("update_vector", owners)
        steps = group["power_iterations"] if start is not None else _COLD_ITERATIONS
        norm, vectors = spectral_norm(found, start, steps, tolerance=None)
        for (parameter, piece), vector in zip(owners, vectors.split(sizes), strict=True):
            self.state[parameter][f"update_vector_{piece}"] = vector.clone()
        return found.div_(norm.clamp_min(_LEAST_UPDATE)[:, None, None])

    def _kept(self, name: str, owners: list[Piece]) -> Tensor | None:
        kept = [self.state[parameter].get(f"{name}_{piece}") for parameter, piece in owners]
        known = [each for each in kept if each is not None]
        return torch.cat(known) if len(known) == len(kept) else None

    def apply(
        self, parameter: Tensor, orthogonal: Tensor, group: dict[str, Any], piece: int = 0
    ) -> None:
        weight, state = self.whole(parameter), self.state[parameter]
        matrix = self.pieces(weight, group)[piece]
        unit, lr = self.unit(parameter, matrix, group), group["lr"]
        if group["rule"] == "spectral":
            factor = unit
        else:
            factor = step_factor(group["rule"], *matrix.shape[-2:]) * group["scale"]
        if group["reference"] == "init":
            if "reference" not in state:
                state["reference"] = state.get("master", parameter).detach().clone()
            start = self.pieces(self.gathered(state["reference"]), group)[piece]
            matrix.lerp_(start, lr * group["weight_decay"])
        else:
            matrix.mul_(1 - lr * group["weight_decay"])
        gain = self._gain(parameter, orthogonal, group, piece) if group["adaptive"] else None
        update = orthogonal if gain is None else orthogonal * gain[..., None, None]
        matrix.add_(update, alpha=-lr * factor)
        if group["weight_norm"] is not None:
            self._normalize(matrix, group["weight_norm"] * unit, state, f"weight_vector_{piece}")
        self.store(parameter, weight)

    def _gain(
        self, parameter: Tensor, orthogonal: Tensor, group: dict[str, Any], piece: int
    ) -> Tensor | None:
        """min(1/ā, max_gain), (…,); None where nothing has been measured (eq. 12)."""
        assert self._probe is not None
        state, key = self.state[parameter], f"alignment_{piece}"
        features = self._probe.features.get(parameter)
        if features is not None:
            found = alignment(orthogonal, features)
            state[key] = _MEMORY * state[key] + (1 - _MEMORY) * found if key in state else found
        return state[key].reciprocal().clamp(max=group["max_gain"]) if key in state else None

    @staticmethod
    def _normalize(matrix: Tensor, norm: float, state: dict[str, Any], key: str) -> None:
        stack = matrix.reshape(-1, *matrix.shape[-2:])
        found = largest_singular_values(
            stack, start=state.get(key), steps=8 if key in state else 30
        )
        state[key] = found.directions
        matrix.mul_((norm / found.values).view(*matrix.shape[:-2], 1, 1))


def decay_of(radius: float) -> float:
    """λ = 1/radius; 0 for an infinite one.

    Raises:
        ConfigError: not above 0.
    """
    if not radius > 0:
        raise ConfigError(
            "radius",
            expected="a number above 0, or math.inf for no decay",
            found=repr(radius),
            mend="It is the largest reduced norm ‖W‖/√(o/i) in the long run; 10 is usual.",
        )
    return 1 / radius


def norm_bound(
    steps: int, *, start: float, lr: float, weight_decay: float, size: float = 1.0
) -> float:
    """What the reduced norm cannot exceed after some steps at a constant rate (Muon++, eq. 7).

    Arguments:
        steps: taken.
        start: w₀.
        lr, weight_decay: η and λ.
        size: spectral norm of the orthogonaliser's output, times `max_gain` where adaptive.
    """
    if not weight_decay:
        return start + size * lr * steps
    kept = (1 - lr * weight_decay) ** steps
    return kept * start + (1 - kept) * size / weight_decay


def noise_floor(outputs: int, inputs: int, *, lr: float, weight_decay: float) -> float:
    """The reduced norm that uncorrelated updates leave in the long run (Muon++, eq. 8).

    √(η/(2λ - ηλ²)) · (1 + √(min/max)) of the two sides: without a term for width.
    """
    spread = math.sqrt(lr / (2 * weight_decay - lr * weight_decay**2))
    return spread * (1 + math.sqrt(min(outputs, inputs) / max(outputs, inputs)))
