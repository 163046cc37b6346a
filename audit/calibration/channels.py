"""The type of calibration channels: images as inputs, known normal and worst-case mutual information.

Real inputs are encoded as pixels around 0.5, and radii are scaled with them, so estimators run with the settings, code
and pixel range of photographs. Samples are stratified, which removes most of the sampling error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from audit.calibration.closed_forms import ExactInformation
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images, Labels

SPAN = 16.0  # reals in [-8, 8] become pixels in [0, 1]


class ChannelSample(NamedTuple):
    """Images (N, C, H, W) and labels (N,), which are zero for a channel without classes."""

    images: Images
    labels: Labels


@dataclass(frozen=True)
class Channel:
    """A channel: its inputs, its noiseless map to features, its noise, and its information in nats.

    `eps` is in pixels. `classes` is the number of classes if features are logits, else 0. The information is I(X; Z)
    about the image or I(Y; Z) about its label, by `target`. `worst_is_exact` is false if the closed form of
    the worst case is only an upper bound of the infimum. Estimates are averaged over `repeats` samples where a sample
    cannot be stratified. `samples` replaces the plan's number. For a "smoothed image" the estimator adds noise that it
    fits to the features: `at_noise` gives both values at any noise, in deviations of each feature.
    """

    name: str
    parameters: str
    draw: Callable[[int, torch.Generator], ChannelSample]
    features: Callable[[Images], Features]
    sigma: float
    eps: float
    normal_nats: float
    worst_nats: float | None
    classes: int = 0
    worst_is_exact: bool = True
    target: Literal["image", "label", "smoothed image"] = "image"
    repeats: int = 1
    samples: int | None = None
    at_noise: Callable[[float], ExactInformation] | None = None

    @property
    def title(self) -> str:
        """The name with the parameters, which no other channel has."""
        return f"{self.name}, {self.parameters}"

    def sample(self, count: int, seed: int) -> ChannelSample:
        """Return a seeded sample of `count` inputs."""
        return self.draw(count, keyed_generator(seed, Purpose.CHANNEL_SAMPLE))

    def noiseless_encoder(self) -> Encoder:
        """Return the encoder without the channel's noise, for estimators that add noise themselves."""
        return lambda images: self._encode(self.features(images))

    def noisy_encoder(self, seed: int) -> Encoder:
        """Return the channel as an encoder, with new channel noise at every call; the sequence is reproducible."""
        generator = keyed_generator(seed, Purpose.CHANNEL_NOISE)

        def encode(images: Images) -> Encoded:
            features = self.features(images)
            noise = torch.randn(features.shape, generator=generator).to(features)
            return self._encode(features + self.sigma * noise)

        return encode

    def _encode(self, features: Features) -> Encoded:
        return Encoded(features, features.log_softmax(1) if self.classes else features.new_empty(len(features), 0))


def as_images(values: Tensor) -> Images:
    """Return reals (N, D) as one-row images (N, 1, 1, D)."""
    return (0.5 + values / SPAN)[:, None, None, :]


def as_values(images: Images) -> Tensor:
    """Return the reals (N, D) encoded by one-row images (N, 1, 1, D)."""
    return (images.flatten(1) - 0.5) * SPAN


def normal_quantiles(count: int, generator: torch.Generator) -> Tensor:
    """Return one standard normal draw from each of `count` equally likely strata."""
    levels = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.special.ndtri(levels.double().clamp(1e-12, 1 - 1e-12)).float()


def paired_normal_quantiles(count: int, generator: torch.Generator) -> Tensor:
    """Return the same normal quantiles for both of two alternating classes."""
    return normal_quantiles((count + 1) // 2, generator).repeat_interleave(2)[:count]


def uniform_quantiles(count: int, generator: torch.Generator) -> Tensor:
    """Return one draw from U[-1, 1] in each of `count` equally likely strata."""
    return 2 * (torch.arange(count) + torch.rand(count, generator=generator)) / count - 1


def shuffled(sample: ChannelSample, generator: torch.Generator) -> ChannelSample:
    """Return a sample in random order."""
    order = torch.randperm(len(sample.images), generator=generator)
    return ChannelSample(sample.images[order], sample.labels[order])
