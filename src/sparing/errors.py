"""Errors that teach: where it happened, what was expected, what was found, how to mend it."""


class SparingError(Exception):
    """A mistake in the input that the user can mend.

    Arguments:
        where: the module, tensor, file or option at fault.
        expected: what a valid input looks like.
        found: what was there instead.
        mend: the next thing to do.
    """

    def __init__(self, where: str, *, expected: str, found: str, mend: str) -> None:
        self.where, self.expected, self.found, self.mend = where, expected, found, mend
        super().__init__(where, expected, found, mend)

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, found {self.found}. {self.mend}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.where, self.expected, self.found, self.mend)


def _rebuild(
    kind: type[SparingError], where: str, expected: str, found: str, mend: str
) -> SparingError:
    return kind(where, expected=expected, found=found, mend=mend)


class ConfigError(SparingError, ValueError):
    """An option has a value that cannot work."""


class DataError(SparingError, ValueError):
    """Training or calibration data cannot be used."""


class CheckpointError(SparingError, ValueError):
    """A file of weights, or a run folder, is damaged, missing or belongs to something else."""


class MissingExtraError(SparingError, ImportError):
    """A room needs a package that the base install leaves out."""

    @classmethod
    def of(cls, package: str, extra: str) -> "MissingExtraError":
        return cls(
            f"package {package!r}",
            expected="it to be installed",
            found="nothing of that name",
            mend=f"Run: pip install 'sparing[{extra}]'",
        )


def near_matches(word: str, choices: list[str]) -> str:
    """A phrase that names the closest valid choices, for the `mend` of an unknown name."""
    from difflib import get_close_matches

    close = get_close_matches(word, choices, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Choose one of: {', '.join(choices)}."
