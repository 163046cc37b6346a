"""Records that lie in a run folder and are not results of its present plan."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from audit.records import AuditRecord, RecordStore
from reports.text import format_eps, format_norm, plain_text, plural, short_name

_NAMED = 5  # records that a sentence names


def leftover_sentences(folders: Iterable[Path]) -> list[str]:
    """Return one sentence for every folder that holds more than the records of its present plan.

    Weights, images or settings have changed since these were computed. A folder of a version that stored no plan does
    not tell which of several records of one cell counts. Raises IntegrityError for a file that cannot be read.
    """
    return [sentence for folder in folders if (sentence := _sentence(Path(folder)))]


def _sentence(folder: Path) -> str:
    store = RecordStore(folder)
    name = plain_text(folder.resolve().name)  # not its path: reports of copied folders are equal
    if store.plan() is not None:
        left = [record for record in store.others() if record.valid]  # nobody looks for an old failure
        what = plural(len(left), "record") if left else ""
        return f"{name} also holds {what} of earlier runs, which are not ranked: {_named(left)}." if left else ""
    twice = _several_of_one_cell(store)
    if not twice:
        return ""
    advice = "run its benchmark again to rank the present ones"
    return f"{name} holds several records of one cell; {advice}: {_named(twice)}."


def _several_of_one_cell(records: Iterable[AuditRecord]) -> list[AuditRecord]:
    by_cell: dict[tuple[object, ...], list[AuditRecord]] = defaultdict(list)
    for record in records:
        if record.valid:
            notes = record.details.get("notes")
            ref = notes.get("recorded_ref", record.model) if isinstance(notes, dict) else record.model
            place = (record.dataset, record.layer, record.norm, record.eps, record.estimator)
            by_cell[(ref, *place)].append(record)
    return [record for group in by_cell.values() if len(group) > 1 for record in group]


def _named(records: Sequence[AuditRecord]) -> str:
    shown = "; ".join(map(_name, records[:_NAMED]))
    return shown + (f"; and {len(records) - _NAMED} more" if len(records) > _NAMED else "")


def _name(record: AuditRecord) -> str:
    threat = f"{format_norm(record.norm)} {format_eps(record.eps)}"
    parts = [short_name(record.model), plain_text(record.layer), threat, plain_text(record.estimator)]
    rv = [] if record.rv is None else [f"RV {record.rv:.3f}"]
    return ", ".join([*parts, f"weights {plain_text(record.weights_sha256[:8])}", *rv])
