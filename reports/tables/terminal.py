"""The leaderboard on a terminal: as many columns as fit, the most important first, names sanitised."""

from collections.abc import Sequence

import pandas as pd
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from audit.records import CalibrationRow
from reports.page.cells import NO_CLAIM, Cell, Header, Row, flags_text, headers_of, unranked_reason
from reports.page.explanations import flag_name
from reports.tables.calibration import calibration_sentence
from reports.tables.table import panels, split_flags
from reports.text import plain_text, short_name, shorten

# by what a reader needs first; the table keeps the report's order whatever fits
_WANTED = (
    "rank", "model", "run", "RV", "adversarial gap", "flags", "training", "adversarial accuracy", "natural accuracy",
    "worst-case MI", "normal-case MI", "Fano accuracy bound", "no head exceeds", "best head", "worst-case probe",
    "passes", "adversarial accuracy bound", "family",
)  # fmt: skip
_WIDEST = 34
_RUN = Header("run", lambda row: Cell(plain_text(row["run"]), row["run"]))  # where several are ranked together
_PADDING = 3


def fitting_table(table: pd.DataFrame, width: int, calibration: Sequence[CalibrationRow] = ()) -> list[Table | Text]:
    """Return a rich table for each comparable group, at most `width` characters wide, and why rows are unranked.

    Each title says how the estimator did in calibration.
    """
    parts: list[Table | Text] = []
    heads = [*headers_of(table)[:2], _RUN, *headers_of(table)[2:]] if "run" in table else list(headers_of(table))
    for panel in panels(table):
        rows = [{str(name): value for name, value in row.items()} for row in panel.rows.to_dict(orient="records")]
        columns = {header.title: [_shown(header, row) for row in rows] for header in heads}
        title = f"{panel.setting}, {panel.estimator}\n{calibration_sentence(calibration, rows[0]['estimator'])}"
        parts.append(_table(title, _fitting(heads, columns, width), columns))
        parts.extend(_unranked(rows))
    return parts


def _unranked(rows: Sequence[Row]) -> list[Text]:
    claim = any(row["ranks"] for row in rows)
    told = [row for row in rows if row["rank"] == "unranked" and (claim or unranked_reason(row) != "no claim to rank")]
    # the table names flags only, their particulars stand here
    lines = [Text(f"{short_name(row['model'])}: {_particulars(row)}") for row in told]
    return lines if claim else [Text(NO_CLAIM), *lines]


def _particulars(row: Row) -> str:
    flags = flags_text(row)
    return unranked_reason(row) if flags == "none" else flags


def _shown(header: Header, row: Row) -> str:
    if header.title != "flags":
        cell = header.cell(row)
        # family and training, the second line of a model's name in the page, are columns of their own here
        return shorten(cell.text if header.title == "model" else f"{cell.text} {cell.note}".strip(), _WIDEST)
    # the names fit in a table; the particulars follow under it
    failure = [] if row["status"] == "valid" else ["failed"]
    return shorten("; ".join([*failure, *map(flag_name, split_flags(row["flags"]))]) or "none", 24)


def _fitting(heads: Sequence[Header], columns: dict[str, list[str]], width: int) -> list[Header]:
    by_title = {header.title: header for header in heads}
    left, chosen = width - 1, set[str]()
    for title in filter(by_title.get, _WANTED):
        needed = _PADDING + max(map(cell_len, [*_head_lines(by_title[title]), *columns[title]]))
        if needed <= left:
            chosen.add(title)
            left -= needed
    return [header for header in heads if header.title in chosen]


def _table(title: str, heads: Sequence[Header], columns: dict[str, list[str]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for head in heads:
        # Text, never str: a name must not be read as markup
        table.add_column(Text("\n".join(_head_lines(head))), justify="right" if head.numeric else "left", no_wrap=True)
    for cells in zip(*(columns[head.title] for head in heads), strict=True):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _head_lines(header: Header) -> list[str]:
    return [header.title, f"{header.unit}, {header.kind}"] if header.kind else [header.title]
