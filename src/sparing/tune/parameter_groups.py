"""Parameters in groups that a binary mask switches on and off (MemControl, table of blocks)."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sparing.errors import ConfigError, near_matches
from sparing.tune import difffit, svdiff
from sparing.tune.blocks import Coverage, is_unet, legacy_blocks, switchable_blocks

Family = Literal["svdiff", "difffit", "attention", "full"]
Chooses = Callable[[str, nn.Parameter], bool]
Mask = str | Sequence[bool] | Sequence[int]
FAMILIES = ("svdiff", "difffit", "attention", "full")
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class ParameterGroup:
    """What one bit switches.

    Arguments:
        name: of the block, or "outside the blocks".
        parameters: names in the model.
    """

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class ParameterGroups:
    """A partition of all parameters that may be trained.

    Arguments:
        family: of parameters, such as "svdiff"; "custom" for a function of the user's.
        coverage: "strict" or "legacy".
        groups: one a bit, in the order of the mask.
        always: names of parameters that every mask trains.
    """

    family: str
    coverage: Coverage
    groups: tuple[ParameterGroup, ...]
    always: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, in the order of the mask."""
        return tuple(group.name for group in self.groups)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters that some mask trains."""
        return (*self.always, *(name for group in self.groups for name in group.parameters))

    def mask(self, mask: Mask) -> tuple[bool, ...]:
        """A mask as booleans; text is of the digits 0 and 1.

        Raises:
            ConfigError: it has another length than there are groups, or other values.
        """
        bits = [int(bit) if bit in ("0", "1") else bit for bit in mask]
        if any(bit not in (0, 1) for bit in bits):
            raise ConfigError(
                "mask",
                expected="zeros and ones",
                found=repr(mask),
                mend="For example: '1' * len(groups).",
            )
        if len(bits) != len(self):
            raise ConfigError(
                "mask",
                expected=f"{len(self)} bits, one for each of {', '.join(self.names)}",
                found=f"{len(bits)} bits",
                mend="Give one bit a group, in this order.",
            )
        return tuple(bool(bit) for bit in bits)

    def active(self, mask: Mask) -> tuple[str, ...]:
        """Names of the parameters that a mask trains."""
        chosen = zip(self.groups, self.mask(mask), strict=True)
        return (*self.always, *(name for group, on in chosen if on for name in group.parameters))

    def apply_mask(self, model: nn.Module, mask: Mask, *, allow_empty: bool = False) -> None:
        """Freeze all of a model but what the mask trains.

        Build the optimiser afterwards, from `optimizer_groups`: one that also holds frozen
        parameters would still decay them and keep their moments.

        Raises:
            ConfigError: the mask does not fit, trains nothing, or names another model's parameters.
        """
        active = self.active(mask)
        if not active and not allow_empty:
            raise ConfigError(
                "mask",
                expected="at least one group to train",
                found="only zeros, with strict coverage",
                mend="Set a bit, or name parameters to train always.",
            )
        known = dict(model.named_parameters())
        missing = [name for name in self.parameters if name not in known]
        if missing:
            raise ConfigError(
                missing[0],
                expected="a parameter of this model",
                found="none of that name",
                mend="Make the groups from this model: block_groups(model, ...).",
            )
        model.requires_grad_(False)
        for name in active:
            known[name].requires_grad_(True)

    def optimizer_groups(
        self, model: nn.Module, mask: Mask, lr: float, lr_1d: float | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: those that the mask trains and no others.

        Arguments:
            lr: learning rate.
            lr_1d: that of SVDiff's δ of vectors, or None for the same.
        """
        of_vectors = {f"{n}.delta" for n, shift in svdiff.shifts(model) if shift.is_vector}
        known = dict(model.named_parameters())
        active = self.active(mask)
        rates = {lr: [n for n in active if lr_1d is None or n not in of_vectors]}
        if lr_1d is not None:
            rates.setdefault(lr_1d, []).extend(n for n in active if n in of_vectors)
        return [
            {"params": [known[name] for name in names], "lr": rate}
            for rate, names in rates.items()
            if names
        ]

    def count(self, model: nn.Module, mask: Mask) -> int:
        """How many parameters a mask trains."""
        known = dict(model.named_parameters())
        return sum(known[name].numel() for name in self.active(mask))


def block_groups(
    model: nn.Module,
    family: Family | Chooses = "svdiff",
    *,
    coverage: Coverage = "strict",
    blocks: Sequence[str] | Callable[[nn.Module], Sequence[str]] | None = None,
    always: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> ParameterGroups:
    """Partition a family's parameters by blocks; installs SVDiff or DiffFit where it is missing.

    "strict" makes every parameter of the family part of exactly one group: one group a block, and a
    last one for what lies outside all blocks. No bit set means that nothing is trained.

    "legacy" is what the released code does, for UNets: bits reach only `transformer_blocks` of
    some attention blocks (and of those only attention, in the family of that name); everything
    else in the family is trained always.

    Arguments:
        model: the network; its parameters are frozen until a mask is applied.
        family: "svdiff" (shifts of singular values), "difffit" (biases, norms, scales),
            "attention" (all parameters of a UNet's attention blocks; elsewhere those in modules
            called attn or attention), "full", or a function from name and parameter to whether it
            is trained.
        coverage: "strict" or "legacy".
        blocks: names of modules, or a function that finds them in the model; by default attention
            blocks of a UNet, and repeated blocks of any other model.
        always: regular expressions; parameters with a match in their name are trained always.
        freeze: regular expressions; those are never trained.

    Raises:
        ConfigError: an option cannot work, or no block has parameters of the family.
    """
    _check(model, family, coverage, blocks)
    chosen = _family(model, family)
    model.requires_grad_(False)
    forced = [name for name in chosen if _matches(name, always)]
    rest = [n for n in chosen if not _matches(n, always) and not _matches(n, freeze)]
    if coverage == "legacy":
        groups = _legacy(model, str(family), rest)
    else:
        groups = _strict(rest, _block_names(model, blocks))
    taken = {name for group in groups for name in group.parameters}
    left = [name for name in rest if name not in taken]
    if not taken:
        raise ConfigError(
            "blocks",
            expected=f"parameters of the family {_name(family)} inside the blocks",
            found="none",
            mend="Choose other blocks, another family, or fewer parameters to freeze.",
        )
    if coverage == "strict" and left:
        groups.append(ParameterGroup(OUTSIDE, tuple(left)))
        left = []
    return ParameterGroups(_name(family), coverage, tuple(groups), (*forced, *left))


def _name(family: Family | Chooses) -> str:
    return family if isinstance(family, str) else "custom"


def _check(model: nn.Module, family: Any, coverage: Any, blocks: Any) -> None:
    if isinstance(family, str) and family not in FAMILIES:
        raise ConfigError(
            "family",
            expected="a family of parameters",
            found=repr(family),
            mend=near_matches(family, list(FAMILIES)),
        )
    if coverage not in ("strict", "legacy"):
        raise ConfigError(
            "coverage",
            expected="'strict' or 'legacy'",
            found=repr(coverage),
            mend="'strict' masks all there is; 'legacy' is the released code.",
        )
    if coverage == "legacy" and (blocks is not None or not is_unet(model) or family == "full"):
        raise ConfigError(
            "coverage",
            expected="'strict', for chosen blocks, for the family full and for all but UNets",
            found="'legacy'",
            mend="Leave out coverage.",
        )


def _family(model: nn.Module, family: Family | Chooses) -> list[str]:
    if family == "svdiff":
        return svdiff.install(model)
    if family == "difffit":
        difffit.install(model)
    chooses = family if callable(family) else _CHOICES[family](model)
    return [name for name, parameter in model.named_parameters() if chooses(name, parameter)]


def _attention(model: nn.Module) -> Chooses:
    pattern = r"\.attentions\." if is_unet(model) else r"(attn|attention)\d*\."
    return lambda name, _: re.search(pattern, f".{name}") is not None


_CHOICES: dict[str, Callable[[nn.Module], Chooses]] = {
    "difffit": lambda model: lambda name, _: difffit.belongs(name),
    "attention": _attention,
    "full": lambda model: lambda name, _: True,
}


def _block_names(model: nn.Module, blocks: Any) -> list[str]:
    names = list(blocks(model) if callable(blocks) else blocks or switchable_blocks(model))
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise ConfigError(
                "blocks",
                expected="names of modules",
                found=repr(name),
                mend=near_matches(name, known),
            )
    for outer in names:
        for inner in names:
            if inner.startswith(f"{outer}."):
                raise ConfigError(
                    "blocks",
                    expected="blocks beside one another",
                    found=f"{inner} inside {outer}",
                    mend="Leave one of them out.",
                )
    return names


def _strict(names: Iterable[str], blocks: Iterable[str]) -> list[ParameterGroup]:
    names = list(names)
    found = [
        ParameterGroup(block, tuple(name for name in names if name.startswith(f"{block}.")))
        for block in blocks
    ]
    return [group for group in found if group.parameters]


def _legacy(model: nn.Module, family: str, names: list[str]) -> list[ParameterGroup]:
    if family == "attention":
        names = [name for name in names if "attn" in name]
    blocks = legacy_blocks(model, family)
    groups = _strict(names, [f"{block}.transformer_blocks" for block in blocks])
    return [
        ParameterGroup(group.name.removesuffix(".transformer_blocks"), group.parameters)
        for group in groups
    ]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
