"""Saliency maps: gradients of the smoothed information in a layer to the images, and their alignment with them.

Source: Zhu, Zhang & Evans 2020, Figures 4 and 5 (saliency of the objective); Etmann et al. 2019, "On the Connection
Between Adversarial Robustness and Saliency Map Interpretability", Definition 3 (alignment).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.memory.limit import allowed
from audit.adversary.passes import input_gradient
from audit.errors import UsageError
from audit.information.gaussian_mixture import mean_shift
from audit.random_keys import Purpose, keyed_generator
from audit.types import FeatureMap, Features, Images

_MAX_NOISE = 1e4  # all images are indistinguishable
_ZERO_SHIFT = 1e-12  # mean shifts below this, in deviations of the noise, are rounding errors
_MAX_ISOLATED = 0.05  # fraction of images that may have no mean shift


class Saliency(NamedTuple):
    """Maps (N, C, H, W), N times the gradient of the information in nats, and the noise used."""

    maps: Images
    noise: float


@dataclass(frozen=True)
class SaliencySettings:
    """Noise, in units of the layer's root mean square deviation, and the number of its draws.

    The noise is doubled while more than 5 % of the images are separated from all others beyond rounding, as in
    high-dimensional layers, because there the information has no gradient. More draws reduce the variance of the
    gradient. `batch_size` bounds memory and affects no value.
    """

    noise: float = 0.5
    draws: int = 16
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.noise < float("inf"):
            raise UsageError(f"noise {self.noise!r} must be above 0 and finite: its unit is the deviation of the layer")
        for name in ("draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} of a saliency map must be at least 1")


class Alignment(NamedTuple):
    """Alignment of maps m with their images x, one value (N,) an image; NaN for a map that is zero.

    `alignment` is |<x, m>| / |m| (Etmann et al. 2019), `cosine` is that divided by |x|, and `correlation` is the cosine
    of x and m after subtraction of their means, which a constant map does not maximise.
    """

    alignment: Tensor
    cosine: Tensor
    correlation: Tensor


def layer_saliency(encode: FeatureMap, images: Images, settings: SaliencySettings) -> Saliency:
    """Return N times the gradient of I(X; g(X) + noise) to the images (N, C, H, W)."""
    features = _encode_in_batches(encode, images, settings.batch_size)
    gradient, noise = _feature_gradient(features, settings)
    return Saliency(_image_gradient(encode, images, gradient, settings.batch_size), noise)


def feature_saliency(encode: FeatureMap, images: Images, column: int, settings: SaliencySettings) -> Saliency:
    """Return N times the gradient (N, C, H, W) of I(X; g_i(X) + noise) for one coordinate i of the layer.

    The unit of the noise is the deviation of that coordinate. Raises UsageError for a coordinate out of range.
    """
    features = _encode_in_batches(encode, images, settings.batch_size)
    if not 0 <= column < features.shape[1]:
        raise UsageError(f"coordinate {column} is out of range: the layer has 0 to {features.shape[1] - 1}")
    gradient = torch.zeros_like(features)
    gradient[:, column : column + 1], noise = _feature_gradient(features[:, column : column + 1], settings)
    return Saliency(_image_gradient(encode, images, gradient, settings.batch_size), noise)


def alignment(images: Images, maps: Images) -> Alignment:
    """Return the alignment of maps (N, C, H, W) with their images (N, C, H, W).

    Source: Etmann et al. 2019, Definition 3: |<x, m>| / |m|.
    """
    x, m = images.flatten(1).double(), maps.flatten(1).double()
    product = (x * m).sum(1).abs() / m.norm(dim=1)
    centred_x, centred_m = x - x.mean(1, keepdim=True), m - m.mean(1, keepdim=True)
    correlation = (centred_x * centred_m).sum(1).abs() / (centred_x.norm(dim=1) * centred_m.norm(dim=1))
    return Alignment(product, product / x.norm(dim=1), correlation)


def _encode_in_batches(encode: FeatureMap, images: Images, batch_size: int) -> Features:
    with torch.no_grad():
        return torch.cat([encode(batch) for batch in images.split(allowed(batch_size))])


def _feature_gradient(features: Features, settings: SaliencySettings) -> tuple[Features, float]:
    """Return N times the gradient (N, D) of the smoothed information to the features (N, D), and the noise."""
    values = features.double()
    deviation = float(values.var(0, correction=0).mean().sqrt())
    noise = settings.noise
    if deviation <= 1e-6 * float(values.abs().max()):
        return torch.zeros_like(features), noise  # constant up to rounding: no information
    values = (values - values.mean(0)) / deviation
    while True:
        shift = mean_shift(values / noise, keyed_generator(settings.seed, Purpose.SALIENCY_DRAWS), settings.draws)
        isolated = float((shift.norm(dim=1) < _ZERO_SHIFT).double().mean())
        if isolated <= _MAX_ISOLATED or noise > _MAX_NOISE:
            return (shift / (noise * deviation)).to(features), noise
        noise *= 2


def _image_gradient(encode: FeatureMap, images: Images, gradient: Features, batch_size: int) -> Images:
    """Return the vector-Jacobian products (N, C, H, W) of gradients (N, D) to the features."""
    maps = []
    size = allowed(batch_size)
    for batch, weights in zip(images.split(size), gradient.split(size), strict=True):
        leaf = batch.detach().requires_grad_()
        maps.append(input_gradient(encode(leaf), leaf, weights))
    return torch.cat(maps)
