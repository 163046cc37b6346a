"""Names on the points of a figure: placed near their points so that no two overlap, with a line where they are apart.

Iterative repulsion (adjustText) leaves overlaps where many points lie on one line. Here every name takes the cheapest
free place of a fixed list, so that names never overlap and the same points give the same figure.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from reports.figures.style import label, text_inches

Floats = NDArray[np.float64]
Marks = NDArray[np.bool_]

_SIZE = 6.3  # points; all lengths below are in points too
_LONGEST = 30  # characters
_HEIGHT = 1.3 * _SIZE
_MARK = 4.0  # a marker reaches so far around its centre
_GAP = 1.5
_ANGLES = np.radians((0, 180, 45, 135, 315, 225, 90, 270))  # in the order in which equal places are preferred
_ACROSS, _UP = 7.0, 4.0  # steps of the grid of places
_LINE_FROM = 8.0  # a line joins a name and a point farther apart
_ON_A_BAR, _OVER_A_MARK, _OVER_A_LINE, _AT_ANOTHER = 12.0, 60.0, 20.0, 60.0  # what a place costs beside its distance
_SHARES = np.linspace(0, 1, 20)  # of a line, where it is looked at


class Named(NamedTuple):
    """A point to name, in data coordinates."""

    x: float
    y: float
    name: str


def name_points(ax: Axes, points: Sequence[Named]) -> int:
    """Write the names of points near them and return how many found no room; call it once the limits are set.

    Names overlap no other name, no point and no line of another name, and stay inside the axes.
    """
    scale = 72 / ax.figure.dpi
    spots: Floats = ax.transData.transform([(p.x, p.y) for p in points]).reshape(-1, 2) * scale
    sheet = _Sheet(np.array(ax.bbox.extents) * scale, np.hstack([spots - _MARK, spots + _MARK]), _bars(ax))
    crowd = [int((np.linalg.norm(spots - spot, axis=1) < 40).sum()) for spot in spots]
    for i in sorted(range(len(points)), key=lambda i: (-crowd[i], tuple(spots[i]))):
        text = label(points[i].name, _LONGEST)
        found = sheet.room(spots[i], 72 * text_inches(text, _SIZE) + 2 * _GAP)
        if found is not None:
            _write(ax, points[i], text, (spots[i], found))
    return len(points) - len(sheet.names)


def without_shared_start(names: Sequence[str]) -> list[str]:
    """Return names without the words that all of them start with.

    >>> without_shared_start(["digits-vgg-robust", "digits-vgg-standard"]), without_shared_start(["a-b"])
    (['robust', 'standard'], ['a-b'])
    """
    words = [name.split("-") for name in names]
    if len(set(names)) < 2:
        return list(names)
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == words[0][shared] for parts in words):
        shared += 1
    return ["-".join(parts[shared:]) for parts in words]


class _Sheet:
    """What lies inside an axes already: boxes (left, bottom, right, top) of markers, error bars and names, and lines."""

    def __init__(self, frame: Floats, marks: Floats, bars: Floats) -> None:
        self.frame, self.marks, self.bars = frame, marks, bars
        self.names: Floats = np.empty((0, 4))
        self.lines: Floats = np.empty((0, len(_SHARES), 2))  # points along the lines

    def room(self, spot: Floats, width: float) -> Floats | None:
        """Take the cheapest place for a name of a width and return it; None where there is none."""
        boxes = _places(self.frame, spot, width)
        boxes = boxes[~_meet(boxes, np.vstack([self.marks, self.names])).any(1) & ~_hold(boxes, self.lines.reshape(-1, 2)).any(1)]
        paths = _paths(spot, boxes)
        free = ~_hold_any(self.names, paths).any(1)
        boxes, paths = boxes[free], paths[free]
        if not len(boxes):
            return None
        best = int(np.argmin(self._costs(spot, boxes, paths)))
        self.names = np.vstack([self.names, boxes[best]])
        self.lines = np.concatenate([self.lines, paths[best : best + 1]])
        return boxes[best]

    def _costs(self, spot: Floats, boxes: Floats, paths: Floats) -> Floats:
        others = self.marks[~_meet(self.marks, np.array([[*(spot - _MARK), *(spot + _MARK)]]))[:, 0]]
        apart = np.linalg.norm(paths[:, -1] - spot, axis=1)
        wide = boxes + np.array([-_MARK, -_MARK, _MARK, _MARK])
        costs: Floats = (
            apart
            + _ON_A_BAR * _meet(boxes, self.bars).any(1)
            + _OVER_A_MARK * _hold_any(others, paths).sum(1)
            + _OVER_A_LINE * _cross(spot, paths[:, -1], self.lines).sum(1)
            + _AT_ANOTHER * _meet(wide, others).any(1)
        )
        return costs


def _places(frame: Floats, spot: Floats, width: float) -> Floats:
    """Return the places inside the axes that a name may take (n, 4): around its point, then a grid over the axes."""
    left, bottom, right, top = frame
    reach = _MARK + _GAP + np.array([width / 2, _HEIGHT / 2])
    around = spot + reach * np.sign(np.round(np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1), 6))
    across = np.arange(left + width / 2, right - width / 2, _ACROSS)
    up = np.arange(bottom + _HEIGHT / 2, top - _HEIGHT / 2, _UP)
    grid = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    middles = np.vstack([around, grid])
    half = np.array([width / 2, _HEIGHT / 2])
    boxes = np.hstack([middles - half, middles + half])
    inside: Marks = (boxes[:, :2] >= frame[:2]).all(1) & (boxes[:, 2:] <= frame[2:]).all(1)
    return boxes[inside]


def _paths(spot: Floats, boxes: Floats) -> Floats:
    """Return points (n, steps, 2) along the line from a point to each box."""
    ends = np.clip(spot, boxes[:, :2], boxes[:, 2:])
    paths: Floats = spot + (ends - spot)[:, None] * _SHARES[:, None]
    return paths


def _meet(some: Floats, others: Floats) -> Marks:
    """Return which boxes overlap which (n, m)."""
    low, high = np.maximum(some[:, None, :2], others[:, :2]), np.minimum(some[:, None, 2:], others[:, 2:])
    overlap: Marks = (low < high).all(-1)
    return overlap


def _hold(boxes: Floats, points: Floats) -> Marks:
    """Return which boxes (n, 4) hold which points (m, 2)."""
    inside: Marks = ((boxes[:, None, :2] < points) & (points < boxes[:, None, 2:])).all(-1)
    return inside


def _hold_any(boxes: Floats, paths: Floats) -> Marks:
    """Return which paths (n, steps, 2) run through which boxes (n, m)."""
    steps = paths[:, :, None]
    through: Marks = ((boxes[:, :2] < steps) & (steps < boxes[:, 2:])).all(-1).any(1)
    return through


def _cross(spot: Floats, ends: Floats, lines: Floats) -> Marks:
    """Return which lines from a spot to ends (n, 2) cross which lines between points (m, steps, 2)."""
    first, last = lines[:, 0], lines[:, -1]
    apart = _turn(spot, ends[:, None], first) * _turn(spot, ends[:, None], last)
    crossing: Marks = (apart < 0) & (_turn(first, last, spot) * _turn(first, last, ends[:, None]) < 0)
    return crossing


def _turn(start: Floats, end: Floats, point: Floats) -> Floats:
    """Return on which side of the line from start to end a point lies, by sign."""
    along, across = end - start, point - start
    side: Floats = along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0]
    return side


def _bars(ax: Axes) -> Floats:
    """Return the error bars of an axes: its lines of two points that run along an axis."""
    found = []
    for line in ax.lines:
        ends = ax.transData.transform(line.get_xydata()) * 72 / ax.figure.dpi if len(line.get_xdata()) == 2 else []
        if len(ends) and (abs(ends[0] - ends[1]) < 1e-6).any():
            found.append([*(ends.min(0) - 0.5), *(ends.max(0) + 0.5)])
    return np.array(found).reshape(-1, 4)


def _write(ax: Axes, point: Named, text: str, place: tuple[Floats, Floats]) -> None:
    spot, box = place
    end = np.clip(spot, box[:2], box[2:]) - spot
    ax.annotate(
        text, (point.x, point.y), (box[0] + _GAP - spot[0], (box[1] + box[3]) / 2 - spot[1]),
        textcoords="offset points", ha="left", va="center", fontsize=_SIZE, color="#333333", zorder=5, gid="name",
    )  # fmt: skip
    if math.hypot(*end) > _LINE_FROM:
        ax.annotate(
            "", (point.x, point.y), tuple(end), textcoords="offset points", zorder=2.2,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#777777", "shrinkA": 0, "shrinkB": _MARK},
        )  # fmt: skip
