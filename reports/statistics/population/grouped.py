"""Rank correlations inside training groups: with shuffles inside groups, and with families drawn again or exchanged.

A family is in every training group, so that networks of one family are not independent: intervals draw families, and a
second p exchanges whole families.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reports.statistics.correlation import Vector

_MOST_FAMILIES = 7  # of which every exchange is tried: 5,040
_TOLERANCE = 1e-9


class Effort(NamedTuple):
    """How many shuffles (0: no p) and draws a statistic rests on, and their seed."""

    shuffles: int = 5000
    draws: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Blocks:
    """The training group, family and training seed of each of n networks."""

    groups: Sequence[str]
    families: Sequence[str]
    seeds: Sequence[int]

    @property
    def indicator(self) -> NDArray[np.float64]:
        """1 where a network (n) is in a group (G)."""
        names = sorted(set(self.groups))
        return np.array([[float(group == name) for name in names] for group in self.groups])

    def drawn(self, effort: Effort) -> NDArray[np.float64]:
        """Return how often each network (n) is in each draw of families with replacement, (draws, n)."""
        names = sorted(set(self.families))
        generator = np.random.default_rng(effort.seed)
        counts = generator.multinomial(len(names), [1 / len(names)] * len(names), size=effort.draws)
        return counts[:, [names.index(family) for family in self.families]].astype(np.float64)


@dataclass(frozen=True)
class Grouped:
    """A rank correlation inside groups, its interval over families, and three p values; None where not defined.

    `p` is of `value` by shuffles inside groups, `tau_p` that of Kendall's `tau`, `families_p` by exchanges of families.
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    families_p: float | None
    tau: float | None
    tau_p: float | None
    n: int


def ranks_inside(values: Vector, groups: Sequence[str]) -> Vector:
    """Return ranks inside each group, centred, in units of the group's size; ties share their mean rank."""
    labels, found = np.asarray(groups, dtype=object), np.zeros(len(values))
    for name in set(groups):
        inside = labels == name
        ranks = stats.rankdata(values[inside])
        found[inside] = (ranks - ranks.mean()) / len(ranks)
    return found


def inside_groups(x: Vector, y: Vector, blocks: Blocks, effort: Effort | None = None) -> Grouped:
    """Return the rank correlation of two vectors (n) inside training groups.

    Source: stratified permutation tests, Good 2005, "Permutation, Parametric and Bootstrap Tests of Hypotheses".
    """
    effort = effort or Effort()
    first, second = ranks_inside(x, blocks.groups), ranks_inside(y, blocks.groups)
    value = _cosine(first, second)
    if value is None:
        return Grouped(None, None, None, None, None, None, None, len(x))
    low, high = _interval(first, second, blocks, effort)
    if not effort.shuffles:
        return Grouped(value, low, high, None, None, None, None, len(x))
    tau, tau_p = _kendall(x, y, blocks, effort)
    shuffled = shuffles_inside(first, blocks.groups, effort) @ second
    p = share_beyond(shuffled, float(first @ second))
    return Grouped(value, low, high, p, exchanged_p(first, second, blocks), tau, tau_p, len(x))


def partial_inside(x: Vector, y: Vector, given: Sequence[Vector], blocks: Blocks, effort: Effort) -> Grouped:
    """Return the rank correlation inside groups of what linear fits on the ranks of `given` leave of x and y.

    Source: Freedman & Lane 1983, for shuffling residuals.
    """
    first, second = ranks_inside(x, blocks.groups), ranks_inside(y, blocks.groups)
    design = np.column_stack([ranks_inside(each, blocks.groups) for each in given])
    first, second = (each - design @ np.linalg.lstsq(design, each, rcond=None)[0] for each in (first, second))
    value = _cosine(first, second)
    if value is None:
        return Grouped(None, None, None, None, None, None, None, len(x))
    shuffled = shuffles_inside(first, blocks.groups, effort) @ second
    low, high = _interval(first, second, blocks, effort)
    p = share_beyond(shuffled, float(first @ second))
    return Grouped(value, low, high, p, None, None, None, len(x))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted for their number; None stays None and does not count.

    Source: Holm 1979.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def shuffles_inside(values: Vector, groups: Sequence[str], effort: Effort) -> NDArray[np.float64]:
    """Return values (n) shuffled inside groups, (shuffles, n)."""
    generator, labels = np.random.default_rng(effort.seed), np.asarray(groups, dtype=object)
    found = np.tile(values, (effort.shuffles, 1))
    for name in sorted(set(groups)):
        inside = np.flatnonzero(labels == name)
        found[:, inside] = generator.permuted(found[:, inside], axis=1)
    return found


def share_beyond(shuffled: Vector, observed: float) -> float:
    """Return the two-sided p of an observed value among those of shuffles, itself included."""
    beyond = int((np.abs(shuffled) >= abs(observed) - _TOLERANCE).sum())
    return (1 + beyond) / (1 + len(shuffled))


def exchanged_p(first: Vector, second: Vector, blocks: Blocks) -> float | None:
    """Return the two-sided p over all exchanges of whole families, the same in every group and seed.

    None for more families than can be exchanged one by one, or fewer than three.
    """
    names = sorted(set(blocks.families))
    if not 3 <= len(names) <= _MOST_FAMILIES:
        return None
    rows = sorted(set(zip(blocks.groups, blocks.seeds, strict=True)))
    tables = np.full((2, len(rows), len(names)), np.nan)
    for index, place in enumerate(zip(blocks.groups, blocks.seeds, strict=True)):
        row, column = rows.index(place), names.index(blocks.families[index])
        tables[:, row, column] = first[index], second[index]
    observed, beyond, orders = _cosine(first, second) or 0.0, 0, list(permutations(range(len(names))))
    for order in orders:
        left, right = tables[0][:, list(order)].ravel(), tables[1].ravel()
        both = np.isfinite(left) & np.isfinite(right)
        beyond += abs(_cosine(left[both], right[both]) or 0.0) >= abs(observed) - _TOLERANCE
    return beyond / len(orders)


def weighted_covariances(
    columns: NDArray[np.float64], weights: NDArray[np.float64], indicator: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the covariances (draws, k, k) inside groups of columns (n, k), for weights (draws, n) of networks.

    Deviations are from the weighted means of groups; `indicator` (n, G) is 1 where a network is in a group.
    """
    (count, width), groups = columns.shape, indicator.shape[1]
    size = weights @ indicator
    inside = (indicator[:, :, None] * columns[:, None, :]).reshape(count, -1)
    sums = (weights @ inside).reshape(len(weights), groups, width)
    products = weights @ (columns[:, :, None] * columns[:, None, :]).reshape(count, -1)
    means = sums / np.where(size > 0, size, 1.0)[:, :, None]
    return products.reshape(-1, width, width) - np.swapaxes(means, 1, 2) @ sums


def _interval(first: Vector, second: Vector, blocks: Blocks, effort: Effort) -> tuple[float | None, float | None]:
    columns = np.column_stack([first, second])
    found = weighted_covariances(columns, blocks.drawn(effort), blocks.indicator)
    return percentiles(_correlation(found, 0, 1))


def percentiles(drawn: Vector, share: float = 0.95) -> tuple[float | None, float | None]:
    """Return the ends of the interval that holds a share of drawn values; None where few draws are defined."""
    usable = drawn[np.isfinite(drawn)]
    if len(usable) < len(drawn) / 2 or len(usable) == 0:
        return None, None
    low, high = np.quantile(usable, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _correlation(covariances: NDArray[np.float64], one: int, other: int) -> Vector:
    spread = np.sqrt(np.clip(covariances[:, one, one] * covariances[:, other, other], 0, None))
    flat = spread <= _TOLERANCE
    return np.where(flat, np.nan, covariances[:, one, other] / np.where(flat, 1.0, spread))


def _kendall(x: Vector, y: Vector, blocks: Blocks, effort: Effort) -> tuple[float | None, float | None]:
    """Return Kendall's tau-b over the pairs inside groups, and its p."""
    labels = np.asarray(blocks.groups, dtype=object)
    one, other = np.triu_indices(len(x), 1)
    inside = labels[one] == labels[other]
    one, other = one[inside], other[inside]
    dx, dy = np.sign(x[one] - x[other]), np.sign(y[one] - y[other])
    pairs = math.sqrt(float(np.abs(dx).sum()) * float(np.abs(dy).sum()))
    if pairs == 0:
        return None, None
    shuffled = shuffles_inside(x, blocks.groups, effort)
    scores = np.sign(shuffled[:, one] - shuffled[:, other]) @ dy
    return float(dx @ dy) / pairs, share_beyond(scores, float(dx @ dy))


def _cosine(x: Vector, y: Vector) -> float | None:
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(np.clip((x @ y) / spread, -1, 1)) if spread > _TOLERANCE else None
