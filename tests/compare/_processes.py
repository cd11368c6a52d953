"""One of several processes that make a comparison together; every run is interrupted once.

    accelerate launch … _processes.py FOLDER METHODS

accelerate shards (FSDP2) on accelerators only: on the CPU its state turns the wish into DDP. torch
itself shards over gloo. So, where FSDP is asked for, the kind of the processes is changed once they
have found each other; everything after that is accelerate's and our own code as on GPUs.
"""

import dataclasses
import functools
import os
import sys
from pathlib import Path

from _small import ARGUMENTS, SMALL
from accelerate import PartialState
from accelerate.utils import DistributedType

from sparing import cli, train
from sparing.compare import compare, jobs
from sparing.compare.competitors import split_methods
from sparing.compare.progress import Silent
from sparing.work import Stopped


class Interrupting(Silent):
    """Ends every run once, after the checkpoint of its second step."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []

    def step(self, job: jobs.Job, step: int, loss: float) -> None:
        self.steps.append((job.method, step))
        if step == 3 and self.steps.count((job.method, step)) == 1:
            raise Stopped


def main(folder: Path, methods: str) -> None:
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    jobs.train = functools.partial(train.train, checkpoint_seconds=0)  # type: ignore[assignment]
    names = tuple(split_methods(methods))
    settings = dataclasses.replace(SMALL, methods=names, learning_rates={"*": (1e-3,)})
    progress = Interrupting()
    while True:
        try:
            results = compare(settings, folder=folder, progress=progress)
            break
        except Stopped:
            continue
    assert [row.error for row in results.rows] == [None] * len(results.rows)
    # Step 3 was seen before and after the interruption, steps 1 and 2 only before.
    assert progress.steps == [(m, step) for m in names for step in (1, 2, 3, 3, 4)]
    sys.argv = ["sparing", *ARGUMENTS, "--methods", methods, "--lr-grid", "1e-3"]
    sys.argv += ["--out", str(folder)]
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
