"""Drawing primitives of figures: points, whiskers, titles and the legend."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reports.figures.naming.names import Named, name_points, without_shared_start
from reports.figures.style import FILL_LABELS, Keys, Look, Sheet, fill_of, label, looks, marker, place_key
from reports.tables.table import Panel, contradicted, panels
from reports.text import short_name

GREY = Look("#555555", "o")
SPOT = "cell-"
"""Start of the identifiers of markers that stand for a record."""
_NAMED = 6
_WIDTH, _HEIGHT = 4.2, 3.4  # inches of a panel whose points have names
_LARGER = (1.0, 1.25, 1.6, 2.0)  # sizes of panels, until every name has room
_TITLE = 46


def plottable(frame: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """Return the rows with every needed value, in an order independent of that of the records."""
    return frame.dropna(subset=list(needed)).sort_values(["family", "trained_eps", "model", "cell_id"])


def points(rows: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return rows as dictionaries; `refuted` marks contradicted rows."""
    return rows.assign(refuted=contradicted(rows)).to_dict(orient="records")


def draw_panels(
    groups: Sequence[Panel], captions: Sequence[str], keys: Keys, draw: Callable[[Axes, Panel], int]
) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel per group, the estimators of one setting side by side.

    `draw` draws a panel and returns how many names found no room: then the panels are larger.
    """
    settings = [panel.setting for panel in groups]
    together = [settings.count(setting) for setting in dict.fromkeys(settings)]
    lines = max((len(title_lines(panel)) for panel in groups), default=1)
    for scale in _LARGER:
        sheet = Sheet(len(groups) or 1, captions, width=scale * _WIDTH, plot_height=scale * _HEIGHT, keys=keys,
                      groups=together, head=0.14 + 0.16 * lines)  # fmt: skip
        figure, axes = sheet.draw()
        if not sum(draw(ax, panel) for panel, ax in zip(groups, axes, strict=False)):
            break
    return figure, axes


def title_lines(panel: Panel) -> list[str]:
    """Return a panel's title: its setting, over it the estimator where there are several."""
    return [panel.setting] if panel.title == panel.setting else [panel.estimator, panel.setting]


def head_note(rows: pd.DataFrame) -> list[str]:
    """Return a sentence on the accuracies of encoders among the rows; none without encoders."""
    heads = rows.get("adversarial_head", pd.Series(dtype="str"))  # rows of earlier versions have no such column
    encoders = int((heads.notna() & heads.ne("")).sum())
    return [f"Encoders ({encoders}): accuracies of the best linear heads found."] if encoders else []


def point(ax: Axes, x: float, y: float, artist: Line2D, cell: str = "") -> None:
    """Put a marker at (x, y); `cell` is the record it stands for, by which a page finds it."""
    artist.set_data([x], [y])
    if cell:
        artist.set_gid(f"{SPOT}{cell}")
    ax.add_line(artist)


def write_names(ax: Axes, rows: Sequence[Mapping[Any, Any]], places: Sequence[tuple[float, float]]) -> int:
    """Name the points of rows at their places; say and return how many names found no room."""
    names = without_shared_start([short_name(row["model"]) for row in rows])
    left_out = name_points(ax, [Named(x, y, name) for (x, y), name in zip(places, names, strict=True)])
    if left_out:
        told = f"{left_out} of {len(rows)} names have no room"
        ax.text(1, 1.01, told, ha="right", va="bottom", fontsize=6.3, color="#777777", transform=ax.transAxes)
    return left_out


def cross(ax: Axes, x: float, y: float) -> None:
    """Cross out a contradicted or failed point."""
    ax.plot([x], [y], marker="x", markersize=8.5, markeredgewidth=0.8, color="black", linestyle="none", zorder=4)


def whisker(ax: Axes, x: list[float], y: list[float], look: Look) -> None:
    """Draw an interval."""
    ax.plot(x, y, color=look.colour, linewidth=0.8, solid_capstyle="butt", zorder=2.5)


def dress(ax: Axes, title: Sequence[str], x_label: str, y_label: str) -> None:
    """Set the titles of a panel and its axes, with unit and kind."""
    ax.set_title("\n".join(label(line, _TITLE) for line in title), loc="left", pad=5)
    ax.set_xlabel(x_label, labelpad=3)
    ax.set_ylabel(y_label, labelpad=3)
    ax.locator_params(nbins=6)
    sns.despine(ax=ax)


def finish(figure: Figure, axes: list[Axes], keys: Keys) -> None:
    """Draw the legend under the figure, or a note that there is nothing to show."""
    if keys[0]:
        place_key(figure, *keys)
        return
    axes[0].text(0.5, 0.5, "no model has these values", ha="center", transform=axes[0].transAxes)
    axes[0].set_axis_off()


def family_key(rows: pd.DataFrame) -> list[Line2D]:
    """Return the legend entries of families."""
    return [named(marker(look, "full"), label(name, 16)) for name, look in looks(rows["family"]).items()]


def fill_key(rows: pd.DataFrame) -> list[Line2D]:
    """Return the legend entries of trainings and of contradicted rows."""
    known = zip(rows["training"], rows["trained_eps"], rows["eps"], strict=True)
    used = {fill_of(training, trained, eps) for training, trained, eps in known}
    fills = [named(marker(GREY, fill), text) for fill, text in FILL_LABELS.items() if fill in used]
    return [*fills, *_contradicted_key(rows)]


def named(artist: Line2D, text: str) -> Line2D:
    """Set the text of a legend entry."""
    artist.set_label(text)
    return artist


def or_zero(value: float) -> float:
    """Return a standard error, 0 where there is none."""
    return or_else(value, 0.0)


def or_else(value: float, otherwise: float) -> float:
    """Return a value, or another where it is missing."""
    return otherwise if pd.isna(value) else float(value)


def _contradicted_key(rows: pd.DataFrame) -> list[Line2D]:
    refuted = rows[contradicted(rows)]
    if len(panels(rows)) > 1:
        # a name would not say in which panel
        return [_cross_entry("contradicted: not ranked")] if len(refuted) else []
    return [_cross_entry(text) for text in _named_models(refuted["model"])]


def _named_models(models: Iterable[str]) -> list[str]:
    names = sorted(set(models))
    texts = [f"contradicted: {label(short_name(name), 17)}" for name in names[:_NAMED]]
    return [*texts, f"and {len(names) - _NAMED} more contradicted"] if len(names) > _NAMED else texts


def _cross_entry(text: str) -> Line2D:
    return named(Line2D([], [], marker="x", color="black", linestyle="none", markersize=6), text)
