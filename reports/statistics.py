"""Does RV follow the adversarial gap? Correlations with intervals, and what is left inside training groups.

Ten real CIFAR-10 models give Pearson .992 overall and .71 [-.08, .95] inside the robust ones, and three training
groups without any relation inside give .93 in simulation: an overall correlation alone says little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from reports.table import ranked

Vector = NDArray[np.float64]

MODELS_FOR_VALUE, MODELS_FOR_P, MODELS_FOR_INTERVAL = 3, 5, 8
_SHUFFLES = 9_999
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Correlation:
    """One correlation coefficient over n models with its 95 % interval and two-sided p; None where not given."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    note: str = ""


def correlations(frame: pd.DataFrame, outcome: str = "adversarial_gap") -> tuple[Correlation, ...]:
    """Return the correlations of RV with an outcome over the ranked models of one panel.

    In order: Spearman, Pearson, Kendall, within training groups, partial given natural accuracy, and Spearman
    with the second outcome, 1 - adversarial / natural accuracy. No interval under 8 models, no p under 5.
    """
    # shuffles are seeded: a fixed order of the rows makes p the same whatever order they came in
    rows = frame[ranked(frame) & frame[outcome].notna()].sort_values(["model", "cell_id"])
    rv, gap = _vector(rows["rv"]), _vector(rows[outcome])
    natural, adversarial = _vector(rows["natural_accuracy"]), _vector(rows["adversarial_accuracy"])
    lost = 1.0 - adversarial / np.where(natural > 0, natural, np.nan)
    return (
        spearman(rv, gap),
        pearson(rv, gap),
        kendall(rv, gap),
        within_groups(rv, gap, training_groups(rows)),
        partial(rv, gap, natural),
        spearman(rv, lost, "Spearman, share of accuracy lost"),
    )


def training_groups(frame: pd.DataFrame) -> list[str]:
    """Return the training group of each row: the training label with the radius trained for."""
    return [f"{label} {eps:g}" for label, eps in zip(frame["training"], frame["trained_eps"], strict=True)]


def pearson(x: Vector, y: Vector) -> Correlation:
    """Return Pearson's r with Fisher's z interval.

    Source: Fisher (1921): atanh(r) has standard error 1/sqrt(n - 3).
    """
    note = _unusable(x, y)
    if note:
        return _absent("Pearson r", len(x), note)
    value = _r(x, y)
    p = float(stats.pearsonr(x, y).pvalue)
    return _guarded("Pearson r", value, 1 / math.sqrt(max(len(x) - 3, 1)), p, len(x))


def spearman(x: Vector, y: Vector, name: str = "Spearman rho") -> Correlation:
    """Return Spearman's rho with the Bonett-Wright interval and a permutation p.

    Source: Bonett & Wright (2000), Psychometrika 65: atanh(rho) has standard error sqrt((1 + rho^2/2)/(n - 3)).
    """
    note = _unusable(x, y)
    if note:
        return _absent(name, len(x), note)
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y)
    value = _r(ranks_x, ranks_y)
    error = math.sqrt((1 + value**2 / 2) / max(len(x) - 3, 1))
    return _guarded(name, value, error, _permutation_p(ranks_x, ranks_y, ["all"] * len(x)), len(x))


def kendall(x: Vector, y: Vector) -> Correlation:
    """Return Kendall's tau-b, its p exact for few models without ties; no interval is given."""
    note = _unusable(x, y)
    if note:
        return _absent("Kendall tau-b", len(x), note)
    result = stats.kendalltau(x, y)
    ties = len(set(x)) < len(x) or len(set(y)) < len(y)
    p = float(result.pvalue) if len(x) >= MODELS_FOR_P else None
    return Correlation("Kendall tau-b", float(result.statistic), None, None, p, len(x), "asymptotic p: ties" * ties)


def within_groups(x: Vector, y: Vector, groups: Sequence[str]) -> Correlation:
    """Return the correlation of the deviations from the group means, p by shuffling inside the groups.

    Groups of one model say nothing and are left out. Fisher's z interval loses one degree a group.
    """
    name = "within training groups r"
    labels = np.asarray(groups, dtype=object)
    keep = np.array([list(groups).count(label) > 1 for label in groups], dtype=bool)
    if not keep.any():
        return _absent(name, 0, "no training group holds two models")
    inside = [str(label) for label in labels[keep]]
    dx, dy = _centred(x[keep], inside), _centred(y[keep], inside)
    note = _unusable(dx, dy)
    if note:
        return _absent(name, len(dx), note)
    freedom = len(dx) - len(set(inside)) - 2
    if freedom < 1:
        return _absent(name, len(dx), "too few models a group")
    return _guarded(name, _r(dx, dy), _error(freedom), _permutation_p(dx, dy, inside), len(dx))


def partial(x: Vector, y: Vector, given: Vector) -> Correlation:
    """Return the correlation of what a linear fit on `given` leaves of x and y, with Fisher's z interval.

    Source: Fisher (1924): one control takes one degree of freedom, standard error 1/sqrt(n - 4).
    """
    name, n = "partial r given natural accuracy", len(x)
    if n < 4 or not np.isfinite(given).all() or np.ptp(given) == 0:
        return _absent(name, n, f"too few models ({n}) or no spread in natural accuracy")
    rest_x, rest_y = _residuals(x, given), _residuals(y, given)
    note = _unusable(rest_x, rest_y)
    if note:
        return _absent(name, n, note)
    value = _r(rest_x, rest_y)
    t = value * math.sqrt((n - 3) / max(1 - value**2, 1e-300))
    return _guarded(name, value, _error(n - 4), 2 * float(stats.t.sf(abs(t), n - 3)), n)


def _guarded(name: str, value: float, error: float, p: float, n: int) -> Correlation:
    if n < MODELS_FOR_P:
        return Correlation(name, value, None, None, None, n, f"no significance under {MODELS_FOR_P} models")
    if n < MODELS_FOR_INTERVAL:
        return Correlation(name, value, None, None, p, n, f"no interval under {MODELS_FOR_INTERVAL} models")
    if not math.isfinite(error):
        return Correlation(name, value, None, None, p, n, "too few models a group for an interval")
    if abs(value) >= 1 - 1e-12:
        return Correlation(name, value, None, None, p, n, "no interval for a perfect correlation")
    centre = math.atanh(value)
    low, high = math.tanh(centre - _Z95 * error), math.tanh(centre + _Z95 * error)
    return Correlation(name, value, low, high, p, n)


def _absent(name: str, n: int, note: str) -> Correlation:
    return Correlation(name, None, None, None, None, n, note)


def _unusable(x: Vector, y: Vector) -> str:
    if len(x) < MODELS_FOR_VALUE:
        return f"too few models ({len(x)}) for a correlation"
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return "a value is missing"
    # residuals of equal numbers are rounding noise, not spread
    flat = [np.ptp(v) <= 1e-12 * max(1.0, float(np.abs(v).max())) for v in (x, y)]
    return "all models have the same value" if any(flat) else ""


def _r(x: Vector, y: Vector) -> float:
    dx, dy = x - x.mean(), y - y.mean()
    return float(np.clip(dx @ dy / math.sqrt(float(dx @ dx) * float(dy @ dy)), -1.0, 1.0))


def _permutation_p(x: Vector, y: Vector, groups: Sequence[str]) -> float:
    """Share of shuffles of y inside the groups whose |sum of products| reaches the observed one (seeded)."""
    random = np.random.default_rng(0)
    dx, dy = _centred(x, groups), _centred(y, groups)
    sums = np.zeros(_SHUFFLES)
    for label in dict.fromkeys(groups):
        inside = np.array([group == label for group in groups])
        shuffled = random.permuted(np.tile(dy[inside], (_SHUFFLES, 1)), axis=1)
        sums += shuffled @ dx[inside]
    reached = np.abs(sums) >= abs(float(dx @ dy)) * (1 - 1e-9)
    return float((reached.sum() + 1) / (_SHUFFLES + 1))


def _centred(values: Vector, groups: Sequence[str]) -> Vector:
    series = pd.Series(values)
    return _vector(series - series.groupby(list(groups)).transform("mean"))


def _residuals(values: Vector, given: Vector) -> Vector:
    design = np.column_stack([np.ones_like(given), given])
    fitted: Vector = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    rest: Vector = values - fitted
    return rest


def _error(freedom: int) -> float:
    return 1 / math.sqrt(freedom) if freedom > 0 else math.inf


def _vector(series: "pd.Series[float]") -> Vector:
    return np.asarray(series, dtype=np.float64)
