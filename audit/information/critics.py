"""Critic networks: an image and a feature vector in, a score out, for all pairs of a batch at once."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audit.errors import UnknownNameError, UsageError
from audit.types import Features, Images, Scores

PAIRS_AT_ONCE = 2**16
"""How many pairs the concatenated critic holds in memory at once."""


@dataclass(frozen=True)
class CriticShape:
    """How large a critic is and how its view of an image is varied while it trains.

    Images larger than `view` pixels are averaged down to it. `flip` mirrors half of the training batches in the
    critic's view only: right for photographs, wrong for digits.
    """

    name: str = "dot-product"
    width: int = 128
    embedding: int = 32
    channels: int = 32
    view: int = 16
    dropout: float = 0.2
    flip: bool = False

    def __post_init__(self) -> None:
        if self.name not in CRITICS:
            raise UnknownNameError("critic", self.name, CRITICS)
        for name in ("width", "embedding", "channels", "view"):
            if getattr(self, name) < 1:
                raise UsageError(f"critic {name} {getattr(self, name)!r} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"critic dropout {self.dropout!r} is outside [0, 1)")


class DotProductCritic(nn.Module):
    """T(x, z) = 4 <f(x), h(z)> / sqrt(d): every pair of a batch for the price of its two embeddings.

    f sees the whole image through strided convolutions, or a vector (an image one pixel high) through dense layers;
    h standardises each feature by the samples it is built on, so scaling a feature changes nothing. No batch norm:
    batch statistics in a critic make single readings worthless.
    """

    def __init__(self, images: Images, features: Features, shape: CriticShape, generator: torch.Generator) -> None:
        super().__init__()
        self.of_image = _image_branch(images, shape, generator)
        self.of_feature = _VectorBranch(features, shape.width, shape.embedding)
        # at a quarter of this, several nats were reached too slowly
        self.scale = 4 / sqrt(shape.embedding)
        _initialise(self, generator)
        _hush(self.of_image.embed, self.of_image.skip)

    def forward(self, images: Images, features: Features) -> Scores:
        """Return scores (N, M) of images (N, C, H, W) against features (M, D)."""
        scores: Scores = self.of_image(images) @ self.of_feature(features).T * self.scale
        return scores


class ConcatenatedCritic(nn.Module):
    """T(x, z) = t([f(x), h(z)]) with dense layers t on every pair: N x M times the price of one.

    The first layer of t is linear, so it is computed for images and features apart and added for pairs.
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
        _hush(self.rest[-1])

    def forward(self, images: Images, features: Features) -> Scores:
        """Return scores (N, M) of images (N, C, H, W) against features (M, D).

        Hidden values (rows, M, width) are held for `PAIRS_AT_ONCE` pairs at a time; where gradients are asked for,
        they are computed again on the way back.
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
        # one at least: without it the critic would be linear in the image
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
            view = self._varied(view)
        pixels = (view - self.mean) / self.deviation
        return self.embed(self._dropped(self.convolutions(pixels))) + self.skip(self._dropped(pixels.flatten(1)))

    def _dropped(self, values: Tensor) -> Tensor:
        if not (self.training and self._shape.dropout):
            return values
        # our own draw: nn.Dropout takes its mask from the global generator
        kept = torch.rand(values.shape, generator=self._generator).to(values) >= self._shape.dropout
        return values * kept / (1 - self._shape.dropout)

    def _view(self, images: Images) -> Tensor:
        """What the critic sees: the image, averaged down where it is large."""
        most, (height, width) = self._shape.view, images.shape[-2:]
        if max(height, width) <= most:
            return images
        return F.adaptive_avg_pool2d(images, (min(height, most), min(width, most)))

    def _varied(self, view: Tensor) -> Tensor:
        """Shift by up to a sixteenth of the view, mirror if asked to: a critic this size over-fits otherwise."""
        most = min(view.shape[-2:]) // 16
        if most:
            down, right = (int(s) for s in torch.randint(2 * most + 1, (2,), generator=self._generator))
            padded = F.pad(view, (most, most, most, most), mode="replicate")
            view = padded[..., down : down + view.shape[-2], right : right + view.shape[-1]]
        if self._shape.flip and bool(torch.rand((), generator=self._generator) < 0.5):
            view = view.flip(-1)
        return view


class _VectorBranch(nn.Module):
    """Dense layers, and a linear path beside them, on vectors (N, ...) standardised by the samples it is built on.

    The linear path is what a Gaussian channel needs: in 20 dimensions it halves what the critic misses.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, samples: Tensor, width: int, embedding: int) -> None:
        super().__init__()
        vectors = samples.flatten(1)
        self.register_buffer("mean", vectors.mean(0))
        spread = vectors.std(0, correction=0)
        # an entry that never varies must not be blown up to noise
        self.register_buffer("deviation", torch.where(spread > 1e-7 * vectors.abs().amax(), spread, torch.inf))
        entries = vectors.shape[1]
        self.layers = nn.Sequential(nn.Linear(entries, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.embed = nn.Linear(width, embedding)
        self.skip = nn.Linear(entries, embedding)

    def forward(self, samples: Tensor) -> Tensor:
        entries = _tamed((samples.flatten(1) - self.mean) / self.deviation)
        return self.embed(self.layers(entries)) + self.skip(entries)


def _tamed(entries: Tensor) -> Tensor:
    """Grow like the logarithm beyond three deviations: one far-off sample must not decide a value."""
    beyond = (entries.abs() - 3).clamp_min(0)
    return entries.clamp(-3, 3) + entries.sign() * beyond.log1p()


def _image_branch(images: Images, shape: CriticShape, generator: torch.Generator) -> "_VectorBranch | _ImageBranch":
    """A vector has no neighbourhoods: convolutions, shifts, flips and dropout are for images of two dimensions."""
    if images.shape[1] == images.shape[2] == 1:
        return _VectorBranch(images, shape.width, shape.embedding)
    return _ImageBranch(images, shape, generator)


def build_critic(images: Images, features: Features, shape: CriticShape, generator: torch.Generator) -> nn.Module:
    """Return a fresh critic on the device of the images, standardising by the samples given."""
    # torch's layers draw weights from the global generator as they are made, before ours replace them
    with torch.random.fork_rng(devices=[]):
        return CRITICS[shape.name](images, features, shape, generator).to(images.device)


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight from our own generator, so that no global seed decides a number."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            fan_in = part.weight[0].numel()
            limit = 1 / sqrt(fan_in)
            with torch.no_grad():
                part.weight.copy_((2 * torch.rand(part.weight.shape, generator=generator) - 1) * limit)
                if part.bias is not None:
                    part.bias.copy_((2 * torch.rand(part.bias.shape, generator=generator) - 1) * limit)


@torch.no_grad()
def _hush(*last: nn.Module) -> None:
    """Let a fresh critic say next to nothing: where there is nothing to learn, that is the best it can say."""
    for part in last:
        for weight in part.parameters():
            weight.mul_(0.01)
