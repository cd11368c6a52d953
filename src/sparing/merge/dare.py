"""DARE: drop entries of the task vectors at random and scale up the rest, then add or elect.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", arXiv 2311.03099 (ICML 2024).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.merge.average import weighted_sum
from sparing.merge.method import Method, Options
from sparing.merge.ties import merge_agreeing
from sparing.merge.view import Block

_CELL = 1 << 16  # numbers drawn from one generator, so that the cut into blocks does not matter


@dataclass(frozen=True)
class DareOptions(Options):
    """Options of DARE.

    Arguments:
        drop: probability p that an entry is dropped, from 0 to below 1; the paper goes to 0.9 and
            beyond for large models.
        scale: λ, one number or a list with one an expert.
        elect: merge the rest as TIES does, by elected signs, instead of adding it up.
        seed: of the choice; it also depends on the tensor and on the expert's place in the list.
    """

    drop: float = 0.9
    scale: float | Sequence[float] = 1.0
    elect: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.require_number("drop", 0, 1 - 1e-6, mend="The paper uses up to 0.9.")
        self.require_scales("scale")
        self.require_truth("elect")
        self.require("seed", type(self.seed) is int, "a whole number", "Use 0.")

    def check(self, experts: int) -> None:
        self.per_expert("scale", experts)


def drop_and_rescale(
    delta: Tensor, probability: float, expert: int, seed: int, block: Block
) -> Tensor:
    """Entries survive with probability 1 - p and are divided by it.

    Arguments:
        delta: (size of the block,) task vector.
        probability: p.
        expert: its number.
        seed: of the choice.
        block: where the entries are; the same entry always has the same fate.
    """
    if probability == 0:
        return delta
    drawn = []
    for cell in range(block.start // _CELL, -(-block.stop // _CELL)):
        uniform = torch.rand(_CELL, generator=_generator(f"{seed} {expert} {block.tensor} {cell}"))
        first = cell * _CELL
        drawn.append(uniform[max(block.start - first, 0) : block.stop - first])
    survives = (torch.cat(drawn) >= probability).to(delta.device)
    return torch.where(survives, delta / (1 - probability), 0)


def _generator(what: str) -> torch.Generator:
    # Not `tuners.generator_for`: merging whole models should not wait for the import of PEFT.
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def _update(deltas: Sequence[Tensor], options: DareOptions, _: None, block: Block) -> Tensor:
    thinned = [
        drop_and_rescale(delta, options.drop, expert, options.seed, block)
        for expert, delta in enumerate(deltas)
    ]
    merge = merge_agreeing if options.elect else weighted_sum
    return merge(thinned, options.per_expert("scale", len(deltas)))


METHOD = Method("dare", "arXiv 2311.03099", DareOptions, _update)
