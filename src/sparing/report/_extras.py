"""Packages that only a report needs, imported when it is written."""

import importlib
from types import ModuleType

from sparing.errors import MissingExtraError


def require(module: str) -> ModuleType:
    """Import a module of the `compare` extra.

    Raises:
        MissingExtraError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError.of(package, "compare") from error
