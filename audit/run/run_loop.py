"""Run the cells of a benchmark in a folder: finished cells are skipped, and an executor computes the others."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from audit.adversary.memory.stages import measured
from audit.config.benchmark import BenchmarkConfig
from audit.errors import AuditError, UsageError
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell, search_groups
from audit.run.cell_runner import CellRunner, OnStage
from audit.run.identity import failure_id
from audit.run.intermediate import remove_stale_files
from audit.run.loading import RunOptions
from audit.run.locks import lock, remove_locks
from audit.run.upkeep.start_folders import write_start_folders
from audit.storage import digest, write_atomically


@dataclass(frozen=True)
class Watcher:
    """Callbacks of a run: the start of a stage of a cell, and a record with whether it was there before the run."""

    stage: OnStage = lambda _cell, _stage: None
    done: Callable[[AuditRecord, bool], None] = lambda _record, _known: None


class Finished(NamedTuple):
    """A cell by its number, its stored record, and whether another run had stored it."""

    number: int
    record: AuditRecord
    known: bool = False


@dataclass(frozen=True, eq=False)
class Workload:
    """The cells of a run, of which groups that share searches are left; `known` cells have records already."""

    cells: Sequence[Cell]
    groups: Sequence[Sequence[int]]
    known: frozenset[int]
    folder: Path
    options: RunOptions
    on_stage: OnStage
    runner: CellRunner

    def unfinished(self, group: Sequence[int]) -> list[int]:
        """Return the numbers of a group's cells without a record."""
        return [number for number in group if number not in self.known]


class Executor(Protocol):
    """Computes cells: in this process, in several processes, or on a cluster."""

    def execute(self, work: Workload) -> Generator[Finished, None, None]:
        """Compute the unfinished cells of every group, store their records, and yield them as they come.

        A failure becomes a record. Raises EnvironmentFault where records cannot be stored or nothing can be computed.
        """
        ...


class InProcess:
    """Computes cells in this process; groups that another run computes are left for the end and awaited."""

    def execute(self, work: Workload) -> Generator[Finished, None, None]:
        """Compute the unfinished cells; see `Executor`."""
        store, runner, waiting = RecordStore(work.folder), work.runner, work.groups
        for wait in (False, True):
            skipped = []
            for group in waiting:
                with lock(work.folder, runner.cell_id(work.cells[group[0]]), wait=wait) as held:
                    if not held:
                        skipped.append(group)
                        continue
                    numbers = work.unfinished(group)
                    runner.begin_group([work.cells[number] for number in numbers])
                    for number in numbers:
                        yield Finished(number, *runner.record(work.cells[number], store))
            waiting = skipped


def claim(folder: Path, config: BenchmarkConfig, text: str, base: Path | None = None) -> None:
    """Reserve a run folder for a benchmark; raises UsageError if it holds results of another one.

    A folder without a single valid record is taken over, so that a corrected typo needs no new folder. `base` is the
    folder of the benchmark file, kept with the working folder so that relative paths are found from elsewhere.
    """
    stamp, copy = folder / "run.sha256", folder / "benchmark.yaml"
    own = digest(config.canonical())
    if stamp.exists() and stamp.read_text().strip() != own:
        old = list(RecordStore(folder))
        if any(record.valid for record in old):
            message = f"{folder} holds a run of another configuration (its {copy.name})"
            raise UsageError(f"{message}: choose another with --out")
        for record in old:
            RecordStore(folder).path(record.cell_id).unlink()
    write_atomically(copy, text)
    write_atomically(stamp, own + "\n")
    write_start_folders(folder, base)


@measured("other")
def run(
    cells: Sequence[Cell],
    folder: Path,
    options: RunOptions | None = None,
    watcher: Watcher | None = None,
    executor: Executor | None = None,
) -> list[AuditRecord]:
    """Evaluate every cell without a valid record, and return the records of all cells in their order.

    A failure becomes a record with its reason, never stops other cells, and is tried again by the next run. Raises
    EnvironmentFault if the folder cannot be written to or the executor cannot compute.
    """
    options, watcher, executor = options or RunOptions(), watcher or Watcher(), executor or InProcess()
    remove_stale_files(folder)
    runner, store = CellRunner(options, folder, watcher.stage), RecordStore(folder)
    records = _stored_records(cells, runner, store)
    for record in records.values():
        watcher.done(record, True)
    groups = [group for group in search_groups(cells) if any(number not in records for number in group)]
    work = Workload(cells, groups, frozenset(records), folder.resolve(), options, watcher.stage, runner)
    with closing(executor.execute(work)) as finished:  # closed at once: locks must not outlive an exception
        for number, record, known in finished:
            watcher.done(record, known)
            records[number] = record
    remove_locks(folder)
    store.write_plan(record.cell_id for record in records.values())
    if all(record.valid for record in records.values()):
        runner.intermediate.clear()
    return [records[number] for number in range(len(cells))]


def _stored_records(cells: Sequence[Cell], runner: CellRunner, store: RecordStore) -> dict[int, AuditRecord]:
    """Return the valid records of a folder by the numbers of their cells, in the order of computation.

    The folder's plan becomes that of these cells, unless the identity of one cannot be determined yet.
    """
    found: dict[int, AuditRecord] = {}
    if not store.holds_records():
        return found
    planned: set[str] = set()
    identified = True
    for number in (number for group in search_groups(cells) for number in group):
        cell_id, failed_id = runner.cell_id(cells[number]), failure_id(cells[number])
        planned |= {cell_id, failed_id}
        identified = identified and cell_id != failed_id
        try:
            record = runner.stored(cells[number], store)
        except AuditError:  # reported by the record of the failure
            continue
        if record is not None:
            found[number] = record
    if identified:
        store.write_plan(planned)
    return found
