"""Two runs side by side: the cells that both have, with the values of each and the differences between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from audit.records import AuditRecord
from reports.page.cells import MISSING, with_error
from reports.tables.comparison import DIRECTION, Difference, Pair, compare
from reports.text import format_eps, format_norm, plain_text, short_name


class Other(NamedTuple):
    """Another run to stand beside this one: its name and its records."""

    name: str
    records: Sequence[AuditRecord]


@dataclass(frozen=True)
class SideBySide:
    """The comparison as text: the other run's name, one row a shared cell, and sentences about all of them.

    `unpaired` are sentences about the cells that only one of the runs has.
    """

    name: str
    rows: Sequence[tuple[str, ...]]
    sentences: Sequence[str]
    unpaired: Sequence[str]


def side_by_side(records: Sequence[AuditRecord], other: Other) -> SideBySide:
    """Return the cells that two runs share; raises UsageError where they share none.

    Rows hold model, setting, estimator, RV of this run and of the other (nats), their difference, natural and
    adversarial accuracy of both (fractions), and what differs in the cells' identities.
    """
    found = compare(records, other.records)
    mine, theirs = ({_key(record): record for record in run if record.valid} for run in (records, other.records))
    rows = [_row(pair, mine[_pair_key(pair)], theirs[_pair_key(pair)]) for pair in found.pairs]
    told, unpaired = ([plain_text(each) for each in lines] for lines in (found.summary(), found.unpaired()))
    return SideBySide(plain_text(other.name), rows, [*told, DIRECTION], unpaired)


def _key(record: AuditRecord) -> tuple[str, str, str, str, float, str]:
    return record.model, record.dataset, record.layer, record.norm, record.eps, record.estimator


def _pair_key(pair: Pair) -> tuple[str, str, str, str, float, str]:
    return pair.model, pair.dataset, pair.layer, pair.norm, pair.eps, pair.estimator


def _row(pair: Pair, first: AuditRecord, second: AuditRecord) -> tuple[str, ...]:
    threat = f"{format_norm(pair.norm)} {format_eps(pair.eps)}"
    return (
        short_name(pair.model),
        f"{short_name(pair.dataset)}, {plain_text(pair.layer)}, {threat}",
        plain_text(pair.estimator),
        _nats(first),
        _nats(second),
        _difference(pair.rv),
        _both(first.natural_accuracy, second.natural_accuracy),
        _both(first.adversarial_accuracy, second.adversarial_accuracy),
        plain_text(", ".join(pair.differing)) or "nothing",
    )


def _nats(record: AuditRecord) -> str:
    return MISSING if record.rv is None else with_error(record.rv, record.rv_se)


def _difference(rv: Difference) -> str:
    interval = "" if rv.low is None or rv.high is None else f" [{rv.low:+.3f}, {rv.high:+.3f}]"
    return f"{rv.mean:+.3f}{interval}"


def _both(first: float | None, second: float | None) -> str:
    return " → ".join(MISSING if value is None else f"{value:.3f}" for value in (first, second))
