"""What a process does that shares a run with others: it asks for tasks, computes them, and tells of each step."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from audit.errors import EnvironmentFault
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell
from audit.run.cell_runner import RunOptions, Watcher, Workbench
from audit.run.run_loop import one_at_a_time


class Desk(NamedTuple):
    """What a process needs to know once."""

    cells: list[Cell]
    folder: Path
    options: RunOptions
    threads: int


class Task(NamedTuple):
    """Groups of cells that share a search, by their numbers; whether to wait for those that another run is at; and
    the cells that killed too many processes."""

    groups: list[list[int]]
    patient: bool = False
    skipped: frozenset[int] = frozenset()


class Stage(NamedTuple):
    """A cell has come to a stage."""

    number: int
    stage: str


class Done(NamedTuple):
    """A cell has its record; `known` where it was there already."""

    number: int
    record: AuditRecord
    known: bool


class Taken(NamedTuple):
    """Another run is at a group of cells."""

    group: list[int]


class Ready(NamedTuple):
    """A process asks for its next task."""


Message = Stage | Done | Taken | Ready | EnvironmentFault


def work(line: Connection, desk: Desk) -> None:
    """Serve the run that started this process, for as long as that one lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(desk.threads)
    serve(line, desk)


def serve(line: Connection, desk: Desk) -> None:
    """Compute tasks as they come, until the line ends."""
    clerk = _Clerk(line, desk)
    while True:
        clerk.tell(Ready())
        try:
            task: Task = line.recv()
        except (EOFError, OSError):  # a line with something unread on it is reset
            return
        try:
            for group in task.groups:
                clerk.compute(group, task)
        except EnvironmentFault as fault:
            clerk.tell(fault)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


class _Clerk:
    """One process's workbench, which tells of what it does."""

    def __init__(self, line: Connection, desk: Desk) -> None:
        self.line, self.desk, self.at = line, desk, 0
        watcher = Watcher(self._at_stage, self._done)
        self.bench, self.store = Workbench(desk.options, watcher, desk.folder), RecordStore(desk.folder)

    def compute(self, group: list[int], task: Task) -> None:
        """Compute the cells of a group, or tell that another run is at them."""
        cells = [self.desk.cells[number] for number in group]
        with one_at_a_time(self.desk.folder, self.bench.cell_id(cells[0]), wait=task.patient) as mine:
            if not mine:
                self.tell(Taken(group))
                return
            self.bench.follow(cells)
            for number in group:
                if number not in task.skipped:
                    self.at = number
                    self.bench.record(self.desk.cells[number], self.store)

    def tell(self, message: Message) -> None:
        """Send a message; where nobody hears it any more, end."""
        try:
            self.line.send(message)
        except OSError:
            os._exit(1)  # an exception would become the record of a failure

    def _at_stage(self, _cell: Cell, stage: str) -> None:
        self.tell(Stage(self.at, stage))

    def _done(self, record: AuditRecord, known: bool) -> None:
        self.tell(Done(self.at, record, known))
