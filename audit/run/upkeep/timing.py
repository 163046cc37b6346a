"""Where the time of a run went: costs of stages in its records, and of the work around them in `timing.json`."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from audit.errors import EnvironmentFault
from audit.records import AuditRecord
from audit.storage import write_atomically

_FILE = "timing.json"


class StageTotal(NamedTuple):
    """Costs of a stage over the records of a run: CPU seconds, images passed, passes needed, and number of records.

    `needed` is None for a stage whose search does not count passes; `records` is 0 for work around the records.
    """

    stage: str
    seconds: float
    passed: float = 0.0
    needed: float | None = None
    records: int = 0


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Store the CPU seconds of work around the records of a run, such as its figures, in the run folder.

    Those of processes that the work starts and ends count, too.
    """
    started = _cpu_seconds()
    try:
        yield
    finally:
        store_seconds(folder, stage, _cpu_seconds() - started)


def _cpu_seconds() -> float:
    of_processes = os.times()
    return time.process_time() + of_processes.children_user + of_processes.children_system


def store_seconds(folder: Path, stage: str, seconds: float) -> None:
    """Store the CPU seconds of a stage around the records, over those of the last run; a full disk is no failure."""
    with suppress(EnvironmentFault, OSError):
        found = {**_stored(folder), stage: round(seconds, 3)}
        write_atomically(Path(folder) / _FILE, json.dumps(found, indent=1) + "\n")


def stage_totals(folder: Path, records: Iterable[AuditRecord]) -> list[StageTotal]:
    """Return the costs of every stage of a run: those of its records, then those around them."""
    totals: dict[str, StageTotal] = {}
    for record in records:
        for stage, cost in record.timing.items():
            totals[stage] = _sum(totals.get(stage, StageTotal(stage, 0.0)), cost)
    return [*totals.values(), *(StageTotal(stage, seconds) for stage, seconds in _stored(folder).items())]


def _sum(total: StageTotal, cost: Mapping[str, float | None]) -> StageTotal:
    needed = cost.get("needed")
    return total._replace(
        seconds=total.seconds + (cost.get("seconds") or 0.0),
        passed=total.passed + (cost.get("passed") or 0.0),
        needed=total.needed if needed is None else (total.needed or 0.0) + needed,
        records=total.records + 1,
    )


def _stored(folder: Path) -> dict[str, float]:
    """Return the stored seconds by stage; none where there is no such file or it holds something else."""
    try:
        found = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}
