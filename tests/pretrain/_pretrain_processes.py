"""One of two processes that train together; every run is interrupted once.

    accelerate launch … _pretrain_processes.py FOLDER

As in tests/compare/_processes.py: accelerate shards (FSDP2) on accelerators only, so the kind of
the processes is changed once they have found each other.
"""

import os
import sys
from pathlib import Path

from _pretraining import small
from accelerate import PartialState
from accelerate.utils import DistributedType
from test_pretrain_distributed import RUNS

from sparing import cli
from sparing.pretrain import pretrain
from sparing.run_progress import Silent
from sparing.work import Stopped


class Interrupting(Silent):
    """Ends a run once, after the checkpoint of its second step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, work: object, step: int, loss: float) -> None:
        self.steps.append(step)
        if step == 3 and self.steps.count(3) == 1:
            raise Stopped


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    for name, changes in RUNS.items():
        progress = Interrupting()
        while True:
            try:
                pretrain(small(**changes), folder / name, progress, checkpoint_seconds=0)
                break
            except Stopped:
                continue
        assert progress.steps == [1, 2, 3, 3, 4, 5, 6]
    options = ["--data", small().data, "--width", "16", "--depth", "2", "--head", "8"]
    options += ["--steps", "2", "--batch-size", "4", "--block-length", "16"]
    options += ["--validation-blocks", "4", "--out", str(folder / "command")]
    sys.argv = ["sparing", "pretrain", "--lr", "0.05", *options]
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
