"""Boxes (left, bottom, right, top) and straight lines of a figure: which of them meet."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Marks = NDArray[np.bool_]

_NOTHING = 1e-9


def boxes_meet(some: Floats, others: Floats) -> Marks:
    """Return which boxes (n, 4) overlap which (m, 4), as (n, m)."""
    overlap = np.ones((len(some), len(others)), dtype=np.bool_)
    for low in (0, 1):  # an axis at a time: reductions over an axis of two numbers take most of the time of a figure
        overlap &= np.maximum(some[:, None, low], others[:, low]) < np.minimum(
            some[:, None, low + 2], others[:, low + 2]
        )
    return overlap


def lines_through(starts: Floats, ends: Floats, boxes: Floats) -> Marks:
    """Return which lines, from starts (n, 2) or one start (2,) to ends (n, 2), run through which boxes (m, 4)."""
    along = ends - starts
    along = np.where(np.abs(along) < _NOTHING, _NOTHING, along)
    start = np.broadcast_to(starts, ends.shape)
    spans = []
    for low in (0, 1):
        origin, rate = start[:, low, None], along[:, low, None]
        enter, leave = (boxes[:, low] - origin) / rate, (boxes[:, low + 2] - origin) / rate
        spans.append((np.minimum(enter, leave), np.maximum(enter, leave)))
    first, last = np.maximum(spans[0][0], spans[1][0]), np.minimum(spans[0][1], spans[1][1])
    through: Marks = (first < last) & (last > 0) & (first < 1 - _NOTHING)
    return through


def lines_cross(starts: Floats, ends: Floats, lines: Floats) -> Marks:
    """Return which lines, from starts (n, 2) or one start (2,) to ends (n, 2), cross which lines (m, 2, 2)."""
    start, end = np.broadcast_to(starts, ends.shape)[:, None], ends[:, None]
    first, last = lines[:, 0], lines[:, 1]
    apart = _turn(start, end, first) * _turn(start, end, last)
    crossing: Marks = (apart < 0) & (_turn(first, last, start) * _turn(first, last, end) < 0)
    return crossing


def _turn(start: Floats, end: Floats, point: Floats) -> Floats:
    """Return on which side of the line from start to end a point lies, by sign."""
    along, across = end - start, point - start
    side: Floats = along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0]
    return side
