"""The task vectors of all experts, seen through a window of one block.

The same view looks at files and at tensors in memory, so that a method cannot tell them apart.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sparing.shards import pieces

_MOST_THREADS = 8
_LESSON = (32 << 20) - (1 << 16)  # bytes; just under what glibc learns from
BLOCK_SIZE = 1 << 18  # numbers; small enough for processor caches, large enough for disks

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """Consecutive numbers of one tensor.

    Arguments:
        tensor: its name.
        start: first number.
        stop: number after the last.
    """

    tensor: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Numbers in the block."""
        return self.stop - self.start


class Progress(Protocol):
    """Is told what a merge does."""

    def stage(self, text: str, total: int) -> None:
        """Something began that goes over so many numbers."""
        ...

    def advance(self, done: int) -> None:
        """So many more numbers are done."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, text: str, total: int) -> None:
        pass

    def advance(self, done: int) -> None:
        pass


class View:
    """Task vectors, block by block.

    Arguments:
        sizes: numbers of every tensor that is merged, by name, in the order to read them.
        experts: how many there are.
        read: from a block to the base's numbers and every expert's task vector, flat and all of
            one floating type; called from several threads.
        threads: that read and compute at a time.
        block_size: most numbers in a block.
        progress: is told of every scan.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        experts: int,
        read: Callable[[Block], tuple[Tensor, list[Tensor]]],
        *,
        threads: int = 1,
        block_size: int = BLOCK_SIZE,
        progress: Progress | None = None,
    ) -> None:
        self.sizes = dict(sizes)
        self.experts = experts
        self.read = read
        self.threads = threads
        self.block_size = block_size
        self.progress = progress or Silent()

    def size(self, tensors: Sequence[str]) -> int:
        """Numbers in some of the tensors."""
        return sum(self.sizes[name] for name in tensors)

    def scan(
        self,
        function: Callable[[list[Tensor], Block], Result],
        tensors: Sequence[str],
        stage: str,
    ) -> Iterator[Result]:
        """Apply a function to the task vectors of every block.

        Arguments:
            function: of the task vectors, each (size of the block,), and the block; runs in
                threads, so it must not change anything outside.
            tensors: to look at.
            stage: what the scan is for, shown to the user.

        Returns:
            The results, in the order of the blocks, whatever the number of threads.
        """
        self.progress.stage(stage, self.size(tensors))
        blocks = (
            Block(name, start, stop)
            for name in tensors
            for start, stop in pieces(self.sizes[name], self.block_size)
        )

        def work(block: Block) -> tuple[int, Result]:
            return block.size, function(self.read(block)[1], block)

        for size, result in ordered_map(work, blocks, self.threads):
            self.progress.advance(size)
            yield result


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Results in the order of the items; at most `threads` are under way or waiting at a time."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(waiting) == threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def default_threads(busy: int = 0) -> int:
    """One a core, at most 8.

    Arguments:
        busy: cores that something else needs.
    """
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 1) - busy))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Our own threads are enough: each of them runs torch on one core."""
    keep_freed_blocks()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_blocks() -> None:
    """Let the allocator keep the memory of a block for the next one.

    glibc gives large pieces back to the system when they are freed and gets them again as zeroed
    pages, which took most of the time of a merge. It learns from the largest piece that was ever
    freed, up to 32 MiB, that such pieces come and go; this one is never touched.
    """
    bytes(_LESSON)
