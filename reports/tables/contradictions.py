"""Consistency across records: worst-case information must not rise with the radius.

A larger ball holds the smaller ball's images, so its worst case is at most the smaller ball's.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import hypot

from audit.flags import FlagCode, flag
from audit.records import AuditRecord
from reports.text import format_eps

_STANDARD_ERRORS = 2.0
_ROUNDING = 1e-6


def cross_check(records: Iterable[AuditRecord]) -> list[AuditRecord]:
    """Return the records, each flagged whose worst case (nats) lies above that of a smaller ball beyond the errors.

    Only records equal in everything but eps are compared. A record that is refuted itself refutes no other; where
    a cell appears twice, the later record counts. Checking twice changes nothing.
    """
    given = list(records)
    witnesses: dict[str, list[AuditRecord]] = defaultdict(list)
    for record in {record.cell_id: record for record in given}.values():
        if record.valid and record.worst_nats is not None and not record.contradicted:
            witnesses[_all_but_eps(record)].append(record)
    return [_checked(record, witnesses[_all_but_eps(record)]) for record in given]


def _all_but_eps(record: AuditRecord) -> str:
    identity = dict(record.details.get("identity") or {})
    identity.pop("eps", None)
    named = (record.model, record.source, record.weights_sha256, record.dataset, record.layer, record.norm)
    how = (record.estimator, record.attack, record.seeds, record.images, record.critic_images)
    return json.dumps([named, how, identity], sort_keys=True, default=str)


def _checked(record: AuditRecord, witnesses: Sequence[AuditRecord]) -> AuditRecord:
    against = [(excess, other) for other in witnesses if (excess := _excess(record, other)) > 0]
    if not against:
        return record
    lowest = min((other for _, other in against), key=lambda other: (other.worst_nats or 0.0, other.eps, other.cell_id))
    flag = _flag(record, lowest)
    return record if flag in record.flags else replace(record, flags=(flag, *record.flags))


def _excess(record: AuditRecord, other: AuditRecord) -> float:
    """Return the excess of the worst case over a smaller ball's, less the error margin; 0 where not comparable."""
    if not record.valid or record.worst_nats is None or other.worst_nats is None or other.eps >= record.eps:
        return 0.0
    error = hypot(record.worst_nats_se or 0.0, other.worst_nats_se or 0.0)
    return record.worst_nats - other.worst_nats - _STANDARD_ERRORS * error - _ROUNDING


def _flag(record: AuditRecord, other: AuditRecord) -> str:
    here, there = _distinct(record.worst_nats or 0.0, other.worst_nats or 0.0)
    return flag(
        FlagCode.CONTRADICTED,
        f"worst_nats {here} at eps {format_eps(record.eps)} is above {there} at eps {format_eps(other.eps)}",
    )


def _distinct(one: float, other: float) -> tuple[str, str]:
    """Return two numbers with two decimals, or as many as needed to differ.

    >>> _distinct(1.3, 0.9), _distinct(0.9013, 0.9)
    (('1.30', '0.90'), ('0.901', '0.900'))
    """
    for digits in range(2, 9):
        shown = f"{one:.{digits}f}", f"{other:.{digits}f}"
        if shown[0] != shown[1]:
            return shown
    return repr(one), repr(other)
