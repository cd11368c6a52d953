"""Choose a method's size options so that it fits a budget: never above, as near as it can."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from sparing import pretrained
from sparing.budget import Budget, Unit
from sparing.compare.competitors import Competitor
from sparing.errors import ConfigError, near_matches

FAR_BELOW = 0.2
LARGEST_SIZE = 2**24
LARGEST_GAP = 16  # between sizes that a method allows, such as the multiples of something


@dataclass(frozen=True)
class Size:
    """What a configuration costs: trainable parameters, and bytes of its saved weight file."""

    parameters: int
    file_bytes: int

    def __getitem__(self, unit: Unit) -> int:
        return self.file_bytes if unit is Unit.BYTES else self.parameters


@dataclass(frozen=True)
class Sizing:
    """A method made to fit.

    Arguments:
        options: to be given to the method's config.
        size: with these options.
        share: of the budget that is used.
        note: a remark when the method stays far below the budget; else empty.
    """

    options: dict[str, Any]
    size: Size
    share: float
    note: str

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Sizing":
        """From what `dataclasses.asdict` made of it."""
        return cls(**{**content, "size": Size(**content["size"])})


class MetaModel:
    """The architecture of a model without its weights, to count what adapters add to it.

    Arguments:
        source: folder or hub id with a `config.json`.
        target_modules: what every method adapts.
        weights: load them all the same, as some methods store what depends on them.

    Raises:
        ConfigError: there is no such model, or it has no such modules.
        CheckpointError: its config is damaged.
    """

    def __init__(self, source: str, target_modules: Any, *, weights: bool = False) -> None:
        self._source = source
        self._device = "cpu" if weights else "meta"
        self._base = self._build()
        _check_targets(self._base, target_modules)
        self.target_modules = target_modules
        self.parameters = sum(p.numel() for p in self._base.parameters())

    def with_weights(self) -> "MetaModel":
        """The same with its weights in memory."""
        return MetaModel(self._source, self.target_modules, weights=True)

    def size(self, competitor: Competitor, options: Mapping[str, Any]) -> Size:
        """Cost of a competitor with these options, counted on the adapted architecture itself."""
        if competitor.config_class is None:
            return Size(self.parameters, 4 * self.parameters)
        with self._adapted(competitor, options) as model:
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            return Size(trainable, _file_bytes(model))

    def module_kinds(self, competitor: Competitor, options: Mapping[str, Any]) -> list[str]:
        """Last names of the modules it adapts, such as q_proj, in the model's order."""
        with self._adapted(competitor, options) as model:
            names: list[str] = model.base_model.targeted_module_names  # type: ignore[assignment]
            return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))

    @contextmanager
    def _adapted(
        self, competitor: Competitor, options: Mapping[str, Any]
    ) -> Iterator[PeftModel | PeftMixedModel]:
        def config() -> PeftConfig:
            return competitor.config(options, self.target_modules)

        try:
            with torch.device(self._device):
                model = get_peft_model(self._base, config())
        except Exception as error:
            self._base = self._build()  # some layers may have been adapted
            if not isinstance(error, NotImplementedError):
                raise
            # The method looks at the weights, as PEFT's SHiRA does; any weights will do.
            model = get_peft_model(pretrained.architecture(self._source), config())
        try:
            yield model
        finally:
            model.unload()

    def _build(self) -> nn.Module:
        if self._device == "cpu":
            return pretrained.load(self._source).model
        with torch.device(self._device):
            return pretrained.architecture(self._source)


def _check_targets(model: nn.Module, target_modules: Any) -> None:
    """PEFT is content if one of several names matches; here every one has to."""
    if target_modules in (None, "all-linear"):
        return
    names = [name for name, _ in model.named_modules() if name]
    alone = isinstance(target_modules, str)
    for target in [target_modules] if alone else target_modules:
        config = LoraConfig(target_modules=target if alone else [target])
        if not any(check_target_module_exists(config, name) for name in names):
            kinds = {name.rsplit(".", 1)[-1] for name in names}
            raise ConfigError(
                "target_modules",
                expected="names of modules that the model has, or a regular expression for them",
                found=repr(target),
                mend=near_matches(target, sorted(k for k in kinds if not k.isdigit())),
            )


def solve(competitor: Competitor, model: MetaModel, budget: Budget) -> Sizing:
    """The largest size within the budget.

    First the largest uniform value of the method's size option. If the method also takes the size
    by module, some kinds of module are then raised by one, such that what is left of the budget is
    used as far as possible; every combination is tried. A method whose smallest size is too large
    falls back to its `smaller_options`, in their order.

    Raises:
        ConfigError: even the smallest configuration is above the budget.
    """
    limit = budget.limit(model.parameters)
    if budget.unit is Unit.BYTES and competitor.bound_to_base:
        model = model.with_weights()  # which entries are chosen decides how they are stored
    refusal: ConfigError | None = None
    for fallback in ({}, *competitor.smaller_options):
        fixed = competitor.fixed
        leaner = dataclasses.replace(competitor, fixed={**fallback, **fixed})
        try:
            chosen = _fit(leaner, model, budget.unit, limit)
            size = model.size(leaner, chosen)
        except ConfigError as error:  # no size suits the widths or the number of layers
            refusal = refusal or error
            continue
        if size[budget.unit] <= limit:
            share = size[budget.unit] / limit
            note = f"{1 - share:.0%} below the budget" if share < 1 - FAR_BELOW else ""
            given = {option: value for option, value in fallback.items() if option not in fixed}
            return Sizing({**given, **chosen}, size, share, note)
        counted = "bytes" if budget.unit is Unit.BYTES else "parameters"
        refusal = ConfigError(
            f"budget {budget}, method {competitor.name!r}",
            expected=f"at least the method's smallest size, {size[budget.unit]:,} {counted}",
            found=f"{limit:,} {counted}",
            mend="Give a larger budget, or fewer target modules.",
        )
    assert refusal is not None
    raise refusal


def _fit(competitor: Competitor, model: MetaModel, unit: Unit, limit: int) -> dict[str, Any]:
    """The size options of the largest configuration within the limit, or of the smallest of all."""

    def cost(options: Mapping[str, Any]) -> int | None:
        try:
            return model.size(competitor, options)[unit]
        except ValueError:  # a size that the method or the widths of the layers do not allow
            return None

    if competitor.size_option is None:
        return {}
    option = competitor.size_option
    options: dict[str, Any] = {option: _largest(lambda value: cost({option: value}), limit)}
    if competitor.size_pattern_option:
        pattern = _raised(competitor, model, cost, options[option], limit)
        if pattern:
            options[competitor.size_pattern_option] = pattern
    return options


def _largest(cost: Callable[[int], int | None], limit: int) -> int:
    """The largest allowed whole number from 1 whose cost is within the limit, or, if there is none,
    the smallest allowed one; costs never fall."""

    def allowed_from(value: int) -> tuple[int, int] | None:
        for size in range(value, value + LARGEST_GAP):
            found = cost(size)
            if found is not None:
                return size, found
        return None

    first = allowed_from(1)
    second = allowed_from(first[0] + 1) if first else None
    if first is None or second is None or second[1] > limit:
        return first[0] if first else 1
    (one, cost_one), (two, cost_two) = first, second
    if cost_two > cost_one:  # costs are nearly always linear
        guess = one + (limit - cost_one) * (two - one) // (cost_two - cost_one)
        found, after = cost(guess), allowed_from(guess + 1)
        if found is not None and found <= limit and (after is None or after[1] > limit):
            return guess
    within, above = two, 2 * two
    while above < LARGEST_SIZE and (probe := allowed_from(above)) and probe[1] <= limit:
        within, above = probe[0], 2 * above
    while above - within > 1:
        middle = (above + within) // 2
        probe = allowed_from(middle)
        if probe and probe[0] < above and probe[1] <= limit:
            within = probe[0]
        else:
            above = middle
    return within


def _raised(
    competitor: Competitor,
    model: MetaModel,
    cost: Callable[[Mapping[str, Any]], int | None],
    uniform: int,
    limit: int,
) -> dict[str, int]:
    """Which kinds of module get one more than the uniform size."""
    assert competitor.size_option is not None
    assert competitor.size_pattern_option is not None
    size, pattern = competitor.size_option, competitor.size_pattern_option

    def raised(kinds: tuple[str, ...]) -> int:
        found = cost({size: uniform, pattern: {kind: uniform + 1 for kind in kinds}})
        return limit + 1 if found is None else found

    if raised(()) > limit:
        return {}

    kinds = model.module_kinds(competitor, {size: uniform})
    start = raised(())
    gains = {kind: raised((kind,)) - start for kind in kinds}
    choices = sorted(
        (sum(gains[kind] for kind in chosen), chosen)
        for count in range(1, len(kinds) + 1)
        for chosen in combinations(kinds, count)
    )
    for gain, chosen in reversed(choices):
        # File sizes are not quite additive (names in the header), so the choice is counted.
        if gain > 0 and start + gain <= limit and raised(chosen) <= limit:
            return {kind: uniform + 1 for kind in chosen}
    return {}


def _file_bytes(model: nn.Module) -> int:
    """Size of the safetensors file that `save_pretrained` would write."""
    named = get_peft_model_state_dict(model, save_embedding_layers=False).items()
    # safetensors lays tensors out by type, in this order, and then by name.
    order = list(_SAFETENSORS_NAMES)
    tensors = dict(sorted(named, key=lambda item: (order.index(item[1].dtype), item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + offset


_SAFETENSORS_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
