"""Critic networks: an image and a feature vector in, a score out, for all pairs of a batch at once."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.errors import UnknownNameError, UsageError
from audit.types import Features, Images, Scores


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
    """T(x, z) = <f(x), h(z)> / sqrt(d): every pair of a batch for the price of its two embeddings.

    f sees the whole image through strided convolutions, h standardises each feature by the samples it is built
    on, so scaling a feature changes nothing. Layer norms throughout: batch statistics in a critic make single
    readings worthless.
    """

    def __init__(self, images: Images, features: Features, shape: CriticShape, generator: torch.Generator) -> None:
        super().__init__()
        self.of_image = _ImageBranch(images, shape, generator)
        self.of_feature = _FeatureBranch(features, shape)
        self.scale = 1 / sqrt(shape.embedding)
        _initialise(self, generator)

    def forward(self, images: Images, features: Features) -> Scores:
        """Return scores (N, N) of images (N, C, H, W) against features (N, D)."""
        scores: Scores = self.of_image(images) @ self.of_feature(features).T * self.scale
        return scores


CRITICS: dict[str, Callable[[Images, Features, CriticShape, torch.Generator], nn.Module]] = {
    "dot-product": DotProductCritic
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

    def forward(self, images: Images) -> Tensor:
        view = self._view(images)
        if self.training:
            view = self._varied(view)
        maps = self.convolutions((view - self.mean) / self.deviation)
        if self.training and self._shape.dropout:
            # our own draw: nn.Dropout takes its mask from the global generator
            kept = torch.rand(maps.shape, generator=self._generator).to(maps) >= self._shape.dropout
            maps = maps * kept / (1 - self._shape.dropout)
        return self.embed(maps)

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


class _FeatureBranch(nn.Module):
    mean: Tensor
    deviation: Tensor

    def __init__(self, features: Features, shape: CriticShape) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        spread = features.std(0, correction=0)
        # a feature that never varies must not be blown up to noise
        self.register_buffer("deviation", torch.where(spread > 1e-7 * features.abs().amax(), spread, torch.inf))
        width = shape.width
        self.layers = nn.Sequential(
            nn.Linear(features.shape[1], width), nn.LayerNorm(width), nn.ReLU(),
            nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(),
            nn.Linear(width, shape.embedding),
        )  # fmt: skip

    def forward(self, features: Features) -> Tensor:
        return self.layers((features - self.mean) / self.deviation)


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
