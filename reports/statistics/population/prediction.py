"""What RV adds to its best rival, how reliable it is, and how well it predicts networks held back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from reports.statistics.correlation import Vector
from reports.statistics.population.grouped import Blocks, Effort, percentiles, ranks_inside, weighted_covariances

_COLLINEAR = 1e-9


@dataclass(frozen=True)
class Increment:
    """Adjusted R2 of outcome ranks by the best rival alone, and what the predictor adds to it, with its interval."""

    rival: str
    alone: float | None
    added: float | None
    low: float | None
    high: float | None


class Sample(NamedTuple):
    """A predictor (n), rivals (n) by name, an outcome (n), and the blocks of n networks."""

    predictor: Vector
    rivals: Mapping[str, Vector]
    outcome: Vector
    blocks: Blocks


def increment(sample: Sample, effort: Effort, *, inside: bool) -> Increment:
    """Return what a predictor adds to the best rival over all networks, or `inside` training groups.

    The interval draws families with replacement; every draw chooses its best rival anew.
    """
    names, columns, indicator = list(sample.rivals), _columns(sample, inside=inside), _strata(sample, inside=inside)
    freedom = len(columns) - indicator.shape[1]
    point = weighted_covariances(columns, np.ones((1, len(columns))), indicator)
    best, alone, added = _added(point, freedom)
    drawn = _added(weighted_covariances(columns, sample.blocks.drawn(effort), indicator), freedom)[2]
    low, high = percentiles(drawn)
    known = bool(np.isfinite(added[0]))
    return Increment(
        names[int(best[0])] if known else "",
        float(alone[0]) if known else None,
        float(added[0]) if known else None,
        low,
        high,
    )


def _columns(sample: Sample, *, inside: bool) -> NDArray[np.float64]:
    """Return the ranks of outcome, predictor and rivals, (n, 2 + rivals)."""
    every = (sample.outcome, sample.predictor, *sample.rivals.values())
    if inside:
        return np.column_stack([ranks_inside(each, sample.blocks.groups) for each in every])
    return np.column_stack([stats.rankdata(each) / len(each) for each in every])


def _strata(sample: Sample, *, inside: bool) -> NDArray[np.float64]:
    return sample.blocks.indicator if inside else np.ones((len(sample.outcome), 1))


def _added(covariances: NDArray[np.float64], freedom: int) -> tuple[NDArray[np.int64], Vector, Vector]:
    """Return for each draw the best rival, its adjusted R2, and what the predictor adds to it."""
    spread = np.sqrt(np.clip(np.einsum("dkk->dk", covariances), 0, None))
    scale = spread[:, :, None] * spread[:, None, :]
    r = np.where(scale > _COLLINEAR, covariances / np.where(scale > _COLLINEAR, scale, 1.0), np.nan)
    single = np.nan_to_num(r[:, 0, 2:] ** 2, nan=-1.0)
    best = single.argmax(1)
    draws = np.arange(len(r))
    rival, predictor, both = r[draws, 0, best + 2], r[:, 0, 1], r[draws, 1, best + 2]
    rest = 1 - both**2
    safe = np.where(rest > _COLLINEAR, rest, 1.0)
    joint = np.where(rest > _COLLINEAR, (rival**2 + predictor**2 - 2 * rival * predictor * both) / safe, rival**2)
    alone, together = _adjusted(rival**2, freedom, 1), _adjusted(joint, freedom, 2)
    return best, alone, together - alone


def _adjusted(explained: Vector, freedom: int, predictors: int) -> Vector:
    return 1 - (1 - explained) * freedom / max(1, freedom - predictors)


def reliability(values: Vector, blocks: Blocks) -> tuple[float | None, int]:
    """Return the rank correlation inside training groups between two training seeds of each recipe, and their number.

    None where fewer than three recipes have both seeds.
    """
    known = {
        (group, family, seed): value
        for group, family, seed, value in zip(blocks.groups, blocks.families, blocks.seeds, values, strict=True)
    }
    seeds = sorted(set(blocks.seeds))
    if len(seeds) < 2:
        return None, 0
    pairs = [
        (group, value, known[group, family, seeds[1]])
        for (group, family, seed), value in sorted(known.items())
        if seed == seeds[0] and (group, family, seeds[1]) in known
    ]
    if len(pairs) < 3:
        return None, len(pairs)
    groups = [group for group, _, _ in pairs]
    one, other = (ranks_inside(np.array([pair[at] for pair in pairs]), groups) for at in (1, 2))
    spread = float(np.sqrt((one @ one) * (other @ other)))
    return (float(one @ other) / spread if spread > 0 else None), len(pairs)


@dataclass(frozen=True)
class Curve:
    """A monotone curve from a predictor to an outcome, with the half width of its intervals."""

    knots: Vector
    heights: Vector
    half_width: float

    def at(self, values: Vector) -> Vector:
        """Return predictions (n) at values (n) of the predictor; constant beyond the outermost knots."""
        return np.asarray(np.interp(values, self.knots, self.heights), dtype=np.float64)


def fit_curve(x: Vector, y: Vector, families: Sequence[str], coverage: float) -> Curve:
    """Return the isotonic curve through (x, y), and intervals from the residuals of families left out in turn.

    Source: Barlow et al. 1972; Vovk, Nouretdinov, Manokhin & Gammerman 2018, cross-conformal intervals.
    """
    knots, heights = _isotonic(x, y)
    labels, residuals = np.asarray(families, dtype=object), np.zeros(len(x))
    for family in set(families):
        out = labels == family
        if out.all():
            residuals[out] = np.abs(y[out] - np.interp(x[out], knots, heights))
        else:
            residuals[out] = np.abs(y[out] - np.interp(x[out], *_isotonic(x[~out], y[~out])))
    rank = min(1.0, np.ceil((len(x) + 1) * coverage) / len(x))
    return Curve(knots, heights, float(np.quantile(residuals, rank, method="higher")))


def _isotonic(x: Vector, y: Vector) -> tuple[Vector, Vector]:
    knots, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=y) / counts
    ranks, heights = (stats.rankdata(each) for each in (x, y))
    rising = float((ranks - ranks.mean()) @ heights) >= 0
    fitted = optimize.isotonic_regression(means, weights=counts.astype(np.float64), increasing=rising)
    return knots, np.asarray(fitted.x, dtype=np.float64)


@dataclass(frozen=True)
class HeldBack:
    """How networks held back fell: mean absolute error, share in intervals of `half_width`, rank correlation."""

    networks: int
    error: float
    covered: float
    half_width: float
    rho: float | None


def judge_held_back(curve: Curve, x: Vector, y: Vector) -> HeldBack:
    """Return how far predictions at x (n) are from outcomes y (n)."""
    misses = np.abs(y - curve.at(x))
    flat = len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0
    rho = None if flat else float(stats.spearmanr(x, y).statistic)
    covered = float((misses <= curve.half_width).mean())
    return HeldBack(len(x), float(misses.mean()), covered, curve.half_width, rho)


def error_difference(
    curves: tuple[Curve, Curve], values: tuple[Vector, Vector], y: Vector, groups: Sequence[str], effort: Effort
) -> tuple[float, float | None, float | None]:
    """Return the first curve's mean absolute error less the second's, with an interval over training groups."""
    one, other = (np.abs(y - curve.at(x)) for curve, x in zip(curves, values, strict=True))
    names, labels = sorted(set(groups)), np.asarray(groups, dtype=object)
    sums = np.array([(one - other)[labels == name].sum() for name in names])
    sizes = np.array([(labels == name).sum() for name in names])
    picks = np.random.default_rng(effort.seed).integers(len(names), size=(effort.draws, len(names)))
    drawn = sums[picks].sum(1) / sizes[picks].sum(1)
    return float((one - other).mean()), *percentiles(drawn)
