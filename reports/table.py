"""Records as one tidy table: the columns, their order, their units and their kinds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from audit.records import AuditRecord
from reports.text import format_eps, format_norm, plain_text, short_name, shorten

__all__ = [
    "COLUMNS", "GROUP", "KINDS", "UNITS", "Panel", "contradicted", "format_eps", "frame_rows", "panels",
    "ranked", "split_flags", "to_frame", "to_rows",
]  # fmt: skip

COLUMNS = (
    "model", "source", "family", "training", "trained_eps", "dataset", "layer", "norm", "eps",
    "num_classes", "seeds", "images", "estimator",
    "normal_nats", "normal_nats_se", "worst_nats", "worst_nats_se", "rv", "rv_se", "ceiling_nats", "floor_nats",
    "adversarial_accuracy_bound", "adversarial_risk_bound",
    "natural_accuracy", "natural_accuracy_low", "natural_accuracy_high",
    "adversarial_accuracy", "adversarial_accuracy_low", "adversarial_accuracy_high", "adversarial_gap",
    "attack", "flags", "status", "weights_sha256", "cell_id",
)  # fmt: skip

# models are compared only where all of these agree: an RV of another layer, radius or estimator is another quantity
GROUP = ("dataset", "layer", "norm", "eps", "estimator")

# the floor follows from measured accuracies alone, which is why it can refute an estimate
KINDS = {
    **dict.fromkeys(
        ("normal_nats", "normal_nats_se", "worst_nats", "worst_nats_se", "rv", "rv_se", "ceiling_nats",
         "adversarial_accuracy_bound", "adversarial_risk_bound"), "estimate",
    ),
    **dict.fromkeys(
        ("natural_accuracy", "natural_accuracy_low", "natural_accuracy_high", "adversarial_accuracy",
         "adversarial_accuracy_low", "adversarial_accuracy_high", "adversarial_gap", "floor_nats"), "measured",
    ),
}  # fmt: skip

UNITS = {
    **{name: "nats" if "nats" in name or name.startswith("rv") else "fraction" for name in KINDS},
    **{"eps": "pixel units", "trained_eps": "pixel units"},
}

_TEXT = (
    "model", "source", "family", "training", "dataset", "layer", "norm", "estimator", "attack", "flags", "status",
    "weights_sha256", "cell_id",
)  # fmt: skip
_COUNTS = ("num_classes", "seeds", "images")
_NO_FLAGS = "none"


@dataclass(frozen=True)
class Panel:
    """The rows that may be compared with one another, and a short title for them."""

    title: str
    rows: pd.DataFrame


def to_frame(records: Iterable[AuditRecord]) -> pd.DataFrame:
    """Return a tidy frame, one row a record, in the order of COLUMNS.

    MI values are in nats, accuracies and bounds fractions in [0, 1], eps in pixel units; what could not be
    measured is missing. `flags` reads "none" where there is none, `status` "failed: <reason>" where it failed.
    """
    rows = [_cells(record) for record in records]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    dtypes = {name: "str" if name in _TEXT else "Int64" if name in _COUNTS else "float64" for name in COLUMNS}
    return frame.astype(dtypes)


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


def contradicted(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows hold an estimate that a measurement refutes."""
    marks = [any(flag.startswith("contradicted") for flag in split_flags(cell)) for cell in frame["flags"]]
    return pd.Series(marks, index=frame.index, dtype=bool)


def ranked(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows may be ranked: valid, with an RV, and not contradicted."""
    return frame["status"].eq("valid") & frame["rv"].notna() & ~contradicted(frame)


def panels(frame: pd.DataFrame) -> list[Panel]:
    """Return the comparable groups of a frame, in the leaderboard's order."""
    several = frame["estimator"].nunique() > 1
    groups = frame.groupby(list(GROUP), sort=True)
    return [Panel(_title(rows.iloc[0], several), rows) for _, rows in groups]


def _title(row: "pd.Series[Any]", name_estimator: bool) -> str:
    threat = f"{format_norm(row['norm'])} {format_eps(row['eps'])}"
    parts = [shorten(short_name(row["dataset"]), 24), shorten(plain_text(row["layer"]), 22), threat]
    return ", ".join([*parts, shorten(plain_text(row["estimator"]), 20)] if name_estimator else parts)


def _cells(record: AuditRecord) -> dict[str, object]:
    status = f"failed: {record.reason}" if record.status == "failed" and record.reason else record.status
    flags = "; ".join(flag.replace("; ", ", ") for flag in record.flags) or _NO_FLAGS
    derived: dict[str, object] = {"status": status, "flags": flags}
    cells = {name: derived[name] if name in derived else getattr(record, name) for name in COLUMNS}
    return {name: _encodable(value) if isinstance(value, str) else value for name, value in cells.items()}


def _encodable(text: str) -> str:
    # JSON can spell half a surrogate pair; no file can hold one
    return text.encode(errors="replace").decode()


def _json_value(name: str, value: Any) -> Any:
    if name == "flags":
        return split_flags(value)
    if value is pd.NA or value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
