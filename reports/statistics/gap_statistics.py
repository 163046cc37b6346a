"""Does RV follow the adversarial gap? Correlations with intervals, and what is left inside training groups.

Ten real CIFAR-10 models give Pearson .992 overall and .71 [-.08, .95] inside the robust ones, and three training
groups without any relation inside give .93 in simulation: an overall correlation alone says little.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from reports.statistics.correlation import (
    MODELS_FOR_INTERVAL,
    MODELS_FOR_P,
    Correlation,
    Vector,
    absent,
    product_moment,
    unusable,
)  # fmt: skip
from reports.statistics.reliability import disattenuated, reliability
from reports.statistics.resampling import centred, concordance_p, shuffle_p, spearman_by_family
from reports.tables.table import ranked

# models whose family nobody named have nothing in common
UNKNOWN_FAMILIES = ("", "unknown", "other")
_Z95 = 1.959963984540054
_EXACT_UP_TO = 50
_NO_P = f"no significance under {MODELS_FOR_P} models"


class Relations(NamedTuple):
    """Every correlation of RV with the adversarial gap over the ranked models of one panel.

    `lost` is with the second outcome, 1 - adversarial / natural accuracy; `by_family` has an interval over families
    drawn again; `reliability` and `disattenuated` are a footnote.
    """

    spearman: Correlation
    by_family: Correlation
    pearson: Correlation
    kendall: Correlation
    within: Correlation
    partial: Correlation
    lost: Correlation
    reliability: Correlation
    disattenuated: Correlation


def correlations(frame: pd.DataFrame, outcome: str = "adversarial_gap") -> Relations:
    """Return the correlations of RV with an outcome over the ranked models of one panel.

    No interval under 8 models, no p under 5; no bootstrap under 5 families, no reliability under 5 seeds.
    """
    # shuffles are seeded: a fixed order of the rows makes p the same whatever order they came in
    rows = frame[ranked(frame) & frame[outcome].notna()].sort_values(["model", "cell_id"])
    rv, gap = _vector(rows["rv"]), _vector(rows[outcome])
    natural, adversarial = _vector(rows["natural_accuracy"]), _vector(rows["adversarial_accuracy"])
    lost = 1.0 - adversarial / np.where(natural > 0, natural, np.nan)
    rho, trust = spearman(rv, gap), reliability(rows)
    return Relations(
        spearman=rho,
        by_family=spearman_by_family(rv, gap, families(rows), rho),
        pearson=pearson(rv, gap),
        kendall=kendall(rv, gap),
        within=within_groups(rv, gap, training_groups(rows)),
        partial=partial(rv, gap, natural),
        lost=spearman(rv, lost, "Spearman, share of accuracy lost"),
        reliability=trust,
        disattenuated=disattenuated(rv, gap, trust),
    )


def families(frame: pd.DataFrame) -> list[str]:
    """Return the family of each row; a model without one is a family of its own."""
    return [
        f"{family}#{index}" if family in UNKNOWN_FAMILIES else str(family)
        for index, family in enumerate(frame["family"])
    ]


def training_groups(frame: pd.DataFrame) -> list[str]:
    """Return the training group of each row: the training label with the radius trained for."""
    return [f"{label} {eps:g}" for label, eps in zip(frame["training"], frame["trained_eps"], strict=True)]


def pearson(x: Vector, y: Vector) -> Correlation:
    """Return Pearson's r with Fisher's z interval.

    Source: Fisher (1921): atanh(r) has standard error 1/sqrt(n - 3).
    """
    note = unusable(x, y)
    if note:
        return absent("Pearson r", len(x), note)
    value = product_moment(x, y)
    p = float(stats.pearsonr(x, y).pvalue)
    return _guarded("Pearson r", value, 1 / math.sqrt(max(len(x) - 3, 1)), p, len(x))


def spearman(x: Vector, y: Vector, name: str = "Spearman rho") -> Correlation:
    """Return Spearman's rho with the Bonett-Wright interval and a permutation p.

    Source: Bonett & Wright (2000), Psychometrika 65: atanh(rho) has standard error sqrt((1 + rho^2/2)/(n - 3)).
    """
    note = unusable(x, y)
    if note:
        return absent(name, len(x), note)
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y)
    value = product_moment(ranks_x, ranks_y)
    error = math.sqrt((1 + value**2 / 2) / max(len(x) - 3, 1))
    return _guarded(name, value, error, shuffle_p(ranks_x, ranks_y, ["all"] * len(x)), len(x))


def kendall(x: Vector, y: Vector) -> Correlation:
    """Return Kendall's tau-b; its p is exact without ties, by permutation with them, and asymptotic over 50 models."""
    name, n = "Kendall tau-b", len(x)
    note = unusable(x, y)
    if note:
        return absent(name, n, note)
    ties, many = len(set(x)) < n or len(set(y)) < n, n > _EXACT_UP_TO
    result = stats.kendalltau(x, y, method="asymptotic" if ties or many else "exact")
    if n < MODELS_FOR_P:
        return Correlation(name, float(result.statistic), None, None, None, n, _NO_P)
    p = concordance_p(x, y) if ties and not many else float(result.pvalue)
    return Correlation(
        name, float(result.statistic), None, None, p, n, "asymptotic p" if many else "permutation p: ties" * ties
    )


def within_groups(x: Vector, y: Vector, groups: Sequence[str]) -> Correlation:
    """Return the correlation of the deviations from the group means, p by shuffling inside the groups.

    Groups of one model say nothing and are left out. Fisher's z interval loses one degree a group.
    """
    name = "within training groups r"
    labels = np.asarray(groups, dtype=object)
    keep = np.array([list(groups).count(label) > 1 for label in groups], dtype=bool)
    if not keep.any():
        return absent(name, 0, "no training group holds two models")
    inside = [str(label) for label in labels[keep]]
    dx, dy = centred(x[keep], inside), centred(y[keep], inside)
    note = unusable(dx, dy)
    if note:
        return absent(name, len(dx), note)
    freedom = len(dx) - len(set(inside)) - 2
    if freedom < 1:
        return absent(name, len(dx), "too few models a group")
    return _guarded(name, product_moment(dx, dy), _error(freedom), shuffle_p(dx, dy, inside), len(dx))


def partial(x: Vector, y: Vector, given: Vector) -> Correlation:
    """Return the correlation of what a linear fit on `given` leaves of x and y, with Fisher's z interval.

    Source: Fisher (1924): one control takes one degree of freedom, standard error 1/sqrt(n - 4).
    """
    name, n = "partial r given natural accuracy", len(x)
    if n < 4 or not np.isfinite(given).all() or np.ptp(given) == 0:
        return absent(name, n, f"too few models ({n}) or no spread in natural accuracy")
    rest_x, rest_y = _residuals(x, given), _residuals(y, given)
    note = unusable(rest_x, rest_y)
    if note:
        return absent(name, n, note)
    value = product_moment(rest_x, rest_y)
    t = value * math.sqrt((n - 3) / max(1 - value**2, 1e-300))
    return _guarded(name, value, _error(n - 4), 2 * float(stats.t.sf(abs(t), n - 3)), n)


def _guarded(name: str, value: float, error: float, p: float, n: int) -> Correlation:
    if n < MODELS_FOR_P:
        return Correlation(name, value, None, None, None, n, _NO_P)
    if n < MODELS_FOR_INTERVAL:
        return Correlation(name, value, None, None, p, n, f"no interval under {MODELS_FOR_INTERVAL} models")
    if not math.isfinite(error):
        return Correlation(name, value, None, None, p, n, "too few models a group for an interval")
    if abs(value) >= 1 - 1e-12:
        return Correlation(name, value, None, None, p, n, "no interval for a perfect correlation")
    centre = math.atanh(value)
    low, high = math.tanh(centre - _Z95 * error), math.tanh(centre + _Z95 * error)
    return Correlation(name, value, low, high, p, n)


def _residuals(values: Vector, given: Vector) -> Vector:
    design = np.column_stack([np.ones_like(given), given])
    fitted: Vector = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    rest: Vector = values - fitted
    return rest


def _error(freedom: int) -> float:
    return 1 / math.sqrt(freedom) if freedom > 0 else math.inf


def _vector(series: "pd.Series[float]") -> Vector:
    return np.asarray(series, dtype=np.float64)
