"""Style of figures: colour-blind-safe colours, markers, fonts, and layout in inches.

Everything is placed by hand from known font sizes, so nothing overlaps and a rebuild gives the same bytes.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

from reports.text import plain_text, shorten

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "axes.formatter.useoffset": False,
    "savefig.dpi": 300,
    "figure.dpi": 100,
    # names are data: a dollar sign in one must not start a formula
    "text.parse_math": False,
    "text.usetex": False,
    "svg.hashsalt": "rvaudit",
    "svg.fonttype": "path",
}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "h", "*")
# the palette's yellow and light grey vanish on white paper
_COLOURS = tuple(sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 3, 4, 5, 9))
_LINE_INCHES = 0.142
_LETTER_INCHES = 0.0505  # of a caption, on average
_KEY_INCHES = 0.147
_KEY_ABOVE, _KEY_BETWEEN, _KEY_LEFT = 0.12, 0.05, 0.1
RIGHT = 0.2  # inches beside a plot, half of a tick's label
_HINTING = 1.08  # letters fitted to pixels take up to so much more room than their outlines
_ROUNDING = 1e-9

FILL_LABELS = {
    "none": "standard training",
    "left": "robust, smaller eps than audited",
    "full": "robust, audited eps or larger",
    "bottom": "not standard, training eps unknown",
}


Keys = tuple[Sequence[Line2D], Sequence[Line2D]]
"""Entries of a legend: those of families, and all others."""


@dataclass(frozen=True)
class Look:
    """The colour and marker shape of one family."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Sheet:
    """A figure of equal panels in a grid, lengths in inches, with captions and legend below.

    `groups` says how many panels belong together: each group starts a row of its own, unless all are single.
    `left`, `head` and `foot` are the room beside, over and under a plot for its labels.
    """

    panels: int
    captions: Sequence[str] = ()
    width: float = 3.5
    plot_height: float = 2.45
    keys: Keys = ((), ())
    groups: Sequence[int] = ()
    left: float = 0.56
    head: float = 0.3
    foot: float = 0.42

    @property
    def columns(self) -> int:
        """Return the number of panels per row: at most three, with rows of about equal length."""
        largest = max(self._blocks)
        return max(1, math.ceil(largest / max(1, math.ceil(largest / 3))))

    def draw(self) -> tuple[Figure, list[Axes]]:
        """Return the empty figure and one axes per panel."""
        places = self._places()
        rows = max((row for row, _ in places), default=0) + 1
        key = _key_height(self.keys, self.width * self.columns)
        size = (self.width * self.columns, rows * self._row_height + key)
        figure = Figure(figsize=size, facecolor="white")
        axes = [figure.add_axes(self._box(place, size)) for place in places]
        for panel, text in zip(axes, self.captions, strict=False):
            self._caption(panel, text)
        return figure, axes

    @property
    def _blocks(self) -> Sequence[int]:
        return self.groups if max(self.groups, default=1) > 1 else (self.panels,)

    def _places(self) -> list[tuple[int, int]]:
        places, first = list[tuple[int, int]](), 0
        for block in self._blocks:
            places += [(first + i // self.columns, i % self.columns) for i in range(block)]
            first += math.ceil(block / self.columns)
        return places

    @property
    def _row_height(self) -> float:
        lines = max((len(_wrapped(text, self.width)) for text in self.captions), default=0)
        return self.head + self.plot_height + self.foot + lines * _LINE_INCHES + 0.06 * bool(lines)

    def _box(self, place: tuple[int, int], size: tuple[float, float]) -> tuple[float, float, float, float]:
        row, column = place
        left, top = self.width * column + self.left, size[1] - row * self._row_height - self.head
        width, height = self.width - self.left - RIGHT, self.plot_height
        return left / size[0], (top - height) / size[1], width / size[0], height / size[1]

    def _caption(self, axes: Axes, text: str) -> None:
        """Write a caption under the axis label, wrapped to the panel's width."""
        across = -0.9 * (self.left - RIGHT) / (self.width - self.left - RIGHT)
        axes.text(
            across, -(self.foot + 0.05) / self.plot_height, "\n".join(_wrapped(text, self.width)),
            transform=axes.transAxes,
            va="top", ha="left", fontsize=6.8, linespacing=1.35, color="#333333",
        )  # fmt: skip


@contextmanager
def paper_style() -> Iterator[None]:
    """Return a context with fonts, grid and a fixed salt of SVG identifiers, for drawing and saving."""
    # a reader's own matplotlibrc must not change the bytes; the backend is not touched, figures need none
    defaults = {name: value for name, value in mpl.rcParamsDefault.items() if "backend" not in name}
    with mpl.rc_context({**defaults, **_RC}):
        yield


def looks(families: Iterable[str]) -> dict[str, Look]:
    """Return a look for every family, independent of their order."""
    names = sorted(set(families))
    return {name: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def fill_of(training: str, trained_eps: float, eps: float) -> str:
    """Return the fill of a marker by the training radius: hollow, half or full.

    Source: Zhu, Zhang & Evans, ICML 2020, Figure 1.

    >>> fill_of("standard", 0, 0.2), fill_of("robust", 0.05, 0.2), fill_of("robust", 0.2, 0.2)
    ('none', 'left', 'full')
    """
    if trained_eps <= 0:
        return "none" if training == "standard" else "bottom"
    return "full" if trained_eps >= eps * (1 - 1e-9) else "left"


def marker(look: Look, fill: str, size: float = 5.5) -> Line2D:
    """Return one marker; the uncoloured part of half-filled and hollow ones is white."""
    face = "white" if fill == "none" else look.colour
    return Line2D(
        [], [], linestyle="none", marker=look.marker, markersize=size, markeredgewidth=0.9,
        fillstyle="full" if fill == "none" else fill, markeredgecolor=look.colour,  # type: ignore[arg-type]
        markerfacecolor=face, markerfacecoloralt="white", zorder=3,
    )  # fmt: skip


def label(text: str, width: int = 34) -> str:
    """Return text reduced to the glyphs of the font, shortened in the middle.

    >>> label("a" * 40, 9)
    'aaaaa…aaa'
    """
    plain = shorten(plain_text(text).strip(), width) or "(no name)"
    shown = _drawable(plain)
    # matplotlib leaves labels that start with an underscore out of the key
    return f" {shown}" if shown.startswith("_") else shown


def place_key(figure: Figure, families: Sequence[Line2D], rest: Sequence[Line2D]) -> None:
    """Place the legend in the reserved bottom margin: families first, everything else under them."""
    width, height = figure.get_size_inches()
    top = _key_height((families, rest), width) - _KEY_ABOVE
    for handles in filter(None, (families, rest)):
        columns = _key_columns(handles, width)
        figure.legend(
            handles=list(handles),
            loc="upper left",
            bbox_to_anchor=(_KEY_LEFT / width, top / height),
            ncols=columns,
            frameon=False,
            handletextpad=0.4,
            columnspacing=1.0,
            labelspacing=0.35,
            borderpad=0.1,
            borderaxespad=0,
        )
        top -= _KEY_INCHES * math.ceil(len(handles) / columns) + _KEY_BETWEEN


@lru_cache(maxsize=4096)  # a figure asks for every name and entry of its key several times
def text_inches(text: str, points: float) -> float:
    """Return the width in inches of a line of text in the figures' font, its size in points."""
    font = FontProperties(family=_RC["font.family"], size=points)
    return _HINTING * float(TextPath((0, 0), text, prop=font).get_extents().width) / 72 if text.strip() else 0.0


def _key_columns(handles: Sequence[Line2D], width: float) -> int:
    """Return how many columns of entries fit, each as wide as the widest, its marker and the space between."""
    size = _RC["legend.fontsize"]
    widest = max(text_inches(str(handle.get_label()), size) for handle in handles) + 3.6 * size / 72
    return max(1, min(len(handles), int((width - 2 * _KEY_LEFT) / widest)))


def _key_height(keys: Keys, width: float) -> float:
    rows = [math.ceil(len(handles) / _key_columns(handles, width)) for handles in keys if handles]
    return _KEY_ABOVE + _KEY_BETWEEN * len(rows) + _KEY_INCHES * sum(rows)


def limits(values: Iterable["pd.Series[float]"], margin: float = 0.07) -> tuple[float, float]:
    """Return axis limits that hold every finite value with a margin; (0, 1) where there is none."""
    joined = pd.concat([series.astype("float64") for series in values]).dropna()
    if joined.empty:
        return 0.0, 1.0
    low, high = float(joined.min()), float(joined.max())
    largest = max(abs(low), abs(high))
    if high - low <= _ROUNDING * max(1.0, largest):  # differences of rounding are none: no axis in steps of 1e-16
        return low - 0.1 * max(largest, 0.1), high + 0.1 * max(largest, 0.1)
    room = margin * (high - low)
    return low - room, high + room


def _drawable(text: str) -> str:
    return "".join(c if ord(c) < 0x250 or c in "…ℓ∞" else "?" for c in text)


def _wrapped(text: str, width: float) -> list[str]:
    sentences = [_drawable(plain_text(sentence)) for sentence in text.split("\n")]
    letters = max(20, int((width - 0.25) / _LETTER_INCHES))
    return [line for sentence in sentences for line in textwrap.wrap(sentence, width=letters)]
