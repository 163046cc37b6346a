"""Limits against accuracy, and RV layer by layer, of one model: rows of values and where they stand on a strip."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from audit.records import AuditRecord
from reports.estimators import place as estimator_place
from reports.page.cells import MISSING, with_error, with_interval
from reports.page.drawings import Strip, place, strip
from reports.tables.check_rows import CheckRow, check_rows
from reports.text import format_eps, format_norm, layer_place, plain_text, short_name


@dataclass(frozen=True)
class Limit:
    """One row of limits against accuracy, a fraction: what it is, its kind, its value in words and on a strip."""

    name: str
    kind: str
    text: str
    strip: Strip


@dataclass(frozen=True)
class Place:
    """One layer under one threat: accuracies and limits, and the checks of every attack with its estimators."""

    title: str
    limits: Sequence[Limit]
    checks: Sequence[tuple[str, Sequence[CheckRow]]]


@dataclass(frozen=True)
class LayerRow:
    """One layer of a profile: RV (nats, estimate) in words and on a strip, and what limits any head on the layer."""

    layer: str
    dimension: str
    rv: str
    strip: Strip
    worst: str
    fano: str
    certified: str


@dataclass(frozen=True)
class Profile:
    """Several layers under one threat and estimator, from the input to the logits."""

    title: str
    rows: Sequence[LayerRow]


def places(records: Sequence[AuditRecord], titles: Mapping[str, str]) -> list[Place]:
    """Return the accuracies, limits (fractions) and checks of one model, a place each; `titles` go by cell."""
    ordered = sorted(records, key=lambda record: (record.dataset, layer_place(record.layer), record.norm, record.eps))
    settings = _grouped(ordered, lambda record: titles[record.cell_id])
    found = [Place(title, _limits(group), _checks(group)) for title, group in settings]
    return [place for place in found if place.limits or place.checks]


def profiles(records: Sequence[AuditRecord]) -> list[Profile]:
    """Return RV (nats, estimate) by layer for every threat and estimator that several layers were audited under."""
    return [profile for _, group in _grouped(records, _threat) if (profile := _profile(group))]


def number(value: object) -> float:
    """Return a number, NaN for anything else.

    >>> number(1), number(None)
    (1.0, nan)
    """
    return float(value) if isinstance(value, int | float) else math.nan


def _grouped(records: Iterable[AuditRecord], key: Callable[[AuditRecord], str]) -> list[tuple[str, list[AuditRecord]]]:
    groups: dict[str, list[AuditRecord]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return list(groups.items())


def _threat(record: AuditRecord) -> str:
    threat = f"{format_norm(record.norm)} {format_eps(record.eps)}"
    return f"{short_name(record.dataset)}, {threat}, {plain_text(record.estimator)}"


def _checks(records: Sequence[AuditRecord]) -> list[tuple[str, Sequence[CheckRow]]]:
    """Return the checks of every attack, each with the names of the estimators whose audits share them."""
    ordered = sorted(records, key=lambda record: estimator_place(record.estimator))
    return [
        (", ".join(dict.fromkeys(plain_text(r.estimator) for r in ordered if rows in check_rows([r]))), rows)
        for rows in check_rows(ordered)
    ]


def _limits(records: Sequence[AuditRecord]) -> list[Limit]:
    """Return what was measured, what is estimated and what is certified, one row each, equal rows once."""
    rows = [row for record in records if record.valid for row in _measured(record)]
    ordered = sorted(records, key=lambda record: estimator_place(record.estimator))
    rows += [row for record in ordered if record.valid for row in _estimated(record)]
    rows += [row for record in records if record.valid for row in _certified(record)]
    adversarial = next((row.strip.at for row in rows if row.name.startswith("adversarial")), "")
    known = [row for row in dict.fromkeys(rows) if row.strip.at]
    return [replace(row, strip=replace(row.strip, shared=adversarial)) for row in known]


def _measured(record: AuditRecord) -> list[Limit]:
    rows = []
    for case, under in (("natural", ""), ("adversarial", f" under {plain_text(record.attack)}")):
        value, low, high = (number(getattr(record, f"{case}_accuracy{end}")) for end in ("", "_low", "_high"))
        head = plain_text(getattr(record, f"{case}_head"))
        name = f"{case} accuracy{f' of the {head} head' if head else ''}{under}, {record.images} images"
        rows.append(Limit(name, "measured", with_interval(value, low, high), strip(value, interval=(low, high))))
    head = f"best head found ({plain_text(record.best_head)}), {record.images} images"
    return [*rows, _limit(head, "measured", record.best_head_accuracy)]


def _estimated(record: AuditRecord) -> list[Limit]:
    of = f"{plain_text(record.estimator)}, {plain_text(record.quantity)}"
    return [
        _limit(f"estimated bound, exact Fano: {of}", "estimate", record.fano_accuracy_bound),
        _limit(f"estimated bound, Theorem 3.4 as printed: {of}", "estimate", record.adversarial_accuracy_bound),
    ]


def _certified(record: AuditRecord) -> list[Limit]:
    tier = plain_text(record.certified_tier)
    ledger = f"the network, under every attack in the ball, {record.images} images"
    return [
        _limit(f"proved to stay right: {ledger}", "certified", record.proved_share),
        _limit(f"not broken: {ledger}", "certified", record.not_broken_share),
        *_kept_population(record),
        _limit(f"no head exceeds, {tier}, {record.images} images", "certified", record.certified_bound),
        _limit(f"no head exceeds, {tier}, all images of their kind", "certified", record.certified_bound_population),
    ]


def _kept_population(record: AuditRecord) -> list[Limit]:
    """Return the limits on the network's adversarial accuracy on the distribution of the images, from the ledger."""
    certificate = record.details.get("certificate")
    ends = certificate.get("kept_population") if isinstance(certificate, Mapping) else None
    if certificate is None or record.proved_share is None or not isinstance(ends, Sequence) or len(ends) != 2:
        return []
    low, high = (number(end) for end in ends)
    sure = f"{_confidence(certificate)} confidence"
    kept = f"the network, under every attack in the ball, all images of their kind, {sure}"
    return [
        Limit(f"{side}: {kept}", "certified", with_error(end, None), strip(end))
        for side, end in (("keeps at least", low), ("keeps at most", high))
    ]


def _confidence(certificate: Mapping[str, Any]) -> str:
    value = certificate.get("confidence")
    return f"{value:.0%}" if isinstance(value, float) else "95%"


def _limit(name: str, kind: str, value: float | None) -> Limit:
    known = number(value)
    return Limit(name, kind, with_error(known, None), strip(known))


def _profile(records: Sequence[AuditRecord]) -> Profile | None:
    valid = [record for record in records if record.valid and record.rv is not None]
    if len({record.layer for record in valid}) < 2:
        return None
    spread = [number(record.rv) + sign * (record.rv_se or 0.0) for record in valid for sign in (-1, 1)]
    ends = (min(0.0, *spread), max(spread))
    rows = [_layer_row(record, ends) for record in sorted(valid, key=lambda record: layer_place(record.layer))]
    return Profile(_threat(records[0]), rows)


def _layer_row(record: AuditRecord, ends: tuple[float, float]) -> LayerRow:
    rv, error = number(record.rv), record.rv_se or 0.0
    drawn = replace(strip(rv, ends, (rv - error, rv + error)), shared=place(0.0, ends))
    bounds = [with_error(number(value), None) for value in (record.fano_accuracy_bound, record.certified_bound)]
    return LayerRow(
        plain_text(record.layer), str(record.dimension or MISSING), with_error(rv, record.rv_se), drawn,
        with_error(number(record.worst_nats), record.worst_nats_se), *bounds,
    )  # fmt: skip
