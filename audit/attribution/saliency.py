"""Where in an image the information of a layer lies: the gradient of the smoothed information, and its alignment.

Source: Zhu, Zhang & Evans 2020, Figures 4 and 5 (saliency of the objective); Etmann et al. 2019, "On the Connection
Between Adversarial Robustness and Saliency Map Interpretability", Definition 3 (alignment).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.gradients import input_gradient
from audit.attribution.receptive_field import Read
from audit.errors import UsageError
from audit.information.gaussian_mixture import mean_shift
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Images

_MOST = 1e4  # beyond it all are one
_APART, _FEW = 1e-12, 0.05  # a pull this small, in deviations of the noise, is rounding; so few may be without one


class Saliency(NamedTuple):
    """Maps (N, C, H, W), n times the gradient of the information in nats; and the noise they were read through."""

    maps: Images
    noise: float


@dataclass(frozen=True)
class SaliencySettings:
    """How the objective is read: noise in deviations of the layer (root mean square), and how many draws of it.

    The noise is doubled while it leaves more than a twentieth of the images told apart from all others for certain, as
    layers of many dimensions do: there the information has no gradient. More draws make the gradient less random;
    `batch_size` bounds memory and decides nothing.
    """

    noise: float = 0.5
    draws: int = 16
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.noise < float("inf"):
            raise UsageError(f"noise {self.noise!r} must be above 0 and finite: it is in deviations of the layer")
        for name in ("draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} of a saliency map must be at least 1")


class Alignment(NamedTuple):
    """How far maps follow their images, one value an image (N,): `nan` where a map is zero everywhere.

    `alignment` is |<x, m>| / |m| of Etmann et al., `cosine` the same divided by |x|, and `correlation` the cosine once
    the mean of image and of map is taken off, which a map of one constant sign does not win.
    """

    alignment: Tensor
    cosine: Tensor
    correlation: Tensor


def layer_saliency(read: Read, images: Images, settings: SaliencySettings) -> Saliency:
    """Return the gradient of I(X; g(X) + noise) to each of the images (N, C, H, W), n times over."""
    features = _features(read, images, settings.batch_size)
    pull, noise = _pull(features, settings)
    return Saliency(_pulled_back(read, images, pull, settings.batch_size), noise)


def feature_saliency(read: Read, images: Images, column: int, settings: SaliencySettings) -> Saliency:
    """Return the gradient (N, C, H, W) of I(X; g_i(X) + noise) of one coordinate i of the layer, n times over.

    The noise is in deviations of that coordinate. Raises UsageError for a coordinate that is not there.
    """
    features = _features(read, images, settings.batch_size)
    if not 0 <= column < features.shape[1]:
        raise UsageError(f"coordinate {column} is not there: the layer has 0 to {features.shape[1] - 1}")
    pull = torch.zeros_like(features)
    pull[:, column : column + 1], noise = _pull(features[:, column : column + 1], settings)
    return Saliency(_pulled_back(read, images, pull, settings.batch_size), noise)


def alignment(images: Images, maps: Images) -> Alignment:
    """Return how far maps (N, C, H, W) follow their images (N, C, H, W).

    Source: Etmann et al. 2019, Definition 3: |<x, m>| / |m|.
    """
    x, m = images.flatten(1).double(), maps.flatten(1).double()
    product = (x * m).sum(1).abs() / m.norm(dim=1)
    flat, level = x - x.mean(1, keepdim=True), m - m.mean(1, keepdim=True)
    correlation = (flat * level).sum(1).abs() / (flat.norm(dim=1) * level.norm(dim=1))
    return Alignment(product, product / x.norm(dim=1), correlation)


def _features(read: Read, images: Images, batch_size: int) -> Features:
    with torch.no_grad():
        return torch.cat([read(batch) for batch in images.split(batch_size)])


def _pull(features: Features, settings: SaliencySettings) -> tuple[Features, float]:
    """Return n times the gradient (N, D) of the smoothed information to the features, and the noise.

    It points away from where the features mix.
    """
    values = features.double()
    deviation = float(values.var(0, correction=0).mean().sqrt())
    noise = settings.noise
    if deviation <= 1e-6 * float(values.abs().max()):
        return torch.zeros_like(features), noise  # features that vary by rounding alone tell nothing
    values = (values - values.mean(0)) / deviation
    while True:
        away = mean_shift(values / noise, keyed_generator(settings.seed, Purpose.SALIENCY_DRAWS), settings.draws)
        if float((away.norm(dim=1) < _APART).double().mean()) <= _FEW or noise > _MOST:
            return (away / (noise * deviation)).to(features), noise
        noise *= 2


def _pulled_back(read: Read, images: Images, pull: Features, batch_size: int) -> Images:
    """Return the vector-Jacobian products (N, C, H, W): one pass an image."""
    maps = []
    for batch, weights in zip(images.split(batch_size), pull.split(batch_size), strict=True):
        leaf = batch.detach().requires_grad_()
        maps.append(input_gradient(read(leaf), leaf, weights))
    return torch.cat(maps)
