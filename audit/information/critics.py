"""Critic networks T(x, z): scores of all pairs of images and feature vectors of a batch."""

from collections.abc import Callable
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audit.adversary.passes import deviations
from audit.information.settings import CriticShape
from audit.types import Features, Images, Scores

PAIRS_AT_ONCE = 2**16
"""Number of pairs that the concatenated critic evaluates at once, which limits memory."""


class DotProductCritic(nn.Module):
    """T(x, z) = 4 <f(x), h(z)> / sqrt(d), whose scores of all N x M pairs need only N + M embeddings.

    f applies strided convolutions to the whole image, or dense layers to a vector (an image one pixel high). h
    standardises each feature by the samples that the critic is built on, so that its unit has no effect. There is no
    batch norm: scores would depend on the other samples of the batch.
    """

    def __init__(self, images: Images, features: Features, shape: CriticShape, generator: torch.Generator) -> None:
        super().__init__()
        self.of_image = _image_branch(images, shape, generator)
        self.of_feature = _VectorBranch(features, shape.width, shape.embedding)
        # a scale of 1 / sqrt(d) needs too many steps to reach several nats (measured)
        self.scale = 4 / sqrt(shape.embedding)
        _initialise(self, generator)
        _scale_down(self.of_image.embed, self.of_image.skip)

    def forward(self, images: Images, features: Features) -> Scores:
        """Return scores (N, M) of images (N, C, H, W) against features (M, D)."""
        scores: Scores = self.of_image(images) @ self.of_feature(features).T * self.scale
        return scores


class ConcatenatedCritic(nn.Module):
    """T(x, z) = t([f(x), h(z)]) with dense layers t, evaluated for each of the N x M pairs.

    The first layer of t is linear: it is applied to images and features separately and added for pairs.
    """

    def __init__(self, images: Images, features: Features, shape: CriticShape, generator: torch.Generator) -> None:
        super().__init__()
        self.of_image = _image_branch(images, shape, generator)
        self.of_feature = _VectorBranch(features, shape.width, shape.embedding)
        self.first_image = nn.Linear(shape.embedding, shape.width)
        self.first_feature = nn.Linear(shape.embedding, shape.width)
        self.rest = nn.Sequential(
            nn.ReLU(), nn.Linear(shape.width, shape.width), nn.ReLU(), nn.Linear(shape.width, 1)
        )  # fmt: skip
        _initialise(self, generator)
        _scale_down(self.rest[-1])

    def forward(self, images: Images, features: Features) -> Scores:
        """Return scores (N, M) of images (N, C, H, W) against features (M, D).

        Hidden activations (rows, M, width) are held for `PAIRS_AT_ONCE` pairs at a time; for gradients they are
        computed again in the backward pass.
        """
        of_image = self.first_image(self.of_image(images))
        of_feature = self.first_feature(self.of_feature(features))
        rows = of_image.split(max(1, PAIRS_AT_ONCE // len(features)))
        if not torch.is_grad_enabled():
            return torch.cat([self._rows(some, of_feature) for some in rows])
        return torch.cat([checkpoint(self._rows, some, of_feature, use_reentrant=False) for some in rows])

    def _rows(self, of_image: Tensor, of_feature: Tensor) -> Scores:
        scores: Scores = self.rest(of_image[:, None] + of_feature[None]).squeeze(2)
        return scores


CRITICS: dict[str, Callable[[Images, Features, CriticShape, torch.Generator], nn.Module]] = {
    "concatenated": ConcatenatedCritic,
    "dot-product": DotProductCritic,
}


class _ImageBranch(nn.Module):
    mean: Tensor
    deviation: Tensor

    def __init__(self, images: Images, shape: CriticShape, generator: torch.Generator) -> None:
        super().__init__()
        self._shape, self._generator = shape, generator
        view = self._view(images)
        self.register_buffer("mean", view.mean((0, 2, 3), keepdim=True))
        self.register_buffer("deviation", view.std().clamp_min(1e-6))
        channels, height, width = view.shape[1:]
        layers: list[nn.Module] = []
        outputs = shape.channels
        # at least one, because the skip connection alone is linear in the image
        while not layers or max(height, width) > 4:
            layers += [nn.Conv2d(channels, outputs, 3, 2, 1), nn.GroupNorm(1, outputs), nn.ReLU()]
            channels, outputs = outputs, 2 * outputs
            height, width = (height + 1) // 2, (width + 1) // 2
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.embed = nn.Linear(channels * height * width, shape.embedding)
        self.skip = nn.Linear(view[0].numel(), shape.embedding)

    def forward(self, images: Images) -> Tensor:
        view = self._view(images)
        if self.training:
            view = self._augment(view)
        pixels = (view - self.mean) / self.deviation
        return self.embed(self._dropout(self.convolutions(pixels))) + self.skip(self._dropout(pixels.flatten(1)))

    def _dropout(self, values: Tensor) -> Tensor:
        if not (self.training and self._shape.dropout):
            return values
        # nn.Dropout draws its mask from the global generator
        kept = torch.rand(values.shape, generator=self._generator).to(values) >= self._shape.dropout
        return values * kept / (1 - self._shape.dropout)

    def _view(self, images: Images) -> Tensor:
        """Return the image, averaged down if it is larger than the view."""
        most, (height, width) = self._shape.view, images.shape[-2:]
        if max(height, width) <= most:
            return images
        return F.adaptive_avg_pool2d(images, (min(height, most), min(width, most)))

    def _augment(self, view: Tensor) -> Tensor:
        """Shift the batch by up to a sixteenth of the view, and mirror it if `flip` is set, to reduce overfitting."""
        most = min(view.shape[-2:]) // 16
        if most:
            down, right = (int(s) for s in torch.randint(2 * most + 1, (2,), generator=self._generator))
            padded = F.pad(view, (most, most, most, most), mode="replicate")
            view = padded[..., down : down + view.shape[-2], right : right + view.shape[-1]]
        if self._shape.flip and bool(torch.rand((), generator=self._generator) < 0.5):
            view = view.flip(-1)
        return view


class _VectorBranch(nn.Module):
    """Dense layers with a linear skip connection, on vectors (N, ...) standardised by the samples it is built on.

    The skip connection halves the error on a Gaussian channel in 20 dimensions (measured).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, samples: Tensor, width: int, embedding: int) -> None:
        super().__init__()
        vectors = samples.flatten(1)
        self.register_buffer("mean", vectors.mean(0))
        spread = deviations(vectors, correction=0)
        # dividing by the deviation of a constant entry would amplify rounding errors
        self.register_buffer("deviation", torch.where(spread > 1e-7 * vectors.abs().amax(), spread, torch.inf))
        entries = vectors.shape[1]
        self.layers = nn.Sequential(nn.Linear(entries, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.embed = nn.Linear(width, embedding)
        self.skip = nn.Linear(entries, embedding)

    def forward(self, samples: Tensor) -> Tensor:
        entries = _compress_outliers((samples.flatten(1) - self.mean) / self.deviation)
        return self.embed(self.layers(entries)) + self.skip(entries)


def _compress_outliers(entries: Tensor) -> Tensor:
    """Return entries that grow logarithmically beyond three deviations, to limit the influence of one sample."""
    beyond = (entries.abs() - 3).clamp_min(0)
    return entries.clamp(-3, 3) + entries.sign() * beyond.log1p()


def _image_branch(images: Images, shape: CriticShape, generator: torch.Generator) -> "_VectorBranch | _ImageBranch":
    """Return convolutions for images, dense layers for vectors, which have no neighbourhoods to convolve or shift."""
    if images.shape[1] == images.shape[2] == 1:
        return _VectorBranch(images, shape.width, shape.embedding)
    return _ImageBranch(images, shape, generator)


def build_critic(images: Images, features: Features, shape: CriticShape, generator: torch.Generator) -> nn.Module:
    """Return a new critic on the device of the images, which standardises by the samples given."""
    # the constructors of torch draw weights from the global generator; keyed draws replace them
    with torch.random.fork_rng(devices=[]):
        return CRITICS[shape.name](images, features, shape, generator).to(images.device)


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight from the given generator, so that the global seed has no effect."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            fan_in = part.weight[0].numel()
            limit = 1 / sqrt(fan_in)
            with torch.no_grad():
                part.weight.copy_((2 * torch.rand(part.weight.shape, generator=generator) - 1) * limit)
                if part.bias is not None:
                    part.bias.copy_((2 * torch.rand(part.bias.shape, generator=generator) - 1) * limit)


@torch.no_grad()
def _scale_down(*output: nn.Module) -> None:
    """Reduce the weights of output layers, so that a new critic scores all pairs almost equally: no information."""
    for part in output:
        for weight in part.parameters():
            weight.mul_(0.01)
