"""The leaderboard as a notebook shows it: the main columns, one estimator after the other."""

from html import escape
from typing import Any

import pandas as pd

from audit.flags import code_of
from reports.tables.table import split_flags
from reports.text import format_eps, format_norm, plain_text, short_name

_NUMBERS = {
    "normal nats": "normal_nats", "worst nats": "worst_nats", "RV": "rv", "Fano bound": "fano_accuracy_bound",
    "certified bound": "certified_bound", "natural": "natural_accuracy", "adversarial": "adversarial_accuracy",
}  # fmt: skip


class LeaderboardFrame(pd.DataFrame):
    """A leaderboard that a notebook shows by its main columns; slices and derived frames are plain frames."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in _cells({}))
        rows = (_cells(dict(row)) for row in self.to_dict(orient="records"))
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
        note = f"{len(self)} rows, {len(self.columns)} columns; nats, RV and the Fano bound are estimates."
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><small>{note}</small>"


def _cells(row: dict[Any, Any]) -> dict[str, str]:
    """Return the cells of one row as text, by the titles of their columns."""
    eps = row.get("eps")
    texts = {name: plain_text(str(row.get(name, ""))) for name in ("rank", "layer", "estimator")}
    ball = "" if eps is None else f"{format_norm(str(row['norm']))} {format_eps(float(eps))}"
    flags = dict.fromkeys(code_of(flag) or flag.partition(":")[0] for flag in split_flags(row.get("flags", "none")))
    return {
        "rank": texts["rank"],
        "model": short_name(str(row.get("model", ""))),
        "layer": texts["layer"],
        "threat": ball,
        "estimator": texts["estimator"],
        **{title: _number(row.get(name)) for title, name in _NUMBERS.items()},
        "flags": plain_text(", ".join(map(str, flags))),
    }


def _number(value: Any) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.3f}"
