"""Worker process of a run: it requests jobs over a pipe, computes their cells, and reports each step."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from audit.adversary.memory.stages import measured
from audit.errors import EnvironmentFault
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell
from audit.run.cell_runner import CellRunner
from audit.run.loading import RunOptions
from audit.run.locks import lock


class WorkerSetup(NamedTuple):
    """The settings of a worker: all cells of the run, its folder, options, and the number of threads."""

    cells: Sequence[Cell]
    folder: Path
    options: RunOptions
    threads: int


class Job(NamedTuple):
    """Groups of cells that share a search, by their numbers, for one worker.

    `wait` for groups that another run computes; `skipped` cells have records, or killed too many workers.
    """

    groups: list[Sequence[int]]
    wait: bool = False
    skipped: frozenset[int] = frozenset()


class StageStarted(NamedTuple):
    """A cell has reached a stage."""

    number: int
    stage: str


class Done(NamedTuple):
    """A cell has its record; `known` if another run stored it."""

    number: int
    record: AuditRecord
    known: bool


class Locked(NamedTuple):
    """Another run computes a group of cells."""

    group: Sequence[int]


class Ready(NamedTuple):
    """The worker requests a job."""


Message = StageStarted | Done | Locked | Ready | EnvironmentFault


def start(pipe: Connection, setup: WorkerSetup) -> None:
    """Serve the process that started this one until that one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(setup.threads)
    serve(pipe, setup)


@measured("other")
def serve(pipe: Connection, setup: WorkerSetup) -> None:
    """Compute jobs as they come, until the pipe is closed."""
    worker = _Worker(pipe, setup)
    while True:
        worker.send(Ready())
        try:
            job: Job = pipe.recv()
        except (EOFError, OSError):  # a pipe with unread messages is reset
            return
        try:
            for group in job.groups:
                worker.compute(group, job)
        except EnvironmentFault as fault:
            worker.send(fault)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


class _Worker:
    """Cell runner of one process, connected to the parent by a pipe."""

    def __init__(self, pipe: Connection, setup: WorkerSetup) -> None:
        self._pipe, self._setup, self._current = pipe, setup, 0
        self._runner = CellRunner(setup.options, setup.folder, self._on_stage)
        self._store = RecordStore(setup.folder)

    def compute(self, group: Sequence[int], job: Job) -> None:
        """Compute the cells of a group, unless another run holds its lock."""
        cells = self._setup.cells
        numbers = [number for number in group if number not in job.skipped]
        with lock(self._setup.folder, self._runner.cell_id(cells[group[0]]), wait=job.wait) as held:
            if not held:
                self.send(Locked(group))
                return
            self._runner.begin_group([cells[number] for number in numbers])
            for number in numbers:
                self._current = number
                self.send(Done(number, *self._runner.record(cells[number], self._store)))

    def send(self, message: Message) -> None:
        """Send a message to the parent; end this process if there is no parent."""
        try:
            self._pipe.send(message)
        except OSError:
            os._exit(1)  # an exception would become the record of a failure

    def _on_stage(self, _cell: Cell, stage: str) -> None:
        self.send(StageStarted(self._current, stage))
