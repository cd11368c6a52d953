"""Reads the base and the task vectors of all experts, block by block, from their files."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from sparing.errors import CheckpointError
from sparing.merge.experts import Expert, require_finite
from sparing.merge.plan import Plan
from sparing.merge.view import Block
from sparing.shards import Checkpoint, TensorInfo

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SAMPLE = 4096  # numbers that tell a fine-tune from another model


def arithmetic_of(choice: str, base: Checkpoint, experts: Sequence[Expert]) -> torch.dtype:
    """The type to compute in: "auto" is float64 where float32 or float64 weights come in."""
    if choice != "auto":
        return DTYPES[choice]
    infos = list(base.tensors.values())
    for expert in experts:
        checkpoint = getattr(expert, "checkpoint", None)
        if expert.complete and checkpoint is not None:
            infos += checkpoint.tensors.values()
    precise = any(info.dtype in (torch.float32, torch.float64) for info in infos)
    return torch.float64 if precise else torch.float32


class Reader:
    """Reads blocks of the base and of all task vectors.

    Attributes:
        sizes: of the tensors to be merged.
        dtype: of all that is read.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Expert],
        plan: Plan,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self._base, self._experts, self._plan = base, experts, plan
        self.dtype, self._device = dtype, device
        self.sizes = {n: p.info.numel for n, p in plan.tensors.items() if p.merged}
        self._shapes = [expert.shapes for expert in experts]
        if not any(self.sizes.values()):
            raise CheckpointError(
                "experts",
                expected="tensors that they share with the base",
                found="nothing to merge",
                mend="Check that the experts are fine-tunes of the base.",
            )

    def read(self, block: Block) -> tuple[Tensor, list[Tensor]]:
        """The base's numbers, and every expert's task vector."""
        name, start, stop = block.tensor, block.start, block.stop
        weights = self._base.read(name, start, stop).to(self._device, self.dtype)
        require_finite(weights, str(self._base.file(name)), name)
        deltas = []
        for place, (expert, source) in enumerate(
            zip(self._experts, self._plan.tensors[name].sources, strict=True)
        ):
            deltas.append(self._delta(expert, place, source, block, weights))
        return weights, deltas

    def _delta(
        self, expert: Expert, place: int, source: str | None, block: Block, weights: Tensor
    ) -> Tensor:
        """One task vector; 0 where the expert has nothing, as its vocabulary may be shorter."""
        if source is None:
            return torch.zeros_like(weights)
        has = TensorInfo(self.dtype, self._shapes[place][source]).numel
        end = max(block.start, min(block.stop, has))
        if end == block.start:
            return torch.zeros_like(weights)
        found = expert.delta(source, block.start, end, weights[: end - block.start])
        if end == block.stop:
            return found
        return torch.cat((found, found.new_zeros(block.stop - end)))


def warn_of_strangers(reader: Reader, experts: Sequence[Expert]) -> None:
    """A fine-tune is near its base; a model that is farther than 0 is from another one."""
    name = max(reader.sizes, key=lambda n: reader.sizes[n])
    weights, deltas = reader.read(Block(name, 0, min(reader.sizes[name], _SAMPLE)))
    for expert, delta in zip(experts, deltas, strict=True):
        if delta.norm() > weights.norm() > 0:
            warnings.warn(
                f"{expert.label} is farther from the base than the base from 0 in {name!r}: it is "
                "hardly a fine-tune of this base.",
                stacklevel=3,
            )
