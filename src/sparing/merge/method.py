"""What a merge method is: options, an update of a block of numbers, and perhaps a survey before.

A method works on task vectors, τ_i = θ_i - θ_base, a block of consecutive numbers of one tensor at
a time. One that needs to know something about all numbers first (a threshold, say) gets it from a
survey, which may scan the models as often as it likes but holds only a few blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from torch import Tensor

from sparing.errors import ConfigError, near_matches
from sparing.merge.view import Block, View

Scope = Literal["model", "tensor"]


@dataclass(frozen=True)
class Options:
    """Options of a merge method; each method derives its own."""

    @classmethod
    def of(cls, method: str, values: dict[str, Any]) -> Self:
        """Options from names and values.

        Raises:
            ConfigError: there is no such option, or a value cannot work.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"option {name!r}",
                    expected=f"an option of {method} or of merge",
                    found="no such option",
                    mend=near_matches(name, known),
                )
        return cls(**values)

    def check(self, experts: int) -> None:
        """Raise a `ConfigError` unless the options suit this number of experts."""

    def require(self, option: str, holds: bool, expected: str, mend: str) -> None:
        """Raise a `ConfigError` that names the option unless its value `holds`."""
        if not holds:
            raise ConfigError(
                f"option {option!r}",
                expected=expected,
                found=repr(getattr(self, option)),
                mend=mend,
            )

    def require_number(
        self, option: str, lowest: float, highest: float, *, above: bool = False, mend: str
    ) -> None:
        """Require a number from `lowest` (or above it) to `highest`."""
        value = getattr(self, option)
        holds = is_number(value) and lowest <= value <= highest and not (above and value == lowest)
        start = f"above {lowest}" if above else f"from {lowest}"
        self.require(option, holds, f"a number {start} to {highest}", mend)

    def require_truth(self, *options: str) -> None:
        """Require true or false."""
        for option in options:
            self.require(
                option, isinstance(getattr(self, option), bool), "true or false", "Leave it out."
            )

    def require_scales(self, option: str) -> None:
        """Require a finite number, or a list of them."""
        value = getattr(self, option)
        numbers = value if isinstance(value, list | tuple) else [value]
        holds = bool(numbers) and all(is_number(number) for number in numbers)
        self.require(option, holds, "a number, or a list with one an expert", "Try 1.0.")

    def require_choice(self, option: str, choices: Sequence[str]) -> None:
        """Require one of a few words."""
        value = getattr(self, option)
        self.require(
            option, value in choices, f"one of {', '.join(choices)}", f"Try {choices[0]!r}."
        )

    def per_expert(self, option: str, experts: int) -> list[float]:
        """The value of an option that is one number, or a list of one an expert.

        Raises:
            ConfigError: the list has another length.
        """
        value = getattr(self, option)
        if not isinstance(value, list | tuple):
            return [float(value)] * experts
        self.require(option, len(value) == experts, f"{experts} numbers", "Give one an expert.")
        return [float(number) for number in value]


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number and not a truth value."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    )


@dataclass(frozen=True)
class Method:
    """One way to merge.

    Arguments:
        slug: its public name.
        paper: where it comes from.
        options: class of its options.
        update: from task vectors, options, what the survey found and the block, the merged task
            vector; all flat and of one floating type.
        survey: what must be known about all numbers beforehand, or None if nothing.
    """

    slug: str
    paper: str
    options: type[Any]
    update: Callable[[Sequence[Tensor], Any, Any, Block], Tensor]
    survey: Callable[[View, Any], Any] | None = None


@dataclass(frozen=True)
class Continual:
    """A way to merge one expert after another into a bank that stays open; see `continual`.

    Arguments:
        slug: its public name.
        paper: where it comes from.
        options: class of its options.
    """

    slug: str
    paper: str
    options: type[Any]


def groups(view: View, scope: Scope) -> list[tuple[str, ...]]:
    """The tensors that share a statistic: all of them, or each alone."""
    names = tuple(name for name, size in view.sizes.items() if size)
    return [names] if scope == "model" else [(name,) for name in names]
