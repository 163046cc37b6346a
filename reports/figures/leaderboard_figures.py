"""Figures 1 and 2 from a committed leaderboard CSV, without the records."""

from pathlib import Path

import pandas as pd

from audit.errors import IntegrityError
from audit.storage import write_atomically
from reports.figures.agreement_figure import agreement_figure
from reports.figures.all_figures import figure_bytes
from reports.figures.gap_figure import figure1
from reports.figures.information_figure import figure2
from reports.tables.columns import COLUMNS, OPTIONAL, UNITS

ROWS = "leaderboard.csv"
_DTYPES = {"text": "str", "count": "Int64", "yes or no": "bool", "place": "str"}


def draw(folder: Path) -> list[Path]:
    """Draw figure1.png, figure2.png and, with three estimators or more, agreement.png beside leaderboard.csv.

    Returns the paths; none without a leaderboard.
    """
    rows = Path(folder) / ROWS
    if not rows.exists():
        return []
    frame = read_leaderboard(rows)
    several = frame["estimator"].nunique() > 2
    drawn = {"figure1": figure1(frame), "figure2": figure2(frame), "agreement": agreement_figure(frame)}
    paths = []
    for name, figure in drawn.items():
        if figure is not None and (name != "agreement" or several):
            write_atomically(Path(folder) / f"{name}.png", figure_bytes(figure, "png"))
            paths.append(Path(folder) / f"{name}.png")
    return paths


def read_leaderboard(path: Path) -> pd.DataFrame:
    """Return a leaderboard's rows as the frame it was written from; raises IntegrityError for another table."""
    frame = pd.read_csv(path, dtype={"rank": "str", "rv_by_seed": "str"}, keep_default_na=False, na_values=[""])
    optional = {name for names, _ in OPTIONAL for name in names}  # left out where no row has a value
    lacking = set(COLUMNS) - set(frame.columns) - optional
    if lacking:
        raise IntegrityError(f"{path} is no leaderboard: it lacks the columns {', '.join(sorted(lacking))}")
    frame = frame.reindex(columns=["rank", *COLUMNS])
    texts = [name for name in COLUMNS if UNITS[name] == "text"]
    frame[texts] = frame[texts].astype("object").fillna("").astype("str")
    kinds = {name: _DTYPES.get(UNITS[name], "float64") for name in COLUMNS if name not in (*texts, "rv_by_seed")}
    return frame.astype(kinds)
