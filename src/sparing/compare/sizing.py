"""Choose a method's size options so that it fits a budget: never above, as near as it can."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparing.budget import Budget, Unit
from sparing.compare.competitors import Competitor
from sparing.errors import ConfigError

FAR_BELOW = 0.2
LARGEST_SIZE = 2**24


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
    """

    def __init__(self, source: str, target_modules: Any) -> None:
        self._source = source
        self._base = self._build("meta")
        self.target_modules = target_modules
        self.parameters = sum(p.numel() for p in self._base.parameters())

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
        try:
            with torch.device("meta"):
                model = get_peft_model(self._base, competitor.config(options, self.target_modules))
        except NotImplementedError:  # a method that looks at the weights, such as PEFT's SHiRA
            self._base = self._build("cpu")
            model = get_peft_model(self._base, competitor.config(options, self.target_modules))
        try:
            yield model
        finally:
            self._base = model.unload()

    def _build(self, device: str) -> nn.Module:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self._source))


def solve(competitor: Competitor, model: MetaModel, budget: Budget) -> Sizing:
    """The largest size within the budget.

    First the largest uniform value of the method's size option. If the method also takes the size
    by module, some kinds of module are then raised by one, such that what is left of the budget is
    used as far as possible; every combination is tried.

    Raises:
        ConfigError: even the smallest configuration is above the budget.
    """
    limit = budget.limit(model.parameters)

    def cost(options: Mapping[str, Any]) -> int:
        try:
            return model.size(competitor, options)[budget.unit]
        except ConfigError:  # sizes between that the layers' widths do not allow
            return limit + 1

    if competitor.size_option is None:
        options: dict[str, Any] = {}
        smallest = model.size(competitor, options)[budget.unit]
    else:
        option = competitor.size_option
        smallest = model.size(competitor, {option: 1})[budget.unit]
        uniform = _largest(lambda value: cost({option: value}), limit, smallest)
        options = {option: uniform}
        if competitor.size_pattern_option and smallest <= limit:
            pattern = _raised(competitor, model, cost, uniform, limit)
            if pattern:
                options[competitor.size_pattern_option] = pattern
    size = model.size(competitor, options)
    if size[budget.unit] > limit:
        counted = "bytes" if budget.unit is Unit.BYTES else "parameters"
        raise ConfigError(
            f"budget {budget}, method {competitor.name!r}",
            expected=f"at least the method's smallest size, {smallest:,} {counted}",
            found=f"{limit:,} {counted}",
            mend="Give a larger budget, or fewer target modules.",
        )
    share = size[budget.unit] / limit
    note = f"{1 - share:.0%} below the budget" if share < 1 - FAR_BELOW else ""
    return Sizing(options, size, share, note)


def _largest(cost: Callable[[int], int], limit: int, smallest: int) -> int:
    """The largest whole number from 1 whose cost is within the limit; costs never fall."""
    if smallest > limit:
        return 1
    step = cost(2) - smallest
    guess = 1 + (limit - smallest) // step if step > 0 else LARGEST_SIZE
    if step > 0 and cost(guess) <= limit < cost(guess + 1):  # costs are nearly always linear
        return guess
    above = 2
    while above < LARGEST_SIZE and cost(above) <= limit:
        above *= 2
    within = above // 2
    while above - within > 1:
        middle = (above + within) // 2
        within, above = (middle, above) if cost(middle) <= limit else (within, middle)
    return within


def _raised(
    competitor: Competitor,
    model: MetaModel,
    cost: Callable[[Mapping[str, Any]], int],
    uniform: int,
    limit: int,
) -> dict[str, int]:
    """Which kinds of module get one more than the uniform size."""
    assert competitor.size_option is not None
    assert competitor.size_pattern_option is not None
    size, pattern = competitor.size_option, competitor.size_pattern_option

    def raised(kinds: tuple[str, ...]) -> int:
        return cost({size: uniform, pattern: {kind: uniform + 1 for kind in kinds}})

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
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
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
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
