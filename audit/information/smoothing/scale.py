"""Noise that fits a layer: every feature in its own deviation, and the scale at which clean features tell a set amount.

A fixed share of the deviation in each of D features tells any n images apart once D is large enough, so that the
information is ln n whatever the features are. Here the scale follows from the clean features alone, by one rule for all
networks and layers: the noise under which they hold `target` nats. The target does not grow with the number of images
and is far below ln n, where the plug-in estimate has little bias (measured on Gaussian vectors of 2 to 2,000
dimensions: at half of ln n it is .15 to .25 nats low with 500 images, at 1.5 nats at most .05).
"""

from math import exp, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from audit.flags import FlagCode, flag
from audit.information.gaussian_mixture import in_float64
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features

_ROUNDING = 1e-6  # deviations below this share of a feature's largest value are rounding errors
_SMALLEST_UNIT = 0.01  # of the median deviation: a unit that hardly fires must not count as much as the others
_UNEVEN = 0.1  # of the layer's deviation: half of the features then lie under the noise
_SMALLEST_NOISE = 0.1  # deviations: finer differences do not count, if the features hold less than the target
_ROWS, _DRAWS, _COLUMNS = 1000, 4000, 4096  # images and draws that choose the scale; columns copied at once
_SHARE_OF_CEILING = 0.5  # of ln n, which a target never exceeds


class Smoothing(NamedTuple):
    """Features (N, D) as seen through noise: (f - centre) / unit + E, E ~ N(0, I), over the `kept` ones.

    `centre` (D,) are the means and `unit` (D,) the noise's standard deviations in feature units. `kept` (D',) indexes
    the features that are seen at all: the finite ones, and with a fitted scale only those that vary. `noise` is what
    the record says: the scale, in deviations of each feature, or in feature units if they share one. `flags` are
    those of the scale.
    """

    centre: Tensor
    unit: Tensor
    kept: Tensor
    noise: float
    flags: tuple[str, ...] = ()

    def of(self, features: Features) -> Features:
        """Return features (N, D) in units of the noise, (N, D'); gradients pass."""
        centre, unit = self.centre.to(features.device), self.unit.to(features.device)
        if len(self.kept) < len(centre):
            kept = self.kept.to(features.device)
            features, centre, unit = features.index_select(1, kept), centre[kept], unit[kept]
        return (features - centre.to(features)) / unit.to(features)

    def noisy(self, features: Features, generator: torch.Generator) -> Features:
        """Return features (N, D) plus noise; those that are not kept have their clean means."""
        noise = torch.randn(features.shape, generator=generator).to(features)
        kept = torch.zeros(len(self.centre), dtype=torch.bool).index_fill_(0, self.kept.cpu(), True).to(features.device)
        return torch.where(kept, features + self.unit.to(features) * noise, self.centre.to(features))


class Spread(NamedTuple):
    """Mean, standard deviation and largest absolute value of every feature, (D,) each, in float64 where it exists."""

    mean: Tensor
    deviation: Tensor
    largest: Tensor

    @property
    def varies(self) -> Tensor:
        """Whether each feature varies by more than rounding errors, (D,)."""
        return self.deviation > _ROUNDING * self.largest

    @property
    def layer_deviation(self) -> float:
        """The root mean square deviation of the features that vary; 0 if none does."""
        varies = self.varies
        # relative to the largest: squares of tiny or huge deviations leave the range of numbers
        largest = float(self.deviation[varies].max()) if bool(varies.any()) else 0.0
        return largest * float((self.deviation[varies] / largest).square().mean().sqrt()) if largest else 0.0


def spread_of(features: Features) -> Spread:
    """Return the spread of features (N, D), copied a few columns at a time."""
    parts = [in_float64(part) for part in features.split(_COLUMNS, 1)]
    mean = torch.cat([part.mean(0) for part in parts])
    deviation = torch.cat([part.std(0, correction=0) for part in parts])
    return Spread(mean, deviation, torch.cat([part.abs().amax(0) for part in parts]))


def common_unit(features: Features, noise: float, *, absolute: bool = False) -> Smoothing:
    """Return one unit for all finite features (N, D): `noise` times the deviation of the layer, or `noise` itself.

    If features vary by rounding errors only, a unit that hides them.
    """
    kept, spread = features.isfinite().all(0).nonzero()[:, 0], spread_of(features)
    unit = noise if absolute else noise * spread.layer_deviation
    if not unit:
        unit = max(1.0, float(spread.largest[kept].amax())) if len(kept) else 1.0
    flags = () if absolute else _uneven_flags(spread)
    return Smoothing(spread.mean, torch.full_like(spread.mean, unit), kept, unit, flags)


def _uneven_flags(spread: Spread) -> tuple[str, ...]:
    median = float(spread.deviation[spread.varies].median()) if bool(spread.varies.any()) else 0.0
    if median >= _UNEVEN * spread.layer_deviation:
        return ()
    told = f"half of the features deviate by at most {median:.3g}, the layer by {spread.layer_deviation:.3g}"
    return (flag(FlagCode.UNEVEN, told),)


def fitted_unit(features: Features, target: float) -> Smoothing:
    """Return the smoothing under which features (N, D) hold `target` nats, and at most half of ln N.

    Each feature that varies is scaled by its deviation, or by a hundredth of the median deviation if that is larger, so
    that neither its unit nor one feature far larger than all others decides. The common factor is found by bisection;
    features that hold less than the target under noise of a tenth of a deviation keep that noise.
    """
    spread = spread_of(features)
    varies = spread.varies & spread.deviation.isfinite()
    if not bool(varies.any()):
        return common_unit(features, 1.0)
    kept = varies.nonzero()[:, 0]
    unit = spread.deviation.clamp_min(_SMALLEST_UNIT * float(spread.deviation[kept].median()))
    scaled = Smoothing(spread.mean, unit, kept, 1.0).of(_some(features))
    noise = _noise_for(in_float64(scaled), min(target, _SHARE_OF_CEILING * log(len(features))))
    return Smoothing(spread.mean, unit * noise, kept, noise)


def _some(features: Features) -> Features:
    """Return the features of at most a thousand images: their information under the target does not depend on more."""
    if len(features) <= _ROWS:
        return features
    order = torch.randperm(len(features), generator=keyed_generator(0, Purpose.SANDWICH_SCALE, 1))
    return features[order[:_ROWS].to(features.device)]


def _noise_for(features: Features, target: float) -> float:
    """Return the standard deviation of the noise under which features (N, D) hold `target` nats."""
    from scipy.optimize import brentq

    information = _Information(features)
    smallest = _SMALLEST_NOISE * float(features.var(0, correction=0).mean().sqrt())
    if information(smallest) <= target:
        return smallest
    largest = max(sqrt(information.mean_distance / (2 * target)), 2 * smallest)  # the mean divergence is the target
    while information(largest) > target:
        largest *= 2
    return exp(brentq(lambda power: information(exp(power)) - target, log(smallest), log(largest), xtol=1e-3))


class _Information:
    """Plug-in information of features (N, D) as a function of the noise, from the same draws at every scale."""

    def __init__(self, features: Features) -> None:
        rows, generator = _rotated(features - features.mean(0)), keyed_generator(0, Purpose.SANDWICH_SCALE)
        halves = torch.linalg.vecdot(rows, rows) / 2
        self._distances = (halves[:, None] + halves - rows @ rows.T).clamp_min_(0).fill_diagonal_(0)
        self._shifts = []
        for _ in range(max(1, _DRAWS // len(rows))):
            shifts = torch.randn(rows.shape, generator=generator).to(rows) @ rows.T
            self._shifts.append(shifts.sub_(shifts.diagonal().clone()[:, None]))
        self.mean_distance = 2 * float(self._distances.mean())

    def __call__(self, noise: float) -> float:
        """Return the information in nats under noise of this standard deviation."""
        powers = self._distances / -(noise**2)
        signed = (torch.add(powers, shifts, alpha=sign / noise) for shifts in self._shifts for sign in (1, -1))
        sums = [float(each.logsumexp(1).mean()) for each in signed]
        return log(len(powers)) - sum(sums) / len(sums)


def _rotated(rows: Tensor) -> Tensor:
    """Return centred rows (N, D) in at most N coordinates: noise looks alike in all directions."""
    if rows.shape[1] <= len(rows):
        return rows
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors * values.clamp_min(0).sqrt()
