"""Hyperparameters that a self-tuning network tunes: their ranges, and where they act."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.errors import ConfigError, near_matches
from sparing.tune.stn.regularizer_names import BATCH_LEVEL, Regularizer

Change = Callable[[Any, Mapping[str, Tensor], torch.Generator], Any]
"""Changes a training batch: (batch, values by name, generator) -> batch."""

_OF_THE_OPTIMIZER = (
    *("lr", "learning_rate", "momentum", "beta1", "beta2", "betas", "optimizer", "batch_size"),
    *("warmup", "warmup_steps", "steps", "epochs", "num_epochs", "clip", "max_grad_norm"),
)


@dataclass(frozen=True)
class HParam:
    """One hyperparameter of the regularisation (STN, eq. 8).

    Inside it is a number without bounds; outside its range is kept: [a, b] by a sigmoid, [a, ∞)
    and (-∞, b] by a softplus, no bounds by nothing.

    Arguments:
        name: unique among the hyperparameters.
        init: where it starts, strictly inside `range`; an integer of the range if `discrete`.
        range: lower and upper bound; None where there is no bound.
        apply: what it does in training. "dropout" and "locked-dropout" (one mask for all times) set
            the rate of dropout modules; "dropconnect" and "embedding-dropout" that of the weights
            of linear, convolution and LSTM layers (hidden to hidden), and of whole words;
            "activation-penalty" and "temporal-penalty" weigh the mean square of a module's output,
            and of its change over time; "weight-penalty" weighs half the squared norm of a layer's
            weights. A function changes the training batch. None leaves it to the loss, which reads
            it in `network.values`, or to a function of another hyperparameter.
        places: names of the modules where it acts; for "dropout", () is every dropout module that
            no other hyperparameter names.
        discrete: rounded down to an integer. The integers a to b are then b - a + 1 bins of equal
            width, and `init` starts in the middle of its bin; the released code floors [a, b],
            which never reaches b and may start one below `init`.
        per_example: another perturbation for every row of the batch. None is yes, unless `apply`
            acts on the whole batch at once, as all but dropout and weight penalties do.

    Raises:
        ConfigError: an option cannot work.
    """

    name: str
    init: float
    range: tuple[float | None, float | None] = (0.0, 1.0)
    apply: Regularizer | Change | None = "dropout"
    places: tuple[str, ...] = ()
    discrete: bool = False
    per_example: bool | None = None

    def __post_init__(self) -> None:
        if self.name.lower() in _OF_THE_OPTIMIZER:
            raise ConfigError(
                f"hyperparameter {self.name!r}",
                expected="one that changes the training loss, such as a dropout rate",
                found="an option of the optimiser, for which no best response of weights exists",
                mend="Search it with optuna, or give it another name if it is a regulariser.",
            )
        names = get_args(Regularizer)
        if isinstance(self.apply, str) and self.apply not in names:
            self._fail("apply", "a known regulariser", near_matches(self.apply, list(names)))
        if self.per_example and self.apply in BATCH_LEVEL:
            self._fail(
                "per_example",
                f"False: {self.apply} acts on the whole batch at once",
                "Leave per_example out.",
            )
        low, high = self.range
        self._check_range(low, high)
        inside = low is None or self.init > low, high is None or self.init < high
        if self.discrete:
            whole = float(self.init).is_integer()
            inside = low is None or self.init >= low, high is None or self.init <= high
            if not whole:
                self._fail("init", "an integer, as it is discrete", "Round it.")
        if not math.isfinite(self.init) or not all(inside):
            kind = "in" if self.discrete else "strictly inside"
            self._fail("init", f"a number {kind} {self.range}", "Move init, or widen the range.")

    def _check_range(self, low: float | None, high: float | None) -> None:
        bounds = [bound for bound in (low, high) if bound is not None]
        if not all(map(math.isfinite, bounds)) or (len(bounds) == 2 and bounds[0] >= bounds[1]):
            self._fail("range", "finite bounds, the lower one first", "Use None for no bound.")
        if self.discrete and any(not float(bound).is_integer() for bound in bounds):
            self._fail("range", "integers, as it is discrete", "Round them.")
        rates = {"dropout", "locked-dropout", "dropconnect", "embedding-dropout"}
        if self.apply in rates and not (len(bounds) == 2 and bounds[0] >= 0 and bounds[1] <= 1):
            self._fail("range", "bounds within 0 and 1, as it is a rate", "Use (0.0, 0.9).")
        if str(self.apply).endswith("-penalty") and (low is None or low < 0):
            self._fail("range", "a lower bound of at least 0", "Use (0.0, None).")

    def _fail(self, option: str, expected: str, mend: str) -> None:
        found = repr(vars(self)[option])
        raise ConfigError(
            f"hyperparameter {self.name!r}, {option}", expected=expected, found=found, mend=mend
        )

    @property
    def by_row(self) -> bool:
        """Whether every row of a batch has a value of its own."""
        if self.per_example is None:
            return self.apply not in BATCH_LEVEL
        return self.per_example

    @property
    def _bounds(self) -> tuple[float | None, float | None]:
        low, high = self.range
        return low, high + 1 if self.discrete and high is not None else high

    def project(self, raw: Tensor) -> Tensor:
        """From the unbounded number to the value, differentiable unless discrete (STN, eq. 8).

        Arguments:
            raw: any shape, float32 or float64.

        Returns:
            the same shape and type, within the range.
        """
        low, high = self._bounds
        if low is not None and high is not None:
            value = low + (high - low) * torch.sigmoid(raw)
        elif low is not None:
            value = low + F.softplus(raw)
        elif high is not None:
            value = high - F.softplus(raw)
        else:
            value = raw
        if self.discrete:
            value = value.floor()
        return value.clamp(*self.range) if any(b is not None for b in self.range) else value

    def squash(self, raw: Tensor) -> Tensor:
        """The sigmoid or softplus alone, without the range: what a response may be fed instead."""
        low, high = self.range
        if low is not None and high is not None:
            return torch.sigmoid(raw)
        return raw if low is None and high is None else F.softplus(raw)

    def unproject(self, value: float) -> float:
        """The unbounded number of a value strictly inside the range; for an integer, of the middle
        of its bin."""
        low, high = self._bounds
        if self.discrete:
            value += 0.5
        if low is not None and high is not None:
            share = (value - low) / (high - low)
            return math.log(share) - math.log1p(-share)
        if low is not None:
            return inverse_softplus(value - low)
        return value if high is None else inverse_softplus(high - value)

    def to_json(self) -> dict[str, Any]:
        """What a saved network is compared by."""
        applied: Any = self.apply
        if callable(applied):
            applied = getattr(applied, "__name__", type(applied).__name__)
        return {
            "name": self.name,
            "range": list(self.range),
            "apply": applied,
            "places": list(self.places),
            "discrete": self.discrete,
            "by_row": self.by_row,
        }


class Values(Mapping[str, Tensor]):
    """Values of the hyperparameters in one forward, which remembers what was read.

    Arguments:
        values: by name; (rows,) where every row has its own, else a scalar.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = dict(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            raise ConfigError(
                f"hyperparameter {name!r}",
                expected="one of the network's hyperparameters",
                found="another name",
                mend=near_matches(name, list(self._values)),
            )
        self.read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Hyperparameters(nn.Module):
    """λ and the scales σ of its perturbation (STN, eqs. 2, 8 and 9).

    Arguments:
        hparams: what is tuned, h of them.
        perturbation: σ at the start, above 0.

    Attributes:
        raw: (h,) float32, λ without bounds.
        raw_scale: (h,) float32; σ = softplus(raw_scale).
    """

    def __init__(self, hparams: Sequence[HParam], perturbation: float = 0.5) -> None:
        super().__init__()
        self.hparams = tuple(hparams)
        names = [hparam.name for hparam in self.hparams]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                "hparams",
                expected="at least one hyperparameter, all with different names",
                found=repr(names),
                mend="For example: HParam('dropout', 0.05, (0.0, 0.9)).",
            )
        if not 0 < perturbation < math.inf:
            raise ConfigError(
                "perturbation",
                expected="a number above 0: without perturbations no response is learned",
                found=repr(perturbation),
                mend="Use 0.5.",
            )
        start = [hparam.unproject(hparam.init) for hparam in self.hparams]
        self.raw = nn.Parameter(torch.tensor(start, dtype=torch.float32, device="cpu"))
        spread = inverse_softplus(perturbation)
        self.raw_scale = nn.Parameter(torch.full((len(names),), spread, device="cpu"))

    @property
    def scale(self) -> Tensor:
        """(h,) σ, differentiable."""
        return F.softplus(self.raw_scale)

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """λ + σ ⊙ ε for every row (STN, eq. 9), differentiable in λ and σ.

        Arguments:
            rows: of the batch.
            generator: on the CPU.

        Returns:
            (rows, h); columns of hyperparameters that act on the whole batch are constant.
        """
        noise = torch.randn(rows, len(self.hparams), generator=generator, dtype=self.raw.dtype)
        shared = torch.tensor([not hparam.by_row for hparam in self.hparams])
        noise = torch.where(shared, noise[:1], noise).to(self.raw.device)
        return self.raw + self.scale * noise

    def project(self, raw: Tensor) -> Values:
        """The values of (rows, h) unbounded numbers; without gradients, and scalars where all rows
        have the same or there is one row."""
        raw, found = raw.detach(), {}
        for i, hparam in enumerate(self.hparams):
            value = hparam.project(raw[:, i])
            found[hparam.name] = value if hparam.by_row and len(raw) > 1 else value[0]
        return Values(found)

    def current(self) -> dict[str, float]:
        """The values at λ, without perturbation."""
        return {name: float(value) for name, value in self.project(self.raw[None]).items()}

    def squash(self, raw: Tensor) -> Tensor:
        """(rows, h) by the squashing functions of the hyperparameters, differentiable."""
        columns = [hparam.squash(raw[:, i]) for i, hparam in enumerate(self.hparams)]
        return torch.stack(columns, dim=1)

    def entropy(self) -> Tensor:
        """Σ log(σ √(2πe)), the entropy of the perturbation (STN, eq. 3)."""
        return (self.scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()


def inverse_softplus(value: float) -> float:
    """x such that log(1 + eˣ) = value, for value > 0."""
    return value + math.log(-math.expm1(-value))
