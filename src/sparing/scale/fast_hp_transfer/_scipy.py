"""SciPy, imported where it is needed: the base install does without it."""

from importlib import import_module
from types import ModuleType

from sparing.errors import MissingExtraError


def scipy_part(name: str) -> ModuleType:
    """A part of SciPy, such as "optimize".

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    try:
        return import_module(f"scipy.{name}")
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("scipy", "compare") from error
