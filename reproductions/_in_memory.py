"""Shared by reproductions: merge state dicts with any blockwise method."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparing.merge import METHODS
from sparing.merge.memory import InMemory
from sparing.merge.view import Block


def in_memory(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], slug: str, options: dict
) -> dict[str, Tensor]:
    """Merge state dicts with any method but the continual ones."""
    method = METHODS[slug]
    chosen = method.options.of(slug, options)
    models = InMemory(base, experts)
    known = method.survey(models.view, chosen) if method.survey else None

    def update(name: str) -> Tensor:
        block = Block(name, 0, models.view.sizes[name])
        return method.update(models.view.read(block)[1], chosen, known, block)

    return models.with_update(update)
