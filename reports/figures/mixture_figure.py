"""Theorem 3.2: RV against the adversarial gap, between the corrected bounds."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.special import entr, ndtr

from audit.storage import write_atomically
from audit.theory import vulnerability_range
from reports.figures.all_figures import figure_bytes
from reports.figures.marks import dress, named, point, whisker
from reports.figures.style import Sheet, looks, marker, paper_style, place_key
from reports.statistics.correlation import Vector

ROWS = "theorem32.csv"
_REGION = "#999999"
_LN2 = float(np.log(2))


def draw(folder: Path) -> list[Path]:
    """Draw theorem32.csv of a folder as theorem32.png beside it and return the paths; none without rows."""
    rows = Path(folder) / ROWS
    if not rows.exists():
        return []
    path = rows.with_suffix(".png")
    write_atomically(path, figure_bytes(mixture_figure(pd.read_csv(rows)), "png"))
    return [path]


def mixture_figure(rows: pd.DataFrame) -> Figure:
    """Return RV in nats (exact curves; estimates with standard errors) against the adversarial gap, bounds in grey.

    A panel a mixture, by mean / spread of w.x. Points stand at the gap measured on their samples.
    """
    with paper_style():
        groups = [group for _, group in rows.groupby(["mean", "spread"], sort=False)]
        look = looks(rows["estimator"])
        keys = [named(marker(look[name], "none", 4.5), f"{name} (estimate)") for name in look], _lines()
        captions = [_caption(group) for group in groups]
        sheet = Sheet(len(groups), captions, plot_height=2.2, keys=keys)
        figure, axes = sheet.draw()
        for ax, group in zip(axes, groups, strict=True):
            _draw(ax, group)
            first = group.iloc[0]
            dress(ax, [f"mean / spread = {first['mean'] / first['spread']:g}"], "adversarial gap", "RV (nats)")
        place_key(figure, *keys)
    return figure


def _draw(ax: Axes, group: pd.DataFrame) -> None:
    gaps = np.linspace(0, 1, 201)
    bounds: Vector = np.array([vulnerability_range(float(gap)) for gap in gaps])
    ax.fill_between(gaps, bounds[:, 0], bounds[:, 1], color=_REGION, alpha=0.18, linewidth=0)
    ax.plot(gaps, bounds[:, 0], color=_REGION, linewidth=0.9)
    ax.plot(gaps, bounds[:, 1], color=_REGION, linewidth=0.9, linestyle=(0, (4, 2)))
    first = group.iloc[0]
    ax.plot(*_exact(float(first["mean"]), float(first["spread"])), color="black", linewidth=1.0)
    look = looks(group["estimator"])
    for row in group.sort_values("estimator").to_dict(orient="records"):  # the small squares over the circles
        own, x, y = look[row["estimator"]], float(row["gap"]), float(row["rv"])
        whisker(ax, [x, x], [y - row["rv_se"], y + row["rv_se"]], own)
        whisker(ax, [x - row["gap_se"], x + row["gap_se"]], [y, y], own)
        point(ax, x, y, marker(own, "none", 7.0 if own.marker == "o" else 3.0))
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.05 * _LN2)


def _exact(mean: float, spread: float) -> tuple[Vector, Vector]:
    """Return gaps and RVs of g = sign(w.x) on a grid of shifts, by the formula of `closed_forms`."""
    shifts = np.linspace(0, mean + 6 * spread, 400)
    rarer = (ndtr((mean - shifts) / spread) + ndtr((-mean - shifts) / spread)) / 2
    return ndtr((shifts - mean) / spread) - ndtr(-mean / spread), _LN2 - entr(rarer) - entr(1 - rarer)


def _lines() -> list[Line2D]:
    return [
        named(Line2D([], [], color="black", linewidth=1.0), "exact"),
        named(Line2D([], [], color=_REGION, linewidth=0.9, linestyle=(0, (4, 2))), "upper bound, corrected"),
        named(Line2D([], [], color=_REGION, linewidth=0.9), "lower bound, corrected"),
    ]


def _caption(group: pd.DataFrame) -> str:
    inside = (group["exact_rv"] >= group["lower_bound"] - 1e-12) & (group["exact_rv"] <= group["upper_bound"] + 1e-12)
    shifts = group.drop_duplicates("shift")
    errors = (group["rv"] - group["exact_rv"]).abs().groupby(group["estimator"]).max()
    said = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    return (
        f"Exact RV within the corrected bounds at {int(inside[shifts.index].sum())} of {len(shifts)} shifts.\n"
        f"Largest error of an estimate (nats): {said}."
    )
