"""Headers and cells of the report's leaderboard as text, with their sort keys."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from audit.flags import UNRANKED, FlagCode, code_of
from reports.page.explanations import flag_name
from reports.tables.columns import KINDS, UNITS
from reports.tables.table import contradictions, split_flags
from reports.text import format_eps, plain_text, short_name

Row = Mapping[str, Any]
MISSING = "–"


@dataclass(frozen=True)
class Chip:
    """A flag as a short code, the particulars of this row, and whether it keeps the row out of the ranking."""

    code: str
    particulars: str
    excludes: bool


@dataclass(frozen=True)
class Cell:
    """The text of a cell, its sort key (a number as text, or the text), a tooltip, a second line, and flags."""

    text: str
    sort: str
    hint: str = ""
    note: str = ""
    chips: Sequence[Chip] = ()


@dataclass(frozen=True)
class Header:
    """The head of a column: its title, unit and kind, and how to fill a cell.

    `needs` names the column of the table without whose values the column is left out; one `on_demand` is shown where a
    reader chooses it.
    """

    title: str
    cell: Callable[[Row], Cell]
    unit: str = ""
    kind: str = ""
    needs: str = ""
    on_demand: bool = False

    @property
    def numeric(self) -> bool:
        """Whether the column sorts as numbers."""
        return bool(self.unit) or self.title == "rank"

    @property
    def key(self) -> str:
        """The column's name in the page and in the reader's choice of columns."""
        return self.title.replace(" ", "-").lower()


def estimate(title: str, name: str, *, on_demand: bool = False) -> Header:
    """Return a column that shows a value, and its standard error in a second line."""
    return _number_header(title, name, lambda row: _second(with_error(row[name], row.get(f"{name}_se"))), on_demand)


def accuracy(title: str, name: str) -> Header:
    """Return a column that shows a fraction; in lines under it its 95 % interval, and the head of an encoder."""
    head = name.replace("_accuracy", "_head")

    def shown(row: Row) -> tuple[str, str]:
        number, interval = _second(with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"]))
        return number, f"{interval}\n{plain_text(row[head])} head" if row.get(head) else interval

    return _number_header(title, name, shown, False)


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

    >>> row = {"rank": "unranked", "status": "valid", "flags": "contradicted: 0.3 under 0.5; unpinned", "ranks": True}
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
    return Cell(name, name.lower(), plain_text(row["model"]), note=f"{plain_text(row['family'])}, {training_text(row)}")


def _words(text: str) -> Cell:
    return Cell(text or MISSING, text.lower())


def chips(flags: Iterable[str]) -> list[Chip]:
    """Return flags as short codes, each code once with the particulars of all its flags.

    >>> chips(["gated: finite failed", "gated: determinism failed"])
    [Chip(code='gated', particulars='finite failed; determinism failed', excludes=True)]
    """
    told: dict[str, list[str]] = {}
    for flag in flags:
        told.setdefault(flag_name(flag), []).append(plain_text(flag).partition(":")[2].strip())
    return [Chip(name, "; ".join(filter(None, parts)), code_of(name) in UNRANKED) for name, parts in told.items()]


def _flags(row: Row) -> Cell:
    text = flags_text(row)
    failure = [] if row["status"] == "valid" else ["failed"]
    return Cell("; ".join(failure), text.lower(), chips=chips(split_flags(row["flags"])))


def _passes(row: Row) -> Cell:
    known = not pd.isna(row["passes"])
    return Cell(f"{int(row['passes']):,}", str(int(row["passes"]))) if known else Cell(MISSING, "")


def _certificate(title: str, name: str, *, on_demand: bool = False) -> Header:
    def cell(row: Row) -> Cell:
        return _number(row[name], (with_error(row[name], None), plain_text(row["certified_tier"])))

    return Header(title, cell, UNITS[name], KINDS[name], needs=name, on_demand=on_demand)


def _share(title: str, name: str) -> Header:
    return _number_header(title, name, lambda row: (with_error(row[name], None), ""), False)


def _best_head(row: Row) -> Cell:
    name = "best_head_accuracy"
    return _number(row[name], (with_error(row[name], None), plain_text(row["best_head"])))


def _number(value: float, shown: tuple[str, str]) -> Cell:
    return Cell(shown[0], repr(float(value)), note=shown[1]) if _known(value) else Cell(MISSING, "")


def _second(text: str) -> tuple[str, str]:
    """Return a number, and its error or interval for the line under it."""
    number, _, rest = text.partition(" ")
    return number, rest


def _number_header(title: str, name: str, text: Callable[[Row], tuple[str, str]], on_demand: bool) -> Header:
    def cell(row: Row) -> Cell:
        return _number(row[name], text(row))

    return Header(title, cell, UNITS[name], KINDS[name], needs=name, on_demand=on_demand)


def _known(value: float) -> bool:
    return math.isfinite(value)


HEADERS = (
    Header("rank", _rank),
    Header("model", _model),
    estimate("normal-case MI", "normal_nats"),
    estimate("worst-case MI", "worst_nats"),
    estimate("RV", "rv"),
    estimate("Fano accuracy bound", "fano_accuracy_bound"),
    accuracy("natural accuracy", "natural_accuracy"),
    accuracy("adversarial accuracy", "adversarial_accuracy"),
    estimate("adversarial gap", "adversarial_gap"),
    accuracy("worst-case probe", "worst_probe_accuracy"),
    Header("best head", _best_head, "fraction", "measured", needs="best_head_accuracy"),
    _certificate("no head exceeds", "certified_bound"),
    _share("proved to stay right", "proved_share"),
    _share("not broken", "not_broken_share"),
    _certificate("no head exceeds, all images of their kind", "certified_bound_population", on_demand=True),
    Header("passes", _passes, "count", needs="passes"),
    Header("flags", _flags),
    Header("training", lambda row: _words(training_text(row)), on_demand=True),
    Header("family", lambda row: _words(plain_text(row["family"])), on_demand=True),
    estimate("adversarial accuracy bound", "adversarial_accuracy_bound", on_demand=True),
    estimate("floor of the MI", "floor_nats", on_demand=True),
)


def headers_of(frame: pd.DataFrame) -> list[Header]:
    """Return the columns that a leaderboard fills: those with a value in any row."""
    return [header for header in HEADERS if not header.needs or bool(frame[header.needs].notna().any())]
