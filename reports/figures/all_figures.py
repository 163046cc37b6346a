"""Write every figure of a run; the same records give the same bytes."""

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from audit.records import CalibrationRow
from audit.storage import write_atomically
from reports.figures.agreement_figure import agreement_figure
from reports.figures.calibration_figure import calibration_figure
from reports.figures.gap_figure import figure1
from reports.figures.information_figure import figure2
from reports.figures.style import paper_style
from reports.tables.table import SETTING
from reports.text import format_eps, short_name

__all__ = [
    "agreement_figure", "by_setting", "calibration_figure", "figure1", "figure2", "figure_bytes", "save_figures",
]  # fmt: skip

_DPI = 300
_LONGEST = 120  # characters of a setting in a file name
_LARGEST = 32_000  # pixels a side: under what PNG readers and the renderer take


def save_figures(frame: pd.DataFrame, folder: Path, calibration: Sequence[CalibrationRow] = ()) -> list[Path]:
    """Write every figure that is not empty as PNG and SVG into `folder`/figures and return the paths.

    figure1 and figure2 always, one of each for every data set, layer and threat where there are several, the setting
    in the name; agreement with two estimators or more; calibration where an estimator was calibrated. An older file
    of a figure that is not there any more is removed.
    """
    drawn = {f"figure1{name}": figure1(rows) for name, rows in by_setting(frame)}
    drawn |= {f"figure2{name}": figure2(rows) for name, rows in by_setting(frame)}
    others = {"agreement": agreement_figure(frame), "calibration": calibration_figure(calibration)}
    drawn |= {name: figure for name, figure in others.items() if figure is not None}
    target = Path(folder) / "figures"
    for old in (path for start in ("figure1", "figure2", *others) for path in target.glob(f"{start}*")):
        if old.suffix in (".png", ".svg") and old.stem not in drawn:
            old.unlink()
    paths = []
    for name, figure in drawn.items():
        for suffix in ("png", "svg"):
            paths.append(target / f"{name}.{suffix}")
            write_atomically(paths[-1], figure_bytes(figure, suffix))
    return paths


def by_setting(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of every data set, layer and threat with an ending for file names, "" for a single setting."""
    groups = [(key, rows) for key, rows in frame.groupby(list(SETTING), sort=False)]
    if len(groups) < 2:
        return [("", frame)]
    found: dict[str, pd.DataFrame] = {}
    for _, rows in groups:
        first = rows.iloc[0]
        words = f"{short_name(first['dataset'])} {first['layer']} {first['norm']} {format_eps(first['eps'])}".lower()
        name = "-" + re.sub(r"[^a-z0-9.]+", "-", words).strip("-.")[:_LONGEST]
        found[name if name not in found else f"{name}-{len(found)}"] = rows
    return list(found.items())


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """Return a figure as a file of type `suffix` (png or svg), the same bytes every time."""
    buffer = BytesIO()
    undated = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    dpi = min(_DPI, _LARGEST / max(figure.get_size_inches()))
    with paper_style():
        figure.savefig(buffer, format=suffix, metadata=undated, dpi=dpi)
    return buffer.getvalue()
