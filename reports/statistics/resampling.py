"""Permutation tests and bootstraps, seeded: the same numbers give the same result."""

from collections.abc import Sequence
from itertools import permutations
from math import factorial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reports.statistics.correlation import Correlation, Vector

Orders = NDArray[np.int64]

_SHUFFLES = 9_999
_DRAWS = 4_999
_ALL_ORDERS_UP_TO = 7
FAMILIES_FOR_INTERVAL = 5


def shuffle_p(x: Vector, y: Vector, groups: Sequence[str]) -> float:
    """Return the share of shuffles of y inside the groups whose |sum of products| reaches the observed one."""
    random = np.random.default_rng(0)
    dx, dy = centred(x, groups), centred(y, groups)
    sums = np.zeros(_SHUFFLES)
    for label in dict.fromkeys(groups):
        inside = np.array([group == label for group in groups])
        shuffled = random.permuted(np.tile(dy[inside], (_SHUFFLES, 1)), axis=1)
        sums += shuffled @ dx[inside]
    reached = np.abs(sums) >= abs(float(dx @ dy)) * (1 - 1e-9)
    return float((reached.sum() + 1) / (_SHUFFLES + 1))


def concordance_p(x: Vector, y: Vector) -> float:
    """Return the two-sided permutation p of Kendall's tau-b, ties allowed: every order of few models, else shuffles.

    Ties are the same in every order, so tau-b is as extreme as its numerator, concordant less discordant pairs.
    """
    n = len(x)
    every = n <= _ALL_ORDERS_UP_TO
    orders = np.array(list(permutations(range(n)))) if every else _orders(n)
    scores = _concordance(x, y, orders)
    reached = int((np.abs(scores) >= abs(_concordance(x, y, np.arange(n)[None]))).sum())
    return reached / factorial(n) if every else (reached + 1) / (_SHUFFLES + 1)


def spearman_by_family(x: Vector, y: Vector, families: Sequence[str], rho: Correlation) -> Correlation:
    """Return Spearman's rho with a percentile interval over whole families resampled, as kin are not independent.

    Source: the cluster bootstrap (Davison & Hinkley 1997, section 3.8); draws without spread are left out.
    """
    names = sorted(set(families))
    name = "Spearman rho, families resampled"
    if rho.value is None or rho.low is None:
        return Correlation(name, rho.value, None, None, None, rho.n, rho.note)
    if len(names) < FAMILIES_FOR_INTERVAL:
        note = f"no bootstrap interval under {FAMILIES_FOR_INTERVAL} families, here {len(names)}"
        return Correlation(name, rho.value, None, None, None, rho.n, note)
    member = np.array([names.index(family) for family in families])
    draws = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=_DRAWS)
    low, high = np.nanpercentile(_weighted_rhos(x, y, draws[:, member].astype(float)), [2.5, 97.5])
    return Correlation(name, rho.value, float(low), float(high), None, rho.n, f"{len(names)} families")


def centred(values: Vector, groups: Sequence[str]) -> Vector:
    """Return values less the mean of their group."""
    series = pd.Series(values)
    return np.asarray(series - series.groupby(list(groups)).transform("mean"), dtype=np.float64)


def _orders(n: int) -> Orders:
    return np.random.default_rng(0).permuted(np.tile(np.arange(n), (_SHUFFLES, 1)), axis=1)


def _concordance(x: Vector, y: Vector, orders: Orders) -> Orders:
    """Concordant less discordant pairs for each order (B, n) of y."""
    scores = np.zeros(len(orders), dtype=np.int64)
    for i in range(len(x) - 1):  # one model against all later ones: orders x pairs at once would not fit for many
        across = np.sign(y[orders[:, i + 1 :]] - y[orders[:, i]][:, None])
        scores += (np.sign(x[i + 1 :] - x[i]) * across).sum(1).astype(np.int64)
    return scores


def _weighted_rhos(x: Vector, y: Vector, weights: Vector) -> Vector:
    """Spearman's rho of each row of weights (B, n): how often each model was drawn."""
    rx, ry = _weighted_ranks(x, weights), _weighted_ranks(y, weights)
    total = weights.sum(1, keepdims=True)
    dx = rx - (weights * rx).sum(1, keepdims=True) / total
    dy = ry - (weights * ry).sum(1, keepdims=True) / total
    spread = (weights * dx**2).sum(1) * (weights * dy**2).sum(1)
    flat = spread <= 1e-12
    rhos: Vector = (weights * dx * dy).sum(1) / np.sqrt(np.where(flat, np.nan, spread))
    return rhos


def _weighted_ranks(values: Vector, weights: Vector) -> Vector:
    """Mid-ranks of values where value j stands there weights[:, j] times."""
    below = (values[None, :] < values[:, None]) + 0.5 * (values[None, :] == values[:, None])
    ranks: Vector = weights @ below.T
    return ranks
