"""Names of points that lie on one another: a column of names in the nearest free place, each with a line to its point.

The lines are those of the least total length, so that no two of them cross.

Source: Bekos, Kaufmann, Symvonis & Wolff 2007, "Boundary labeling: models and efficient algorithms for rectangular
maps": straight leaders of least total length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from reports.figures.naming.geometry import Floats, Marks, boxes_meet, lines_cross, lines_through

_TOUCHING = 11.0  # points; markers that are nearer belong together
_FEWEST = 3  # points of a crowd: two find room on either side
_ACROSS, _UP = 8.0, 4.0  # steps of the grid of places
_APART = 4.0  # a column is at least so far from its points, so that lines do not run along names
_ROUNDING = 1e-3  # points
_NEAREST, _FARTHER = 60, 200  # places whose lines are computed: the nearest, then some of all others
_ENOUGH = 15  # places of which the cheapest is taken
_ON_A_LINE, _OVER_A_MARK = 6.0, 80.0  # what a place costs beside the length of its lines


class Column(NamedTuple):
    """Boxes of names (n, 4) and the ends of the lines to them (n, 2), in the order of the points given.

    `cost` is the length of the lines, and more for what they and the names cover.
    """

    boxes: Floats
    ends: Floats
    cost: float


class Obstacles(NamedTuple):
    """What names must not cover: markers and names (boxes) and lines to names; segments of the figure's own lines."""

    frame: Floats
    marks: Floats
    names: Floats
    leaders: Floats
    segments: Floats


def crowds(spots: Floats) -> list[list[int]]:
    """Return groups of at least three points of which each lies almost on another one, the largest first."""
    near = np.linalg.norm(spots[:, None] - spots[None], axis=-1) < _TOUCHING
    left, found = set(range(len(spots))), list[list[int]]()
    while left:
        group, new = set[int](), {min(left)}
        while new:
            group |= new
            new = {int(i) for i in np.flatnonzero(near[sorted(new)].any(0))} - group
        left -= group
        found.append(sorted(group))
    return sorted((group for group in found if len(group) >= _FEWEST), key=len, reverse=True)


def splits(crowd: Sequence[int], spots: Floats) -> list[list[list[int]]]:
    """Return the ways to divide a crowd over columns: one, or two or three from side to side or from below."""
    found = [[list(crowd)]]
    for parts in (2, 3):
        for axis in (0, 1):
            order = sorted(crowd, key=lambda i: (spots[i][axis], spots[i][1 - axis], i))
            if len(crowd) >= 2 * parts:
                found.append([[int(i) for i in part] for part in np.array_split(order, parts)])
    return found


def column_of(spots: Floats, widths: Sequence[float], height: float, around: Obstacles) -> Column | None:
    """Return the cheapest column of names for points (n, 2); None if there is no place for one.

    `widths` (n) are those of the names, `height` is that of a line, in points.
    """
    size = np.array([max(widths), height * len(spots)])
    boxes, rightwards = _places(spots, size, around.frame)
    free = ~boxes_meet(boxes, np.vstack([around.marks, around.names])).any(1)
    free &= ~lines_through(around.leaders[:, 0], around.leaders[:, 1], boxes).any(0)
    boxes, rightwards = boxes[free], rightwards[free]
    crossed = lines_through(around.segments[:, 0], around.segments[:, 1], boxes).sum(0)
    sides = np.where(rightwards, boxes[:, 0], boxes[:, 2])
    slots = boxes[:, 1, None] + height * (np.arange(len(spots)) + 0.5)  # from below
    by_height = spots[np.argsort(spots[:, 1], kind="stable")]
    near = np.hypot(sides[:, None] - by_height[:, 0], slots - by_height[:, 1]).sum(1) + _ON_A_LINE * crossed
    found, order = list[Column](), np.argsort(near, kind="stable")
    for i in (*order[:_NEAREST], *order[_NEAREST :: 1 + len(order) // _FARTHER]):
        if len(found) == _ENOUGH:
            break
        ends = np.stack([np.full(len(spots), sides[i]), slots[i]], 1)
        column = _joined(spots, widths, (ends, height, bool(rightwards[i])), around)
        found += [column._replace(cost=column.cost + _ON_A_LINE * float(crossed[i]))] if column else []
    return min(found, key=lambda column: column.cost, default=None)


def _places(spots: Floats, size: Floats, frame: Floats) -> tuple[Floats, Marks]:
    """Return boxes of a size inside a frame, wholly to the right or left of points, and which are to the right."""
    low, high = frame[:2], frame[2:] - size
    across = np.arange(low[0], high[0] + 1e-9, _ACROSS)
    up = np.arange(low[1], high[1] + 1e-9, _UP)
    corners = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    boxes = np.hstack([corners, corners + size])
    right = boxes[:, 0] >= spots[:, 0].max() + _APART
    beside = right | (boxes[:, 2] <= spots[:, 0].min() - _APART)
    return boxes[beside], right[beside]


def _joined(
    spots: Floats, widths: Sequence[float], place: tuple[Floats, float, bool], around: Obstacles
) -> Column | None:
    """Return the column whose lines end at a place; None if a line crosses a name or another line."""
    ends, height, rightwards = place
    lengths = np.linalg.norm(spots[:, None] - ends[None], axis=-1)
    _, chosen = linear_sum_assignment(lengths)
    ends = ends[chosen]
    if lines_through(spots, ends, around.names).any() or lines_cross(spots, ends, around.leaders).any():
        return None
    centres: Floats = (around.marks[:, None, :2] + around.marks[:, None, 2:]) / 2
    others = np.abs(centres - spots[None]).max(-1).min(1) > _ROUNDING
    over = lines_through(spots, ends, around.marks[others]).sum()
    reach = np.asarray(widths)
    left, right = (ends[:, 0], ends[:, 0] + reach) if rightwards else (ends[:, 0] - reach, ends[:, 0])
    boxes = np.stack([left, ends[:, 1] - height / 2, right, ends[:, 1] + height / 2], 1)
    cost = lengths[np.arange(len(spots)), chosen].sum() + _OVER_A_MARK * over
    return Column(boxes, ends, float(cost))
