"""Figure 3: histograms of the normal-case information and of the vulnerability of single features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from audit.storage import write_atomically
from reports.figures.all_figures import figure_bytes
from reports.figures.marks import dress, named
from reports.figures.style import Keys, Sheet, label, paper_style, place_key
from reports.statistics.correlation import Vector
from reports.text import format_eps, format_norm, plain_text, short_name

ROWS = "figure3.csv"
_COLOURS = {"standard": "#d55e00", "unknown": "#de8f05", "robust": "#0173b2", "certified": "#029e73"}
_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")
_BINS = 14
_SIDES = (("normal_nats", "normal-case MI of a feature (nats, estimate)"),
          ("rv", "vulnerability of a feature (nats, estimate)"))  # fmt: skip


def draw(folder: Path) -> list[Path]:
    """Draw the committed rows of Figure 3 in a folder as PNG beside them and return the paths; none without rows."""
    rows = Path(folder) / ROWS
    return draw_features(rows) if rows.exists() else []


def draw_features(rows: Path) -> list[Path]:
    """Draw a CSV of feature rows as a PNG of the same name and return its path."""
    path = Path(rows).with_suffix(".png")
    write_atomically(path, figure_bytes(feature_figure(pd.read_csv(rows)), "png"))
    return [path]


def feature_figure(frame: pd.DataFrame) -> Figure:
    """Return histograms of features: normal-case MI on the left, vulnerability on the right (nats, estimates).

    A row of panels a data set and radius, a line a network; the colour tells how it was trained. Short strokes on the
    axis are means.
    """
    groups = [group for _, group in frame.groupby(["dataset", "norm", "eps"], sort=False)]
    lines = _lines(frame)
    with paper_style():
        captions = [text for group in groups for text in (_sentence(group), NOT_A_BOUND)]
        keys: Keys = list(lines.values()), []
        sheet = Sheet(2 * len(groups), captions, plot_height=1.7, keys=keys, groups=[2] * len(groups))
        figure, axes = sheet.draw()
        for i, group in enumerate(groups):
            for ax, (column, text) in zip(axes[2 * i : 2 * i + 2], _SIDES, strict=True):
                _draw(ax, group, column, lines)
                dress(ax, _title(group), text, "share of the features")
        place_key(figure, *keys)
    return figure


NOT_A_BOUND = "Each feature searched alone: a picture of the layer, never a bound on it."


def _draw(ax: Axes, group: pd.DataFrame, column: str, lines: dict[str, Line2D]) -> None:
    values = group[column]
    low, high = float(values.min()), float(values.max())
    edges: Vector = np.linspace(low, high + 1e-9, _BINS + 1)
    for model, rows in group.groupby("model", sort=False):
        heights, _ = np.histogram(rows[column], edges)
        colour, style = lines[str(model)].get_color(), lines[str(model)].get_linestyle()
        ax.stairs(heights / len(rows), edges, color=colour, linestyle=style, linewidth=1.0)
        ax.plot([rows[column].mean()] * 2, [0, 0.07], transform=ax.get_xaxis_transform(), color=colour, linewidth=2.0,
                solid_capstyle="butt")  # fmt: skip


def _lines(frame: pd.DataFrame) -> dict[str, Line2D]:
    """Return one line style per network: the second network of a training in a group is dashed, the third dotted."""
    found: dict[str, Line2D] = {}
    met: dict[tuple[str, ...], int] = {}
    for model, rows in frame.groupby("model", sort=False):
        first = rows.iloc[0]
        kind = tuple(str(first[name]) for name in ("dataset", "norm", "eps", "training"))
        met[kind] = met.get(kind, 0) + 1
        found[str(model)] = _line(rows, _STYLES[(met[kind] - 1) % len(_STYLES)])
    return found


def _line(rows: pd.DataFrame, style: Any) -> Line2D:
    first = rows.iloc[0]
    training = str(first["training"])
    radius = f" at {format_eps(first['trained_eps'])}" if first["trained_eps"] > 0 else ""
    text = f"{label(short_name(first['model']).removeprefix('digits-'), 28)}: {training}{radius}, {len(rows)} channels"
    return named(Line2D([], [], color=_COLOURS.get(training, "#555555"), linestyle=style, linewidth=1.4), text)


def _title(group: pd.DataFrame) -> Sequence[str]:
    first = group.iloc[0]
    return [f"{plain_text(short_name(first['dataset']))}, {format_norm(first['norm'])} {format_eps(first['eps'])}"]


def _sentence(group: pd.DataFrame) -> str:
    first = group.iloc[0]
    unit = "in deviations of the feature" if first["scale"] == "feature" else "in deviations of the layer"
    return f"I(X; g_i(X) + noise) on {int(first['images'])} images, noise {first['noise']:g} {unit}."
