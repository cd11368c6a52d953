"""What a user of a method writes down, and the random choices that follow from its seed."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from sparing.errors import ConfigError


@dataclass
class TunerConfig(PeftConfig):
    """Options that all our fine-tuning methods share.

    Arguments:
        target_modules: names or a regular expression of the layers to adapt, or "all-linear".
        exclude_modules: names or a regular expression of layers to leave out.
        layers_to_transform: only blocks with these numbers.
        layers_pattern: name of the block list, if it is not a common one.
        modules_to_save: other modules to train in full and save (a task head, say).
        seed: of every random choice; same seed, same adapter, on any device and world size.
        base_fingerprint: filled in at first use by methods that train entries of the base weights;
            guards against loading on another base model.

    Class attributes for budgets and comparisons:
        method: name in PEFT, lower case with underscores.
        bound_to_base: whether the adapter makes sense only on the very weights it was trained on.
        starts_fresh: whether it is trained from scratch; False for methods that are put together
            from trained adapters, which comparisons leave out.
        size_option: the integer option that sets the number of trainable parameters.
        size_pattern_option: the option that sets it per module, if there is one.
        smaller_options: options to fall back to, in order, where the defaults exceed a budget or
            do not suit a model.
        learning_rates: a grid around the paper's, ascending.
    """

    method: ClassVar[str]
    bound_to_base: ClassVar[bool] = False
    starts_fresh: ClassVar[bool] = True
    size_option: ClassVar[str]
    size_pattern_option: ClassVar[str | None] = None
    smaller_options: ClassVar[tuple[dict[str, Any], ...]] = ()
    learning_rates: ClassVar[tuple[float, ...]]

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    seed: int = 0
    base_fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method.upper()]
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def require(self, option: str, holds: bool, expected: str, mend: str) -> None:
        """Raise a `ConfigError` that names the option unless its value `holds`."""
        if not holds:
            raise ConfigError(
                f"{type(self).__name__}.{option}",
                expected=expected,
                found=repr(getattr(self, option)),
                mend=mend,
            )


def option_for(pattern: dict[str, Any] | None, module_name: str, default: Any) -> Any:
    """The value of a per-module option: that of the matching key of `pattern`, or `default`.

    Keys match as in PEFT's `rank_pattern`: the end of a module name, or a regular expression.
    """
    if not pattern:
        return default
    return pattern.get(get_pattern_key(list(pattern), module_name), default)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for one random choice: other names, other numbers.

    Arguments:
        seed: of the adapter.
        name: of the module and of what is drawn for it.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
