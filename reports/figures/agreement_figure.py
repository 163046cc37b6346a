"""Agreement of estimators: one matrix of Kendall's tau-b per setting, with the number of models."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reports.figures.style import RIGHT, Sheet, label, paper_style
from reports.statistics.agreement import Agreement, agreements

_CELL = 0.62
_LABELS = 1.22
_SHOWN_FROM = 0.62
_CAPTION = (
    "Below the diagonal: Kendall's tau-b of two estimators' RVs over the models both cover, contradicted ones left "
    "out. On it: median standard error of RV in nats."
)
_NO_CLAIM = " * does not claim to rank."


def agreement_figure(frame: pd.DataFrame) -> Figure | None:
    """Return Kendall's tau-b (estimate) of every two estimators, one matrix per setting; None for a single one."""
    found = agreements(frame)
    if not found:
        return None
    largest = max(len(agreement.estimators) for agreement in found)
    size = max(3, largest) * _CELL
    with paper_style():
        captions = [_caption(agreement) for agreement in found]
        sheet = Sheet(
            len(found), captions, width=_LABELS + size + RIGHT, plot_height=size, left=_LABELS,
            head=0.48, foot=0.75,
        )  # fmt: skip
        figure, axes = sheet.draw()
        for agreement, ax in zip(found, axes, strict=True):
            _draw(ax, agreement)
            title = ("Kendall's tau-b of RV (estimate)", label(agreement.title, 52))
            ax.set_title("\n".join(title), loc="left", pad=5, x=-(_LABELS - 0.14) / size)
    return figure


def _caption(agreement: Agreement) -> str:
    silent = not all(firm.ranks for firm in agreement.firmness.values())
    return f"{_CAPTION}{_NO_CLAIM}" if silent else _CAPTION


def _draw(ax: Axes, agreement: Agreement) -> None:
    count = len(agreement.estimators)
    for row, one in enumerate(agreement.estimators):
        for column, other in enumerate(agreement.estimators[:row]):
            tau = agreement.tau(one, other)
            text = "–" if tau.value is None else f"{tau.value:.2f}"
            _cell(ax, (column, row), f"{text}\nn = {tau.n}", tau.value)
        firm = agreement.firmness[one]
        error = "–" if firm.error is None else f"± {firm.error:.3f}"
        _cell(ax, (row, row), f"{error}\nn = {firm.models}", None)
    names = [label(name, 18) + ("" if agreement.firmness[name].ranks else " *") for name in agreement.estimators]
    ax.set(xlim=(0, count), ylim=(count, 0))
    ax.set_xticks([i + 0.5 for i in range(count)], names, rotation=28, ha="right", rotation_mode="anchor")
    ax.set_yticks([i + 0.5 for i in range(count)], names)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    sns.despine(ax=ax, left=True, bottom=True)


def _cell(ax: Axes, corner: tuple[int, int], text: str, value: float | None) -> None:
    colours = sns.color_palette("vlag_r", as_cmap=True)
    face = "#f0f0f0" if value is None else colours((value + 1) / 2)
    strong = value is not None and abs(value) > _SHOWN_FROM
    ax.add_patch(
        Rectangle(corner, 1, 1, facecolor=face, edgecolor="white", linewidth=1.2, zorder=2),
    )
    middle = (corner[0] + 0.5, corner[1] + 0.5)
    ax.text(
        *middle, text, ha="center", va="center", fontsize=7, linespacing=1.3, zorder=3,
        color="white" if strong else "#222222",
    )  # fmt: skip
