"""Figure 1: representation vulnerability against the adversarial gap, one panel per estimator."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.figures.marks import (
    cross,
    draw_panels,
    dress,
    family_key,
    fill_key,
    finish,
    head_note,
    or_zero,
    plottable,
    point,
    points,
    title_lines,
    whisker,
    write_names,
)  # fmt: skip
from reports.figures.style import Look, fill_of, limits, looks, marker, paper_style
from reports.statistics.sentences import panel_sentences
from reports.tables.table import GROUP, Panel, panels


def figure1(frame: pd.DataFrame) -> Figure:
    """Return RV (nats, estimate, with its standard error) against the adversarial gap (measured).

    A panel a comparable group, the estimators of one setting beside one another. Estimators that do not claim to
    rank models are left out, unless there is no other.
    """
    rows = plottable(frame, ["rv", "adversarial_gap"])
    rows = rows[rows["ranks"]] if rows["ranks"].any() else rows
    with paper_style():
        keys, groups = (family_key(rows), fill_key(rows)), panels(rows)
        captions = [
            "\n".join([*panel_sentences(_all_of(frame, panel.rows)), *head_note(panel.rows)]) for panel in groups
        ]
        family_looks = looks(rows["family"])

        def draw(ax: Axes, panel: Panel) -> int:
            left_out = _draw(ax, panel.rows, family_looks)
            dress(ax, title_lines(panel), "RV (nats, estimate)", "adversarial gap (measured)")
            return left_out

        figure, axes = draw_panels(groups, captions, keys, draw)
        finish(figure, axes, keys)
    return figure


def _all_of(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    # the caption counts every row of the group, drawn or not
    first = rows.iloc[0]
    return frame[np.logical_and.reduce([frame[name] == first[name] for name in GROUP])]


def _draw(ax: Axes, rows: pd.DataFrame, family_looks: dict[str, Look]) -> int:
    for row in points(rows):
        look = family_looks[row["family"]]
        x, y, se = float(row["rv"]), float(row["adversarial_gap"]), or_zero(row["rv_se"])
        whisker(ax, [x - se, x + se], [y, y], look)
        point(ax, x, y, marker(look, fill_of(row["training"], row["trained_eps"], row["eps"])), row["cell_id"])
        if row["refuted"]:
            cross(ax, x, y)
    ax.set_xlim(*limits([rows["rv"] - rows["rv_se"].fillna(0), rows["rv"] + rows["rv_se"].fillna(0)]))
    ax.set_ylim(*limits([rows["adversarial_gap"]]))
    drawn = points(rows)
    return write_names(ax, drawn, [(float(row["rv"]), float(row["adversarial_gap"])) for row in drawn])
