"""Headers and cells of the report's leaderboard as text, with their sort keys."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from audit.flags import UNRANKED, FlagCode, code_of
from reports.tables.columns import KINDS, UNITS
from reports.tables.table import contradictions, split_flags
from reports.text import format_eps, plain_text, short_name

Row = Mapping[str, Any]
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """The text of a cell, its sort key (a number as text, or the text), and the full text for a tooltip."""

    text: str
    sort: str
    hint: str = ""


@dataclass(frozen=True)
class Header:
    """The head of a column: its title, unit and kind, and how to fill a cell."""

    title: str
    cell: Callable[[Row], Cell]
    unit: str = ""
    kind: str = ""

    @property
    def numeric(self) -> bool:
        """Whether the column sorts as numbers."""
        return bool(self.kind) or self.title == "rank"


def estimate(title: str, name: str) -> Header:
    """Return a column that shows a value with its standard error."""
    return _number_header(title, name, lambda row: with_error(row[name], row.get(f"{name}_se")))


def accuracy(title: str, name: str) -> Header:
    """Return a column that shows a fraction with its 95 % interval."""
    return _number_header(title, name, lambda row: with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"]))


def with_error(value: float, error: float | None) -> str:
    """Return a value with its standard error.

    >>> with_error(1.3, 0.06), with_error(1.3, None), with_error(float("nan"), 0.1)
    ('1.300 ± 0.060', '1.300', '–')
    """
    if not _known(value):
        return MISSING
    return f"{value:.3f} ± {error:.3f}" if error is not None and _known(error) else f"{value:.3f}"


def with_interval(value: float, low: float, high: float) -> str:
    """Return a value with its interval.

    >>> with_interval(0.98, 0.965, 0.99)
    '0.980 [0.965, 0.990]'
    """
    if not _known(value):
        return MISSING
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if _known(low) and _known(high) else f"{value:.3f}"


def training_text(row: Row) -> str:
    """Return how a model was trained, with the radius where there was one."""
    label, eps = plain_text(row["training"]), float(row["trained_eps"])
    return f"{label}, eps {format_eps(eps)}" if eps > 0 else label


def flags_text(row: Row) -> str:
    """Return the flags of a row, and its failure where there is one."""
    failure = [] if row["status"] == "valid" else [row["status"]]
    return plain_text("; ".join([*failure, *split_flags(row["flags"])])) or "none"


NO_CLAIM = "This estimator does not claim to rank models: its values are shown for replication."


def unranked_reason(row: Row) -> str:
    """Return why a row is not ranked, with the figures by which it is contradicted; "" for one that is.

    >>> row = {"rank": "unranked", "status": "valid", "flags": "contradicted: 0.3 under 0.5; saturated", "ranks": True}
    >>> unranked_reason(row), unranked_reason({**row, "rank": "1"})
    ('contradicted: 0.3 under 0.5', '')
    """
    if row["rank"] != "unranked":
        return ""
    failure = [] if row["status"] == "valid" else [row["status"]]
    distrust = [flag for flag in split_flags(row["flags"]) if code_of(flag) in UNRANKED - {FlagCode.CONTRADICTED}]
    told = plain_text("; ".join([*failure, *contradictions(row["flags"]), *distrust]))
    return told or ("no claim to rank" if not row["ranks"] else "no RV")


def _rank(row: Row) -> Cell:
    return Cell(row["rank"], row["rank"] if row["rank"].isdigit() else "")


def _model(row: Row) -> Cell:
    name = short_name(row["model"])
    return Cell(name, name.lower(), plain_text(row["model"]))


def _words(text: str) -> Cell:
    return Cell(text or MISSING, text.lower())


def _number_header(title: str, name: str, text: Callable[[Row], str]) -> Header:
    def cell(row: Row) -> Cell:
        return Cell(text(row), repr(float(row[name])) if _known(row[name]) else "")

    return Header(title, cell, UNITS[name], KINDS[name])


def _known(value: float) -> bool:
    return math.isfinite(value)


HEADERS = (
    Header("rank", _rank),
    Header("model", _model),
    estimate("RV", "rv"),
    estimate("adversarial gap", "adversarial_gap"),
    accuracy("natural accuracy", "natural_accuracy"),
    accuracy("adversarial accuracy", "adversarial_accuracy"),
    Header("family", lambda row: _words(plain_text(row["family"]))),
    Header("training", lambda row: _words(training_text(row))),
    Header("flags", lambda row: _words(flags_text(row))),
    estimate("normal-case MI", "normal_nats"),
    estimate("worst-case MI", "worst_nats"),
    estimate("floor of the MI", "floor_nats"),
    estimate("Fano accuracy bound", "fano_accuracy_bound"),
    estimate("adversarial accuracy bound", "adversarial_accuracy_bound"),
)
