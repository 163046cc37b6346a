"""How far a run is: which cells are done, failed or to do, read from its folder alone. Imports no torch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from audit.config.benchmark import BenchmarkConfig, Planned
from audit.config.yaml_source import read_config
from audit.errors import EnvironmentFault
from audit.records import AuditRecord, RecordStore

DONE, FAILED, TO_DO = "done", "failed", "to do"
Key = tuple[str, str, str, str, float, str]
"""Model reference, data set, layer, norm, eps and estimator: what tells the cells of one run apart."""


class Standing(NamedTuple):
    """One cell and how it stands; `reason` says why it failed, `cell_id` names the record where it is done."""

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
        """Return what tells the cell apart from the others of its run."""
        return (self.model, self.dataset, self.layer, self.norm, self.eps, self.estimator)


def standings(
    config: BenchmarkConfig, records: Iterable[AuditRecord], expand: Callable[[str], list[str]]
) -> list[Standing]:
    """Return how every cell of a benchmark stands; `expand` gives the references that a pattern stands for.

    Raises UnknownNameError for a pattern that nothing matches.
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
        found += [_standing(planned, ref, valid, failed) for ref in expand(planned.model.ref)]
    return found


def run_standings(folder: Path, expand: Callable[[str], list[str]]) -> list[Standing]:
    """Return how every cell of a run folder stands.

    Raises EnvironmentFault where the folder is no run, IntegrityError for a file among its records that is none.
    """
    copy = Path(folder) / "benchmark.yaml"
    if not copy.is_file():
        raise EnvironmentFault(f"{folder} is no run folder: it has no benchmark.yaml")
    return standings(read_config(copy), RecordStore(folder), expand)


def record_key(record: AuditRecord) -> Key:
    """Return what tells a record's cell apart from the others of its run."""
    notes = record.details.get("notes") or {}
    return (str(notes.get("recorded_ref", record.model)), *_setting(record), record.estimator)


def counts(found: Iterable[Standing]) -> dict[str, int]:
    """Return how many cells are done, failed and to do."""
    states = [each.state for each in found]
    return {state: states.count(state) for state in (DONE, FAILED, TO_DO)}


def _setting(record: AuditRecord) -> tuple[str, str, str, float]:
    return (record.dataset, record.layer, record.norm, record.eps)


def _standing(
    planned: Planned, ref: str, valid: dict[Key, AuditRecord], failed: dict[tuple[object, ...], str]
) -> Standing:
    setting = (planned.dataset, planned.layer, planned.norm, planned.eps)
    cell = Standing(ref, *setting, planned.estimator.shown, TO_DO, images=planned.images)
    if cell.key in valid:
        return cell._replace(state=DONE, cell_id=valid[cell.key].cell_id)
    label = planned.model.name or ref  # by which a failed record knows the model
    reason = failed.get((label, *setting, planned.estimator.shown))
    return cell if reason is None else cell._replace(state=FAILED, reason=reason)
