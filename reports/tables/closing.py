"""The short table of a run's cells: what a terminal prints at the end of a run, and what a notebook shows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import Any, NamedTuple

from audit.flags import MEANINGS, FlagCode, code_of
from audit.records import AuditRecord
from reports.estimators import place
from reports.tables.contradictions import cross_check
from reports.text import format_eps, format_norm, layer_place, plain_text, short_name

PROVENANCE = (FlagCode.UNPINNED, FlagCode.CODE_TRUSTED)
"""Flags that say where weights and code come from, and nothing about the numbers."""
AUDITED_WITH = f"rvaudit {version('rvaudit')}"
NOTE = "Accuracies are measured; nats, RV and the bound are estimates."
_CERTIFIED = {
    "certified bound": "A certified bound is proved on these images.",
    "kept, proved": "Proved of these images: the network keeps at least the first share and at most the second.",
}


class ClosingTable(NamedTuple):
    """Header and rows as plain text, sorted, and the sentences under them."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]

    @property
    def html(self) -> str:
        """Return the table with its sentences as HTML; every text is escaped."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        notes = "".join(f"<br>{escape(note)}" for note in self.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><small>{notes[4:]}</small>"


def closing_table(records: Iterable[AuditRecord]) -> ClosingTable:
    """Return the table of the valid records, one estimator after the other, and of each the least vulnerable first.

    Columns that no record fills are left out. The notes explain each flag once, and name the models whose weights or
    code were not checked.
    """
    found = sorted((record for record in cross_check(records) if record.valid), key=_order)
    if not found:
        return ClosingTable((), [], [])
    columns = {name: [cell(record) for record in found] for name, cell in _COLUMNS.items()}
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    certified = [note for name, note in _CERTIFIED.items() if name in filled]
    rows = list(zip(*filled.values(), strict=True))
    return ClosingTable(tuple(filled), rows, [" ".join([NOTE, *certified]), *_verdicts(found), *_provenance(found)])


def _order(record: AuditRecord) -> tuple[Any, ...]:
    rv = float("inf") if record.rv is None else record.rv
    setting = (record.dataset, layer_place(record.layer), record.norm, record.eps)
    return (place(record.estimator), *setting, rv, record.model, record.cell_id)


def _number(name: str, digits: int = 3) -> Callable[[AuditRecord], str]:
    def cell(record: AuditRecord) -> str:
        value, error = getattr(record, name), getattr(record, f"{name}_se", None)
        if value is None:
            return ""
        return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"

    return cell


def _head(record: AuditRecord) -> str:
    share = record.best_head_accuracy
    return "" if share is None else f"{share:.3f} ({plain_text(record.best_head)})"


def _flags(record: AuditRecord) -> str:
    return ", ".join(_codes(record, provenance=False))


def _codes(record: AuditRecord, *, provenance: bool) -> list[str]:
    """Return the codes of a record's flags, each once: those of its provenance, or all others."""
    codes = dict.fromkeys(code_of(flag) or plain_text(flag.partition(":")[0]) for flag in record.flags)
    return [str(code) for code in codes if (code in PROVENANCE) == provenance]


def _ledger(record: AuditRecord) -> str:
    ends = (record.proved_share, record.not_broken_share)
    return " to ".join(f"{share:.3f}" for share in ends if share is not None)


_COLUMNS: Mapping[str, Callable[[AuditRecord], str]] = {
    "model": lambda record: short_name(record.model),
    "layer": lambda record: plain_text(record.layer),
    "norm": lambda record: format_norm(record.norm),
    "eps": lambda record: format_eps(record.eps),
    "estimator": lambda record: plain_text(record.estimator),
    "normal nats": _number("normal_nats", 2),
    "worst nats": _number("worst_nats", 2),
    "RV": _number("rv", 2),
    "Fano bound": _number("fano_accuracy_bound"),
    "certified bound": _number("certified_bound"),
    "kept, proved": _ledger,
    "best head": _head,
    "natural": _number("natural_accuracy"),
    "adversarial": _number("adversarial_accuracy"),
    "flags": _flags,
}


def _verdicts(records: Sequence[AuditRecord]) -> list[str]:
    """Return the meaning of every flag in the table, once."""
    codes = dict.fromkeys(code for record in records for code in _codes(record, provenance=False))
    return [f"{code}: {MEANINGS[FlagCode(code)]}." if code in list(FlagCode) else code for code in codes]


def _provenance(records: Sequence[AuditRecord]) -> list[str]:
    """Return a sentence for each kind of weights or code that were not checked, with the names of the models."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for code in _codes(record, provenance=True):
            found.setdefault(code, {})[short_name(record.model)] = None
    return [f"Provenance, {code}: {MEANINGS[FlagCode(code)]} ({', '.join(models)})." for code, models in found.items()]
