"""Closed forms of normal and worst-case mutual information, in nats, that estimators are calibrated against.

A shift is the largest distance, in either direction, that the adversary may move the scalar input by. A random shift
cannot be worse than a fixed one for each input, because I(X'; Z) is concave in the distribution of X'.

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

_POINTS_PER_SIGMA = 24  # the error of the trapezoid rule decreases exponentially; here it is a rounding error
_TAIL = 10.0
_MAX_POINTS = 2_000_000


class ExactInformation(NamedTuple):
    """Normal and worst-case information of a channel, in nats."""

    normal: float
    worst: float

    @property
    def rv(self) -> float:
        """Return the representation vulnerability, in nats."""
        return self.normal - self.worst


class ExactSignInformation(NamedTuple):
    """Normal and worst-case information of the sign, in nats, and its natural and adversarial risk."""

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
        """Return the adversarial risk minus the natural risk."""
        return self.adversarial_risk - self.risk


def sign_of_gaussian(mean: float, spread: float, shift: float) -> ExactSignInformation:
    """Return the exact values for g = sign(x), x ~ N(y mean, spread^2), y = +-1 equally likely.

    For g = sign(w.x) on a mixture N(y theta, S) under an l_p ball: mean = w.theta, spread = sqrt(w'Sw), shift = eps
    times the dual norm of w. Raises UsageError for a negative mean (Theorem 3.2 needs a positive correlation of sign
    and label), a spread not above 0, or a negative shift.

    Source: Zhu, Zhang & Evans 2020, Definition 3.1: in the worst case every input within reach of the threshold moves
    to the same side.

    >>> exact = sign_of_gaussian(1, 1, 0.5)
    >>> [round(value, 4) for value in (exact.worst, exact.rv, exact.adversarial_gap)]
    [0.6636, 0.0295, 0.1499]
    """
    if not 0 <= mean < inf:
        raise UsageError(f"mean {mean!r} must be at least 0 and finite")
    _check(spread, shift, "spread")
    below = NormalDist(0, spread).cdf
    minority = (below(mean - shift) + below(-mean - shift)) / 2
    return ExactSignInformation(log(2), binary_entropy(minority), below(-mean), below(shift - mean))


def atoms(points: Sequence[float], sigma: float) -> float:
    """Return I(X; X + sigma N) in nats for equally likely `points` (n,), which may repeat.

    Raises UsageError for no points, infinite points, or a sigma not above 0 or too small to integrate.

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


def two_points(sigma: float, shift: float) -> ExactInformation:
    """Return the exact values for x = +-1, Z = x + sigma N; in the worst case both points move towards 0.

    Raises UsageError for a sigma not above 0 or too small to integrate, or a negative shift.

    Source: I(X; X + sigma N) of two points increases with their distance (data processing inequality).

    >>> [round(nats, 4) for nats in two_points(0.5, 0.5)]
    [0.6327, 0.3368]
    """
    _check(sigma, shift)
    near = max(0.0, 1 - shift)
    return ExactInformation(atoms([-1.0, 1.0], sigma), atoms([-near, near], sigma))


def gaussian(sigma: float, shift: float) -> ExactInformation:
    """Return the exact values for x ~ N(0, 1), Z = x + sigma N, with the worst case by soft thresholding.

    The adversary moves every x towards 0 by `shift`. No search has found a smaller value for sigma >= 0.25. **For
    smaller sigma this is only an upper bound of the worst case**, because inputs that merge into a few atoms have less
    information: for sigma 0.1 and shifts 0.25, 0.5 and 1 a search finds 1.766, 1.28 and 0.753 nats, and this function
    returns 2.021, 1.653 and 0.934. Raises UsageError for a sigma not above 0 or too small to integrate, or a negative
    shift.

    Source: Shannon 1948 for the normal case, ln(1 + 1 / sigma^2) / 2.

    >>> [round(nats, 4) for nats in gaussian(0.5, 0.25)]
    [0.8047, 0.639]
    """
    _check(sigma, shift)
    variance = 1 + sigma**2
    deviation = sigma / sqrt(variance)
    at_zero, shifted = _kernel(0.0, sigma), _kernel(-shift, sqrt(variance))

    def right(z: Floats) -> Floats:
        # density of z for x' = x - shift > 0: a Gaussian in z times P(x' > 0 | z)
        return shifted(z) * ndtr((z - shift * sigma**2) / (variance * deviation))

    mass_at_zero = float(ndtr(shift) - ndtr(-shift))
    worst = _smoothed_information(lambda z: mass_at_zero * at_zero(z) + right(z) + right(-z), _TAIL, sigma)
    return ExactInformation(gaussian_vector(1, sigma), worst)


def uniform(sigma: float, shift: float) -> ExactInformation:
    """Return the exact values for x ~ U[-1, 1], Z = x + sigma N, with the worst case by soft thresholding.

    As for `gaussian`, no search has found a smaller value for sigma >= 0.25, and for smaller sigma this is only an
    upper bound of the worst case. Raises UsageError for a sigma not above 0 or too small to integrate, or a negative
    shift.

    Source: h(Z) - h(sigma N), with the density of Z in closed form.

    >>> [round(nats, 4) for nats in uniform(0.5, 0.25)]
    [0.4187, 0.223]
    """
    _check(sigma, shift)
    return ExactInformation(_thresholded_uniform(sigma, 0.0), _thresholded_uniform(sigma, min(1.0, shift)))


def _thresholded_uniform(sigma: float, shift: float) -> float:
    at_zero, edge = _kernel(0.0, sigma), 1 - shift
    return _smoothed_information(
        lambda z: shift * at_zero(z) + (ndtr((z + edge) / sigma) - ndtr((z - edge) / sigma)) / 2, edge, sigma
    )


def three_points(sigma: float, shift: float) -> ExactInformation:
    """Return the exact values for x in {-1, 0, 1}, Z = x + sigma N, with the worst case by exhaustive search.

    Raises UsageError for a sigma not above 0 or too small to integrate, or a negative shift.

    Source: every triple of shifts on a grid that includes the ends, then finer grids around the best triple.

    >>> [round(nats, 4) for nats in three_points(0.25, 0.4)]
    [1.018, 0.6432]
    """
    _check(sigma, shift)
    normal = atoms([-1.0, 0.0, 1.0], sigma)
    reach = min(1.0, shift)  # at 1 all three points meet at 0
    step = reach / 10
    worst, best = _best_triple(sigma, [np.linspace(-reach, reach, 21)] * 3)
    for _ in range(5 if reach else 0):
        worst, best = _best_triple(sigma, [np.clip(at + step * np.linspace(-1, 1, 9), -reach, reach) for at in best])
        step /= 4
    return ExactInformation(normal, min(normal, worst))


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
    """Return the entropy of `count` fair bits in nats; raises UsageError for a negative count.

    Source: Shannon 1948: one bit is ln 2 nats.

    >>> round(bits(1), 3)
    0.693
    """
    if count < 0:
        raise UsageError(f"count {count!r} of bits must be at least 0")
    return count * log(2)


def gaussian_vector(dimensions: int, sigma: float) -> float:
    """Return I(X; X + sigma N) in nats for X ~ N(0, 1) in each of `dimensions` independent dimensions.

    Raises UsageError for fewer than one dimension or a sigma not above 0.

    Source: Shannon 1948: ln(1 + 1 / sigma^2) / 2 a dimension.

    >>> [round(gaussian_vector(1, sigma), 4) for sigma in (2, 1, 0.5, 0.25)]
    [0.1116, 0.3466, 0.8047, 1.4166]
    """
    _check(sigma)
    _check_dimensions(dimensions)
    # each form loses precision in the range of the other
    return dimensions * (log(hypot(1, sigma)) - log(sigma) if sigma < 1 else log1p(sigma**-2) / 2)


def sigma_for(dimensions: int, nats: float) -> float:
    """Return the sigma for which `gaussian_vector(dimensions, sigma)` equals `nats`.

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
    if count > _MAX_POINTS:
        least = 2.5 * reach * _POINTS_PER_SIGMA / _MAX_POINTS
        raise UsageError(
            f"sigma {sigma!r} is too small to integrate over a length of {reach:.3g}: at least {least:.2g} is needed"
        )
    z = np.linspace(-half, half, count)
    return z, float(z[1] - z[0])


def _smoothed_information(density: Density, reach: float, sigma: float) -> float:
    # I = h(Z) - h(noise); the density of Z is negligible beyond `reach` plus the tails of the noise
    z, width = _grid(reach, sigma)
    return max(0.0, width * float(entr(density(z)).sum()) - _noise_entropy(sigma))
