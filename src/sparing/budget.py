"""Budgets: how much of a resource a method may use, as users write it."""

import enum
import re
from dataclasses import dataclass
from fractions import Fraction

from sparing.errors import ConfigError


class Unit(enum.Enum):
    """What a budget counts."""

    SHARE = "%"
    PARAMETERS = "parameters"
    BYTES = "bytes"
    BITS = "bit"


_SCALES: dict[str, tuple[Unit, Fraction]] = {
    "%": (Unit.SHARE, Fraction(1, 100)),
    "": (Unit.PARAMETERS, Fraction(1)),
    "k": (Unit.PARAMETERS, Fraction(10**3)),
    "m": (Unit.PARAMETERS, Fraction(10**6)),
    "b": (Unit.PARAMETERS, Fraction(10**9)),
    "bytes": (Unit.BYTES, Fraction(1)),
    "kb": (Unit.BYTES, Fraction(10**3)),
    "mb": (Unit.BYTES, Fraction(10**6)),
    "gb": (Unit.BYTES, Fraction(10**9)),
    "kib": (Unit.BYTES, Fraction(2**10)),
    "mib": (Unit.BYTES, Fraction(2**20)),
    "gib": (Unit.BYTES, Fraction(2**30)),
    "bit": (Unit.BITS, Fraction(1)),
}
_PATTERN = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*(%|[A-Za-z]*)\s*", re.ASCII)
_LONGEST = 100  # characters; Python refuses to read numbers of some thousand digits
_BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Budget:
    """An exact amount of one resource.

    Arguments:
        amount: in units of `unit`; a share is between 0 and 1.
        unit: what is counted.
        text: the budget as the user wrote it.
    """

    amount: Fraction
    unit: Unit
    text: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `0.45%`, `600k`, `2M`, `4MiB` or `3.65bit`.

        Raises:
            ConfigError: the text is no number with a known unit, or not above zero.
        """
        match = _PATTERN.fullmatch(text) if len(text) <= _LONGEST else None
        unit_text = match.group(2).lower() if match else ""
        if match is None or unit_text not in _SCALES:
            raise ConfigError(
                "budget",
                expected="a number with a unit, such as 0.45%, 600k, 2M, 4MiB or 3.65bit",
                found=repr(text[:_LONGEST]),
                mend=f"Known units: {', '.join(u for u in _SCALES if u)}; none means parameters.",
            )
        unit, scale = _SCALES[unit_text]
        amount = Fraction(match.group(1).replace("_", "")) * scale
        if amount <= 0 or (unit is Unit.SHARE and amount > 1):
            raise ConfigError(
                "budget",
                expected="more than nothing and, for a share, at most 100%",
                found=repr(text),
                mend="Try 0.5%.",
            )
        return cls(amount, unit, text.strip())

    def limit(self, total_parameters: int) -> int:
        """The largest whole count (parameters, or bytes) within the budget.

        Arguments:
            total_parameters: of the model that the share refers to.

        Raises:
            ConfigError: the budget is above the model's size, or counts bits per weight.
        """
        if self.unit is Unit.BITS:
            raise ConfigError(
                "budget",
                expected="a share, a number of parameters or bytes",
                found=repr(self.text),
                mend="Bits per weight are a target of `sparing compress`.",
            )
        amount = self.amount * total_parameters if self.unit is Unit.SHARE else self.amount
        counts_bytes = self.unit is Unit.BYTES
        most = total_parameters * (_BYTES_PER_PARAMETER if counts_bytes else 1)
        if amount > most:
            counted = "bytes in float32" if counts_bytes else "parameters"
            raise ConfigError(
                "budget",
                expected=f"at most the model's own {most:,} {counted}",
                found=repr(self.text),
                mend="Give a smaller budget, or fine-tune the whole model.",
            )
        return int(amount)

    def __str__(self) -> str:
        return self.text
