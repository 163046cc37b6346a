"""The report: one self-contained HTML file that opens offline and runs nothing but its own script."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any, cast

import pandas as pd
from jinja2 import DictLoader, Environment, StrictUndefined
from matplotlib.figure import Figure

from audit.records import AuditRecord
from reports.cells import HEADERS, Cell, Row
from reports.explanations import explain, flag_name
from reports.figures import figure1, figure2, figure_bytes
from reports.ranking import leaderboard
from reports.sentences import caption, describe, family_order, order_sentence
from reports.statistics import correlations
from reports.table import Panel, contradicted, panels, split_flags, to_frame
from reports.text import plain_text, plural, short_name

# the parts of a record's details that have a place of their own, in reading order; others follow
DETAIL_ORDER = ("notes", "per_seed", "curves", "identity", "provenance", "renames")
_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Picture:
    """A figure as a data address, with what it shows in words."""

    title: str
    source: str
    words: str


@dataclass(frozen=True)
class Board:
    """One comparable group: its title, its table, and its correlations."""

    title: str
    rows: Sequence[tuple[str, Sequence[Cell]]]
    correlations: Sequence[str]


@dataclass(frozen=True)
class ModelDetails:
    """Everything else a record says about one model."""

    name: str
    reference: str
    facts: dict[str, Any]
    parts: dict[str, Any]


def render_report(records: Sequence[AuditRecord]) -> str:
    """Return the HTML report of records; the same records give the same bytes."""
    frame = leaderboard(to_frame(records))
    css, js = _asset("report.css"), _asset("report.js")
    template = _environment().get_template(_TEMPLATE)
    return template.render(
        policy=_policy(css, js),
        css=css,
        js=js,
        headers=HEADERS,
        summary=summary(frame),
        notices=_notices(records),
        boards=[_board(panel) for panel in panels(frame)],
        order=family_order(frame).to_dict(orient="records"),
        pictures=_pictures(frame),
        flags=_flags(frame),
        failures=_failures(frame),
        attacks=sorted({plain_text(attack) for attack in frame["attack"]}),
        models=_details(records, frame),
    )


def summary(frame: pd.DataFrame) -> list[str]:
    """Return the report's opening: how many models, which are refuted or failed, the order, the correlation."""
    refuted = frame[contradicted(frame)]
    failed = frame[~frame["status"].eq("valid")]
    counts = f"{plural(len(frame), 'audit')} of {plural(frame['model'].nunique(), 'model')}: "
    counts += f"{int(frame['rank'].ne('unranked').sum())} ranked, {len(refuted)} contradicted, {len(failed)} failed."
    reasons = [
        f"{short_name(model)} is contradicted and not ranked{_why(cell)}."
        for model, cell in zip(refuted["model"], refuted["flags"], strict=True)
    ]
    return [counts, *reasons, order_sentence(frame), caption(frame)]


def _why(flags: str) -> str:
    refuting = [flag for flag in split_flags(flags) if flag.startswith("contradicted")]
    told = [plain_text(flag).partition(":")[2].strip() for flag in refuting]
    return f": {'; '.join(filter(None, told))}" if any(told) else ""


def _environment() -> Environment:
    environment = Environment(
        loader=DictLoader({_TEMPLATE: _asset(_TEMPLATE)}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=_plain, spark=spark)
    return environment


def _asset(name: str) -> str:
    return (files("reports") / "templates" / name).read_text(encoding="utf-8")


def _policy(css: str, js: str) -> str:
    style, script = (base64.b64encode(sha256(text.encode()).digest()).decode() for text in (css, js))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _notices(records: Sequence[AuditRecord]) -> list[str]:
    trusted = sorted({short_name(record.model) for record in records if record.code_trusted})
    loose = sorted({short_name(record.model) for record in records if not record.weights_pinned})
    notices = []
    if trusted:
        notices.append(f"User code was trusted to build: {', '.join(trusted)}.")
    if loose:
        notices.append(f"No hash of the weights was known beforehand for: {', '.join(loose)}.")
    return notices


def _board(panel: Panel) -> Board:
    rows = [
        ("unranked" if row["rank"] == "unranked" else "ranked", [header.cell(cast(Row, row)) for header in HEADERS])
        for row in panel.rows.to_dict(orient="records")
    ]
    return Board(panel.title, rows, [describe(correlation) for correlation in correlations(panel.rows)])


def _pictures(frame: pd.DataFrame) -> list[Picture]:
    return [
        _picture("Figure 1. Representation vulnerability against adversarial gap", figure1(frame), caption(frame)),
        _picture(
            "Figure 2. Mutual information against accuracy, normal and worst case",
            figure2(frame),
            "Small markers: normal-case MI and natural accuracy; large ones: worst-case MI and adversarial accuracy. "
            "Dashed: Theorem 3.4, an estimated bound because the MI is an estimate.",
        ),
    ]


def _picture(title: str, figure: Figure, words: str) -> Picture:
    data = base64.b64encode(figure_bytes(figure, "svg")).decode()
    return Picture(title, f"data:image/svg+xml;base64,{data}", words)


def _flags(frame: pd.DataFrame) -> list[tuple[str, str]]:
    names = {flag_name(flag): flag for cell in frame["flags"] for flag in split_flags(cell)}
    return [(name, explain(names[name])) for name in sorted(names)]


def _failures(frame: pd.DataFrame) -> list[tuple[str, str]]:
    failed = frame[~frame["status"].eq("valid")]
    pairs = zip(failed["model"], failed["status"], strict=True)
    return [(plain_text(model), plain_text(status).removeprefix("failed: ")) for model, status in pairs]


def _details(records: Sequence[AuditRecord], frame: pd.DataFrame) -> list[ModelDetails]:
    by_cell = {record.cell_id: record for record in records}
    return [_model_details(by_cell[cell]) for cell in frame["cell_id"] if cell in by_cell]


def _model_details(record: AuditRecord) -> ModelDetails:
    data = record.to_dict()
    details = data.pop("details")
    later = sorted(set(details) - set(DETAIL_ORDER))
    parts = {name: details[name] for name in [*DETAIL_ORDER, *later] if details.get(name)}
    facts = {name: value for name, value in data.items() if value not in (None, "", ())}
    return ModelDetails(f"{short_name(record.model)}, {plain_text(record.layer)}", record.model, facts, parts)


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return plain_text(str(value)).encode(errors="replace").decode()


def spark(values: Sequence[object]) -> str:
    """Return the points of a small curve (100 x 24) through numbers, or "" where they make none.

    >>> spark([0, 1])
    ''
    """
    numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    if len(numbers) < 8 or len(numbers) < len(values):
        return ""
    low, span = min(numbers), max(numbers) - min(numbers) or 1.0
    step = 100 / (len(numbers) - 1)
    return " ".join(f"{i * step:.1f},{23 - 22 * (v - low) / span:.1f}" for i, v in enumerate(numbers))
