"""Packages that only a report needs, imported when it is written."""

import importlib
from types import ModuleType

from sparing.errors import MissingExtraError


def require(module: str, extra: str = "compare") -> ModuleType:
    """Import a module of an extra.

    Arguments:
        module: to import.
        extra: that brings it, to name where it is missing.

    Raises:
        MissingExtraError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError.of(package, extra) from error
