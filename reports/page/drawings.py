"""Coordinates of inline drawings (interval strips, line charts, sparklines) for the template. Stdlib only.

Coordinates are in the units of an SVG's viewBox, y downwards.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
STRIP = 160  # units a strip is wide
_EDGE = 5.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 312.0, 10.0, 118.0
_MOST = 60  # points of a line


@dataclass(frozen=True)
class Strip:
    """A value on a strip, the ends of its interval, and a reference line shared by a table; "" where there is none."""

    at: str
    low: str = ""
    high: str = ""
    shared: str = ""


@dataclass(frozen=True)
class Curve:
    """One learning curve: the split it was evaluated on, and its (step, nats) pairs."""

    kind: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Polyline points by kind, end points, and the labels of both axis ends."""

    title: str
    words: str
    lines: Sequence[tuple[str, str]]
    dots: Sequence[str]
    top: str
    bottom: str
    last: str


def strip(value: float, ends: tuple[float, float] = (0.0, 1.0), interval: Sequence[float] = ()) -> Strip:
    """Return a value on a strip between two ends, with its interval where both ends of that are known.

    >>> strip(0.5, interval=(0.0, 1.0))
    Strip(at='80.0', low='5.0', high='155.0', shared='')
    >>> strip(math.nan)
    Strip(at='', low='', high='', shared='')
    """
    if not math.isfinite(value):
        return Strip("")
    low, high = (place(end, ends) for end in interval) if _all_finite(interval) else ("", "")
    return Strip(place(value, ends), low, high)


def place(value: float, ends: tuple[float, float]) -> str:
    """Return the position of a value on a strip, clipped to its ends.

    >>> place(2.0, (0.0, 1.0)), place(0.0, (0.0, 0.0))
    ('155.0', '5.0')
    """
    span = (ends[1] - ends[0]) or 1.0
    return f"{_EDGE + (STRIP - 2 * _EDGE) * min(1.0, max(0.0, (value - ends[0]) / span)):.1f}"


def charts(cases: Sequence[tuple[str, Sequence[Curve], Sequence[float]]]) -> list[Chart]:
    """Return a chart for every (title, curves, reported values in nats), all on one scale; none of no curve."""
    drawn = [case for case in cases if case[1]]
    nats = [y for _, curves, _ in drawn for curve in curves for _, y in curve.points]
    nats += [value for _, _, values in drawn for value in values]
    if not nats:
        return []
    steps = [x for _, curves, _ in drawn for curve in curves for x, _ in curve.points]
    box = (min(0.0, *steps), max(steps), min(nats), max(nats))
    return [_chart(title, curves, values, box) for title, curves, values in drawn]


def thinned(points: Sequence[Item]) -> list[Item]:
    """Return at most 60 points of a line, the first and the last among them."""
    if len(points) <= _MOST:
        return list(points)
    return [points[round(i * (len(points) - 1) / (_MOST - 1))] for i in range(_MOST)]


def spark(values: Sequence[object]) -> str:
    """Return the polyline points of a sparkline (100 x 24), or "" for fewer than two finite numbers.

    >>> spark([0, 1])
    ''
    """
    known = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    if len(known) < 8 or len(known) < len(values):
        return ""
    numbers = thinned(known)
    low, span = min(numbers), max(numbers) - min(numbers) or 1.0
    step = 100 / (len(numbers) - 1)
    return " ".join(f"{i * step:.1f},{23 - 22 * (v - low) / span:.1f}" for i, v in enumerate(numbers))


def _chart(
    title: str, curves: Sequence[Curve], values: Sequence[float], box: tuple[float, float, float, float]
) -> Chart:
    first, last, low, high = box
    across, up = (last - first) or 1.0, (high - low) or 1.0

    def spot(x: float, y: float) -> str:
        return f"{_LEFT + (_RIGHT - _LEFT) * (x - first) / across:.1f},{_height(y, low, up):.1f}"

    lines = [(curve.kind, " ".join(spot(x, y) for x, y in thinned(curve.points))) for curve in curves]
    ends = [f"{curve.kind} from {_told(curve.points[0][1])} to {_told(curve.points[-1][1])}" for curve in curves]
    told = f"{title}, nats over {last:g} steps: {'; '.join(ends)}"
    dots = [f"{_height(value, low, up):.1f}" for value in values]
    return Chart(title, told, lines, dots, _told(high), _told(low), f"{last:g} steps")


def _height(y: float, low: float, span: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * (y - low) / span


def _told(nats: float) -> str:
    return f"{round(nats, 2) + 0.0:.2f}"  # no minus before a zero


def _all_finite(values: Iterable[float]) -> bool:
    given = list(values)
    return len(given) == 2 and all(math.isfinite(value) for value in given)
