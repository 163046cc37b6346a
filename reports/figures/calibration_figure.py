"""Calibration figure: error of each estimator against the true information, with the tolerance as a band."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from audit.records import CalibrationRow
from reports.estimators import place
from reports.figures.marks import GREY, cross, dress, named, point, whisker
from reports.figures.style import Look, Sheet, label, looks, marker, paper_style, place_key
from reports.statistics.correlation import Vector
from reports.tables.calibration import calibration_sentence, errors
from reports.text import plain_text

_CASES = ("normal", "worst")
_BAND = "#d9d9d9"
_SMALLEST_EDGE = 0.001  # nats; errors of rounding get no axis of their own


def calibration_figure(rows: Sequence[CalibrationRow]) -> Figure | None:
    """Return estimate less truth (nats, measured) against the truth (nats, closed form); None without calibration.

    Two panels an estimator, normal and worst case; grey is the tolerance, whiskers are one standard error.
    """
    estimators = sorted({row.estimator for row in rows}, key=place)
    if not estimators:
        return None
    looked = looks(plain_text(row.channel) for row in rows)
    with paper_style():
        keys = _channel_key(looked), _verdict_key()
        captions = [text for name in estimators for text in (_sentence(rows, name), "")]
        sheet = Sheet(
            2 * len(estimators), captions, plot_height=1.7, keys=keys,
            groups=[2] * len(estimators), left=0.95, head=0.46,
        )  # fmt: skip
        figure, axes = sheet.draw()
        for i, name in enumerate(estimators):
            own = [row for row in rows if row.estimator == name]
            for ax, case in zip(axes[2 * i : 2 * i + 2], _CASES, strict=True):
                _draw(ax, own, case, looked)
                dress(ax, (name, f"{case} case"), "truth (nats, closed form)", "estimate − truth\n(nats, measured)")
        place_key(figure, *keys)
    return figure


def _sentence(rows: Sequence[CalibrationRow], name: str) -> str:
    sentence = calibration_sentence(rows, name)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _draw(ax: Axes, rows: Sequence[CalibrationRow], case: str, looked: dict[str, Look]) -> None:
    known = [(row, errors(row)[case]) for row in rows if case in errors(row)]
    if not known:
        ax.text(0.5, 0.5, "no channel", ha="center", transform=ax.transAxes)
        return
    _band(ax, known, case)
    ax.axhline(0, color="#333333", linewidth=0.6, zorder=1.5)
    edge = _edge(known, case)
    for row, error in known:
        look, tolerance = looked[plain_text(row.channel)], getattr(row, f"{case}_tolerance")
        x, se = getattr(row, f"true_{case}_nats"), getattr(row, f"{case}_nats_se") or 0.0
        if abs(error) > edge:
            _outside(ax, x, error, edge, look)
            continue
        whisker(ax, [x, x], [error - se, error + se], look)
        point(ax, x, error, marker(look, "none" if tolerance is None else "full", 4.5))
        if tolerance is not None and abs(error) > tolerance:
            cross(ax, x, error)
    ax.set_ylim(-1.12 * edge, 1.12 * edge)
    ax.set_xlim(*_truths([getattr(row, f"true_{case}_nats") for row, _ in known]))


def _edge(known: Sequence[tuple[CalibrationRow, float]], case: str) -> float:
    """Return the half-height of a panel: every tolerance and every error with a tolerance fits."""
    judged = [
        (abs(error) + (getattr(row, f"{case}_nats_se") or 0.0), getattr(row, f"{case}_tolerance"))
        for row, error in known
    ]
    reach = [max(error, tolerance) for error, tolerance in judged if tolerance is not None]
    return max(1.05 * max(reach or [error for error, _ in judged]), _SMALLEST_EDGE)


def _truths(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis of truths: at least 0.2 nats apart, so that one channel gets an axis one can read."""
    low, high = min(values), max(values)
    room = max(0.07 * (high - low), 0.1 - (high - low) / 2)
    return low - room, high + room


def _outside(ax: Axes, x: float, error: float, edge: float, look: Look) -> None:
    """Clip an outlier without a tolerance to the edge of the panel and annotate its error."""
    y = math.copysign(edge, error)
    point(ax, x, y, marker(look, "none", 4.5))
    ax.annotate(f"{error:+.2f}", (x, y), (5, 0), textcoords="offset points", va="center", fontsize=6.8)


def _band(ax: Axes, known: Sequence[tuple[CalibrationRow, float]], case: str) -> None:
    """Draw the band from -tolerance to +tolerance, the widest where channels share a true value."""
    widest: dict[float, float] = {}
    for row, _ in known:
        truth, tolerance = getattr(row, f"true_{case}_nats"), getattr(row, f"{case}_tolerance")
        if tolerance is not None:
            widest[truth] = max(tolerance, widest.get(truth, 0.0))
    truths: Vector = np.array(sorted(widest))
    height: Vector = np.array([widest[truth] for truth in truths])
    ax.vlines(truths, -height, height, color=_BAND, linewidth=7, zorder=0.6)
    ax.fill_between(truths, -height, height, color=_BAND, alpha=0.5, linewidth=0, zorder=0.5)


def _channel_key(looked: dict[str, Look]) -> list[Line2D]:
    return [named(marker(look, "full", 4.5), label(channel, 40)) for channel, look in looked.items()]


def _verdict_key() -> list[Line2D]:
    return [
        named(Line2D([], [], marker="s", color=_BAND, linestyle="none", markersize=7), "tolerance"),
        named(Line2D([], [], marker="x", color="black", linestyle="none", markersize=6), "failed: beyond it"),
        named(marker(GREY, "none", 4.5), "shown without a verdict"),
    ]
