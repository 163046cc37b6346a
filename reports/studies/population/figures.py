"""Figures of the study: the population in the manner of Figure 1, and a forest plot of predictors by outcome."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reports.figures.marks import GREY, dress, named
from reports.figures.style import (
    FILL_LABELS,
    Keys,
    Look,
    Sheet,
    fill_of,
    label,
    limits,
    looks,
    marker,
    paper_style,
    place_key,
)
from reports.statistics.population.grouped import Grouped
from reports.studies.population.analysis import SetAnalysis
from reports.text import format_eps

_SIZE, _RING = 4.2, 7.6  # points, of a marker and of the ring around a network held back
_SETS = (Look("#0173b2", "o"), Look("#de8f05", "s"), Look("#029e73", "D"))
_NAMES = {
    "rv_sandwich_logits": "RV, logits",
    "rv_sandwich_penultimate": "RV, penultimate",
    "rv_label_level": "label-level RV",
    "margin_ratio": "margin / gradient",
    "gradient_norm": "gradient norm",
    "displacement": "displacement",
    "natural": "natural accuracy",
    "trained_eps": "training radius",
}


def population_figure(analyses: Sequence[SetAnalysis]) -> Figure:
    """Return RV (nats, estimate) against the adversarial gap (measured), a panel an estimator and data set."""
    panels = [(each, name) for each in analyses for name in each.design.estimators]
    with paper_style():
        keys = _population_keys(analyses)
        captions = [_caption(each) for each, _ in panels]
        together = [len(each.design.estimators) for each in analyses]
        sheet = Sheet(len(panels), captions, width=3.4, plot_height=2.6, keys=keys, groups=together, head=0.46)
        figure, axes = sheet.draw()
        for (analysis, name), ax in zip(panels, axes, strict=True):
            _scatter(ax, analysis.usable, name, _family_looks(analyses))
            title = [f"{analysis.name}, l-inf {format_eps(float(analysis.every['eps'].iloc[0]))}"]
            dress(ax, [_NAMES.get(name, name), *title], "RV (nats, estimate)", "adversarial gap (measured)")
        place_key(figure, *keys)
    return figure


def forest_figure(analyses: Sequence[SetAnalysis]) -> Figure:
    """Return every predictor's correlation with every outcome inside training groups, a panel an outcome.

    Signs are turned so that a positive value is what the predictor's claim implies.
    """
    design = analyses[0].design
    predictors = list(design.predictors)
    with paper_style():
        keys: Keys = ([named(_dot(look), each.name) for each, look in zip(analyses, _SETS, strict=False)], [])
        captions = [str(each["words"]) for each in design.outcomes.values()]
        pairs = [2] * (len(captions) // 2) + [1] * (len(captions) % 2)  # two beside one another: legible on a phone
        sheet = Sheet(len(captions), captions, width=3.4, plot_height=1.7, keys=keys, groups=pairs, left=1.2)
        figure, axes = sheet.draw()
        for outcome, ax in zip(design.outcomes, axes, strict=True):
            for number, analysis in enumerate(analyses):
                _column(ax, analysis, outcome, number)
            ax.axvline(0, color="#777777", linewidth=0.7, zorder=1)
            dress(ax, [outcome.replace("_", " ")], "rank correlation inside groups", "")
            ax.set(xlim=(-1.05, 1.05), ylim=(len(predictors) - 0.4, -0.6))
            ax.set_yticks(range(len(predictors)), [label(_NAMES.get(name, name), 18) for name in predictors])
        place_key(figure, *keys)
    return figure


def _scatter(ax: Axes, rows: pd.DataFrame, name: str, known: dict[str, Look]) -> None:
    for row in rows.sort_values(["family", "multiple", "model"]).to_dict(orient="records"):
        fill = fill_of(str(row["training"]), float(row["trained_eps"]), float(row["eps"]))
        point = [float(row[name])], [float(row["gap"])]
        artist = marker(known[str(row["family"])], fill, _SIZE)
        artist.set_data(*point)
        ax.add_line(artist)
        if row["held_back"]:
            ring = _ring()
            ring.set_data(*point)
            ax.add_line(ring)
    ax.set_xlim(*limits([rows[name]]))
    ax.set_ylim(*limits([rows["gap"]]))


def _column(ax: Axes, analysis: SetAnalysis, outcome: str, number: int) -> None:
    for place, name in enumerate(analysis.design.predictors):
        found: Grouped = analysis.forest[name, outcome]
        if found.value is None:
            continue
        sign, look = analysis.design.expected(name, outcome), _SETS[number % len(_SETS)]
        height = place + 0.22 * (number - 0.5)
        if found.low is not None and found.high is not None:
            ends = sorted((sign * found.low, sign * found.high))
            ax.plot(ends, [height, height], color=look.colour, linewidth=0.9, zorder=2)
        ax.add_line(_dot(look, sign * found.value, height))


def _dot(look: Look, x: float = 0.0, y: float = 0.0) -> Line2D:
    style: dict[str, Any] = {"linestyle": "none", "marker": look.marker, "color": look.colour, "markersize": 3.6}
    return Line2D([x], [y], zorder=3, **style)


def _ring() -> Line2D:
    return Line2D([], [], linestyle="none", marker="o", markersize=_RING, markerfacecolor="none",
                  markeredgecolor="#999999", markeredgewidth=0.5, zorder=2.8)  # fmt: skip


def _family_looks(analyses: Sequence[SetAnalysis]) -> dict[str, Look]:
    return looks(name for each in analyses for name in each.every["family"])


def _population_keys(analyses: Sequence[SetAnalysis]) -> Keys:
    families = [named(marker(look, "full"), label(name, 16)) for name, look in _family_looks(analyses).items()]
    fills = [named(marker(GREY, fill), text) for fill, text in FILL_LABELS.items() if fill != "bottom"]
    return families, [*fills, named(_ring(), "held back: no choice rests on it")]


def _caption(analysis: SetAnalysis) -> str:
    out = len(analysis.every) - len(analysis.usable)
    left = f" {out} that have not learned are left out." if out else ""
    return f"{len(analysis.usable)} networks, {len(analysis.held)} of them held back.{left}"
