"""Executor of several processes on this machine: each computes whole models, with the records of a single process.

The cores are divided among the processes. Sums of floats in another number of threads differ in their last digits
(measured: 2e-5 nats), as they do between machines. Waiting threads release their core at once, and freed memory is
kept for the next tensor: returning it to the system and requesting it again took a fifth of the time.
"""

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from audit.errors import EnvironmentFault, UsageError
from audit.records import RecordStore
from audit.run.cell import Cell
from audit.run.failures import worker_failure
from audit.run.loading import RunOptions, device_of, model_bytes
from audit.run.run_loop import Finished, InProcess, Workload
from audit.run.worker import Done, Job, Locked, Message, Ready, StageStarted, WorkerSetup, start

_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # glibc: tensors under 32 MiB, the limit of older versions, come from memory
    "MALLOC_TRIM_THRESHOLD_": str(2**29),  # that is kept, up to 512 MiB of it
}
_END_SECONDS = 5.0  # before a process that was asked to end is killed
_SHORT_RUN = 3000  # images of all cells: a shorter run is over before another process has started
_PROCESS_BYTES = 0.6e9  # of a process with torch, without a model


@dataclass(frozen=True)
class Processes:
    """The number of processes that share a run, and how often a cell is retried after its process died."""

    count: int
    retries: int = 3

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"jobs {self.count!r} must be at least 1: it is the number of processes")

    def execute(self, work: Workload) -> Generator[Finished, None, None]:
        """Compute the unfinished cells; see `Executor`.

        All cells of a model go to one process, which loads and attacks it once. A process that dies is replaced, and
        its cell is retried. Other runs may work in the same folder.
        """
        queue = _JobQueue(work, self)
        try:
            yield from queue.results()
        finally:
            queue.close()


@dataclass(frozen=True)
class FittingProcesses:
    """`jobs` processes, or as many as the unfinished cells of a run and this machine suggest; at most one a model."""

    options: RunOptions
    jobs: int | None = None

    def execute(self, work: Workload) -> Generator[Finished, None, None]:
        """Compute the unfinished cells; see `Executor`."""
        if not work.groups:
            return
        cells = [work.cells[number] for group in work.groups for number in work.unfinished(group)]
        models = len({(cell.ref, cell.dataset) for cell in cells})
        count = min(self.jobs or fitting_processes(cells, self.options), models)
        yield from (Processes(count) if count > 1 else InProcess()).execute(work)


def divides(cells: Sequence[Cell], options: RunOptions) -> bool:
    """Return whether several processes are worth their start: on a CPU with cores, for several models, no short run."""
    images = sum(cell.images or _SHORT_RUN for cell in cells)
    models = {(cell.ref, cell.dataset) for cell in cells}
    return images >= _SHORT_RUN and device_of(options.device).type == "cpu" and len(models) > 1 and cores() > 1


def fitting_processes(cells: Sequence[Cell], options: RunOptions) -> int:
    """Return the default number of processes: one a core, as far as half of the free memory holds their models."""
    if not divides(cells, options):
        return 1
    models = sorted({(cell.ref, cell.dataset) for cell in cells})
    largest = max(model_bytes(ref, dataset, options) for ref, dataset in models)
    return max(1, min(cores(), int(free_bytes() / 2 / (_PROCESS_BYTES + largest))))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int:
    """Return the memory in bytes that new processes may take: available memory on Linux, elsewhere unused memory."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass
class _Process:
    """A worker process with its pipe, its job (None: starting or idle) and the number of its current cell."""

    process: Any
    pipe: Connection
    job: Job | None = None
    cell: int | None = None
    ready: bool = False


class _JobQueue:
    """Distributes the models of a run to worker processes, and replaces processes that die."""

    def __init__(self, work: Workload, settings: Processes) -> None:
        threads = max(1, torch.get_num_threads() // settings.count)
        self._work, self._settings = work, settings
        self._setup = WorkerSetup(work.cells, work.folder, work.options, threads)
        self._finished = set(work.known)
        self._workers: list[_Process] = []
        self._deaths: Counter[int | None] = Counter()
        models: dict[tuple[str, str], list[Sequence[int]]] = {}
        for group in work.groups:
            first = work.cells[group[0]]
            models.setdefault((first.ref, first.dataset), []).append(group)
        self._jobs = deque(Job(groups) for groups in models.values())

    def results(self) -> Iterator[Finished]:
        """Yield every cell once it has its record."""
        while len(self._finished) < len(self._work.cells):
            self._assign()
            pipes = {worker.pipe: worker for worker in self._workers}
            for pipe in wait(list(pipes)):
                worker = pipes[pipe]  # type: ignore[index]
                try:
                    message: Message = worker.pipe.recv()
                except (EOFError, OSError):
                    found = self._replace(worker)
                else:
                    found = self._handle(worker, message)
                if found is not None and found.number not in self._finished:
                    self._finished.add(found.number)
                    yield found

    def close(self) -> None:
        """End all processes; their current cells have no records and are left to the next run."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_END_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self._workers.clear()

    def _assign(self) -> None:
        """Give jobs to idle workers, and start as many processes as there are further jobs."""
        failed = {number for number, count in self._deaths.items() if number is not None and self._too_often(count)}
        for worker in self._workers:
            if worker.ready and self._jobs:
                worker.job, worker.cell, worker.ready = self._jobs.popleft(), None, False
                with suppress(OSError):  # a dead worker: the end of its pipe is read next
                    worker.pipe.send(worker.job._replace(skipped=self._work.known | failed))
        starting = sum(worker.job is None for worker in self._workers)
        room = self._settings.count - len(self._workers)
        for _ in range(min(room, len(self._jobs) - starting)):
            self._workers.append(_started(self._setup))

    def _too_often(self, deaths: int) -> bool:
        return deaths > self._settings.retries

    def _handle(self, worker: _Process, message: Message) -> Finished | None:
        match message:
            case Ready():
                worker.job, worker.cell, worker.ready = None, None, True
            case StageStarted(number, stage):
                worker.cell = number
                self._work.on_stage(self._work.cells[number], stage)
            case Done(number, record, known):
                return Finished(number, record, known)
            case Locked(group):
                assert worker.job is not None
                worker.job.groups.remove(group)
                self._jobs.append(Job([group], wait=True))
            case EnvironmentFault():
                raise message
        return None

    def _replace(self, worker: _Process) -> Finished | None:
        """Queue the rest of a dead worker's job again; return its cell as failed if that killed too many workers."""
        self._workers.remove(worker)
        worker.process.join()
        ending = _ending(worker.process.exitcode)
        worker.process.close()
        worker.pipe.close()
        left = self._left(worker)
        current = (
            worker.cell if worker.cell is not None else next((n for group in left for n in self._open(group)), None)
        )
        self._deaths[current] += 1
        found = None
        if self._too_often(self._deaths[current]):
            if current is None:
                raise EnvironmentFault(f"worker processes end as soon as they start ({ending}): use --jobs 1")
            found = self._failed(current, ending)
            left = [group for group in left if set(self._open(group)) - {current}]
        if left and worker.job:
            self._jobs.appendleft(Job(left, worker.job.wait))
        return found

    def _failed(self, number: int, ending: str) -> Finished:
        cell = self._work.cells[number]
        record = worker_failure(cell, ending)
        self._work.runner.save(record, cell, RecordStore(self._work.folder))
        return Finished(number, record)

    def _left(self, worker: _Process) -> list[Sequence[int]]:
        return [group for group in worker.job.groups if self._open(group)] if worker.job else []

    def _open(self, group: Sequence[int]) -> list[int]:
        return [number for number in group if number not in self._finished]


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _started(setup: WorkerSetup) -> _Process:
    spawn = multiprocessing.get_context("spawn")
    own, other = spawn.Pipe()
    process = spawn.Process(target=start, args=(other, setup), daemon=True)
    with sharing_environment():
        process.start()
    other.close()  # only the process holds it now: the pipe ends with the process
    return _Process(process, own)


@contextmanager
def sharing_environment() -> Iterator[None]:
    """Set the environment that processes read at their start, except what the user has set."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
