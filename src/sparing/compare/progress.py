"""What a comparison shows while it runs."""

from collections.abc import Sequence

from sparing import run_progress
from sparing.compare.jobs import Job
from sparing.run_progress import Progress, Silent
from sparing.work import Work

__all__ = ["Live", "Progress", "Silent"]


class Live(run_progress.Live):
    """A line of progress on a terminal, plain lines elsewhere; says when training is over."""

    def expect(self, work: Sequence[Work]) -> None:
        super().expect(work)
        waiting = [job for job in work if not job.result_file.exists()]
        if waiting and all(isinstance(job, Job) and job.kind == "measure" for job in waiting):
            self.stage(f"measuring {len(waiting)} trained adapters")
