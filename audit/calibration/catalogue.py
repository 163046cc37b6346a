"""All calibration channels, with one entry for each radius."""

from collections.abc import Callable
from functools import cache
from math import sqrt

import torch
from torch import Tensor

from audit.calibration.channels import (
    SPAN,
    Channel,
    ChannelSample,
    as_images,
    as_values,
    normal_quantiles,
    paired_normal_quantiles,
    shuffled,
    uniform_quantiles,
)
from audit.calibration.closed_forms import (
    ExactInformation,
    bits,
    gaussian,
    sign_of_gaussian,
    three_points,
    two_points,
    uniform,
)
from audit.calibration.label_channels import label_channels
from audit.calibration.smoothed_channels import smoothed_channels
from audit.types import Features, Images


@cache
def all_channels() -> tuple[Channel, ...]:
    """Return every channel, with one entry for each radius; made once, because some train a network."""
    known = [*_sign(), *_atoms(), *_reals(), *_vectors(), *_bits(), *_projections(), *_labelled()]
    return (*known, *label_channels(), *smoothed_channels())


def _sign() -> list[Channel]:
    table = [
        (1.0, 1.0, 0.1),
        (1.0, 1.0, 0.5),
        (0.6, 1.0, 0.5),
        (0.6, 1.0, 0.7),
        (1.0, 1.0, 1.0),
        (1.0, 1.0, 2.0),
        (1.7321, 1.3229, 0.433),
        (0.0, 1.0, 0.5),
    ]
    return [_sign_channel(*row) for row in table]


def _sign_channel(mean: float, spread: float, shift: float) -> Channel:
    exact = sign_of_gaussian(mean, spread, shift)

    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        labels = torch.arange(count) % 2
        values = (2.0 * labels - 1) * mean + spread * paired_normal_quantiles(count, generator)
        return shuffled(ChannelSample(as_images(values[:, None]), labels), generator)

    parameters = f"mean {mean:g}, spread {spread:g}, shift {shift:g}"
    return Channel(
        name="sign of a Gaussian mixture",
        parameters=parameters,
        draw=draw,
        features=_sign_logits,
        sigma=0.0,
        eps=shift / SPAN,
        normal_nats=exact.normal,
        worst_nats=exact.worst,
        classes=2,
    )


def _sign_logits(images: Images) -> Features:
    """Return (-1, 1) or (1, -1) by the sign, with a straight-through gradient."""
    value = as_values(images)
    sign = torch.where(value > 0, 1.0, -1.0) + value - value.detach()
    return torch.cat([-sign, sign], 1)


def _atoms() -> list[Channel]:
    rows = []
    for sigma in (1.0, 0.5, 0.25):
        for shift in (0.1, 0.25, 0.5, 0.75, 1.0):
            rows.append(_real("two points", sigma, shift, two_points(sigma, shift), _atom_source((-1.0, 1.0))))
    for sigma in (0.25, 1.0):
        for shift in (0.1, 0.25, 0.4, 0.5, 0.75):
            exact = three_points(sigma, shift)
            rows.append(_real("three points", sigma, shift, exact, _atom_source((-1.0, 0.0, 1.0))))
    return rows


def _reals() -> list[Channel]:
    rows = []
    for sigma in (2.0, 1.0, 0.5, 0.25, 0.1):
        for shift in (0.1, 0.25, 0.5, 1.0):
            rows.append(_real("Gaussian", sigma, shift, gaussian(sigma, shift), normal_quantiles))
    for sigma in (1.0, 0.5, 0.25):
        for shift in (0.1, 0.25, 0.5, 0.75):
            rows.append(_real("uniform", sigma, shift, uniform(sigma, shift), uniform_quantiles))
    return rows


def _real(
    name: str,
    sigma: float,
    shift: float,
    exact: ExactInformation,
    source: Callable[[int, torch.Generator], Tensor],
) -> Channel:
    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        values = source(count, generator)
        return shuffled(ChannelSample(as_images(values[:, None]), torch.zeros(count, dtype=torch.long)), generator)

    return Channel(
        name=name,
        parameters=f"sigma {sigma:g}, shift {shift:g}",
        draw=draw,
        features=as_values,
        sigma=sigma,
        eps=shift / SPAN,
        normal_nats=exact.normal,
        worst_nats=exact.worst,
        # for less noise, atoms are less informative than the soft thresholding of the closed form
        worst_is_exact=sigma >= 0.25,
    )


def _vectors() -> list[Channel]:
    rows = []
    for dimensions in (2, 5, 10, 20):
        for nats in (0.5, 1.0, 2.0):
            sigma = 1 / sqrt(torch.tensor(2 * nats / dimensions).exp().item() - 1)
            rows.append(_vector(dimensions, nats, sigma))
    return rows


def _vector(dimensions: int, nats: float, sigma: float) -> Channel:
    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        values = torch.randn(count, dimensions, generator=generator)
        return ChannelSample(as_images(values), torch.zeros(count, dtype=torch.long))

    return Channel(
        name=f"{dimensions}-d Gaussian",
        parameters=f"sigma {sigma:.4g}",
        draw=draw,
        features=as_values,
        sigma=sigma,
        eps=0.0,
        normal_nats=nats,
        worst_nats=None,
        repeats=4,
    )


def _bits() -> list[Channel]:
    return [_bit_channel(count) for count in (0, 1, 2, 3)]


def _bit_channel(count: int) -> Channel:
    classes = max(2, 2**count)

    def draw(total: int, generator: torch.Generator) -> ChannelSample:
        labels = torch.arange(total) % 2**count
        values = _codes(labels, count) if count else torch.rand(total, 1, generator=generator)
        return shuffled(ChannelSample(as_images(values), labels), generator)

    def features(images: Images) -> Features:
        values = as_values(images)
        codes = _codes(torch.arange(classes), count) if count else torch.ones(2, 1)
        scores = values @ codes.T.to(values)
        return 0 * scores if not count else 4 * scores

    return Channel(
        name=f"{count} noiseless bits" if count else "constant",
        parameters="eps 0",
        draw=draw,
        features=features,
        sigma=0.0,
        eps=0.0,
        normal_nats=bits(count),
        worst_nats=None,
        classes=classes,
    )


def _codes(numbers: Tensor, count: int) -> Tensor:
    """Return the binary digits (N, count) of numbers (N,) as -1 and 1."""
    return 2.0 * ((numbers[:, None] >> torch.arange(count)) & 1) - 1


def _projections() -> list[Channel]:
    return [_projection(size, sigma, shift) for size in (8, 16) for sigma in (1.0, 0.5, 0.25) for shift in (0.25, 0.5)]


def _projection(size: int, sigma: float, shift: float, pixel_deviation: float = 0.1) -> Channel:
    """Return the channel of a smooth unit-variance projection of noise images."""
    pattern = torch.outer(*2 * [torch.linspace(0, 3.14159, size).sin()])
    weights = (pattern / (pattern.norm() * pixel_deviation)).flatten()
    exact = gaussian(sigma, shift)

    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        pixels = pixel_deviation * torch.randn(count, size * size, generator=generator)
        # the projection is stratified; its orthogonal complement is not
        projected = normal_quantiles(count, generator)[torch.randperm(count, generator=generator)]
        pixels += torch.outer(projected - pixels @ weights, weights / weights.square().sum())
        return ChannelSample((0.5 + pixels).view(-1, 1, size, size).clamp(0, 1), torch.zeros(count, dtype=torch.long))

    def features(images: Images) -> Features:
        return ((images.flatten(1) - 0.5) @ weights.to(images))[:, None]

    return Channel(
        name=f"projection of {size}x{size} images",
        parameters=f"sigma {sigma:g}, shift {shift:g}",
        draw=draw,
        features=features,
        sigma=sigma,
        eps=shift / float(weights.abs().sum()),
        normal_nats=exact.normal,
        worst_nats=exact.worst,
    )


def _labelled() -> list[Channel]:
    return [_labelled_channel(sigma, shift) for sigma in (1.0, 0.5) for shift in (0.25, 0.5)]


def _labelled_channel(sigma: float, shift: float) -> Channel:
    """Return the channel of the labels of two Gaussian classes at -1 and 1.

    In the worst case both move towards each other: the likelihood ratio of the moved pair is monotone, so its optimal
    test at every prior is a threshold, and no other pair in the balls increases the error of that threshold.
    """
    exact = two_points(sigma, shift)

    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        labels = torch.arange(count) % 2
        noise = paired_normal_quantiles(count, generator)
        return shuffled(ChannelSample(as_images((2.0 * labels - 1 + sigma * noise)[:, None]), labels), generator)

    return Channel(
        name="labels of two Gaussians",
        parameters=f"sigma {sigma:g}, shift {shift:g}",
        draw=draw,
        features=as_values,
        sigma=0.0,
        eps=shift / SPAN,
        normal_nats=exact.normal,
        worst_nats=exact.worst,
        target="label",
    )


def _atom_source(points: tuple[float, ...]) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, _generator: torch.tensor(points)[torch.arange(count) % len(points)]
