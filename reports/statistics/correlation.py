"""One coefficient with its doubt, and from how many models on each part of it is given."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

MODELS_FOR_VALUE, MODELS_FOR_P, MODELS_FOR_INTERVAL = 3, 5, 8


@dataclass(frozen=True)
class Correlation:
    """One coefficient over n models with its 95 % interval and two-sided p; None where not given."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    note: str = ""


def absent(name: str, n: int, note: str) -> Correlation:
    """Return a coefficient that cannot be given, with the reason."""
    return Correlation(name, None, None, None, None, n, note)


def unusable(x: Vector, y: Vector) -> str:
    """Return why two vectors have no correlation, or "" where they have one."""
    if len(x) < MODELS_FOR_VALUE:
        return f"too few models ({len(x)}) for a correlation"
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return "a value is missing"
    # residuals of equal numbers are rounding noise, not spread
    flat = [np.ptp(v) <= 1e-12 * max(1.0, float(np.abs(v).max())) for v in (x, y)]
    return "all models have the same value" if any(flat) else ""


def product_moment(x: Vector, y: Vector) -> float:
    """Return Pearson's r of two vectors that have spread."""
    dx, dy = x - x.mean(), y - y.mean()
    return float(np.clip(dx @ dy / np.sqrt(float(dx @ dx) * float(dy @ dy)), -1.0, 1.0))
