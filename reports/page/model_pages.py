"""What the report says of each model: limits, layers, learning curves, checks, and every field."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from audit.records import AuditRecord
from reports.page.drawings import Chart, Curve, charts
from reports.page.model_limits import Place, Profile, number, places, profiles
from reports.page.verdicts import verdict
from reports.tables.contradictions import cross_check
from reports.tables.table import setting_title
from reports.text import format_eps, plain_text, short_name

# the parts of a record's details that have a place of their own, in reading order; others follow
DETAIL_ORDER = ("notes", "per_seed", "certificate", "published", "identity", "provenance", "renames")
NO_NAME = "(no name)"
_LINES = (("validation", "held-out"), ("training", "training"))


@dataclass(frozen=True)
class Audit:
    """One record: what speaks against it, its curves, and everything else it says."""

    title: str
    reason: str
    flags: Sequence[str]
    charts: Sequence[Chart]
    facts: Mapping[str, Any]
    parts: Mapping[str, Any]


@dataclass(frozen=True)
class ModelPage:
    """The section of one model, which opens with its verdict."""

    anchor: str
    name: str
    reference: str
    verdict: str
    summary: str
    places: Sequence[Place]
    profiles: Sequence[Profile]
    audits: Sequence[Audit]


def model_pages(records: Sequence[AuditRecord], frame: pd.DataFrame) -> list[ModelPage]:
    """Return a section for every model of a leaderboard, in its order; of other weights is another model."""
    by_cell = {record.cell_id: record for record in cross_check(records)}
    titles = {row["cell_id"]: setting_title(row) for _, row in frame.iterrows()}
    models: dict[tuple[str, str], list[AuditRecord]] = defaultdict(list)
    for cell, model in zip(frame["cell_id"], frame["model"], strict=True):
        models[plain_text(model), by_cell[cell].weights_sha256].append(by_cell[cell])
    numbered = enumerate(models.items(), start=1)
    return [_page((f"model-{i}", reference), found, titles) for i, ((reference, _), found) in numbered]


def anchors(pages: Sequence[ModelPage]) -> dict[str, str]:
    """Return the anchor of every model by its plain reference, the first where several share it."""
    return {page.reference: page.anchor for page in reversed(pages)}


def _page(names: tuple[str, str], records: Sequence[AuditRecord], titles: Mapping[str, str]) -> ModelPage:
    (anchor, reference), first = names, records[0]
    trained = f", eps {format_eps(first.trained_eps)}" if first.trained_eps > 0 else ""
    known = "known" if first.weights_pinned else "not known"
    parts = [
        plain_text(first.family), f"training {plain_text(first.training)}{trained}",
        f"weights {plain_text(first.weights_sha256)[:12]}, their hash {known} beforehand",
    ]  # fmt: skip
    return ModelPage(
        anchor=anchor,
        name=short_name(reference) or NO_NAME,
        reference=reference,
        verdict=verdict(records),
        summary="; ".join(parts),
        places=places(records, titles),
        profiles=profiles(records),
        audits=[_audit(record, titles[record.cell_id]) for record in records],
    )


def _audit(record: AuditRecord, setting: str) -> Audit:
    data = record.to_dict()
    details = data.pop("details")
    for name in ("checks", "flags"):
        del data[name]
    drawn = _charts(details)
    hidden = {"curves"} if drawn is not None else set()
    order = [*DETAIL_ORDER, *sorted(set(details) - {*DETAIL_ORDER, *hidden})]
    return Audit(
        title=f"{setting}, {plain_text(record.estimator)}",
        reason="" if record.valid else plain_text(record.reason or record.status),
        flags=[plain_text(flag) for flag in record.flags],
        charts=drawn or [],
        facts={name: value for name, value in data.items() if value not in (None, "", ())},
        parts={name: details[name] for name in order if details.get(name)},
    )


def _charts(details: Mapping[str, Any]) -> list[Chart] | None:
    """Return the learning curves, or None where `curves` holds something else."""
    runs = details.get("curves", [])
    if not isinstance(runs, list) or not all(isinstance(run, Mapping) for run in runs):
        return None
    seeds = [row for row in details.get("per_seed") or [] if isinstance(row, Mapping)]
    cases = [
        (
            f"{case} case",
            [curve for run in runs for curve in _curves(run.get(case))],
            [value for row in seeds if math.isfinite(value := number(row.get(f"{case}_nats")))],
        )
        for case in ("normal", "worst")
    ]
    return charts(cases)


def _curves(lines: object) -> list[Curve]:
    given = lines if isinstance(lines, Mapping) else {}
    found = [(shown, _points(given.get(name))) for name, shown in _LINES]
    return [Curve(shown, points) for shown, points in found if len(points) > 1]


def _points(pairs: object) -> list[tuple[float, float]]:
    """Return (step, nats) pairs; those that are no numbers are left out."""
    numbers = [tuple(map(number, pair)) for pair in pairs if _is_pair(pair)] if isinstance(pairs, list) else []
    return [(x, y) for x, y in numbers if math.isfinite(x) and math.isfinite(y)]


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2
