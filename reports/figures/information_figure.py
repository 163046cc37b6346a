"""Figure 2: information against accuracy, with the upper bound on any head."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from audit.theory import fano_accuracy_bound
from reports.estimators import curve_of
from reports.figures.marks import (
    GREY,
    cross,
    draw_panels,
    dress,
    family_key,
    fill_key,
    finish,
    head_note,
    named,
    or_else,
    or_zero,
    plottable,
    point,
    points,
    title_lines,
    whisker,
    write_names,
)  # fmt: skip
from reports.figures.proved_band import LEDGER_TEXT, ledger_band, ledger_mark
from reports.figures.style import Look, fill_of, limits, looks, marker, paper_style
from reports.statistics.correlation import Vector
from reports.tables.table import Panel, panels, too_few

_REGION = "#999999"
_CASES = (("normal", "natural"), ("worst", "adversarial"))
_VALUES = ("normal_nats", "worst_nats", "natural_accuracy", "adversarial_accuracy")
_LINES: dict[str, Any] = {"fano": "-", "theorem": (0, (4, 2))}
_NAMES = {"fano": "exact Fano (estimated bound)", "theorem": "Theorem 3.4 (estimated bound)"}
_AXES = {
    "fano": "label information I(Y; g(X)) (nats, estimate)",
    "theorem": "mutual information (nats, estimate)",
}


def figure2(frame: pd.DataFrame) -> Figure:
    """Return each model's normal and worst case: information (nats, estimate) against accuracy (measured).

    Label information stands under the exact Fano curve, solid; estimates of I(X; g(X)) under Theorem 3.4 as printed,
    dashed, as a replication in panels of their own. With estimates either is an *estimated bound*. `sandwich` is left
    out because it is information about a smoothed representation, `label-level` because its worst case limits no head.
    Bars are certified ceilings, where a certificate was asked for; bands reach from the share that the network provably
    keeps to the share that nothing has broken, where a ledger of images was.
    Source: Fano's inequality, d(a || 1/K) <= I(Y; g(X)) for K equal classes; Zhu, Zhang & Evans, ICML 2020,
    Theorem 3.4: a <= (I + ln 2)/ln K.
    """
    rows = plottable(frame, _VALUES)
    drawn = [bool(curve_of(*names)) for names in zip(rows["estimator"], rows["quantity"], strict=True)]
    rows = rows[pd.Series(drawn, index=rows.index, dtype=bool)]
    with paper_style():
        groups = panels(rows)
        used = [curve for curve in _LINES if curve in {_curve(panel.rows.iloc[0]) for panel in groups}]
        keys = family_key(rows), [*fill_key(rows), *_case_key(used, rows)]
        captions = ["\n".join([_caption(panel), *head_note(panel.rows)]) for panel in groups]
        family_looks = looks(rows["family"])

        def draw(ax: Axes, panel: Panel) -> int:
            left_out = _draw(ax, panel.rows, family_looks)
            dress(ax, title_lines(panel), _AXES[_curve(panel.rows.iloc[0])], "accuracy (measured)")
            return left_out

        figure, axes = draw_panels(groups, captions, keys, draw)
        finish(figure, axes, keys)
    return figure


def limit(curve: str, nats: Vector, classes: int) -> Vector:
    """Return the bound on any head's accuracy given information (nats), by exact Fano or Theorem 3.4, in [1/K, 1].

    >>> limit("fano", np.array([0.0, 1.0]), 10).round(3), limit("theorem", np.array([0.0, 1.0]), 10).round(3)
    (array([0.1  , 0.689]), array([0.301, 0.735]))
    """
    if curve == "fano":
        return np.array([fano_accuracy_bound(max(0.0, float(x)), 1 / classes) for x in nats])
    return np.clip((nats + math.log(2)) / math.log(classes), 1 / classes, 1.0)


def _curve(row: "pd.Series[str]") -> str:
    return curve_of(row["estimator"], row["quantity"])


def _caption(panel: Panel) -> str:
    curve = _curve(panel.rows.iloc[0])
    classes = " or ".join(f"{int(k)}" for k in sorted(set(panel.rows["num_classes"].dropna())))
    if not classes:
        return "No line: the number of classes is not known."
    if too_few(panel.rows).all():
        return "No line: too few images a class to state a bound on heads."
    if curve == "fano":
        return f"Solid: exact Fano for {classes} equal classes, an estimated bound because I(Y; g(X)) is an estimate."
    line = f"Dashed: Theorem 3.4 as printed, {classes} classes, an estimated bound because the MI is an estimate."
    return line if panel.rows["ranks"].all() else f"{line}\nReplication only: this estimator does not claim to rank."


def _draw(ax: Axes, rows: pd.DataFrame, family_looks: dict[str, Look]) -> int:
    for row in points(rows):
        look, fill = family_looks[row["family"]], fill_of(row["training"], row["trained_eps"], row["eps"])
        ends = [(float(row[f"{case}_nats"]), float(row[f"{kind}_accuracy"])) for case, kind in _CASES]
        ax.plot(*zip(*ends, strict=True), color=look.colour, linewidth=0.6, alpha=0.45, zorder=2)
        for (x, y), (case, kind), size in zip(ends, _CASES, (3.2, 5.5), strict=True):
            se = or_zero(row[f"{case}_nats_se"])
            whisker(ax, [x - se, x + se], [y, y], look)
            interval = [or_else(row[f"{kind}_accuracy_{end}"], y) for end in ("low", "high")]
            whisker(ax, [x, x], interval, look)
            point(ax, x, y, marker(look, fill, size), row["cell_id"] if case == "worst" else "")
        if row["refuted"]:
            cross(ax, *ends[1])
        if not pd.isna(row["certified_bound"]):
            _ceiling(ax, ends[1], float(row["certified_bound"]), look)
        if not pd.isna(row["proved_share"]):
            shares = float(row["proved_share"]), float(row["not_broken_share"])
            known = or_else(row["kept_population_low"], shares[0]), or_else(row["kept_population_high"], shares[1])
            ledger_band(ax, ends[1][0], shares, look, known)
    low, high = limits([rows["normal_nats"], rows["worst_nats"]])
    ax.set_xlim(min(low, 0.0), high)
    ax.set_ylim(-0.04, 1.04)
    for classes in sorted(set(rows.loc[~too_few(rows), "num_classes"].dropna())):
        _limit_line(ax, _curve(rows.iloc[0]), int(classes))
    drawn = points(rows)
    return write_names(ax, drawn, [(float(row["worst_nats"]), float(row["adversarial_accuracy"])) for row in drawn])


def _ceiling(ax: Axes, worst: tuple[float, float], bound: float, look: Look) -> None:
    """Draw the certified upper bound above the adversarial accuracy of the network's own head."""
    x, y = worst
    ax.plot([x, x], [y, bound], color=look.colour, linewidth=0.6, linestyle=":", zorder=2)
    ax.plot([x], [bound], marker="_", markersize=7, markeredgewidth=1.4, color=look.colour, linestyle="none", zorder=3)


def _limit_line(ax: Axes, curve: str, classes: int) -> None:
    left, right = ax.get_xlim()
    # where the line meets chance and one: corners must not be rounded off by sampling
    corners = {
        "fano": [*(right * np.linspace(0, 1, 120) ** 2), math.log(classes)],  # dense where it is steep
        "theorem": [1 / classes * math.log(classes) - math.log(2), math.log(classes / 2)],
    }[curve]
    x = np.array(sorted({left, right, *(float(c) for c in corners if left < c < right)}))
    y = limit(curve, x, classes)
    ax.plot(x, y, linestyle=_LINES[curve], color="#333333", linewidth=0.9, zorder=1.5)
    ax.fill_between(x, y, 2, color=_REGION, alpha=0.16, linewidth=0, zorder=0.5)


def _case_key(used: list[str], rows: pd.DataFrame) -> list[Line2D]:
    lines = [
        named(Line2D([], [], linestyle=_LINES[curve], color="#333333", linewidth=0.9), _NAMES[curve]) for curve in used
    ]
    ceiling = Line2D([], [], marker="_", markersize=7, markeredgewidth=1.4, color=GREY.colour, linestyle="none")
    proved = [named(ledger_mark(), LEDGER_TEXT)] if rows["proved_share"].notna().any() else []
    return [
        named(marker(GREY, "full", 3.2), "normal case, natural acc."),
        named(marker(GREY, "full", 5.5), "worst case, adversarial acc."),
        *lines,
        *([named(ceiling, "no head exceeds it (certified)")] if rows["certified_bound"].notna().any() else []),
        *proved,
    ]
