"""The opening of the page: which model loses least and what limits heads on it, what was checked, what has not settled.

Also the rows that a flag concerns.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import pandas as pd

from audit.flags import FlagCode
from audit.records import AuditRecord
from reports.estimators import place
from reports.page.cells import chips, with_error
from reports.page.explanations import explain, flag_name
from reports.page.verdicts import verdict
from reports.tables.check_rows import check_rows
from reports.tables.table import setting_title, split_flags
from reports.text import plain_text, plural, short_name

_MOST = 6  # names that a sentence lists
_DECISIVE = ("gate", "trust")
_UNSETTLED = {
    FlagCode.NOT_CONVERGED: "the critic (its information is likely too small)",
    FlagCode.SEARCH_NOT_CONVERGED: "the worst-case search (its information is likely too large)",
}


def opening(records: Sequence[AuditRecord], frame: pd.DataFrame, setting: str) -> list[str]:
    """Return the answers a reader looks for first, one sentence each; those on models are of one setting, by title."""
    valid = [record for record in records if record.valid]
    several = frame["model"].nunique() > 1
    here = frame[[setting_title(row) == setting for _, row in frame.iterrows()]] if several else frame[:0]
    return [*_lowest(valid, here, setting), *_checked(valid), *_unsettled(valid)]


def flagged(frame: pd.DataFrame) -> list[tuple[str, str, list[str]]]:
    """Return every flag of a leaderboard: its code, what it means, and the rows it concerns with their particulars."""
    meanings: dict[str, str] = {}
    rows: dict[str, list[str]] = defaultdict(list)
    for _, row in frame.iterrows():
        flags = split_flags(row["flags"])
        meanings |= {flag_name(flag): explain(flag) for flag in flags}
        for chip in chips(flags):
            particulars = f": {chip.particulars}" if chip.particulars else ""
            rows[chip.code].append(f"{short_name(row['model'])}, {plain_text(row['estimator'])}{particulars}")
    return [(name, meaning, _first(rows[name])) for name, meaning in sorted(meanings.items())]


def _lowest(valid: Sequence[AuditRecord], here: pd.DataFrame, setting: str) -> list[str]:
    """Return who has the lowest RV by each estimator, and the verdict on the first of them."""
    first = here[here["rank"].eq("1")].drop_duplicates("estimator")
    if first.empty:
        return []
    by_cell = {record.cell_id: record for record in valid}
    leaders = sorted((by_cell[cell] for cell in first["cell_id"]), key=lambda record: place(record.estimator))
    named: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in leaders:
        value = with_error(record.rv or 0.0, record.rv_se)
        named[record.model, record.weights_sha256].append(f"{plain_text(record.estimator)} ({value} nats, estimate)")
    told = [f"{short_name(model)} by {' and '.join(names)}" for (model, _), names in named.items()]
    (model, weights), cells = next(iter(named)), set(here["cell_id"])
    own = [r for r in valid if (r.model, r.weights_sha256) == (model, weights) and r.cell_id in cells]
    sentence = verdict(own)
    return [
        f"Lowest RV, so the most robust representation ({setting}): {'; '.join(told)}.",
        f"{short_name(model)}: {sentence[:1].lower()}{sentence[1:]}",
    ]


def _checked(valid: Sequence[AuditRecord]) -> list[str]:
    """Return how many audits failed a check that decides over their trust, and how many were not checked."""
    outcomes = [[row for rows in check_rows([record]) for row in rows] for record in valid]
    checked = [[row for row in rows if row.level in _DECISIVE] for rows in outcomes if rows]
    if not checked:
        return ["No audit holds checks of its network, attack or search."] if valid else []
    failed = sum(any(row.outcome == "failed" for row in rows) for rows in checked)
    left = len(valid) - len(checked)
    without = f"; {plural(left, 'audit')} without checks" if left else ""
    counted = f"{failed} of {plural(len(checked), 'audit')} failed one"
    return [f"Gate and trust checks of networks, attacks and searches: {counted}{without}."]


def _unsettled(valid: Sequence[AuditRecord]) -> list[str]:
    """Return which estimates are flagged as not converged, by part and estimator."""
    found: dict[tuple[FlagCode, str], dict[str, None]] = defaultdict(dict)
    for record in sorted(valid, key=lambda record: place(record.estimator)):
        for code in _UNSETTLED:
            if code in record.codes:
                found[code, plain_text(record.estimator)][short_name(record.model)] = None
    if not found:
        return ["No estimate is flagged as not converged."] if valid else []
    parts = [f"{_UNSETTLED[code]}, {estimator}: {_listed(names)}" for (code, estimator), names in found.items()]
    return [f"Not converged: {'; '.join(parts)}."]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(_first(list(names)))


def _first(told: Sequence[str]) -> list[str]:
    return [*told[:_MOST], *([f"and {len(told) - _MOST} more"] if len(told) > _MOST else [])]
