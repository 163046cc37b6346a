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
_ACROSS, _UP = 10.0, 5.0  # steps of the grid of places
_LINE_FROM = 8.0  # a line joins a name and a point farther apart
_ON_A_BAR, _OVER_A_MARK, _OVER_A_LINE, _AT_ANOTHER = 12.0, 60.0, 20.0, 60.0  # what a place costs beside its distance
_NO_ROOM = 1e4
_MANY = 40  # names of which only one order is tried
_NOTHING = 1e-9


class Named(NamedTuple):
    """A point to name, in data coordinates."""

    x: float
    y: float
    name: str


def name_points(ax: Axes, points: Sequence[Named]) -> int:
    """Write the names of points near them and return how many found no room; call it once the limits are set.

    Names overlap no other name, no point and no line of another name, and stay inside the axes.
    """
    if not points:
        return 0
    scale = 72 / ax.figure.dpi
    spots: Floats = ax.transData.transform([(p.x, p.y) for p in points]) * scale
    texts = [label(point.name, _LONGEST) for point in points]
    widths = [72 * text_inches(text, _SIZE) + 2 * _GAP for text in texts]
    made = (np.array(ax.bbox.extents) * scale, np.hstack([spots - _MARK, spots + _MARK]), _bars(ax))
    best = min((_arranged(_Sheet(*made), spots, widths, order) for order in _orders(spots)), key=lambda tried: tried[0])
    for i, place in best[1].items():
        _write(ax, points[i], texts[i], (spots[i], place))
    return len(points) - len(best[1])


def _orders(spots: Floats) -> list[list[int]]:
    """Return orders in which names are placed: the most crowded first, and from every side."""
    crowd = [int((np.linalg.norm(spots - spot, axis=1) < 40).sum()) for spot in spots]
    numbers = range(len(spots))
    first = sorted(numbers, key=lambda i: (-crowd[i], tuple(spots[i])))
    if len(spots) > _MANY:
        return [first]
    sides = [(axis, sign) for axis in (0, 1) for sign in (1, -1)]
    return [first, *(sorted(numbers, key=lambda i: (side[1] * spots[i][side[0]], i)) for side in sides)]


def _arranged(
    sheet: "_Sheet", spots: Floats, widths: Sequence[float], order: Sequence[int]
) -> tuple[float, dict[int, "Place"]]:
    """Return what an arrangement costs, the names without room above all, and the places by point."""
    found = {i: place for i in order if (place := sheet.room(spots[i], widths[i])) is not None}
    return _NO_ROOM * (len(spots) - len(found)) + sheet.cost, found


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


class Place(NamedTuple):
    """Where a name stands (left, bottom, right, top) and the end of the line to it."""

    box: Floats
    end: Floats


class _Sheet:
    """What lies inside an axes: boxes (left, bottom, right, top) of markers, error bars and names, and lines."""

    def __init__(self, frame: Floats, marks: Floats, bars: Floats) -> None:
        self.frame, self.marks, self.bars = frame, marks, bars
        self.names: Floats = np.empty((0, 4))
        self.lines: Floats = np.empty((0, 2, 2))
        self.cost = 0.0

    def room(self, spot: Floats, width: float) -> Place | None:
        """Take the cheapest place for a name of a width and return it; None where there is none."""
        boxes = _places(self.frame, spot, width)
        boxes = boxes[~_meet(boxes, np.vstack([self.marks, self.names])).any(1)]
        boxes = boxes[~_through(self.lines[:, 0], self.lines[:, 1], boxes).any(0)]
        boxes, ends = _ends(spot, boxes)
        free = ~_through(spot, ends, self.names).any(1)
        boxes, ends = boxes[free], ends[free]
        if not len(boxes):
            return None
        costs = self._costs(spot, boxes, ends)
        best = int(np.argmin(costs))
        self.cost += float(costs[best])
        self.names = np.vstack([self.names, boxes[best]])
        self.lines = np.concatenate([self.lines, np.stack([spot, ends[best]])[None]])
        return Place(boxes[best], ends[best])

    def _costs(self, spot: Floats, boxes: Floats, ends: Floats) -> Floats:
        others = self.marks[~_meet(self.marks, np.array([[*(spot - _MARK), *(spot + _MARK)]]))[:, 0]]
        wide = boxes + np.array([-_MARK, -_MARK, _MARK, _MARK])
        costs: Floats = (
            np.linalg.norm(ends - spot, axis=1)
            + _ON_A_BAR * _meet(boxes, self.bars).any(1)
            + _OVER_A_MARK * _through(spot, ends, others).sum(1)
            + _OVER_A_LINE * _cross(spot, ends, self.lines).sum(1)
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
    inside: Marks = np.all((boxes[:, :2] >= frame[:2]) & (boxes[:, 2:] <= frame[2:]), axis=1)
    return boxes[inside]


def _ends(spot: Floats, boxes: Floats) -> tuple[Floats, Floats]:
    """Return every box (n, 4) with each end that a line to it may have: its nearest point, and the middle of a side."""
    middle = (boxes[:, 1] + boxes[:, 3]) / 2
    sides = [np.stack([boxes[:, side], middle], 1) for side in (0, 2)]
    return np.tile(boxes, (3, 1)), np.vstack([np.clip(spot, boxes[:, :2], boxes[:, 2:]), *sides])


def _meet(some: Floats, others: Floats) -> Marks:
    """Return which boxes overlap which (n, m)."""
    low, high = np.maximum(some[:, None, :2], others[:, :2]), np.minimum(some[:, None, 2:], others[:, 2:])
    overlap: Marks = np.all(low < high, axis=-1)
    return overlap


def _through(starts: Floats, ends: Floats, boxes: Floats) -> Marks:
    """Return which lines (n) run through which boxes (n, m)."""
    along = (ends - starts)[:, None]
    along = np.where(np.abs(along) < _NOTHING, _NOTHING, along)
    start = np.broadcast_to(starts, ends.shape)[:, None]
    enter, leave = (boxes[:, :2] - start) / along, (boxes[:, 2:] - start) / along
    first, last = np.minimum(enter, leave).max(-1), np.maximum(enter, leave).min(-1)
    through: Marks = (first < last) & (last > 0) & (first < 1 - _NOTHING)
    return through


def _cross(spot: Floats, ends: Floats, lines: Floats) -> Marks:
    """Return which lines from a spot to ends (n, 2) cross which lines (m, 2, 2)."""
    first, last = lines[:, 0], lines[:, 1]
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
        data: Floats = np.asarray(line.get_xydata(), dtype=np.float64)
        if len(data) == 2:
            ends: Floats = ax.transData.transform(data) * 72 / ax.figure.dpi
            if (np.abs(ends[0] - ends[1]) < _NOTHING).any():
                found.append([*(ends.min(0) - 0.5), *(ends.max(0) + 0.5)])
    return np.array(found).reshape(-1, 4)


def _write(ax: Axes, point: Named, text: str, placed: tuple[Floats, Place]) -> None:
    spot, (box, end) = placed
    reach = end - spot
    ax.annotate(
        text, (point.x, point.y), (box[0] + _GAP - spot[0], (box[1] + box[3]) / 2 - spot[1]),
        textcoords="offset points", ha="left", va="center", fontsize=_SIZE, color="#333333", zorder=5, gid="name",
    )  # fmt: skip
    if math.hypot(*reach) > _LINE_FROM:
        ax.annotate(
            "", (point.x, point.y), tuple(reach), textcoords="offset points", zorder=2.2,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#777777", "shrinkA": 0, "shrinkB": _MARK},
        )  # fmt: skip
