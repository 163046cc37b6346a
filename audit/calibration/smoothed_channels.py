"""Channels of 2 to 2,000 dimensions whose information is known at every noise, for noise that an estimator fits itself.

Their features have one closed form in the noise, in deviations of each feature, whatever the units of the features and
however many of them are dead.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from audit.calibration.channels import SPAN, Channel, ChannelSample, as_images, as_values, normal_quantiles
from audit.calibration.closed_forms import ExactInformation, gaussian_vector, two_points
from audit.types import Features, Images

_NOMINAL_NATS = 1.5
_DEAD = 0.3  # of all features
_SAMPLES = 500


def smoothed_channels() -> list[Channel]:
    """Return Gaussian vectors, whose worst case is not known, and bits, which an adversary can only shrink."""
    gaussians = [_vector(dimensions, _SAMPLES) for dimensions in (2, 10, 100, 1000, 2000)]
    gaussians += [_vector(dimensions, None) for dimensions in (2, 10, 100)]
    return gaussians + [_bits(2, 2, 0.5), _bits(8, 100, 0.5)] + [_bits(8, each, 0.25) for each in (10, 1000, 2000)]


def _vector(dimensions: int, samples: int | None) -> Channel:
    """Return the channel of independent normal features, each stratified, so that its deviation is one."""

    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        values = torch.stack([_shuffled(normal_quantiles(count, generator), generator) for _ in range(dimensions)], 1)
        return ChannelSample(as_images(values), torch.zeros(count, dtype=torch.long))

    return Channel(
        name=f"{dimensions}-d Gaussian, fitted noise",
        parameters=f"{samples or 'all'} samples",
        draw=draw,
        features=as_values,
        sigma=0.0,
        eps=0.0,
        normal_nats=_NOMINAL_NATS,
        worst_nats=None,
        target="smoothed image",
        samples=samples,
        at_noise=lambda noise: ExactInformation(gaussian_vector(dimensions, noise), gaussian_vector(dimensions, noise)),
    )


def _bits(count: int, dimensions: int, shift: float) -> Channel:
    """Return the channel of fair bits -1 and 1, one pixel each, repeated over features of any unit and dead ones.

    A shift of every pixel brings -1 and 1 no closer than 2 (1 - shift). The worst case moves both of every bit as
    far: clamping all pixels to [-(1 - shift), 1 - shift] is a contraction of each coordinate and maps every other
    attack to this one, and contractions of the inputs do not increase the information through Gaussian noise.

    Source: Aishwarya, Alam, Li, Myroshnychenko & Zatarain-Vera 2023, "Entropic exercises around the Kneser-Poulsen
    conjecture" (contractions).
    """

    def draw(total: int, generator: torch.Generator) -> ChannelSample:
        halves = 2.0 * (torch.arange(total) % 2) - 1
        values = torch.stack([_shuffled(halves, generator) for _ in range(count)], 1)
        return ChannelSample(as_images(values), torch.zeros(total, dtype=torch.long))

    return Channel(
        name=f"{count} bits on {dimensions} features, fitted noise",
        parameters=f"shift {shift:g}",
        draw=draw,
        features=_repeated(count, dimensions),
        sigma=0.0,
        eps=shift / SPAN,
        normal_nats=_NOMINAL_NATS,
        worst_nats=0.0,
        target="smoothed image",
        samples=_SAMPLES,
        at_noise=lambda noise: _of_bits(count, dimensions, noise, shift),
    )


def _of_bits(count: int, dimensions: int, noise: float, shift: float) -> ExactInformation:
    """Return the exact values of independent bits, each on its number of features."""
    normal, worst = 0.0, 0.0
    for copies in _copies(count, dimensions):
        exact = two_points(noise / sqrt(copies), shift)
        normal, worst = normal + exact.normal, worst + exact.worst
    return ExactInformation(normal, worst)


def _copies(count: int, dimensions: int) -> list[int]:
    return [len(range(bit, dimensions, count)) for bit in range(count)]


def _repeated(count: int, dimensions: int) -> Callable[[Images], Features]:
    """Return the map to features in units from 0.1 to 10, of which one is 1e4 times larger, and constant ones."""
    units = 10 ** torch.linspace(-1, 1, dimensions) * (1 - 2.0 * (torch.arange(dimensions) % 3 == 0))
    units[0] *= 1e4

    def features(images: Images) -> Features:
        values = as_values(images)[:, torch.arange(dimensions) % count] * units.to(images)
        dead = images.new_ones(len(images), round(_DEAD / (1 - _DEAD) * dimensions))
        return torch.cat([values, dead], 1)

    return features


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]
