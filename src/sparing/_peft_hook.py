"""Register the methods of `sparing.adapt` with PEFT as soon as PEFT is imported."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def install() -> None:
    """Make `peft.PeftModel.from_pretrained` know our adapters after `import sparing`."""
    if "peft" in sys.modules:
        importlib.import_module("sparing.adapt")
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder(MetaPathFinder):
    """Waits for the first `import peft`, then steps aside.

    Being asked where PEFT is (`importlib.util.find_spec`, as transformers does) is no import yet.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)  # lest it asks itself
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        run_peft = spec.loader.exec_module

        def run_peft_then_register(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            run_peft(module)
            if "sparing.tuners" not in sys.modules:  # else that module, half loaded, asked for PEFT
                importlib.import_module("sparing.adapt")

        spec.loader.exec_module = run_peft_then_register  # type: ignore[method-assign]
        return spec
