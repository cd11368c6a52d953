"""Where jobs run: each in a process of its own, all in this one, or on a Ray cluster."""

import functools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from sparing.compare import jobs
from sparing.compare.jobs import Job
from sparing.errors import ConfigError, MissingExtraError

OnStep = Callable[[Job, int, float], None]


class Executor(Protocol):
    """Runs jobs that do not depend on each other."""

    def run(self, work: Sequence[Job], on_step: OnStep) -> list[dict[str, Any]]:
        """The results of all jobs, in order; a job that dies gives `{"error": ...}`."""
        ...


class InProcess:
    """One job after another in this process; under `accelerate launch`, on all of its processes."""

    def run(self, work: Sequence[Job], on_step: OnStep) -> list[dict[str, Any]]:
        return [jobs.run(job, functools.partial(on_step, job)) for job in work]


class Isolated:
    """One job after another, each in a fresh process: its memory is its own, and so is its death.

    Processes are forked from a server that has imported everything but touched no data.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([jobs.__name__])

    def run(self, work: Sequence[Job], on_step: OnStep) -> list[dict[str, Any]]:
        return [self._run(job, on_step) for job in work]

    def _run(self, job: Job, on_step: OnStep) -> dict[str, Any]:
        if job.result_file.exists():
            return jobs.run(job)
        receiver, sender = self._context.Pipe(duplex=False)
        child = self._context.Process(target=_child, args=(job, sender), daemon=True)
        child.start()
        sender.close()
        try:
            while True:
                on_step(job, *receiver.recv())
        except EOFError:
            child.join()
        finally:
            if child.is_alive():
                child.kill()
        if job.result_file.exists():
            return jobs.run(job)
        return jobs.failed(job, f"the process ended with exit code {child.exitcode}")


def _child(job: Job, sender: Connection) -> None:
    jobs.run(job, lambda step, loss: sender.send((step, loss)))
    sender.close()


@dataclass
class OnRay:
    """Jobs side by side on a Ray cluster that shares the run folder's file system.

    Arguments:
        address: of the cluster, or "auto" for the one this machine belongs to; "local" starts one.
    """

    address: str

    def run(self, work: Sequence[Job], on_step: OnStep) -> list[dict[str, Any]]:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError.of("ray", "ray") from error
        if not ray.is_initialized():
            self._connect(ray)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_gpus=gpus, num_cpus=1, max_retries=0, max_calls=1)(jobs.run)
        pending = {remote.remote(job): job for job in work}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            job = pending.pop(done[0])
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayError as error:
                result = jobs.failed(job, f"{type(error).__name__}: {error}")
            if "error" not in result and job.plan is not None:
                on_step(job, job.plan.steps, result.get("selection_loss", float("nan")))
        return jobs.results(work)

    def _connect(self, ray: Any) -> None:
        address = None if self.address == "local" else self.address
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except Exception as error:
            raise ConfigError(
                f"ray address {self.address!r}",
                expected="a running Ray cluster",
                found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                mend="Start one with `ray start --head`, or use --ray local.",
            ) from error


def executor(ray: str | None = None, isolate: bool = True) -> Executor:
    """The executor that suits: Ray if asked for, this process if it is one of several."""
    if ray is not None:
        return OnRay(ray)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not isolate:
        return InProcess()
    return Isolated()
