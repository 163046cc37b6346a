"""Executor on a Ray cluster, with the records of a single process."""

import signal
import socket
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from audit.adversary.memory.stages import costs_since_last, measured
from audit.errors import EnvironmentFault
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell
from audit.run.cell_runner import CellRunner
from audit.run.failures import worker_failure
from audit.run.loading import RunOptions
from audit.run.run_loop import Finished, Workload


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster: its address (None: one on this machine), the GPUs of a task, and how often a task is retried.

    `workers` limits the processes of a cluster on this machine.
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_cell: float = 0.0
    retries: int = 3

    def execute(self, work: Workload) -> Generator[Finished, None, None]:
        """Compute the unfinished cells; see `Executor`.

        A task is the cells that share a search. Records are stored by this process, so workers need no common folder
        for them; weights and data must have the same paths everywhere. Tasks start model by model.
        Raises EnvironmentFault where Ray is not installed or the cluster cannot be reached.
        """
        ray = self._connect()
        try:
            task = ray.remote(num_cpus=1, num_gpus=self.gpus_per_cell, max_retries=self.retries)(_compute)
            open_groups = [work.unfinished(group) for group in work.groups]
            running = {
                task.remote([work.cells[number] for number in group], work.options, work.folder): group
                for group in open_groups
            }
            store = RecordStore(work.folder)
            while running:
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                group = running.pop(done)
                cells = [work.cells[number] for number in group]
                for number, cell, record in zip(group, cells, _results(ray, done, cells), strict=True):
                    work.runner.save(record, cell, store)
                    yield Finished(number, record)
        finally:
            ray.shutdown()

    def _connect(self) -> Any:
        try:
            ray = import_module("ray")
        except ImportError as error:
            raise EnvironmentFault("ray is not installed: pip install 'rvaudit[ray]'") from error
        if self.address:
            _check_reachable(self.address)
        local = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
        ended = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EnvironmentFault(f"no Ray cluster at {self.address or 'this machine'}: {error}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended)  # Ray replaces the handler and exits with another code
        return ray


def _check_reachable(address: str) -> None:
    """Raise EnvironmentFault if nothing listens at an address: Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # `auto`, or a name that Ray resolves
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise EnvironmentFault(f"no Ray cluster at {address}: {error.strerror or error}") from error


@measured("other")
def _compute(cells: Sequence[Cell], options: RunOptions, folder: Path) -> list[AuditRecord]:
    runner = _runner(options, folder)
    runner.begin_group(cells)
    return [replace(runner.compute(cell), timing=costs_since_last()) for cell in cells]


@cache
def _runner(options: RunOptions, folder: Path) -> CellRunner:
    """Return the runner of this worker: it keeps the last model, which the next task often uses again."""
    return CellRunner(options, folder)


def _results(ray: Any, task: Any, cells: Sequence[Cell]) -> list[AuditRecord]:
    """Return the records of a finished task; records of failures if its worker died too often."""
    try:
        records: list[AuditRecord] = ray.get(task)
    except ray.exceptions.RayError as error:
        return [worker_failure(cell, type(error).__name__) for cell in cells]
    return records
