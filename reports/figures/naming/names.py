"""Names on the points of a figure: placed near their points so that no two overlap, with a line where they are apart.

Iterative repulsion (adjustText) leaves overlaps where many points lie on one line. Here a crowd of points has its names
in a column beside it, and every other name takes the cheapest free place of a fixed list, so that names never overlap
and the same points give the same figure.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from reports.figures.naming.columns import Obstacles, column_of, crowds, splits
from reports.figures.naming.geometry import Floats, Marks, boxes_meet, lines_cross, lines_through
from reports.figures.style import label, text_inches

_SIZE = 7.0  # points; all lengths below are in points too
_LONGEST = 30  # characters
_HEIGHT = 1.3 * _SIZE
_MARK = 4.0  # a marker reaches so far around its centre
_GAP = 1.5
_ANGLES = np.radians((0, 180, 45, 135, 315, 225, 90, 270))  # in the order in which equal places are preferred
_ACROSS, _UP = 10.0, 5.0  # steps of the grid of places
_LINE_FROM = 8.0  # a line joins a name and a point farther apart
_ON_A_LINE, _OVER_A_MARK, _OVER_A_LINE, _AT_ANOTHER = 12.0, 60.0, 400.0, 60.0  # what a place costs beside its distance
_NO_ROOM = 1e4
_ANOTHER_COLUMN = 40.0  # what one more column for the names of a crowd costs
_MANY = 40  # names of which only one order is tried


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
    sheet = _Sheet(np.array(ax.bbox.extents) * scale, _markers(ax, spots), _segments(ax))
    placed = _in_columns(sheet, spots, widths)
    orders = [[i for i in order if i not in placed] for order in _orders(spots)]
    best = min((_arranged(copy.copy(sheet), spots, widths, order) for order in orders), key=lambda tried: tried[0])
    placed |= best[1]
    for i, place in placed.items():
        _write(ax, points[i], texts[i], (spots[i], place))
    return len(points) - len(placed)


def _in_columns(sheet: "_Sheet", spots: Floats, widths: Sequence[float]) -> dict[int, "Place"]:
    """Place the names of every crowd in a column, or in several where that is cheaper; return the places."""
    found = dict[int, Place]()
    for crowd in crowds(spots):
        tried = [_columns(copy.copy(sheet), parts, spots, widths) for parts in splits(crowd, spots)]
        _, places = min(tried, key=lambda each: each[0])
        for i, place in places.items():
            sheet.take(spots[i], place)
        found |= places
    return found


def _columns(
    sheet: "_Sheet", parts: Sequence[Sequence[int]], spots: Floats, widths: Sequence[float]
) -> tuple[float, dict[int, "Place"]]:
    """Return what a column for each part of a crowd costs, and the places of the names that find room."""
    cost, found = _ANOTHER_COLUMN * (len(parts) - 1), dict[int, Place]()
    for part in parts:
        column = column_of(spots[part], [widths[i] for i in part], _HEIGHT, sheet.obstacles)
        if column is None:
            cost += _NO_ROOM * len(part)
            continue
        cost += column.cost
        for i, box, end in zip(part, column.boxes, column.ends, strict=True):
            found[i] = Place(box, end)
            sheet.take(spots[i], found[i])
    return cost, found


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

    def __init__(self, frame: Floats, marks: Floats, segments: Floats) -> None:
        self.frame, self.marks, self.segments = frame, marks, segments
        self.names: Floats = np.empty((0, 4))
        self.lines: Floats = np.empty((0, 2, 2))
        self.cost = 0.0

    def room(self, spot: Floats, width: float) -> Place | None:
        """Take the cheapest place for a name of a width and return it; None where there is none."""
        boxes = _places(self.frame, spot, width)
        boxes = boxes[~boxes_meet(boxes, np.vstack([self.marks, self.names])).any(1)]
        boxes = boxes[~lines_through(self.lines[:, 0], self.lines[:, 1], boxes).any(0)]
        boxes, ends = _ends(spot, boxes)
        free = ~lines_through(spot, ends, self.names).any(1)
        boxes, ends = boxes[free], ends[free]
        if not len(boxes):
            return None
        costs = self._costs(spot, boxes, ends)
        best = int(np.argmin(costs))
        self.cost += float(costs[best])
        place = Place(boxes[best], ends[best])
        self.take(spot, place)
        return place

    def take(self, spot: Floats, place: "Place") -> None:
        """Note that a name stands at a place, with a line to its point."""
        self.names = np.vstack([self.names, place.box])
        self.lines = np.concatenate([self.lines, np.stack([spot, place.end])[None]])

    @property
    def obstacles(self) -> Obstacles:
        """What a column of names must not cover."""
        return Obstacles(self.frame, self.marks, self.names, self.lines, self.segments)

    def _costs(self, spot: Floats, boxes: Floats, ends: Floats) -> Floats:
        others = self.marks[~boxes_meet(self.marks, np.array([[*(spot - _MARK), *(spot + _MARK)]]))[:, 0]]
        wide = boxes + np.array([-_MARK, -_MARK, _MARK, _MARK])
        costs: Floats = (
            np.linalg.norm(ends - spot, axis=1)
            + _ON_A_LINE * np.minimum(3, lines_through(self.segments[:, 0], self.segments[:, 1], boxes).sum(0))
            + _OVER_A_MARK * lines_through(spot, ends, others).sum(1)
            + _OVER_A_LINE * lines_cross(spot, ends, self.lines).sum(1)
            + _AT_ANOTHER * boxes_meet(wide, others).any(1)
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
    """Return boxes (m, 4) with ends of the lines to them: the nearest point, and the middle of the facing side."""
    middle, nearest = (boxes[:, 1] + boxes[:, 3]) / 2, np.clip(spot, boxes[:, :2], boxes[:, 2:])
    facing = [spot[0] <= boxes[:, 0], spot[0] >= boxes[:, 2]]  # of the other side, the line would run along the name
    ends = [np.stack([boxes[of, side], middle[of]], 1) for of, side in zip(facing, (0, 2), strict=True)]
    return np.vstack([boxes, *(boxes[of] for of in facing)]), np.vstack([nearest, *ends])


def _markers(ax: Axes, spots: Floats) -> Floats:
    """Return the boxes of points to name, and of every other marker of an axes."""
    data = [np.asarray(line.get_xydata(), dtype=np.float64) for line in ax.lines]
    single = [ax.transData.transform(place) * 72 / ax.figure.dpi for place in data if len(place) == 1]
    centres = np.unique(np.round(np.vstack([spots, *single]), 6), axis=0)
    return np.hstack([centres - _MARK, centres + _MARK])


def _segments(ax: Axes) -> Floats:
    """Return the straight parts (n, 2, 2) of the lines of an axes: error bars, curves."""
    found = [np.empty((0, 2, 2))]
    for line in ax.lines:
        data: Floats = ax.transData.transform(np.asarray(line.get_xydata(), dtype=np.float64)) * 72 / ax.figure.dpi
        found.append(np.stack([data[:-1], data[1:]], 1))
    return np.concatenate(found)


def _write(ax: Axes, point: Named, text: str, placed: tuple[Floats, Place]) -> None:
    spot, (box, end) = placed
    reach = end - spot
    ax.annotate(
        text, (point.x, point.y), (box[0] + _GAP - spot[0], (box[1] + box[3]) / 2 - spot[1]),
        textcoords="offset points", ha="left", va="center", fontsize=_SIZE, color="#333333", zorder=5, gid="name",
    )  # fmt: skip
    if math.hypot(*reach) > _LINE_FROM:
        # to the centre and over the markers: they may lie on one another
        ax.annotate(
            "", (point.x, point.y), tuple(reach), textcoords="offset points", zorder=3.8, gid="leader",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#555555", "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        ax.plot([point.x], [point.y], marker="o", markersize=1.6, color="#222222", markeredgewidth=0, zorder=3.9)
