"""Channels whose normal and worst-case mutual information are known: what estimators are held against.

All in nats, floats in and out. A shift is what the adversary may move the scalar input by, either way; a random shift
never does better than a fixed one for each input, because I(X'; Z) is concave in the law of X'.

Source: Zhu, Zhang & Evans 2020, Definition 3.1 (worst-case MI, representation vulnerability), solved for each channel.
"""

from collections.abc import Callable, Sequence
from math import ceil, e, exp, expm1, hypot, inf, log, log1p, pi, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, ndtr

from audit.errors import UsageError
from audit.theory import binary_entropy

Floats = NDArray[np.float64]
Density = Callable[[Floats], Floats]

_POINTS_PER_SIGMA = 24  # the trapezoid rule's error falls exponentially: from here on it is rounding
_TAIL = 10.0
_MOST_POINTS = 2_000_000


class Truth(NamedTuple):
    """What a channel carries, in nats: normally, and at worst."""

    normal: float
    worst: float

    @property
    def rv(self) -> float:
        """Return the representation vulnerability, in nats."""
        return self.normal - self.worst


class SignTruth(NamedTuple):
    """What the sign carries, in nats, and how often it is wrong: normally, and at worst."""

    normal: float
    worst: float
    risk: float
    adversarial_risk: float

    @property
    def rv(self) -> float:
        """Return the representation vulnerability, in nats."""
        return self.normal - self.worst

    @property
    def adversarial_gap(self) -> float:
        """Return how much more often the sign is wrong under attack."""
        return self.adversarial_risk - self.risk


def sign_of_gaussian(mean: float, spread: float, shift: float) -> SignTruth:
    """Return the truth of g = sign(x) for x ~ N(y mean, spread^2), y = +-1 equally likely.

    For g = sign(w.x) on a mixture N(y theta, S) under an l_p ball: mean = w.theta, spread = sqrt(w'Sw), shift = eps
    times the dual norm of w. Raises UsageError for a negative mean (Theorem 3.2 needs a sign that leans the right
    way), a spread not above 0, or a negative shift.

    Source: Zhu, Zhang & Evans 2020, Definition 3.1: at worst everything within reach of the threshold goes to one side.

    >>> truth = sign_of_gaussian(1, 1, 0.5)
    >>> [round(value, 4) for value in (truth.worst, truth.rv, truth.adversarial_gap)]
    [0.6636, 0.0295, 0.1499]
    """
    if not 0 <= mean < inf:
        raise UsageError(f"mean {mean!r} must be at least 0 and finite")
    _check(spread, shift, "spread")
    below = NormalDist(0, spread).cdf
    rarer = (below(mean - shift) + below(-mean - shift)) / 2
    return SignTruth(log(2), binary_entropy(rarer), below(-mean), below(shift - mean))


def atoms(points: Sequence[float], sigma: float) -> float:
    """Return I(X; X + sigma N) in nats for equally likely `points` (n,); a point may be named more than once.

    Raises UsageError for no points, points that are not finite, or a sigma not above 0 or far below their distances.

    Source: I(X; Z) = h(Z) - h(sigma N), h(Z) by the trapezoid rule.

    >>> round(atoms([-1, 1], 0.5), 4), round(atoms([-1, 0, 1], 0.25), 4)
    (0.6327, 1.018)
    """
    _check(sigma)
    if not points or not np.isfinite(points).all():
        raise UsageError(f"points {list(points)!r} must be finite numbers, at least one")
    middle, reach = (min(points) + max(points)) / 2, (max(points) - min(points)) / 2
    kernels = [_kernel(point - middle, sigma) for point in points]
    return _smoothed_information(lambda z: np.mean([kernel(z) for kernel in kernels], axis=0), reach, sigma)


def two_points(sigma: float, shift: float) -> Truth:
    """Return the truth of x = +-1, Z = x + sigma N: both points move towards each other, at most to 0.

    Raises UsageError for a sigma not above 0 or too small to integrate, or a negative shift.

    Source: I(X; X + sigma N) of two points falls with their distance (data processing: add more noise).

    >>> [round(nats, 4) for nats in two_points(0.5, 0.5)]
    [0.6327, 0.3368]
    """
    _check(sigma, shift)
    near = max(0.0, 1 - shift)
    return Truth(atoms([-1.0, 1.0], sigma), atoms([-near, near], sigma))


def gaussian(sigma: float, shift: float) -> Truth:
    """Return the truth of x ~ N(0, 1), Z = x + sigma N, its worst case by soft-thresholding.

    The adversary pulls every x towards 0 by `shift`. For sigma >= 0.25 no search has found less. **Below, this worst
    case is only an upper bound of the true one**: inputs that collapse to a few atoms tell less. For sigma 0.1 and
    shifts 0.25, 0.5 and 1 a search finds 1.766, 1.28 and 0.753 nats where this gives 2.021, 1.653 and 0.934. Raises
    UsageError for a sigma not above 0 or too small to integrate, or a negative shift.

    Source: Shannon 1948 for the normal case, ln(1 + 1 / sigma^2) / 2.

    >>> [round(nats, 4) for nats in gaussian(0.5, 0.25)]
    [0.8047, 0.639]
    """
    _check(sigma, shift)
    variance = 1 + sigma**2
    deviation = sigma / sqrt(variance)
    still, moved = _kernel(0.0, sigma), _kernel(-shift, sqrt(variance))

    def right(z: Floats) -> Floats:
        # x' = x - shift > 0: a Gaussian in z times the chance that its x' was above 0
        return moved(z) * ndtr((z - shift * sigma**2) / (variance * deviation))

    held = float(ndtr(shift) - ndtr(-shift))
    worst = _smoothed_information(lambda z: held * still(z) + right(z) + right(-z), _TAIL, sigma)
    return Truth(gaussian_vector(1, sigma), worst)


def uniform(sigma: float, shift: float) -> Truth:
    """Return the truth of x ~ U[-1, 1], Z = x + sigma N, its worst case by soft-thresholding.

    As for `gaussian`, no search has found less for sigma >= 0.25, and for smaller ones this worst case is only an
    upper bound of the true one. Raises UsageError for a sigma not above 0 or too small to integrate, or a negative
    shift.

    Source: h(Z) - h(sigma N), with the density of Z in closed form.

    >>> [round(nats, 4) for nats in uniform(0.5, 0.25)]
    [0.4187, 0.223]
    """
    _check(sigma, shift)
    return Truth(_thresholded_uniform(sigma, 0.0), _thresholded_uniform(sigma, min(1.0, shift)))


def _thresholded_uniform(sigma: float, shift: float) -> float:
    still, edge = _kernel(0.0, sigma), 1 - shift
    return _smoothed_information(
        lambda z: shift * still(z) + (ndtr((z + edge) / sigma) - ndtr((z - edge) / sigma)) / 2, edge, sigma
    )


def three_points(sigma: float, shift: float) -> Truth:
    """Return the truth of x in {-1, 0, 1}, Z = x + sigma N, its worst case by exhaustion over the three shifts.

    Raises UsageError for a sigma not above 0 or too small to integrate, or a negative shift.

    Source: every triple of shifts on a grid with its ends, then finer grids around the best.

    >>> [round(nats, 4) for nats in three_points(0.25, 0.4)]
    [1.018, 0.6432]
    """
    _check(sigma, shift)
    normal = atoms([-1.0, 0.0, 1.0], sigma)
    reach = min(1.0, shift)  # with 1 all three meet at 0
    step = reach / 10
    worst, best = _best_triple(sigma, [np.linspace(-reach, reach, 21)] * 3)
    for _ in range(5 if reach else 0):
        worst, best = _best_triple(sigma, [np.clip(at + step * np.linspace(-1, 1, 9), -reach, reach) for at in best])
        step /= 4
    return Truth(normal, min(normal, worst))


def _best_triple(sigma: float, shifts: Sequence[Floats]) -> tuple[float, tuple[float, ...]]:
    z, width = _grid(2.0, sigma)
    left, middle, right = (
        _kernel(0.0, sigma)(z - (at + by)[:, None]) for at, by in zip((-1, 0, 1), shifts, strict=True)
    )
    best = (inf, (0.0, 0.0, 0.0))
    for i, j in np.ndindex(len(left), len(middle)):
        entropies = width * entr((left[i] + middle[j] + right) / 3).sum(-1)
        k = int(entropies.argmin())
        best = min(best, (float(entropies[k]), (float(shifts[0][i]), float(shifts[1][j]), float(shifts[2][k]))))
    return max(0.0, best[0] - _noise_entropy(sigma)), best[1]


def bits(count: int) -> float:
    """Return what `count` fair noiseless bits carry, in nats; raises UsageError for a negative count.

    Source: Shannon 1948: one bit is ln 2 nats.

    >>> round(bits(1), 3)
    0.693
    """
    if count < 0:
        raise UsageError(f"count {count!r} of bits must be at least 0")
    return count * log(2)


def gaussian_vector(dimensions: int, sigma: float) -> float:
    """Return I(X; X + sigma N) in nats for X ~ N(0, 1) in each of so many independent dimensions.

    Raises UsageError for fewer than one dimension or a sigma not above 0.

    Source: Shannon 1948: ln(1 + 1 / sigma^2) / 2 a dimension.

    >>> [round(gaussian_vector(1, sigma), 4) for sigma in (2, 1, 0.5, 0.25)]
    [0.1116, 0.3466, 0.8047, 1.4166]
    """
    _check(sigma)
    _check_dimensions(dimensions)
    # either form loses digits where the other is used
    return dimensions * (log(hypot(1, sigma)) - log(sigma) if sigma < 1 else log1p(sigma**-2) / 2)


def sigma_for(dimensions: int, nats: float) -> float:
    """Return the noise at which `gaussian_vector` of so many dimensions carries `nats`.

    Raises UsageError for fewer than one dimension or nats not above 0.

    Source: the inverse of ln(1 + 1 / sigma^2) / 2 a dimension.

    >>> round(gaussian_vector(10, sigma_for(10, 2.0)), 12)
    2.0
    """
    _check_dimensions(dimensions)
    if not 0 < nats < inf:
        raise UsageError(f"nats {nats!r} must be above 0 and finite")
    each = nats / dimensions
    return exp(-each) / sqrt(-expm1(-2 * each))


def _check_dimensions(dimensions: int) -> None:
    if dimensions < 1:
        raise UsageError(f"dimensions {dimensions!r} must be at least 1")


def _check(sigma: float, shift: float = 0.0, name: str = "sigma") -> None:
    if not 0 < sigma < inf:
        raise UsageError(f"{name} {sigma!r} must be above 0 and finite")
    if not 0 <= shift < inf:
        raise UsageError(f"shift {shift!r} must be at least 0 and finite")


def _kernel(mean: float, sigma: float) -> Density:
    return lambda z: np.exp(-0.5 * ((z - mean) / sigma) ** 2) / (sigma * sqrt(2 * pi))


def _noise_entropy(sigma: float) -> float:
    return log(2 * pi * e * sigma**2) / 2


def _grid(reach: float, sigma: float) -> tuple[Floats, float]:
    half = reach + _TAIL * sigma
    count = 2 * ceil(half / sigma * _POINTS_PER_SIGMA) + 1
    if count > _MOST_POINTS:
        least = 2.5 * reach * _POINTS_PER_SIGMA / _MOST_POINTS
        raise UsageError(f"sigma {sigma!r} is too small to integrate over lengths of {reach:.3g}: at least {least:.2g}")
    z = np.linspace(-half, half, count)
    return z, float(z[1] - z[0])


def _smoothed_information(density: Density, reach: float, sigma: float) -> float:
    # I = h(Z) - h(noise), Z's density living within `reach` and the noise's tails
    z, width = _grid(reach, sigma)
    return max(0.0, width * float(entr(density(z)).sum()) - _noise_entropy(sigma))
