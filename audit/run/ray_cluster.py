"""Cells computed on a Ray cluster instead of in this process, to the same records."""

import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from audit.errors import EnvironmentFault
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell
from audit.run.cell_runner import RunOptions, Watcher, Workbench
from audit.run.intermediate import remove_leftovers
from audit.run.processes import died
from audit.run.warm_starts import sharing


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: its address (none: one on this machine), what a cell needs, and how often it is tried again.

    `workers` bounds a cluster on this machine to so many processes.
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_cell: float = 0.0
    retries: int = 3


def run_on_ray(
    todo: Sequence[Cell], folder: Path, options: RunOptions, watcher: Watcher, cluster: Cluster | None = None
) -> list[AuditRecord]:
    """Audit every cell that has no record yet and return all records in the order of the cells.

    A task is the cells that share a search. Records are written here as they come, so workers need no common folder
    for them; weights and data must lie under the same paths everywhere. A worker that dies is replaced and its task
    tried again. Tasks go out model after model, so the first models are finished first.
    Raises EnvironmentFault where Ray is not installed or the cluster cannot be reached.
    """
    remove_leftovers(folder)
    bench, store = Workbench(options, watcher, folder), RecordStore(folder)
    ids = [bench.cell_id(cell) for cell in todo]
    records = {n: bench.record(cell, store) for n, cell in enumerate(todo) if store.path(ids[n]).exists()}
    cluster = cluster or Cluster()
    ray = _connected(cluster)
    try:
        task = ray.remote(num_cpus=1, num_gpus=cluster.gpus_per_cell, max_retries=cluster.retries)(_computed)
        left = [[number for number in group if number not in records] for group in sharing(todo)]
        out = {task.remote([todo[n] for n in group], options, folder.resolve()): group for group in left if group}
        while out:
            (done, *_), _ = ray.wait(list(out), num_returns=1)
            group = out.pop(done)
            for number, record in zip(group, _answer(ray, done, [todo[n] for n in group]), strict=True):
                records[number] = bench.keep(record, todo[number], store)
    finally:
        ray.shutdown()
    if all(record.valid for record in records.values()):
        bench.parts.forget()
    return [records[number] for number in range(len(todo))]


def _connected(cluster: Cluster) -> Any:
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise EnvironmentFault("ray is not installed: pip install 'rvaudit[ray]'") from error
    if cluster.address:
        _knock(cluster.address)
    local = {} if cluster.address else {"num_cpus": cluster.workers, "include_dashboard": False}
    ended = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(f"no Ray cluster at {cluster.address or 'this machine'}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ended)  # Ray takes the signal for itself, and exits with another code
    return ray


def _knock(address: str) -> None:
    """Raise EnvironmentFault where nobody listens: Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # `auto`, or a name that Ray knows
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise EnvironmentFault(f"no Ray cluster at {address}: {error.strerror or error}") from error


def _computed(cells: Sequence[Cell], options: RunOptions, folder: Path) -> list[AuditRecord]:
    bench = _bench(options, folder)
    bench.follow(cells)
    return [bench.compute(cell) for cell in cells]


@cache
def _bench(options: RunOptions, folder: Path) -> Workbench:
    """A worker keeps its last model and what attacks found of it: the next cell is often the same model's."""
    return Workbench(options, Watcher(), folder)


def _answer(ray: Any, done: Any, cells: Sequence[Cell]) -> list[AuditRecord]:
    """Return a finished task's records; those of the failure where its worker died too often."""
    try:
        records: list[AuditRecord] = ray.get(done)
    except ray.exceptions.RayError as error:
        return [died(cell, type(error).__name__) for cell in cells]
    return records
