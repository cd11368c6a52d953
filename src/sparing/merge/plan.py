"""Which tensor of which model goes where: everything that can be known without reading weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch

from sparing.errors import CheckpointError, ConfigError
from sparing.merge.experts import Expert, FullExpert
from sparing.shards import Checkpoint, TensorInfo, same_content

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_LISTED = 5  # names in a message
OnMismatch = Literal["error", "skip"]
Vocabulary = Literal["error", "base", "crop"]


@dataclass(frozen=True)
class Planned:
    """One tensor of the result.

    Arguments:
        info: its shape and type.
        sources: for every expert, its own name of the tensor, or None if it leaves it as it is.
        merged: whether it is merged; if not, it is the base's.
    """

    info: TensorInfo
    sources: tuple[str | None, ...]
    merged: bool


@dataclass(frozen=True)
class Plan:
    """The whole result.

    Arguments:
        tensors: by the base's names, in the order of its files.
        per_task: names of tensors that stay each task's own.
        notes: what a user should know, one sentence each.
        vocabulary: rows of the embeddings if they were cropped, else None.
    """

    tensors: dict[str, Planned]
    per_task: tuple[str, ...]
    notes: tuple[str, ...]
    vocabulary: int | None


class Planner:
    """Compares the models.

    Arguments:
        base: the base model.
        experts: models and adapters.
        dtype: of the result's floating tensors; None keeps the base's.
        on_mismatch: "error", or "skip": tensors that an expert lacks, or has in another shape,
            stay as they are in the base, and what the base lacks is left out.
        vocabulary: for embeddings of different length: "error"; "base" merges the rows that the
            base has, and a row that an expert lacks counts as unchanged; "crop" keeps the rows
            that all have.
        per_task: patterns of tensors that are not merged, such as task heads.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Expert],
        *,
        dtype: torch.dtype | None,
        on_mismatch: OnMismatch,
        vocabulary: Vocabulary,
        per_task: Sequence[str],
    ) -> None:
        self._base, self._experts, self._dtype = base, experts, dtype
        self._on_mismatch, self._vocabulary, self._patterns = on_mismatch, vocabulary, per_task
        self._notes: list[str] = []
        self._wrong: list[str] = []
        self._rows: int | None = None
        self._aliases = _tied_in(base)

    def plan(self) -> Plan:
        """Raises:
        CheckpointError: a model is of another architecture, quantised, or does not fit.
        ConfigError: a pattern matches nothing.
        """
        for expert in self._experts:
            self._check_config(expert)
        per_task = self._matching()
        names = [name for name in self._base.tensors if name not in self._aliases]
        if self._aliases:
            self._notes.append(f"tied, stored once: {_some(list(self._aliases))}")
        sources = {name: [self._source(e, name, per_task) for e in self._experts] for name in names}
        for expert in self._experts:
            self._check_extra(expert, per_task)
        if self._wrong:
            raise CheckpointError(
                "experts",
                expected="fine-tunes of the base, with its tensors",
                found=_some(self._wrong),
                mend="Merge fine-tunes of one base; on_mismatch=skip leaves these tensors as they "
                "are in the base.",
            )
        tensors = {name: self._planned(name, tuple(sources[name]), per_task) for name in names}
        return Plan(tensors, tuple(per_task), tuple(self._notes), self._rows)

    def _check_config(self, expert: Expert) -> None:
        base = self._base.config or {}
        theirs = expert.config or {}
        for config, label in ((base, "base"), (theirs, expert.label)):
            if "quantization_config" in config:
                raise CheckpointError(
                    f"model {label}",
                    expected="plain floating-point weights",
                    found="quantised ones",
                    mend="Give the unquantised checkpoint.",
                )
        for key in ("model_type", "hidden_size", "num_hidden_layers"):
            if key in base and key in theirs and base[key] != theirs[key]:
                raise CheckpointError(
                    f"expert {expert.label}",
                    expected=f"the base's architecture, {key} {base[key]}",
                    found=f"{key} {theirs[key]}",
                    mend="Merge fine-tunes of one base.",
                )

    def _matching(self) -> list[str]:
        found = []
        for pattern in self._patterns:
            names = [name for name in self._base.tensors if fnmatchcase(name, pattern)]
            theirs = (name for expert in self._experts for name in expert.shapes)
            if not names and not any(fnmatchcase(name, pattern) for name in theirs):
                raise ConfigError(
                    "per_task",
                    expected="patterns that match tensors, such as 'lm_head.*'",
                    found=repr(pattern),
                    mend="Check the names of the tensors.",
                )
            found += names
        return sorted(set(found))

    def _source(self, expert: Expert, name: str, per_task: Sequence[str]) -> str | None:
        info = self._base.tensors[name]
        if name in per_task or info.dtype in _WHOLE:
            return None
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor {name!r} of the base",
                expected="float64, float32, float16, bfloat16 or whole numbers",
                found=str(info.dtype).removeprefix("torch."),
                mend="Give the unquantised checkpoint.",
            )
        own = name if name in expert.shapes else self._alias(expert, name)
        if own is None:
            if expert.complete:
                self._mismatch(f"{expert.label} lacks {name!r}")
            return None
        theirs = expert.shapes[own]
        if theirs != info.shape and not self._fits_vocabulary(expert, name, theirs):
            shapes = f"{list(theirs)} instead of {list(info.shape)}"
            self._mismatch(f"{expert.label} has {name!r} of shape {shapes}")
            return None
        if isinstance(expert, FullExpert):
            dtype = expert.checkpoint.tensors[own].dtype
            if dtype not in FLOATS:
                kind = str(dtype).removeprefix("torch.")
                self._mismatch(f"{expert.label} has {name!r} in {kind}")
                return None
        return own

    def _alias(self, expert: Expert, name: str) -> str | None:
        """Another name under which an expert keeps a tensor that the base ties to this one."""
        tied = [alias for alias, owner in self._aliases.items() if owner == name]
        return next((alias for alias in tied if alias in expert.shapes), None)

    def _mismatch(self, text: str) -> None:
        if self._on_mismatch == "skip":
            self._notes.append(f"left as in the base: {text}")
        else:
            self._wrong.append(text)

    def _fits_vocabulary(self, expert: Expert, name: str, theirs: tuple[int, ...]) -> bool:
        info = self._base.tensors[name]
        words = (self._base.config or {}).get("vocab_size")
        if not theirs or info.shape[1:] != theirs[1:] or info.shape[0] != words:
            return False
        if self._vocabulary == "error":
            raise CheckpointError(
                f"tensor {name!r} of {expert.label}",
                expected=f"the base's vocabulary of {words}",
                found=f"{theirs[0]} rows",
                mend="Choose vocabulary=base (its rows; others are dropped or count as unchanged) "
                "or vocabulary=crop (the rows that all have).",
            )
        if self._vocabulary == "crop":
            self._rows = min(self._rows or info.shape[0], theirs[0], info.shape[0])
        self._notes.append(f"{expert.label} has {theirs[0]} rows of {name!r}, the base {words}")
        return True

    def _check_extra(self, expert: Expert, per_task: Sequence[str]) -> None:
        known = set(self._base.tensors)
        for name in expert.shapes:
            if name in known or any(fnmatchcase(name, pattern) for pattern in self._patterns):
                continue
            if isinstance(expert, FullExpert) and _tied_copy(expert.checkpoint, name, known):
                self._notes.append(f"{expert.label} stores {name!r}, which is tied, once more")
                continue
            self._mismatch(f"{expert.label} has {name!r}, which the base lacks")

    def _planned(
        self, name: str, sources: tuple[str | None, ...], per_task: Sequence[str]
    ) -> Planned:
        info = self._base.tensors[name]
        shape, dtype = info.shape, info.dtype
        words = (self._base.config or {}).get("vocab_size")
        if self._rows is not None and shape and shape[0] == words:
            shape = (self._rows, *shape[1:])
        if dtype in FLOATS and self._dtype is not None:
            dtype = self._dtype
        skipped = any(s is None and e.complete for s, e in zip(sources, self._experts, strict=True))
        merged = info.dtype in FLOATS and name not in per_task and not skipped
        merged = merged and any(source is not None for source in sources)
        return Planned(TensorInfo(dtype, shape), sources, merged)


def _tied_in(base: Checkpoint) -> dict[str, str]:
    """Matrices that are stored more than once, by the name of the one that is kept.

    Only a model whose config ties its embeddings is searched; equal matrices of another are two.
    """
    if not (base.config or {}).get("tie_word_embeddings"):
        return {}
    words = (base.config or {}).get("vocab_size")
    tables = [
        n for n, info in base.tensors.items() if len(info.shape) == 2 and info.shape[0] == words
    ]
    tables.sort(key=lambda name: ("shared" not in name, "embed" not in name and "wte" not in name))
    owner: dict[str, str] = {}
    for position, name in enumerate(tables):
        if name not in owner:
            for other in tables[position + 1 :]:
                if other not in owner and same_content(base, name, base, other):
                    owner[other] = name
    return owner


def _tied_copy(checkpoint: Checkpoint, name: str, known: set[str]) -> bool:
    return any(
        same_content(checkpoint, name, checkpoint, other)
        for other, info in checkpoint.tensors.items()
        if other in known and info == checkpoint.tensors[name] and len(info.shape) == 2
    )


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return "; ".join(texts[:_LISTED]) + more
