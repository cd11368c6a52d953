"""Where work is done: each piece in a process of its own, all in this one, or on a Ray cluster."""

import functools
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from sparing.checkpoint import UnwritableError
from sparing.errors import ConfigError, MissingExtraError
from sparing.work import Stopped, Work

OnStep = Callable[[Any, int, float], None]
OnResult = Callable[[Any, dict[str, Any]], None]


def _ignore(work: Work, result: dict[str, Any]) -> None:
    pass


class Executor(Protocol):
    """Does independent pieces of work, all with as many threads as this process has."""

    def run(
        self, work: Sequence[Work], on_step: OnStep, on_result: OnResult = _ignore
    ) -> list[dict[str, Any]]:
        """The results of all work, in order.

        Work whose process dies gives `{"error": ...}`; the same command will try it again.

        Arguments:
            work: to be done.
            on_step: called with the work, its step and the loss.
            on_result: called with the work and its result, as soon as there is one.

        Raises:
            UnwritableError: files could not be written.
        """
        ...


class InProcess:
    """One after another in this process; under `accelerate launch`, on all of its processes."""

    def run(
        self, work: Sequence[Work], on_step: OnStep, on_result: OnResult = _ignore
    ) -> list[dict[str, Any]]:
        return _one_by_one(work, lambda job: job.run(functools.partial(on_step, job)), on_result)


class Isolated:
    """One after another, each in a fresh process: its memory is its own, and so is its death.

    Processes are forked from a server that has imported everything but touched no data; it begins
    to do so at once, in the background.

    Arguments:
        module: that defines the work, for the server to import.
    """

    def __init__(self, module: str = __name__) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([module])
        forkserver.ensure_running()

    def run(
        self, work: Sequence[Work], on_step: OnStep, on_result: OnResult = _ignore
    ) -> list[dict[str, Any]]:
        return _one_by_one(work, lambda job: self._run(job, on_step), on_result)

    def _run(self, job: Work, on_step: OnStep) -> dict[str, Any]:
        if job.result_file.exists():
            return job.run()
        receiver, sender = self._context.Pipe(duplex=False)
        child = self._context.Process(
            target=_child, args=(job, sender, torch.get_num_threads()), daemon=True
        )
        child.start()
        sender.close()
        try:
            while True:
                news = receiver.recv()
                if isinstance(news, Exception):
                    raise news
                on_step(job, *news)
        except EOFError:
            child.join()
        finally:
            if child.is_alive():
                child.kill()
            receiver.close()
        if job.result_file.exists():
            return job.run()
        return {"error": f"the process ended with exit code {child.exitcode}"}


def _one_by_one(
    work: Sequence[Work], do: Callable[[Work], dict[str, Any]], on_result: OnResult
) -> list[dict[str, Any]]:
    results = []
    for job in work:
        results.append(do(job))
        on_result(job, results[-1])
    return results


def _child(job: Work, sender: Connection, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)

    def report(step: int, loss: float) -> None:
        try:
            sender.send((step, loss))
        except OSError as error:
            raise Stopped from error

    try:
        job.run(report)
    except UnwritableError as error:
        sender.send(error)
    except Stopped:
        return
    sender.close()


def _end_with_parent() -> None:
    """A killed command leaves no worker behind that would go on beside the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@dataclass
class OnRay:
    """Side by side on a Ray cluster that shares the run folder's file system.

    Arguments:
        address: of the cluster, or "auto" for the one this machine belongs to; "local" starts one.
    """

    address: str

    def run(
        self, work: Sequence[Work], on_step: OnStep, on_result: OnResult = _ignore
    ) -> list[dict[str, Any]]:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError.of("ray", "ray") from error
        if not ray.is_initialized():
            self._connect(ray)
        threads = torch.get_num_threads()
        widest = max(node["Resources"].get("CPU", 1) for node in ray.nodes())
        remote = ray.remote(
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
            num_cpus=min(threads, widest),
            max_retries=0,
            max_calls=1,
        )(_on_worker)
        results = {job.folder: job.run() for job in work if job.result_file.exists()}
        for job in work:
            if job.folder in results:
                on_result(job, results[job.folder])
        waiting = [job for job in work if job.folder not in results]
        pending = {remote.remote(job, threads): job for job in waiting}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            job = pending.pop(done[0])
            try:
                result = results[job.folder] = ray.get(done[0])
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", error)
                if isinstance(cause, UnwritableError):
                    raise cause from None
                reason = (str(cause).strip().splitlines() or [""])[0]
                result = results[job.folder] = {"error": f"{type(cause).__name__}: {reason}"}
            if job.steps and "selection_loss" in result:
                on_step(job, job.steps, result["selection_loss"])
            on_result(job, result)
        return [results[job.folder] for job in work]

    def _connect(self, ray: Any) -> None:
        address = None if self.address == "local" else self.address
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:
            raise ConfigError(
                f"ray address {self.address!r}",
                expected="a running Ray cluster",
                found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                mend="Start one with `ray start --head`, or use --ray local.",
            ) from error


def _on_worker(job: Work, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return job.run()


def executor(ray: str | None = None, isolate: bool = True, module: str = __name__) -> Executor:
    """The executor that suits: Ray if asked for, this process if it is one of several.

    Arguments:
        ray: address of a cluster.
        isolate: give all work a process of its own.
        module: see `Isolated`.
    """
    if ray is not None:
        return OnRay(ray)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not isolate:
        return InProcess()
    return Isolated(module)
