"""Where jobs run: in this process, in several processes, or on the machines of a Ray cluster.

An engine runs what it is given and hands back each job once, with its files or with the error that it ended
in. It writes nothing: results are kept by whoever asked for them, so no shared folder is needed and nothing
is counted twice when a worker dies and its job runs again.
"""

from __future__ import annotations

import multiprocessing
import socket
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import torch

from fltoolkit.errors import InputError
from fltoolkit.tradeoff.jobs import Files, Job

ENGINES = ("processes", "ray")
TRIES = 4
"""How often a job is begun that takes its worker down with it."""


class Engine(Protocol):
    """Runs jobs; `slots` of them at once."""

    slots: int

    def submit(self, job: Job, given: Files) -> None:
        """Begin a job, given the files of the one that it needs."""

    def done(self) -> list[tuple[Job, Files]]:
        """Wait for the next jobs to end. Raises what a job raised."""

    def close(self) -> None: ...


class Here:
    """One job after the other, in this process."""

    slots = 1

    def __init__(self, scratch: Path | None) -> None:
        self.scratch = scratch
        self.waiting: list[tuple[Job, Files]] = []

    def submit(self, job: Job, given: Files) -> None:
        self.waiting.append((job, given))

    def done(self) -> list[tuple[Job, Files]]:
        job, given = self.waiting.pop(0)
        return [(job, work(job, given, self.scratch))]

    def close(self) -> None:
        self.waiting.clear()


class Processes:
    """`workers` processes of this machine, one thread each. A job whose process dies is begun again."""

    def __init__(self, workers: int, scratch: Path | None) -> None:
        self.slots, self.scratch = workers, scratch
        self.pool = self._pool()
        self.running: dict[Future[Files], tuple[Job, Files, int]] = {}

    def submit(self, job: Job, given: Files, tries: int = 1) -> None:
        try:
            self.running[self.pool.submit(work, job, given, self.scratch)] = (job, given, tries)
        except BrokenProcessPool:  # a process died since the last job ended
            self._begin_again([(job, given, tries)])

    def done(self) -> list[tuple[Job, Files]]:
        ended, _ = wait(self.running, return_when=FIRST_COMPLETED)
        found, lost = [], []
        for future in ended:
            job, given, tries = self.running.pop(future)
            try:
                found.append((job, future.result()))
            except BrokenProcessPool:
                lost.append((job, given, tries))
        if lost:
            self._begin_again(lost)
        return found or self.done()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list((getattr(self.pool, "_processes", None) or {}).values()):
            process.terminate()

    def _begin_again(self, lost: list[tuple[Job, Files, int]]) -> None:
        """A process that dies takes the whole pool with it."""
        lost += self.running.values()
        self.running = {}
        self.pool = self._pool()
        for job, given, tries in lost:
            if tries >= TRIES:
                raise RuntimeError(f"{tries} processes died in {job.id}: too little memory, perhaps")
            self.submit(job, given, tries + 1)

    def _pool(self) -> ProcessPoolExecutor:
        how = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.slots, mp_context=how)


class OnRay:
    """The workers of a Ray cluster, a CPU each; `address` as `ray.init` takes it, None for one made here.

    Ray begins a job again when its worker, or its machine, dies. Jobs have no scratch folder there: a job
    that is begun again begins from its start.
    """

    def __init__(self, address: str | None, workers: int) -> None:
        try:
            import ray
        except ImportError as e:
            raise InputError(
                "engine must be processes where Ray is not installed, got 'ray': "
                "pip install 'fltoolkit[distributed]'"
            ) from e
        self.ray = ray
        self.ours = not ray.is_initialized()
        if self.ours:
            self._connect(address, workers)
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.task = ray.remote(num_cpus=1, max_retries=TRIES)(work)
        self.running: dict[Any, Job] = {}
        self.given: dict[str, Any] = {}

    def submit(self, job: Job, given: Files) -> None:
        name = job.needs.id if job.needs is not None else ""
        if name not in self.given:
            self.given[name] = self.ray.put(given)
        self.running[self.task.remote(job, self.given[name], None)] = job

    def done(self) -> list[tuple[Job, Files]]:
        ended, _ = self.ray.wait(list(self.running), num_returns=1)
        return [(self.running.pop(ref), self.ray.get(ref)) for ref in ended]

    def close(self) -> None:
        for ref in self.running:
            self.ray.cancel(ref, force=True)
        if self.ours:
            self.ray.shutdown()

    def _connect(self, address: str | None, workers: int) -> None:
        if address is not None:
            _answers(address)
        where = {"num_cpus": workers} if address is None else {"address": address}
        try:
            self.ray.init(log_to_driver=False, include_dashboard=False if address is None else None, **where)
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise InputError(f"address must be that of a running Ray cluster, got {address!r}: {e}") from e


def _answers(address: str) -> None:
    """Raise InputError where HOST:PORT is one that nobody listens at, which Ray waits minutes for."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise InputError(f"address must be that of a running Ray cluster, got {address!r}: {e}") from e


def work(job: Job, given: Files, scratch: Path | None) -> Files:
    """What a worker does with a job: in one thread, so that sums of floating-point numbers have one order
    however many workers there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return job.run(given, scratch)
    finally:
        torch.set_num_threads(threads)


def engine(name: str, workers: int, scratch: Path, address: str | None = None) -> Engine:
    """The engine called `name`."""
    if name == "ray":
        return OnRay(address, workers)
    return Here(scratch) if workers == 1 else Processes(workers, scratch)
