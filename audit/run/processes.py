"""Cells computed by several processes of this machine, whole models each, to the records of a single process.

The cores are divided among the processes. Float sums in another number of threads differ in their last digits (2e-5
nats were met), as they do between machines. Threads that wait leave their core to others at once, and freed memory is
kept for the next tensor instead of being given back and asked for again, which was a fifth of the time.
"""

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from audit.errors import AuditError, EnvironmentFault, UsageError
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell
from audit.run.cell_runner import RunOptions, Watcher, Workbench
from audit.run.failures import failure
from audit.run.intermediate import remove_leftovers
from audit.run.warm_starts import sharing
from audit.run.worker import Desk, Done, Message, Ready, Stage, Taken, Task, work

_FOR_SHARING = {
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_THRESHOLD_": str(2**28),  # glibc's: tensors under 256 MiB come from memory that is kept,
    "MALLOC_TRIM_THRESHOLD_": str(2**29),  # up to 512 MiB of it
}
_PATIENCE = 5.0  # seconds that a process has to end when asked


@dataclass(frozen=True)
class Jobs:
    """How many processes share a run, and how often a cell is tried again when its process died."""

    count: int
    retries: int = 3

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"jobs {self.count!r} must be at least 1: so many processes share a run")


def run_in_jobs(
    todo: Sequence[Cell], folder: Path, options: RunOptions, watcher: Watcher, jobs: Jobs
) -> list[AuditRecord]:
    """Audit every cell that has no record yet and return all records, in the order of the cells.

    The cells of one model go to one process, which loads and attacks it once; models go out in their order. A process
    that dies is replaced, and the cell that it was at is tried again. Locks and files are those of `benchmark.run`, so
    other runs may work in the same folder. Raises EnvironmentFault where no process can be started or the folder
    cannot be written to.
    """
    remove_leftovers(folder)
    threads = max(1, torch.get_num_threads() // jobs.count)
    office = _Office(todo, Desk(list(todo), folder.resolve(), options, threads), watcher, jobs)
    try:
        office.oversee()
    finally:
        office.close()
    rmtree(folder / ".locks", ignore_errors=True)  # every cell has its record: nobody waits any more
    if all(record.valid for record in office.records.values()):
        office.bench.parts.forget()
    return [office.records[number] for number in range(len(todo))]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int:
    """Return how much memory new processes may take: what Linux says is available, elsewhere what no one holds."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def died(cell: Cell, how: str) -> AuditRecord:
    """Return the record of a cell whose process died more often than it may be tried again."""
    return failure(cell, EnvironmentFault(f"its worker died again and again, perhaps for want of memory ({how})"))


@dataclass
class _Worker:
    """A process, the line to it, its task (none: it is starting or has nothing to do) and the cell it is at."""

    process: Any
    line: Connection
    task: Task | None = None
    at: int | None = None
    ready: bool = False


class _Office:
    """Hands out the models of a run, hears what comes of them, and replaces processes that die."""

    def __init__(self, todo: Sequence[Cell], desk: Desk, watcher: Watcher, jobs: Jobs) -> None:
        self.todo, self.desk, self.watcher, self.jobs = todo, desk, watcher, jobs
        self.bench, self.store = Workbench(desk.options, watcher, desk.folder), RecordStore(desk.folder)
        self.records: dict[int, AuditRecord] = {}
        self.workers: list[_Worker] = []
        self.deaths: Counter[int | None] = Counter()
        self.queue = deque(Task(groups) for groups in self._models())

    def _models(self) -> list[list[list[int]]]:
        """Return the groups of each model; a group whose cells all have records is told of at once."""
        models: dict[tuple[str, str], list[list[int]]] = {}
        for group in sharing(self.todo):
            if all(self._known(self.todo[number]) for number in group):
                for number in group:
                    self.records[number] = self.bench.record(self.todo[number], self.store)
            else:
                first = self.todo[group[0]]
                models.setdefault((first.ref, first.dataset), []).append(group)
        return list(models.values())

    def _known(self, cell: Cell) -> bool:
        try:
            found = self.store.read(self.bench.cell_id(cell))
        except AuditError:  # the process that computes the cell will say it
            return False
        return found is not None and found.valid

    def oversee(self) -> None:
        """Return when every cell has its record."""
        while len(self.records) < len(self.todo):
            self._staff()
            lines = {worker.line: worker for worker in self.workers}
            for line in wait(list(lines)):
                worker = lines[line]  # type: ignore[index]
                try:
                    message: Message = worker.line.recv()
                except (EOFError, OSError):
                    self._lost(worker)
                else:
                    self._hear(worker, message)

    def close(self) -> None:
        """End all processes: what they were at has no record, and is done by the next run."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(_PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
            worker.line.close()
        self.workers.clear()

    def _staff(self) -> None:
        """Give tasks to those who ask, and start as many processes as the rest is worth."""
        for worker in self.workers:
            if worker.ready and self.queue:
                worker.task, worker.at, worker.ready = self.queue.popleft(), None, False
                with suppress(OSError):  # it may be dead: the end of its line is heard of next
                    worker.line.send(worker.task._replace(skipped=frozenset(self._given_up())))
        starting = sum(worker.task is None for worker in self.workers)
        room = self.jobs.count - len(self.workers)
        for _ in range(min(room, len(self.queue) - starting)):
            self.workers.append(_started(self.desk))

    def _given_up(self) -> list[int]:
        return [number for number, count in self.deaths.items() if number is not None and count > self.jobs.retries]

    def _hear(self, worker: _Worker, message: Message) -> None:
        match message:
            case Ready():
                worker.task, worker.at, worker.ready = None, None, True
            case Stage(number, stage):
                worker.at = number
                self.watcher.stage(self.todo[number], stage)
            case Done(number, record, known):
                if number not in self.records:
                    self.watcher.done(record, known)
                self.records[number] = record
            case Taken(group):
                assert worker.task is not None
                worker.task.groups.remove(group)
                self.queue.append(Task([group], patient=True))
            case EnvironmentFault():
                raise message

    def _lost(self, worker: _Worker) -> None:
        """Put back what a process that died has not done; a cell that killed too many has failed."""
        self.workers.remove(worker)
        worker.process.join()
        how = _ending(worker.process.exitcode)
        worker.process.close()
        worker.line.close()
        left = [group for group in worker.task.groups if self._open(group)] if worker.task else []
        at = worker.at if worker.at is not None else next((n for group in left for n in self._open(group)), None)
        self.deaths[at] += 1
        if self.deaths[at] > self.jobs.retries:
            if at is None:
                raise EnvironmentFault(f"processes that should share the run end at once ({how}): use --jobs 1")
            self.records[at] = self.bench.keep(died(self.todo[at], how), self.todo[at], self.store)
            left = [group for group in left if self._open(group)]
        if left and worker.task:
            self.queue.appendleft(Task(left, worker.task.patient))

    def _open(self, group: list[int]) -> list[int]:
        return [number for number in group if number not in self.records]


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _started(desk: Desk) -> _Worker:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(theirs, desk), daemon=True)
    with _set_for_sharing():
        process.start()
    theirs.close()  # the process alone holds it now: the line ends when it does
    return _Worker(process, ours)


@contextmanager
def _set_for_sharing() -> Iterator[None]:
    """Set what processes started meanwhile read once, unless the user has: how threads wait, and memory is kept."""
    added = {name: value for name, value in _FOR_SHARING.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
