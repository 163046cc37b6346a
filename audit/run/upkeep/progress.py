"""Progress of a run: which cells are done, failed or to do, from its folder alone. Imports no torch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from audit.config.benchmark import BenchmarkConfig, Planned
from audit.config.yaml_source import read_config
from audit.errors import EnvironmentFault
from audit.records import AuditRecord, RecordStore
from audit.run.evidence.kept import finished

DONE, FAILED, TO_DO = "done", "failed", "to do"
Key = tuple[str, str, str, str, float, str]
"""Model reference, data set, layer, norm, eps and estimator: unique for each cell of a run."""


class CellStatus(NamedTuple):
    """State of one cell; `reason` is that of a failure, `cell_id` the name of the record of a finished cell."""

    model: str
    dataset: str
    layer: str
    norm: str
    eps: float
    estimator: str
    state: str
    reason: str = ""
    cell_id: str = ""
    images: int | None = None

    @property
    def key(self) -> Key:
        """The key of the cell in its run."""
        return (self.model, self.dataset, self.layer, self.norm, self.eps, self.estimator)


def cell_statuses(
    config: BenchmarkConfig, records: Iterable[AuditRecord], expand: Callable[[str], list[str]]
) -> list[CellStatus]:
    """Return the state of every cell of a benchmark; `expand` returns the references that a pattern matches.

    Raises UnknownNameError for a pattern without a match.
    """
    valid: dict[Key, AuditRecord] = {}
    failed: dict[tuple[object, ...], str] = {}
    for record in records:
        if record.valid:
            valid[record_key(record)] = record
        else:
            failed[(record.model, *_setting(record), record.estimator)] = record.reason
    found = []
    for planned in config.planned():
        found += [_status(planned, ref, valid, failed) for ref in expand(planned.model.ref)]
    return found


def run_statuses(folder: Path, expand: Callable[[str], list[str]]) -> list[CellStatus]:
    """Return the state of every cell of a run folder.

    Raises EnvironmentFault for a folder that is no run, IntegrityError for a file among its records that is none.
    """
    copy = Path(folder) / "benchmark.yaml"
    if not copy.is_file():
        raise EnvironmentFault(f"{folder} is no run folder: it has no benchmark.yaml")
    config = read_config(copy)
    known = finished(Path(folder), RecordStore(folder).present(), keep=config.keep_images)
    return cell_statuses(config, known, expand)


def record_key(record: AuditRecord) -> Key:
    """Return the key of a record's cell in its run."""
    notes = record.details.get("notes") or {}
    return (str(notes.get("recorded_ref", record.model)), *_setting(record), record.estimator)


def counts(found: Iterable[CellStatus]) -> dict[str, int]:
    """Return how many cells are done, failed and to do."""
    states = [each.state for each in found]
    return {state: states.count(state) for state in (DONE, FAILED, TO_DO)}


def _setting(record: AuditRecord) -> tuple[str, str, str, float]:
    return (record.dataset, record.layer, record.norm, record.eps)


def _status(
    planned: Planned, ref: str, valid: dict[Key, AuditRecord], failed: dict[tuple[object, ...], str]
) -> CellStatus:
    setting = (planned.dataset, planned.layer, planned.norm, planned.eps)
    cell = CellStatus(ref, *setting, planned.estimator.shown, TO_DO, images=planned.images)
    if cell.key in valid:
        return cell._replace(state=DONE, cell_id=valid[cell.key].cell_id)
    label = planned.model.name or ref  # the model of a failed record
    reason = failed.get((label, *setting, planned.estimator.shown))
    return cell if reason is None else cell._replace(state=FAILED, reason=reason)


def in_words(seconds: float) -> str:
    """Return a duration in words.

    >>> in_words(8), in_words(100), in_words(8000)
    ('about 8 s', 'about 2 min', 'about 2.2 h')
    """
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
