"""The leaderboard: rows ranked by RV, and rows excluded from the ranking."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd

from audit.records import read_records
from audit.storage import write_atomically
from reports.estimators import place
from reports.tables.columns import OPTIONAL, columns_csv
from reports.tables.notebook import LeaderboardFrame
from reports.tables.table import GROUP, ranked, to_frame
from reports.text import spreadsheet_text

UNRANKED = "unranked"


def leaderboard(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows grouped by data set, layer, threat and estimator, and ranked by RV inside each group.

    Rank 1 has the lowest RV (nats), the least vulnerable representation; equal RVs share a rank. Failed and
    contradicted rows come last in their group and are never ranked, nor is any row of an estimator that does not
    claim to rank. The default estimator comes first. Where a cell appears twice (several run folders), the later
    row counts.
    """
    rows = frame.drop_duplicates("cell_id", keep="last")
    ranks = rows["rv"].where(ranked(rows)).groupby([rows[key] for key in GROUP]).rank(method="min")
    places = rows["estimator"].map({name: i for i, name in enumerate(sorted(set(rows["estimator"]), key=place))})
    keys = [*GROUP[:-1], "place", "rank", "model", "cell_id"]
    ordered = rows.assign(rank=ranks, place=places).sort_values(keys, na_position="last").drop(columns="place")
    shown = [UNRANKED if pd.isna(rank) else str(int(rank)) for rank in ordered.pop("rank")]
    ordered.insert(0, "rank", pd.Series(shown, index=ordered.index, dtype="str"))
    return LeaderboardFrame(ordered.reset_index(drop=True))


def leaderboard_of(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the leaderboard of run folders; of several, the column `run` after the rank names each row's folders.

    A cell that several folders hold has one row. Raises EnvironmentFault if a folder has no records.
    """
    records = {Path(folder): read_records(Path(folder)) for folder in folders}
    frame = to_frame(record for found in records.values() for record in found)
    if len(records) < 2:
        return leaderboard(frame)
    names = {folder: folder.resolve().name for folder in records}
    unique = len(set(names.values())) == len(names)
    holders: dict[str, dict[str, None]] = {}
    for folder, found in records.items():
        for record in found:
            holders.setdefault(record.cell_id, {})[names[folder] if unique else str(folder)] = None
    frame.insert(0, "run", frame["cell_id"].map({cell: ", ".join(runs) for cell, runs in holders.items()}))
    return leaderboard(frame)


def to_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV that a spreadsheet opens without running anything.

    Text cells lose control characters and are quoted where they start like a formula; numbers keep every digit.
    """
    table = _without_empty(table)
    texts = [name for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    safe = table.assign(**{name: table[name].map(spreadsheet_text) for name in texts})
    return str(safe.to_csv(index=False, lineterminator="\n"))


def to_parquet(table: pd.DataFrame) -> bytes:
    """Return a table as a parquet file, text unchanged."""
    buffer = BytesIO()
    _without_empty(table).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _without_empty(table: pd.DataFrame) -> pd.DataFrame:
    """Drop the groups of optional columns that no row has a value of."""
    empty = [name for names, mark in OPTIONAL if mark in table and not _filled(table[mark]) for name in names]
    return table.drop(columns=empty)


def _filled(column: "pd.Series[Any]") -> bool:
    return bool((column.notna() & column.ne("")).any())


def write_leaderboard(folder: Path) -> list[Path]:
    """Write leaderboard.csv, leaderboard.parquet and columns.csv, which says the kind and unit of every column.

    Returns their paths.
    """
    table = leaderboard(to_frame(read_records(Path(folder))))
    contents: dict[str, str | bytes] = {
        "leaderboard.csv": to_csv(table),
        "leaderboard.parquet": to_parquet(table),
        "columns.csv": columns_csv(),
    }
    for name, content in contents.items():
        write_atomically(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]
