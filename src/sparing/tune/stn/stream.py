"""Batches of a loader, epoch after epoch, that can go on where they stopped."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from sparing.errors import DataError


class Stream:
    """An endless iterator over a loader.

    Its place is kept as the random state at the start of the epoch and the batches taken since, so
    that a resumed run sees the batches it would have seen.

    Arguments:
        loader: iterable, more than once.
        what: for errors.
    """

    def __init__(self, loader: Iterable[Any], what: str) -> None:
        self.loader, self.what = loader, what
        self._iterator: Iterator[Any] | None = None
        self._start: dict[str, torch.Tensor] = {}
        self._taken = 0

    def next(self) -> Any:
        """The next batch.

        Raises:
            DataError: the loader is empty, or can be iterated only once.
        """
        if self._iterator is None:
            self._begin()
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._begin()
            batch = next(self._iterator, None)
            if batch is None:
                raise DataError(
                    self.what,
                    expected="a loader with batches, which can be iterated again",
                    found="no batch",
                    mend="Give a DataLoader or a list, no generator.",
                ) from None
        self._taken += 1
        return batch

    def state(self) -> dict[str, Any]:
        """For `resume`."""
        return {"start": self._start, "taken": self._taken}

    def resume(self, state: dict[str, Any]) -> None:
        """Go to a place of an earlier run; leaves the global random state changed."""
        if not state["start"]:
            return
        torch.set_rng_state(state["start"]["global"])
        own = self._generator
        if own is not None and "own" in state["start"]:
            own.set_state(state["start"]["own"])
        self._begin()
        assert self._iterator is not None
        for _ in range(state["taken"]):
            next(self._iterator)
        self._taken = state["taken"]

    @property
    def _generator(self) -> torch.Generator | None:
        return getattr(self.loader, "generator", None)

    def _begin(self) -> None:
        self._start = {"global": torch.get_rng_state()}
        if self._generator is not None:
            self._start["own"] = self._generator.get_state()
        self._iterator, self._taken = iter(self.loader), 0


def check_apart(train: Iterable[Any], validation: Iterable[Any]) -> None:
    """Whether training and validation data are different ones, as far as can be seen.

    Raises:
        DataError: they are the same loader or data set, or share items of one.
    """
    shared = "the same loader" if train is validation else ""
    if isinstance(train, DataLoader) and isinstance(validation, DataLoader):
        one, other = train.dataset, validation.dataset
        shared = "the same data set" if one is other else shared
        if isinstance(one, Subset) and isinstance(other, Subset) and one.dataset is other.dataset:
            common = set(one.indices) & set(other.indices)
            shared = f"{len(common)} items of both" if common else shared
    if shared:
        raise DataError(
            "validation data",
            expected="items that the weights are not trained on",
            found=shared,
            mend="Hold some items out: on training data no regularisation is always best.",
        )
