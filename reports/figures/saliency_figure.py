"""Figures 4 and 5: images beside the saliency maps of networks, with the alignment of map and image."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from audit.storage import write_atomically
from reports.figures.all_figures import figure_bytes
from reports.figures.style import label, paper_style
from reports.text import format_eps, plain_text, short_name

ROWS = ("figure4.csv", "figure5.csv")
_WIDEST = 9  # maps beside the images
_CELL, _HEAD, _LEFT, _FOOT, _GAP = 0.86, 0.34, 0.12, 0.42, 0.06  # inches
_SAID = (("alignment", ".2f"), ("correlation", ".3f"))


def draw(folder: Path) -> list[Path]:
    """Draw the committed saliency rows of a folder as PNG beside them and return the paths; none without rows."""
    return [path for name in ROWS if (Path(folder) / name).exists() for path in draw_saliency(Path(folder) / name)]


def draw_saliency(rows: Path) -> list[Path]:
    """Draw a CSV of alignments and the JSON of maps beside it as a PNG of the same name and return its path."""
    rows = Path(rows)
    panels = _split(json.loads(rows.with_suffix(".json").read_text(encoding="utf-8")))
    path = rows.with_suffix(".png")
    frame = pd.read_csv(rows, dtype={"feature": "str"})
    write_atomically(path, figure_bytes(saliency_figure(panels, frame), "png"))
    return [path]


def _split(panels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split maps into panels that fit a page, each beside the images."""
    parts = [(panel, panel["maps"][i : i + _WIDEST]) for panel in panels for i in range(0, len(panel["maps"]), _WIDEST)]
    return [{**panel, "maps": maps} for panel, maps in parts]


def saliency_figure(panels: Sequence[Mapping[str, Any]], frame: pd.DataFrame) -> Figure:
    """Return a grid: one column of images, one per network and feature; red raises the information, blue lowers it.

    Under each column stand the means over all images, with standard errors, of Etmann's alignment and of the
    correlation of image and map.
    """
    with paper_style():
        width = _LEFT + max(1 + len(panel["maps"]) for panel in panels) * (_CELL + _GAP) + _LEFT
        heights = [_HEAD + len(panel["images"]) * (_CELL + _GAP) + _FOOT for panel in panels]
        figure = Figure(figsize=(width, sum(heights)), facecolor="white")
        top = sum(heights)
        for panel, height in zip(panels, heights, strict=True):
            _draw_panel(figure, panel, frame, top)
            top -= height
    return figure


def _draw_panel(figure: Figure, panel: Mapping[str, Any], frame: pd.DataFrame, top: float) -> None:
    columns = [("image", panel["images"], ""), *((_name(m), m["values"], _numbers(m, frame)) for m in panel["maps"])]
    for place, (title, pictures, numbers) in enumerate(columns):
        for row, picture in enumerate(pictures):
            ax = _axes(figure, place, top - _HEAD - row * (_CELL + _GAP))
            _show(ax, np.array(picture), is_map=place > 0)
            if row == 0:
                ax.set_title(title, fontsize=5.6, pad=3, linespacing=1.2)
            if row == len(pictures) - 1:
                ax.text(0.5, -0.08, numbers or _legend(), transform=ax.transAxes, ha="center", va="top", fontsize=5.2,
                        linespacing=1.35)  # fmt: skip


def _axes(figure: Figure, place: int, top: float) -> Axes:
    width, height = figure.get_size_inches()
    left = _LEFT + place * (_CELL + _GAP)
    ax: Axes = figure.add_axes((left / width, (top - _CELL) / height, _CELL / width, _CELL / height))
    ax.set_axis_off()
    return ax


def _show(ax: Axes, values: Any, *, is_map: bool) -> None:
    if is_map:
        # a few large entries would leave all others white
        edge = max(1.0, float(np.percentile(np.abs(values), 99)))
        ax.imshow(values, cmap="RdBu_r", vmin=-edge, vmax=edge, interpolation="nearest")
    else:
        ax.imshow(values.squeeze(-1) if values.shape[-1] == 1 else values, cmap="gray", vmin=0, vmax=255,
                  interpolation="nearest")  # fmt: skip


def _name(shown: Mapping[str, Any]) -> str:
    feature = "" if shown["feature"] == "g" else f", #{shown['feature']}"
    radius = f" {format_eps(shown['trained_eps'])}" if shown["trained_eps"] else ""
    name = short_name(shown["model"]).removeprefix("digits-").removeprefix("mnist-")
    return f"{label(name, 17)}\n{plain_text(shown['training'])}{radius}{feature}"


def _numbers(shown: Mapping[str, Any], frame: pd.DataFrame) -> str:
    same = np.logical_and.reduce([frame[name] == shown[name] for name in ("dataset", "model", "layer", "feature")])
    row = frame[same].iloc[0]
    if pd.isna(row["alignment"]):
        return "maps are zero"
    return "\n".join(f"{row[name]:{form}} ± {row[f'{name}_se']:{form}}" for name, form in _SAID)


def _legend() -> str:
    return "alignment:\ncorrelation:"
