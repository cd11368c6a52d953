"""Who can take part in a comparison: our methods, LoRA, any method of PEFT, full fine-tuning."""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from sparing import adapt
from sparing.catalog import CATALOG, ready
from sparing.errors import ConfigError, near_matches
from sparing.tuners import TunerConfig

# The integer option of PEFT's own methods that sets their size, and the one that sets it by module.
PEFT_SIZE_OPTIONS: dict[str, tuple[str, str | None]] = {
    "lora": ("r", "rank_pattern"),
    "adalora": ("init_r", None),
    "loha": ("r", "rank_pattern"),
    "lokr": ("r", "rank_pattern"),
    "hira": ("r", "rank_pattern"),
    "hra": ("r", None),
    "vera": ("r", None),
    "pvera": ("r", None),
    "randlora": ("r", None),
    "shira": ("r", None),
    "miss": ("r", None),
    "delora": ("r", "rank_pattern"),
    "gralora": ("r", None),
    "fourierft": ("n_frequency", None),
    "waveft": ("n_frequency", None),
    "vblora": ("num_vectors", None),
}
PEFT_LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "lora": (5e-4, 2e-3, 5e-3),
    "vera": (4e-3, 1e-2, 4e-2),
    "ia3": (3e-3, 1e-2, 3e-2),
    "fourierft": (3e-3, 1e-2, 3e-2),
    "loha": (5e-4, 2e-3, 5e-3),
    "shira": (5e-4, 2e-3, 5e-3),
    "ln_tuning": (5e-4, 2e-3, 5e-3),
}
DEFAULT_LEARNING_RATES = (5e-4, 2e-3, 5e-3)
FULL_LEARNING_RATES = (1e-5, 3e-5, 1e-4)


@dataclass(frozen=True)
class Competitor:
    """One method, ready to be sized.

    Arguments:
        name: as given by the user.
        title: for people.
        config_class: None for full fine-tuning.
        fixed: options that the solver leaves alone.
        size_option: integer option that the solver sets; None if the size is fixed.
        size_pattern_option: option that sets the size by module, or None.
        smaller_options: to fall back to, in order, where even the smallest size is too large.
        learning_rates: default grid.
    """

    name: str
    title: str
    config_class: type[PeftConfig] | None
    fixed: dict[str, Any] = field(default_factory=dict)
    size_option: str | None = None
    size_pattern_option: str | None = None
    smaller_options: tuple[dict[str, Any], ...] = ()
    learning_rates: tuple[float, ...] = DEFAULT_LEARNING_RATES

    @property
    def bound_to_base(self) -> bool:
        """Whether the adapter depends on the very weights it is put on."""
        return bool(getattr(self.config_class, "bound_to_base", False))

    def config(self, options: Mapping[str, Any], target_modules: Any, seed: int = 0) -> PeftConfig:
        """The PEFT config with these options on top of the fixed ones."""
        assert self.config_class is not None
        chosen: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": target_modules}
        chosen |= {**self.fixed, **options}
        known = inspect.signature(self.config_class).parameters
        if "seed" in known:
            chosen.setdefault("seed", seed)
        unknown = sorted(set(chosen) - set(known) - {"target_modules"})
        if unknown:
            raise ConfigError(
                f"method {self.name!r}, option {unknown[0]!r}",
                expected=f"an option of {self.config_class.__name__}",
                found="no such option",
                mend=near_matches(unknown[0], sorted(known)),
            )
        return self.config_class(**{k: v for k, v in chosen.items() if k in known})


def split_methods(text: str) -> list[str]:
    """Split `lora,mos,peft:vera{"r":256}` at the commas outside braces.

    `all-adapt` stands for LoRA and all of our methods that are not named beside it.
    """
    names = [name.strip() for name in re.split(r",(?![^{]*\})", text) if name.strip()]
    expanded: list[str] = []
    ours = [slug for slug, config in _our_configs().items() if config.starts_fresh]
    for name in names:
        others = [one for one in ("lora", *ours) if one not in names]
        expanded += others if name == "all-adapt" else [name]
    if not expanded:
        raise ConfigError(
            "methods", expected="at least one name", found=repr(text), mend="Try lora,mos."
        )
    repeated = {name for name in expanded if expanded.count(name) > 1}
    if repeated:
        raise ConfigError(
            "methods",
            expected="every method once",
            found=f"{sorted(repeated)[0]!r} more than once",
            mend="Remove the repetition.",
        )
    return expanded


def competitor(name: str) -> Competitor:
    """Look up `lora`, one of our slugs, `peft:<name>`, `peft:<name>{json options}` or `full`.

    Raises:
        ConfigError: unknown, or planned but not built yet.
    """
    match = re.fullmatch(r"([\w:-]+)(\{.*\})?", name, re.DOTALL)
    bare, options = (match.group(1), _options(name, match.group(2))) if match else (name, {})
    if bare == "full":
        return Competitor(name, "full fine-tuning", None, learning_rates=FULL_LEARNING_RATES)
    if bare == "lora":
        return _peft_competitor(name, "lora", options)
    if bare.startswith("peft:"):
        return _peft_competitor(name, bare.removeprefix("peft:"), options)
    ours = _our_configs()
    if bare in ours:
        if not ours[bare].starts_fresh:
            raise ConfigError(
                f"method {name!r}",
                expected="a method that is trained from scratch",
                found="one that is put together from trained adapters",
                mend="Train the adapters first and use `sparing route`.",
            )
        config_class = ours[bare]
        title = next(m.title.split(":")[0] for m in CATALOG if m.slug == bare)
        return _sized(
            Competitor(
                name,
                title,
                config_class,
                options,
                config_class.size_option,
                config_class.size_pattern_option,
                config_class.smaller_options,
                config_class.learning_rates,
            )
        )
    planned = {m.slug for m in CATALOG if m.status == "planned"}
    peft_names = [f"peft:{kind.value.lower()}" for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    raise ConfigError(
        f"method {name!r}",
        expected="lora, full, one of our fine-tuning methods or peft:<name>",
        found="a method that is planned" if bare in planned else "none of these",
        mend=near_matches(bare, ["lora", "full", *sorted(ours), *sorted(peft_names)]),
    )


def _our_configs() -> dict[str, type[TunerConfig]]:
    """By slug, in the order of the catalog."""
    found = {
        value.method.replace("_", "-"): value
        for value in vars(adapt).values()
        if isinstance(value, type) and issubclass(value, TunerConfig)
    }
    return {m.slug: found[m.slug] for m in ready("adapt") if m.slug in found}


def _peft_competitor(name: str, method: str, options: dict[str, Any]) -> Competitor:
    ours = {config.method for config in _our_configs().values()}
    kinds = {kind.value.lower(): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    kinds = {name: kind for name, kind in kinds.items() if name not in ours}
    if method not in kinds:
        raise ConfigError(
            f"method {name!r}",
            expected="a method of PEFT",
            found="no such method",
            mend=near_matches(method, sorted(kinds)),
        )
    size, pattern = PEFT_SIZE_OPTIONS.get(method, (None, None))
    rates = PEFT_LEARNING_RATES.get(method, DEFAULT_LEARNING_RATES)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[method]]
    title = "LoRA" if method == "lora" else config_class.__name__.removesuffix("Config")
    return _sized(
        Competitor(name, title, config_class, options, size, pattern, learning_rates=rates)
    )


def _sized(entry: Competitor) -> Competitor:
    """A size that the user gives is not solved for."""
    if {entry.size_option, entry.size_pattern_option} & set(entry.fixed):
        return dataclasses.replace(entry, size_option=None, size_pattern_option=None)
    return entry


def _options(name: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"method {name!r}",
            expected='options as JSON, such as peft:lora{"r": 8}',
            found=str(error),
            mend="Quote the whole word for the shell.",
        ) from error
    return dict(options)
