"""How much of RV's spread between models is more than noise over seeds, for a footnote under the correlations."""

import math

import numpy as np
import pandas as pd

from reports.statistics.correlation import MODELS_FOR_VALUE, Correlation, Vector, absent, product_moment, unusable

SEEDS_FOR_RELIABILITY = 5


def seed_values(cell: str) -> dict[int, float]:
    """Return the RV in nats of each seed, from a cell of the column `rv_by_seed`.

    >>> seed_values("0=1.5; 1=1.25"), seed_values("none")
    ({0: 1.5, 1: 1.25}, {})
    """
    pairs = [part.partition("=") for part in cell.split("; ") if "=" in part]
    return {int(seed): float(value) for seed, _, value in pairs}


def intraclass(values: Vector) -> float:
    """Return the consistency of the mean over seeds, ICC(C, k), of values (models, seeds).

    Source: McGraw & Wong (1996), case 3; Shrout & Fleiss (1979) call it ICC(3, k): (MSR - MSE) / MSR.
    """
    models, seeds = values.shape
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    between = seeds * float(rows.var(ddof=1))
    rest = float(((values - rows - columns + values.mean()) ** 2).sum()) / ((models - 1) * (seeds - 1))
    return (between - rest) / between if between > 0 else 0.0


def reliability(rows: pd.DataFrame) -> Correlation:
    """Return the reliability of RV averaged over the seeds that all models share, or why there is none."""
    name = "reliability of RV over seeds"
    by_model = [seed_values(cell) for cell in rows["rv_by_seed"]]
    if len(by_model) < MODELS_FOR_VALUE:
        return absent(name, len(by_model), f"too few models ({len(by_model)})")
    shared = sorted(set.intersection(*(set(seeds) for seeds in by_model)))
    if len(shared) < SEEDS_FOR_RELIABILITY:
        return absent(name, len(by_model), f"{len(shared)} shared seeds, {SEEDS_FOR_RELIABILITY} are needed")
    values = np.array([[seeds[seed] for seed in shared] for seeds in by_model])
    return Correlation(name, intraclass(values), None, None, None, len(by_model), f"{len(shared)} seeds")


def disattenuated(x: Vector, y: Vector, trust: Correlation) -> Correlation:
    """Return Pearson's r divided by the root of RV's reliability: the correlation corrected for noise of RV over seeds.

    The outcome's own noise is left in. Source: Spearman (1904).
    """
    name = "Pearson r without noise over seeds"
    if trust.value is None:
        return absent(name, len(x), trust.note)
    note = unusable(x, y) or ("" if trust.value > 0 else "the seeds differ as much as the models")
    if note:
        return absent(name, len(x), note)
    value = product_moment(x, y) / math.sqrt(trust.value)
    return Correlation(name, max(-1.0, min(1.0, value)), None, None, None, len(x))
