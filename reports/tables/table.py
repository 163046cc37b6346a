"""Records as one tidy table, with the rows that may be compared and ranked."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from audit.flags import UNRANKED, FlagCode, code_of
from audit.records import AuditRecord
from reports.estimators import place
from reports.tables.columns import COLUMNS, KINDS, UNITS
from reports.tables.contradictions import cross_check
from reports.text import format_eps, format_norm, plain_text, short_name, shorten

__all__ = [
    "COLUMNS", "GROUP", "KINDS", "SETTING", "UNITS", "Panel", "contradicted", "contradictions", "format_eps",
    "frame_rows", "panels", "ranked", "setting_title", "sound", "split_flags", "to_frame", "to_rows",
]  # fmt: skip

# models are compared only where all of these agree: an RV of another layer, radius or estimator is another quantity
GROUP = ("dataset", "layer", "norm", "eps", "estimator")

# models are compared by RV with the same estimator, and estimators with one another inside a setting
SETTING = GROUP[:-1]

_DTYPES = {"text": "str", "count": "Int64", "yes or no": "bool"}
_AS_TEXT = ("rv_by_seed",)
_NO_FLAGS = NO_SEEDS = "none"
UPPER_BOUND = "upper bound"


@dataclass(frozen=True)
class Panel:
    """The rows that may be compared with one another, and short titles: of the whole, its setting, its estimator."""

    title: str
    rows: pd.DataFrame
    setting: str
    estimator: str


def to_frame(records: Iterable[AuditRecord]) -> pd.DataFrame:
    """Return a tidy frame, one row a record, in the order of COLUMNS.

    MI values are in nats, accuracies and bounds fractions in [0, 1], eps in pixel units; what could not be
    measured is missing. `flags` reads "none" where there is none, `status` "failed: <reason>" where it failed.
    Records that contradict one another are flagged here, so every table, ranking and figure sees it.
    """
    rows = [_cells(record) for record in cross_check(records)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype({name: "str" if name in _AS_TEXT else _DTYPES.get(UNITS[name], "float64") for name in COLUMNS})


def to_rows(records: Iterable[AuditRecord]) -> list[dict[str, Any]]:
    """Return records as strict-JSON data keyed by the leaderboard's columns; flags are lists, missing is None."""
    return frame_rows(to_frame(records))


def frame_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame as strict-JSON data; flags are lists, missing and non-finite is None."""
    rows = frame.astype(object).to_dict(orient="records")
    return [{str(name): _json_value(str(name), value) for name, value in row.items()} for row in rows]


def split_flags(flags: str) -> list[str]:
    """Return the flags of a cell of the table.

    >>> split_flags("none"), split_flags("saturated; not_converged")
    ([], ['saturated', 'not_converged'])
    """
    return [] if flags == _NO_FLAGS else flags.split("; ")


def contradictions(flags: str) -> list[str]:
    """Return the contradiction flags of a cell of the table."""
    return [flag for flag in split_flags(flags) if code_of(flag) is FlagCode.CONTRADICTED]


def contradicted(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows hold an estimate that a measurement or another record refutes."""
    return pd.Series([bool(contradictions(cell)) for cell in frame["flags"]], index=frame.index, dtype=bool)


def too_few(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows have too few images a class to state a bound on heads."""
    few = [FlagCode.TOO_FEW_IMAGES in map(code_of, split_flags(cell)) for cell in frame["flags"]]
    return pd.Series(few, index=frame.index, dtype=bool)


def sound(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows hold an uncontradicted RV of a sound network by searches that passed their checks."""
    return frame["status"].eq("valid") & frame["rv"].notna() & ~contradicted(frame) & ~_out_of_the_ranking(frame)


def _out_of_the_ranking(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows carry a flag that excludes them from the ranking."""
    out = [any(code_of(flag) in UNRANKED for flag in split_flags(cell)) for cell in frame["flags"]]
    return pd.Series(out, index=frame.index, dtype=bool)


def ranked(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows may be ranked: sound, and of an estimator that claims to rank models."""
    return sound(frame) & frame["ranks"]


def panels(frame: pd.DataFrame) -> list[Panel]:
    """Return the comparable groups of a frame, in the leaderboard's order: the default estimator first."""
    several = frame["estimator"].nunique() > 1
    groups = [(key, rows) for key, rows in frame.groupby(list(GROUP), sort=False)]
    return [_panel(rows, several) for _, rows in sorted(groups, key=lambda group: _order(group[0]))]


def setting_title(row: "pd.Series[Any]") -> str:
    """Return a short title of data set, layer and threat."""
    threat = f"{format_norm(row['norm'])} {format_eps(row['eps'])}"
    return ", ".join([shorten(short_name(row["dataset"]), 24), shorten(plain_text(row["layer"]), 22), threat])


def _order(key: Any) -> tuple[Any, ...]:
    *setting, estimator = key
    return (*setting, place(estimator))


def _panel(rows: pd.DataFrame, name_estimator: bool) -> Panel:
    setting, estimator = setting_title(rows.iloc[0]), shorten(plain_text(rows.iloc[0]["estimator"]), 20)
    return Panel(f"{setting}, {estimator}" if name_estimator else setting, rows, setting, estimator)


def _cells(record: AuditRecord) -> dict[str, object]:
    status = f"failed: {record.reason}" if record.status == "failed" and record.reason else record.status
    flags = "; ".join(flag.replace("; ", ", ") for flag in record.flags) or _NO_FLAGS
    derived: dict[str, object] = {
        "status": status,
        "flags": flags,
        "rv_by_seed": _by_seed(record),
        "attack_trust": _trust(record),
    }
    cells = {name: derived[name] if name in derived else getattr(record, name) for name in COLUMNS}
    return {name: _encodable(value) if isinstance(value, str) else value for name, value in cells.items()}


def _trust(record: AuditRecord) -> str:
    if all(check.get("level") == "gate" for check in record.checks):
        return "not checked"
    return UPPER_BOUND if FlagCode.UNTRUSTED in record.codes else "trusted"


def _by_seed(record: AuditRecord) -> str:
    seeds = record.details.get("per_seed") or []
    told = [(seed.get("seed"), seed.get("rv")) for seed in seeds if isinstance(seed, dict)]
    known = [(seed, rv) for seed, rv in told if isinstance(seed, int) and isinstance(rv, int | float)]
    return "; ".join(f"{seed}={float(rv)!r}" for seed, rv in known) or NO_SEEDS


def _encodable(text: str) -> str:
    # JSON can spell half a surrogate pair; no file can hold one
    return text.encode(errors="replace").decode()


def _json_value(name: str, value: Any) -> Any:
    if name == "flags":
        return split_flags(value)
    if value is pd.NA or value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
