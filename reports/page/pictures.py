"""Figures of the page: a picture a setting and estimator, with places over its points that tell the model's numbers."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reports.estimators import curve_of
from reports.figures.all_figures import figure1, figure2, figure_bytes
from reports.figures.marks import SPOT
from reports.figures.profile_figure import Profile, profile_figures
from reports.page.cells import with_error
from reports.tables.table import panels, setting_title
from reports.text import plain_text, short_name

FIGURE1 = "Figure 1. Representation vulnerability against adversarial gap"
FIGURE2 = "Figure 2. Information against accuracy, normal and worst case"
_WORDS1 = "RV is an estimate, the gap measured."
_WORDS2 = (
    "Small markers: normal-case information and natural accuracy; large ones: worst case and adversarial accuracy. "
    "The line is an estimated bound on any head, because the information is an estimate."
)
_ONE_PANEL = 6.0  # inches
_POINTS = 72  # units of an SVG's viewBox an inch


@dataclass(frozen=True)
class Spot:
    """A place over a point of a picture, in units of its viewBox: where it leads and what it tells."""

    x: str
    y: str
    anchor: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A figure as a data address, with what it shows in words, its view, its size, and the places over its points."""

    title: str
    source: str
    words: str
    wide: bool
    view: str = ""
    size: tuple[str, str] = ("1", "1")
    spots: Sequence[Spot] = ()


def pictures(frame: pd.DataFrame, links: Mapping[str, str], views: Mapping[str, str]) -> list[Picture]:
    """Return Figures 1 and 2 for every group of comparable models, by setting; of one model, its profiles as well.

    `links` are anchors by the plain reference of a model, `views` names of views by the title of a setting.
    """
    alone = frame["model"].nunique() == 1
    found = [_profile(drawn, views) for drawn in profile_figures(frame)] if alone else []
    for panel in panels(frame):
        rows, view = panel.rows, views[panel.setting]
        where = f"{panel.setting}, {panel.estimator}"
        if bool(rows["ranks"].any()) and not alone and _known(rows, ("rv", "adversarial_gap")):
            found.append(_group(f"{FIGURE1}: {where}", figure1(rows), (rows, links, view), _WORDS1))
        first = rows.iloc[0]
        if curve_of(first["estimator"], first["quantity"]) and _known(rows, ("worst_nats", "normal_nats")):
            found.append(_group(f"{FIGURE2}: {where}", figure2(rows), (rows, links, view), _WORDS2))
    return found


def picture(title: str, figure: Figure, words: str, view: str = "", spots: Sequence[Spot] = ()) -> Picture:
    """Return a figure as a picture."""
    data = base64.b64encode(figure_bytes(figure, "svg")).decode()
    width, height = figure.get_size_inches()
    size = (f"{_POINTS * width:.1f}", f"{_POINTS * height:.1f}")
    return Picture(title, f"data:image/svg+xml;base64,{data}", words, width > _ONE_PANEL, view, size, spots)


def _profile(drawn: Profile, views: Mapping[str, str]) -> Picture:
    """Return the picture of a profile, part of every view whose setting it shows."""
    shown = sorted({views[setting_title(row)] for _, row in drawn.rows.iterrows()})
    return picture(drawn.title, drawn.figure, "", " ".join(shown))


def _known(rows: pd.DataFrame, names: Sequence[str]) -> bool:
    return bool(rows[list(names)].notna().all(axis=1).any())


def _group(title: str, figure: Figure, shown: tuple[pd.DataFrame, Mapping[str, str], str], words: str) -> Picture:
    rows, links, view = shown
    by_cell = {str(row["cell_id"]): row for row in rows.to_dict(orient="records")}
    return picture(title, figure, words, view, spots_of(figure, by_cell, links))


def spots_of(figure: Figure, by_cell: Mapping[str, Mapping[Any, Any]], links: Mapping[str, str]) -> list[Spot]:
    """Return a place for every marker of a figure that stands for a record."""
    scale, height = _POINTS / figure.dpi, _POINTS * figure.get_figheight()
    found = []
    for ax in figure.axes:
        for line in ax.lines:
            cell = str(line.get_gid() or "").removeprefix(SPOT)
            if cell in by_cell:
                x, y = ax.transData.transform(np.asarray(line.get_xydata(), dtype=np.float64)[0]) * scale
                row = by_cell[cell]
                anchor = links[plain_text(row["model"])]
                found.append(Spot(f"{x:.1f}", f"{height - y:.1f}", anchor, _told(row)))
    return found


def _told(row: Mapping[Any, Any]) -> str:
    nats = f"normal {with_error(row['normal_nats'], None)}, worst {with_error(row['worst_nats'], None)} nats"
    accuracies = [with_error(row[f"{case}_accuracy"], None) for case in ("natural", "adversarial")]
    rv = with_error(row["rv"], row["rv_se"])
    return (
        f"{short_name(row['model'])}: RV {rv}, {nats} (estimate); accuracy {accuracies[0]}, {accuracies[1]} under "
        "attack (measured)"
    )
