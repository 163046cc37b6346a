"""A benchmark's cells in, records out: what is there is not computed again, and nothing that is there is lost."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

from filelock import FileLock, Timeout

from audit.config.benchmark import BenchmarkConfig
from audit.errors import EnvironmentFault, UsageError
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell, cells
from audit.run.cell_runner import RunOptions, Watcher, Workbench
from audit.run.intermediate import remove_leftovers
from audit.run.warm_starts import climbed, sharing
from audit.storage import digest, write_atomically
from model_zoo.lookup import expand_ref

_LOCKS, _TRIES = ".locks", 10


def expand(config: BenchmarkConfig) -> list[Cell]:
    """Return the benchmark's cells with patterns such as `bundled:digits-*` replaced by the models they match.

    The cells of one model stay together: it is loaded and attacked once.
    """
    found = [replace(cell, ref=ref) for cell in cells(config) for ref in expand_ref(cell.ref)]
    first = {cell.ref: number for number, cell in reversed(list(enumerate(found)))}
    return climbed(sorted(found, key=lambda cell: first[cell.ref]))


def claim(folder: Path, config: BenchmarkConfig, text: str) -> None:
    """Make a run folder this benchmark's own; raises UsageError where it holds results of another one.

    A folder in which nothing has succeeded yet is taken over: a corrected typo needs no new folder.
    """
    stamp, copy = folder / "run.sha256", folder / "benchmark.yaml"
    mine = digest(config.canonical())
    if stamp.exists() and stamp.read_text().strip() != mine:
        old = list(RecordStore(folder))
        if any(record.valid for record in old):
            message = f"{folder} holds a run of another configuration (its {copy.name})"
            raise UsageError(f"{message}: choose another with --out")
        for record in old:
            RecordStore(folder).path(record.cell_id).unlink()
    write_atomically(copy, text)
    write_atomically(stamp, mine + "\n")


def run(
    todo: Sequence[Cell], folder: Path, options: RunOptions | None = None, watcher: Watcher | None = None
) -> list[AuditRecord]:
    """Audit every cell that has no record yet and return all records, in the order of the cells.

    One model's failure never stops the others: it becomes a record with the reason, and is tried again next time.
    Several processes may work in one folder: cells that share a search are one process's, and those that another one
    is at are left for the end, and waited for.
    """
    remove_leftovers(folder)
    bench = Workbench(options or RunOptions(), watcher or Watcher(), folder)
    store, records = RecordStore(folder), dict[int, AuditRecord]()
    waiting = sharing(todo)
    for patience in (False, True):
        left = []
        for group in waiting:
            with one_at_a_time(folder, bench.cell_id(todo[group[0]]), wait=patience) as mine:
                if not mine:
                    left.append(group)
                    continue
                bench.follow([todo[number] for number in group])
                records |= {number: bench.record(todo[number], store) for number in group}
        waiting = left
    rmtree(folder / _LOCKS, ignore_errors=True)  # every cell has its record: nobody waits any more
    if all(record.valid for record in records.values()):
        bench.parts.forget()
    return [records[number] for number in range(len(todo))]


@contextmanager
def one_at_a_time(folder: Path, cell_id: str, *, wait: bool) -> Iterator[bool]:
    """Hold a cell against other processes while the block runs, and tell whether it is held.

    The lock dies with its process. Where a file system has none, a cell may be computed twice, to the same end.
    Raises EnvironmentFault where the folder cannot be written to.
    """
    lock = FileLock(folder / _LOCKS / cell_id)
    held = _taken(lock, wait=wait)
    try:
        yield held
    finally:
        lock.release()


def _taken(lock: FileLock, *, wait: bool) -> bool:
    place = Path(lock.lock_file).parent
    for _ in range(_TRIES):
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return False
        except NotImplementedError:
            return True
        except (FileNotFoundError, FileExistsError):  # another process was done just now, and took the folder away
            continue
        except OSError as error:
            raise EnvironmentFault(f"cannot write to {place.parent}: {error.strerror or error}") from error
        return True
    raise EnvironmentFault(f"cannot write to {place.parent}: {place.name} is taken away again and again")
