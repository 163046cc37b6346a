"""Channels whose worst-case information about the label is known, and on which short or one-sided searches fail."""

from collections.abc import Callable, Sequence
from functools import cache
from math import cos, log, pi, sin
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.calibration.channels import Channel, ChannelSample, paired_normal_quantiles, shuffled
from audit.calibration.closed_forms import two_points
from audit.calibration.graph_entropy import least_label_information
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Images

_JITTER = 0.01  # of each pixel around a class's point
_MARGIN = 0.015  # by which eps may be off without another set of classes meeting
_CONDITION = 2.5  # of the random linear maps
Points = Sequence[Sequence[float]]


@cache
def label_channels() -> tuple[Channel, ...]:
    """Return all channels of this module."""
    return (*_means(), *_atoms(), _comb(), *_trained())


class _Atoms(NamedTuple):
    """Classes at points around the grey image, a radius, the map to features, and the share of random labels."""

    name: str
    points: Points
    eps: float
    mapping: str
    label_noise: float = 0.0


def _atoms() -> list[Channel]:
    table = [
        _Atoms("4 classes on a line", _line(4, 0.2), 0.14, "linear map"),
        _Atoms("5 classes on a circle", _circle(5, 0.4), 0.27, "network"),
        _Atoms("6 classes on a circle", _circle(6, 0.4), 0.25, "linear map", 0.2),
        _Atoms("3 classes on a simplex", _simplex(3, 0.36), 0.24, "linear map"),
        _Atoms("8 classes on a simplex", _simplex(8, 0.36), 0.24, "network"),
        _Atoms("7 classes on a simplex", _simplex(7, 0.36), 0.14, "linear map"),
        _Atoms("4 classes on a simplex", _simplex(4, 0.36), 0.14, "network", 0.3),
    ]
    return [_atom_channel(each, number) for number, each in enumerate(table)]


def _line(classes: int, gap: float) -> Points:
    return [[gap * (number - (classes - 1) / 2), 0.0] for number in range(classes)]


def _circle(classes: int, radius: float) -> Points:
    angles = [2 * pi * (number + 0.5) / classes for number in range(classes)]
    return [[radius * cos(angle), radius * sin(angle)] for angle in angles]


def _simplex(classes: int, side: float) -> Points:
    return [[side * (number == place) - side / 2 for place in range(classes)] for number in range(classes)]


def _atom_channel(atoms: _Atoms, number: int) -> Channel:
    """Return the channel of classes at points, behind an invertible map.

    A map that is invertible loses no information, so that the infimum is that of the points. Jitter does not change
    it, because the same classes meet within eps - jitter and eps + jitter.
    """
    points, noise = torch.tensor(atoms.points), atoms.label_noise
    radii = (atoms.eps - _JITTER - _MARGIN, atoms.eps + _JITTER + _MARGIN)
    low, high = (least_label_information(atoms.points, radius, noise) for radius in radii)
    assert abs(low - high) < 1e-3, f"{atoms.name}: {low:.4f} and {high:.4f} within the margin of eps"

    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        number, classes = torch.arange(count) // len(points), torch.arange(count) % len(points)
        # every class gets its share of random labels, and each label equally often among them
        random = (number * noise).long() % len(points)
        labels = torch.where(((number + 1) * noise).long() > (number * noise).long(), random, classes)
        jitter = _JITTER * (2 * torch.rand(count, points.shape[1], generator=generator) - 1)
        return shuffled(ChannelSample(_row_images(0.5 + points[classes] + jitter), labels), generator)

    return Channel(
        name=atoms.name,
        parameters=f"{atoms.mapping}, eps {atoms.eps:g}" + (f", label noise {noise:g}" if noise else ""),
        draw=draw,
        features=_invertible(atoms.mapping, points.shape[1], number),
        sigma=0.0,
        eps=atoms.eps,
        normal_nats=least_label_information(atoms.points, 0.0, noise),
        worst_nats=low,
        target="label",
    )


def _row_images(pixels: Tensor) -> Images:
    return pixels[:, None, None, :].clamp(0, 1)


def _invertible(mapping: str, pixels: int, number: int) -> Callable[[Images], Features]:
    """Return a random invertible map of images to features: linear, or a network of two layers."""
    first, second = (_rotation(pixels, number, layer) for layer in range(2))
    stretch = torch.logspace(0, log(_CONDITION) / log(10), pixels)

    def features(images: Images) -> Features:
        values = (images.flatten(1) - 0.5) @ first.to(images)
        if mapping == "network":
            values = F.leaky_relu(8 * values + 0.1, 0.3)
        return (values * stretch.to(images)) @ second.to(images)

    return features


def _rotation(size: int, number: int, layer: int) -> Tensor:
    generator = keyed_generator(number, Purpose.CHANNEL_MAPS, layer)
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def _means(pixels: int = 16, distance: float = 0.1, spread: float = 0.05) -> list[Channel]:
    """Return the mean of equal pixels, two Gaussian classes at 0.5 +- `distance`, at multiples of that distance."""

    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        labels = torch.arange(count) % 2
        means = 0.5 + distance * (2.0 * labels - 1) + spread * paired_normal_quantiles(count, generator)
        return shuffled(ChannelSample(_row_images(means[:, None].expand(-1, pixels)), labels), generator)

    rows = []
    for multiple in (0.5, 1.0, 1.5, 2.0, 4.0):
        exact = two_points(spread / distance, min(1.0, multiple))
        rows.append(
            Channel(
                name="labels by the mean of 16 pixels",
                parameters=f"eps {multiple:g} x distance",
                draw=draw,
                features=lambda images: images.flatten(1).mean(1, keepdim=True),
                sigma=0.0,
                eps=multiple * distance,
                normal_nats=exact.normal,
                worst_nats=exact.worst,
                target="label",
            )
        )
    return rows


def _comb(teeth: int = 6, pixels: int = 6, eps: float = 0.02) -> Channel:
    """Return classes that alternate over the narrow intervals of one pixel among several, too far apart to meet."""
    spacing = 0.9 / teeth

    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        tooth = torch.arange(count) % teeth
        values = torch.rand(count, pixels, generator=generator)
        offset = 0.1 * spacing * (2 * torch.rand(count, generator=generator) - 1)
        values[:, 0] = 0.05 + spacing * (tooth + 0.5) + offset
        return shuffled(ChannelSample(_row_images(values), tooth % 2), generator)

    return Channel(
        name="labels by a comb",
        parameters=f"{teeth} teeth, {pixels} pixels, eps {eps:g}",
        draw=draw,
        features=lambda images: images.flatten(1) - 0.5,
        sigma=0.0,
        eps=eps,
        normal_nats=log(2),
        worst_nats=log(2),
        target="label",
    )


def _trained(classes: int = 4, size: int = 6, contrast: float = 0.08) -> list[Channel]:
    """Return the logits of a small network trained on noisy patterns, at radii at which all images can meet."""
    generator = keyed_generator(classes, Purpose.CHANNEL_MAPS, size)
    patterns = contrast * torch.randn(classes, size * size, generator=generator).clamp(-1.5, 1.5)

    def draw(count: int, generator: torch.Generator) -> ChannelSample:
        labels = torch.arange(count) % classes
        noise = 0.02 * (2 * torch.rand(count, size * size, generator=generator) - 1)
        images = (0.5 + patterns[labels] + noise).view(-1, 1, size, size)
        return shuffled(ChannelSample(images, labels), generator)

    network = _trained_network(draw(600, generator), classes)
    # every image may move to the grey one, whatever the network: then it tells nothing
    reach = float(patterns.abs().max()) + 0.02
    return [
        Channel(
            name="labels by a trained network",
            parameters=f"{classes} patterns of {size}x{size}, eps {eps:.3f}",
            draw=draw,
            features=network,
            sigma=0.0,
            eps=eps,
            normal_nats=log(classes),
            worst_nats=0.0,
            classes=classes,
            target="label",
        )
        for eps in (1.05 * reach, 2 * reach)
    ]


def _trained_network(
    sample: ChannelSample, classes: int, width: int = 32, steps: int = 150
) -> Callable[[Images], Features]:
    generator = keyed_generator(width, Purpose.CHANNEL_MAPS, steps)
    inputs = sample.images[0].numel()
    weights = [
        (torch.randn(rows, columns, generator=generator) / rows**0.5).requires_grad_()
        for rows, columns in ((inputs, width), (width, classes))
    ]

    def logits(images: Images) -> Features:
        first, second = (weight.detach().to(images) for weight in weights) if frozen else weights
        return ((images.flatten(1) - 0.5) / 0.1 @ first).relu() @ second

    frozen = False
    optimiser = torch.optim.Adam(weights, 1e-2)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(logits(sample.images), sample.labels).backward()
            optimiser.step()
    frozen = True
    return logits
