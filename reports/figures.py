"""Figure 1 (RV against the adversarial gap) and Figure 2 (information against accuracy)."""

import math
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from audit.records import write_atomically
from reports.sentences import caption
from reports.style import (
    FILL_LABELS,
    Look,
    Sheet,
    fill_of,
    label,
    limits,
    looks,
    marker,
    paper_style,
    place_key,
)  # fmt: skip
from reports.table import contradicted, panels
from reports.text import short_name

_GREY = Look("#555555", "o")
_REGION = "#999999"
_NAMED = 6


def figure1(frame: pd.DataFrame) -> Figure:
    """Return RV (nats, estimate, with its standard error) against the adversarial gap (measured), a panel a group."""
    rows = _plottable(frame, ["rv", "adversarial_gap"])
    with paper_style():
        families, rest = _family_key(rows), _fill_key(rows)
        groups = panels(rows)
        captions = [caption(_all_of(frame, panel.rows)) for panel in groups]
        figure, axes = Sheet(len(groups) or 1, captions, keys=(len(families), len(rest))).draw()
        family_looks = looks(rows["family"])
        for panel, ax in zip(groups, axes, strict=False):
            _draw_gap(ax, panel.rows, family_looks)
            _dress(ax, panel.title, "RV (nats, estimate)", "adversarial gap (measured)")
        _finish(figure, axes, families, rest)
    return figure


def figure2(frame: pd.DataFrame) -> Figure:
    """Return each model's normal and worst case: MI (nats, estimate) against accuracy (measured), a panel a group.

    The dashed line is what Theorem 3.4 gives for MI values that were exact; with estimates it is an estimated bound.
    Source: Zhu, Zhang & Evans, ICML 2020, Theorem 3.4: accuracy <= (I + ln 2)/ln K.
    """
    rows = _plottable(frame, ["normal_nats", "worst_nats", "natural_accuracy", "adversarial_accuracy"])
    with paper_style():
        families, rest = _family_key(rows), [*_fill_key(rows), *_case_key()]
        groups = panels(rows)
        figure, axes = Sheet(len(groups) or 1, keys=(len(families), len(rest))).draw()
        family_looks = looks(rows["family"])
        for panel, ax in zip(groups, axes, strict=False):
            _draw_cases(ax, panel.rows, family_looks)
            _dress(ax, panel.title, "mutual information (nats, estimate)", "accuracy (measured)")
        _finish(figure, axes, families, rest)
    return figure


def save_figures(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write figure1 and figure2 as PNG and SVG into `folder`/figures and return their paths."""
    paths = []
    for name, figure in (("figure1", figure1(frame)), ("figure2", figure2(frame))):
        for suffix in ("png", "svg"):
            path = Path(folder) / "figures" / f"{name}.{suffix}"
            write_atomically(path, figure_bytes(figure, suffix))
            paths.append(path)
    return paths


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """Return a figure as a file of type `suffix` (png or svg), the same bytes every time."""
    buffer = BytesIO()
    undated = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    with paper_style():
        figure.savefig(buffer, format=suffix, metadata=undated)
    return buffer.getvalue()


def _plottable(frame: pd.DataFrame, needed: list[str]) -> pd.DataFrame:
    return frame.dropna(subset=needed).sort_values(["family", "trained_eps", "model", "cell_id"])


def _points(rows: pd.DataFrame) -> list[dict[Any, Any]]:
    return rows.assign(refuted=contradicted(rows)).to_dict(orient="records")


def _all_of(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    # the caption counts every row of the group, drawn or not
    first = rows.iloc[0]
    same = [frame[name] == first[name] for name in ("dataset", "layer", "norm", "eps", "estimator")]
    return frame[np.logical_and.reduce(same)]


def _draw_gap(ax: Axes, rows: pd.DataFrame, family_looks: dict[str, Look]) -> None:
    for row in _points(rows):
        look = family_looks[row["family"]]
        x, y = float(row["rv"]), float(row["adversarial_gap"])
        _whisker(ax, [x - _se(row["rv_se"]), x + _se(row["rv_se"])], [y, y], look)
        _point(ax, x, y, marker(look, fill_of(row["training"], row["trained_eps"], row["eps"])))
        if row["refuted"]:
            _cross(ax, x, y)
    ax.set_xlim(*limits([rows["rv"] - rows["rv_se"].fillna(0), rows["rv"] + rows["rv_se"].fillna(0)]))
    ax.set_ylim(*limits([rows["adversarial_gap"]]))


def _draw_cases(ax: Axes, rows: pd.DataFrame, family_looks: dict[str, Look]) -> None:
    for row in _points(rows):
        look, fill = family_looks[row["family"]], fill_of(row["training"], row["trained_eps"], row["eps"])
        ends = [(float(row[f"{case}_nats"]), float(row[f"{kind}_accuracy"])) for case, kind in _CASES]
        ax.plot(*zip(*ends, strict=True), color=look.colour, linewidth=0.6, alpha=0.45, zorder=2)
        for (x, y), (case, kind), size in zip(ends, _CASES, (3.2, 5.5), strict=True):
            se = _se(row[f"{case}_nats_se"])
            _whisker(ax, [x - se, x + se], [y, y], look)
            _whisker(ax, [x, x], [_or(row[f"{kind}_accuracy_low"], y), _or(row[f"{kind}_accuracy_high"], y)], look)
            _point(ax, x, y, marker(look, fill, size))
        if row["refuted"]:
            _cross(ax, *ends[1])
    low, high = limits([rows["normal_nats"], rows["worst_nats"]])
    ax.set_xlim(min(low, 0.0), high)
    ax.set_ylim(-0.04, 1.04)
    for classes in sorted(set(rows["num_classes"].dropna())):
        _theorem_line(ax, int(classes))


_CASES = (("normal", "natural"), ("worst", "adversarial"))


def _theorem_line(ax: Axes, classes: int) -> None:
    left, right = ax.get_xlim()
    # where the line meets chance and one: corners must not be rounded off by sampling
    corners = [1 / classes * math.log(classes) - math.log(2), math.log(classes / 2)]
    x = np.array(sorted({left, right, *(c for c in corners if left < c < right)}))
    y = np.clip((x + math.log(2)) / math.log(classes), 1 / classes, 1)
    ax.plot(x, y, linestyle=(0, (4, 2)), color="#333333", linewidth=0.9, zorder=1.5)
    ax.fill_between(x, y, 2, color=_REGION, alpha=0.16, linewidth=0, zorder=0.5)


def _point(ax: Axes, x: float, y: float, artist: Line2D) -> None:
    artist.set_data([x], [y])
    ax.add_line(artist)


def _cross(ax: Axes, x: float, y: float) -> None:
    ax.plot([x], [y], marker="x", markersize=8.5, markeredgewidth=0.8, color="black", linestyle="none", zorder=4)


def _whisker(ax: Axes, x: list[float], y: list[float], look: Look) -> None:
    ax.plot(x, y, color=look.colour, linewidth=0.8, solid_capstyle="butt", zorder=2.5)


def _dress(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    ax.set_title(label(title, 62), loc="left", pad=5)
    ax.set_xlabel(x_label, labelpad=3)
    ax.set_ylabel(y_label, labelpad=3)
    ax.locator_params(nbins=6)
    sns.despine(ax=ax)


def _finish(figure: Figure, axes: list[Axes], families: list[Line2D], rest: list[Line2D]) -> None:
    if families:
        place_key(figure, families, rest, min(len(axes), 3))
        return
    axes[0].text(0.5, 0.5, "no model has these values", ha="center", transform=axes[0].transAxes)
    axes[0].set_axis_off()


def _family_key(rows: pd.DataFrame) -> list[Line2D]:
    return [_named(marker(look, "full"), label(name, 16)) for name, look in looks(rows["family"]).items()]


def _fill_key(rows: pd.DataFrame) -> list[Line2D]:
    known = zip(rows["training"], rows["trained_eps"], rows["eps"], strict=True)
    used = {fill_of(training, trained, eps) for training, trained, eps in known}
    fills = [_named(marker(_GREY, fill), text) for fill, text in FILL_LABELS.items() if fill in used]
    return [*fills, *_unranked_key(rows[contradicted(rows)]["model"])]


def _unranked_key(models: Iterable[str]) -> list[Line2D]:
    names = sorted(set(models))
    texts = [f"contradicted: {label(short_name(name), 17)}" for name in names[:_NAMED]]
    if len(names) > _NAMED:
        texts.append(f"and {len(names) - _NAMED} more contradicted")
    return [_named(Line2D([], [], marker="x", color="black", linestyle="none", markersize=6), text) for text in texts]


def _case_key() -> list[Line2D]:
    line = Line2D([], [], linestyle=(0, (4, 2)), color="#333333", linewidth=0.9)
    return [
        _named(marker(_GREY, "full", 3.2), "normal case, natural acc."),
        _named(marker(_GREY, "full", 5.5), "worst case, adversarial acc."),
        _named(line, "Theorem 3.4 (estimated bound)"),
    ]


def _named(artist: Line2D, text: str) -> Line2D:
    artist.set_label(text)
    return artist


def _se(value: float) -> float:
    return _or(value, 0.0)


def _or(value: float, otherwise: float) -> float:
    return otherwise if pd.isna(value) else float(value)
