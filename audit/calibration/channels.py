"""Channels whose normal and worst-case mutual information is known exactly, dressed as images.

Real-valued inputs become pixels around 0.5, radii shrink with them, so an estimator runs on them with the settings,
the code and the [0, 1] range it has on photographs. Samples are stratified: what shows is an estimator's error, not
the luck of a draw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from audit.calibration.closed_forms import bits, gaussian, sign_of_gaussian, three_points, two_points, uniform
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images, Labels

SPAN = 16.0  # reals in [-8, 8] become pixels in [0, 1]


class Sample(NamedTuple):
    """Images (N, C, H, W), and labels (N,) where the channel has classes (zeros where it has none)."""

    images: Images
    labels: Labels


@dataclass(frozen=True)
class Channel:
    """One channel: how to sample it, its noiseless map to features, its noise, and the truth in nats.

    `eps` is in pixels. `classes` is 0 where the features answer no question; else features are logits of so many
    classes. `tells` says whether the truth is I(X; Z) of the image or I(Y; Z) of its label; `exact` whether the closed
    form of the worst case is the infimum, not only an upper bound of it. `repeats` is how many samples to average
    over where one cannot be stratified.
    """

    name: str
    parameters: str
    draw: Callable[[int, torch.Generator], Sample]
    features: Callable[[Images], Features]
    sigma: float
    eps: float
    normal_nats: float
    worst_nats: float | None
    classes: int = 0
    exact: bool = True
    tells: Literal["image", "label"] = "image"
    repeats: int = 1

    def sample(self, count: int, seed: int) -> Sample:
        """Return a seeded sample of the channel's inputs."""
        return self.draw(count, keyed_generator(seed, Purpose.CHANNEL_SAMPLE))

    def noiseless(self) -> Encoder:
        """Return the encoder without the channel's noise, for estimators that bring their own."""
        return lambda images: self._encoded(self.features(images))

    def noisy(self, seed: int) -> Encoder:
        """Return the encoder with fresh noise at every call, reproducible as a sequence."""
        generator = keyed_generator(seed, Purpose.CHANNEL_NOISE)

        def encode(images: Images) -> Encoded:
            features = self.features(images)
            noise = torch.randn(features.shape, generator=generator).to(features)
            return self._encoded(features + self.sigma * noise)

        return encode

    def _encoded(self, features: Features) -> Encoded:
        answers = features.log_softmax(1) if self.classes else features.new_empty(len(features), 0)
        return Encoded(features, answers)


def channels() -> list[Channel]:
    """Return every channel, one entry a radius, in the order of the closed forms."""
    return [*_sign(), *_atoms(), *_reals(), *_vectors(), *_bits(), *_images(), *_labelled()]


def as_images(values: Tensor) -> Images:
    """Return reals (N, D) as one-row images (N, 1, 1, D)."""
    return (0.5 + values / SPAN)[:, None, None, :]


def as_values(images: Images) -> Tensor:
    """Return the reals (N, D) that one-row images stand for."""
    return (images.flatten(1) - 0.5) * SPAN


def _sign() -> list[Channel]:
    table = [(1.0, 1.0, 0.1), (1.0, 1.0, 0.5), (0.6, 1.0, 0.5), (0.6, 1.0, 0.7), (1.0, 1.0, 1.0), (1.0, 1.0, 2.0),
             (1.7321, 1.3229, 0.433), (0.0, 1.0, 0.5)]  # fmt: skip
    return [_sign_channel(*row) for row in table]


def _sign_channel(mean: float, spread: float, shift: float) -> Channel:
    truth = sign_of_gaussian(mean, spread, shift)

    def draw(count: int, generator: torch.Generator) -> Sample:
        labels = torch.arange(count) % 2
        values = (2.0 * labels - 1) * mean + spread * _paired_quantiles(count, generator)
        return _shuffled(Sample(as_images(values[:, None]), labels), generator)

    parameters = f"mean {mean:g}, spread {spread:g}, shift {shift:g}"
    return Channel("sign of a Gaussian mixture", parameters, draw, _sign_logits, 0.0, shift / SPAN, truth.normal,
                   truth.worst, classes=2)  # fmt: skip


def _sign_logits(images: Images) -> Features:
    """(-1, 1) or (1, -1) by the sign; the gradient is that of the input itself, as the sign has none."""
    value = as_values(images)
    sign = torch.where(value > 0, 1.0, -1.0) + value - value.detach()
    return torch.cat([-sign, sign], 1)


def _atoms() -> list[Channel]:
    rows = []
    for sigma in (1.0, 0.5, 0.25):
        for shift in (0.1, 0.25, 0.5, 0.75, 1.0):
            truth = two_points(sigma, shift)
            rows.append(_real("two points", sigma, shift, truth, _atom_source((-1.0, 1.0))))
    for sigma in (0.25, 1.0):
        for shift in (0.1, 0.25, 0.4, 0.5, 0.75):
            truth = three_points(sigma, shift)
            rows.append(_real("three points", sigma, shift, truth, _atom_source((-1.0, 0.0, 1.0))))
    return rows


def _reals() -> list[Channel]:
    rows = []
    for sigma in (2.0, 1.0, 0.5, 0.25, 0.1):
        for shift in (0.1, 0.25, 0.5, 1.0):
            channel = _real("Gaussian", sigma, shift, gaussian(sigma, shift), _normal_quantiles)
            rows.append(channel)
    for sigma in (1.0, 0.5, 0.25):
        for shift in (0.1, 0.25, 0.5, 0.75):
            rows.append(_real("uniform", sigma, shift, uniform(sigma, shift), _uniform_quantiles))
    return rows


def _real(
    name: str, sigma: float, shift: float, truth: tuple[float, float], source: Callable[[int, torch.Generator], Tensor]
) -> Channel:
    def draw(count: int, generator: torch.Generator) -> Sample:
        values = source(count, generator)
        return _shuffled(Sample(as_images(values[:, None]), torch.zeros(count, dtype=torch.long)), generator)

    # under 0.25 collapsing to atoms beats soft-thresholding: the closed form is only an upper bound of the worst case
    return Channel(name, f"sigma {sigma:g}, shift {shift:g}", draw, as_values, sigma, shift / SPAN, truth[0], truth[1],
                   exact=sigma >= 0.25)  # fmt: skip


def _vectors() -> list[Channel]:
    rows = []
    for dimensions in (2, 5, 10, 20):
        for nats in (0.5, 1.0, 2.0):
            sigma = 1 / sqrt(torch.tensor(2 * nats / dimensions).exp().item() - 1)
            rows.append(_vector(dimensions, nats, sigma))
    return rows


def _vector(dimensions: int, nats: float, sigma: float) -> Channel:
    def draw(count: int, generator: torch.Generator) -> Sample:
        values = torch.randn(count, dimensions, generator=generator)
        return Sample(as_images(values), torch.zeros(count, dtype=torch.long))

    return Channel(f"{dimensions}-d Gaussian", f"sigma {sigma:.4g}", draw, as_values, sigma, 0.0, nats, None,
                   repeats=4)  # fmt: skip


def _bits() -> list[Channel]:
    return [_bit_channel(count) for count in (0, 1, 2, 3)]


def _bit_channel(count: int) -> Channel:
    classes = max(2, 2**count)

    def draw(total: int, generator: torch.Generator) -> Sample:
        labels = torch.arange(total) % 2**count
        values = _codes(labels, count) if count else torch.rand(total, 1, generator=generator)
        return _shuffled(Sample(as_images(values), labels), generator)

    def features(images: Images) -> Features:
        values = as_values(images)
        codes = _codes(torch.arange(classes), count) if count else torch.ones(2, 1)
        scores = values @ codes.T.to(values)
        return 0 * scores if not count else 4 * scores

    name = f"{count} noiseless bits" if count else "constant"
    return Channel(name, "eps 0", draw, features, 0.0, 0.0, bits(count), None, classes=classes)


def _codes(numbers: Tensor, count: int) -> Tensor:
    """The binary digits of numbers (N,) as -1 and 1: (N, count)."""
    return 2.0 * ((numbers[:, None] >> torch.arange(count)) & 1) - 1


def _images() -> list[Channel]:
    return [_picture(size, sigma, shift) for size in (8, 16) for sigma in (1.0, 0.5, 0.25) for shift in (0.25, 0.5)]


def _picture(size: int, sigma: float, shift: float, spread: float = 0.1) -> Channel:
    """Noise images of which one smooth projection, of deviation one, is told through Gaussian noise."""
    pattern = torch.outer(*2 * [torch.linspace(0, 3.14159, size).sin()])
    weights = (pattern / (pattern.norm() * spread)).flatten()
    truth = gaussian(sigma, shift)

    def draw(count: int, generator: torch.Generator) -> Sample:
        pixels = spread * torch.randn(count, size * size, generator=generator)
        # the told projection is stratified like the reals; the rest of the image is free
        told = _normal_quantiles(count, generator)[torch.randperm(count, generator=generator)]
        pixels += torch.outer(told - pixels @ weights, weights / weights.square().sum())
        return Sample((0.5 + pixels).view(-1, 1, size, size).clamp(0, 1), torch.zeros(count, dtype=torch.long))

    def features(images: Images) -> Features:
        return ((images.flatten(1) - 0.5) @ weights.to(images))[:, None]

    eps = shift / float(weights.abs().sum())
    name = f"projection of {size}x{size} images"
    return Channel(name, f"sigma {sigma:g}, shift {shift:g}", draw, features, sigma, eps, *truth)


def _labelled() -> list[Channel]:
    return [_labelled_channel(sigma, shift) for sigma in (1.0, 0.5) for shift in (0.25, 0.5)]


def _labelled_channel(sigma: float, shift: float) -> Channel:
    """Two Gaussian classes at -1 and 1.

    Moving both towards each other is the worst case: the moved pair keeps a monotone likelihood ratio, so at every
    prior its best test is a threshold, and no pair in the ball makes that threshold err more.
    """
    truth = two_points(sigma, shift)

    def draw(count: int, generator: torch.Generator) -> Sample:
        labels = torch.arange(count) % 2
        noise = _paired_quantiles(count, generator)
        return _shuffled(Sample(as_images((2.0 * labels - 1 + sigma * noise)[:, None]), labels), generator)

    parameters = f"sigma {sigma:g}, shift {shift:g}"
    return Channel("labels of two Gaussians", parameters, draw, as_values, 0.0, shift / SPAN, truth.normal,
                   truth.worst, tells="label")  # fmt: skip


def _atom_source(points: tuple[float, ...]) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, _generator: torch.tensor(points)[torch.arange(count) % len(points)]


def _normal_quantiles(count: int, generator: torch.Generator) -> Tensor:
    """One standard normal draw from each of `count` equally likely cells."""
    cells = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.special.ndtri(cells.double().clamp(1e-12, 1 - 1e-12)).float()


def _paired_quantiles(count: int, generator: torch.Generator) -> Tensor:
    """The same quantiles for two classes that take turns."""
    return _normal_quantiles((count + 1) // 2, generator).repeat_interleave(2)[:count]


def _uniform_quantiles(count: int, generator: torch.Generator) -> Tensor:
    return 2 * (torch.arange(count) + torch.rand(count, generator=generator)) / count - 1


def _shuffled(sample: Sample, generator: torch.Generator) -> Sample:
    order = torch.randperm(len(sample.images), generator=generator)
    return Sample(sample.images[order], sample.labels[order])
