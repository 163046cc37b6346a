"""Projected descent in pixels that moves features together, the worst-case search of a representation.

One loop takes projected steps; the searches differ in the direction in which features are to move: to given targets,
or to where features are dense. Information is not convex in the images, so a search needs several starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.memory.counting import count_passes
from audit.adversary.memory.limit import allowed
from audit.adversary.passes import input_gradient
from audit.adversary.threat import ThreatModel
from audit.types import Encoder, Features, Images, copied_pixels, empty_pixels, image_slices, is_large

FeatureGradient = Callable[[Features], Features]
"""Maps features (N, D) to the gradient (N, D) of an objective with respect to them."""

BatchGradient = Callable[[Images, slice], Tensor]
"""Maps a batch of images (B, C, H, W) and its place among all images to the gradient with respect to its pixels."""


class Candidate(NamedTuple):
    """Perturbed images (N, C, H, W), their features (N, D), and the forward+backward passes of single images spent."""

    images: Images
    features: Features
    passes: float = 0.0


def step_sizes(largest: float, steps: int, hold: float = 0.0) -> list[float]:
    """Return `steps` sizes: `largest` for the share `hold` of them, then shrinking linearly to a tenth of it."""
    return [largest * (1 - 0.9 * (max(0.0, step / steps - hold) / (1 - hold))) for step in range(steps)]


class Descent(NamedTuple):
    """The clean images (N, C, H, W), the ball around each, the size of each step, and the largest batch."""

    clean: Images
    threat: ThreatModel
    sizes: list[float]
    batch_size: int

    def run(self, start: Images, next_gradient: Callable[[], BatchGradient]) -> Images:
        """Return the images (N, C, H, W) after all projected steps; `next_gradient` is called once before each step."""
        images, buffer, count = copied_pixels(start), empty_pixels(start.shape, start), allowed(self.batch_size)
        # bounds take as much memory as the images: for many of them they are computed again in every step
        bounds = None if is_large(start) else self.threat.step_bounds(self.clean)
        for size in self.sizes:
            gradient_of = next_gradient()
            for batch in image_slices(images, count):
                descent = gradient_of(images[batch], batch), size
                legal = [each[batch] for each in bounds] if bounds else self.threat.step_bounds(self.clean[batch])
                self.threat.step_into(buffer[batch], images[batch], descent, *legal)
                count_passes(len(images[batch]))
            images, buffer = buffer, images
        return images


@dataclass(frozen=True)
class FeatureDescent:
    """Projected descent of images along gradients given for their features.

    `clean` (N, C, H, W) are the centres of the balls. The step size is `relative_step` * eps for the share `hold` of
    the steps, then shrinks linearly to a tenth of it.
    """

    encoder: Encoder
    clean: Images
    threat: ThreatModel
    relative_step: float = 0.2
    batch_size: int = 256
    hold: float = 0.0

    def run(self, feature_gradient: FeatureGradient, start: Candidate, steps: int) -> Candidate:
        """Return the candidate after `steps` projected steps, each of one pass an image.

        The gradient is computed for all images at once from the features of the step before; the features returned
        are those of the last pass, one step behind the images.
        """
        features = start.features.clone()

        def next_gradient() -> BatchGradient:
            direction = feature_gradient(features)

            def gradient_of(images: Images, batch: slice) -> Tensor:
                gradient, features[batch] = self._pixel_gradient(images, direction[batch])
                return gradient

            return gradient_of

        sizes = step_sizes(self.threat.eps * self.relative_step, steps, self.hold)
        images = Descent(self.clean, self.threat, sizes, self.batch_size).run(start.images, next_gradient)
        return Candidate(images, features, start.passes + steps * len(images))

    def _pixel_gradient(self, images: Images, direction: Features) -> tuple[Tensor, Features]:
        leaf = images.detach().requires_grad_()
        features = self.encoder(leaf).features
        return input_gradient(features, leaf, direction), features.detach()


def towards(targets: Features) -> FeatureGradient:
    """Return the gradient of |f - t|^2 / 2 for targets t (N, D), or (D,) for one common target."""
    return lambda features: features - targets


def k_means(features: Features, count: int, generator: torch.Generator, rounds: int = 10) -> tuple[Features, Tensor]:
    """Return `count` centres (K, D) of features (N, D), and the index of each vector's nearest centre (N,).

    Source: Lloyd 1982, with the k-means++ seeding of Arthur & Vassilvitskii 2007.
    """
    mean = features.mean(0)
    features = features - mean  # cdist loses the distances between vectors far from zero
    first = int(torch.randint(len(features), (), generator=generator))
    centres = features[first : first + 1]
    distance = (features - centres).square().sum(1)
    while len(centres) < count and float(distance.max()) > 0:
        chosen = int(torch.multinomial(distance.cpu(), 1, generator=generator))
        centres = torch.cat([centres, features[chosen : chosen + 1]])
        distance = torch.minimum(distance, (features - centres[-1]).square().sum(1))
    for _ in range(rounds):
        nearest = torch.cdist(features, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        sizes = nearest.bincount(minlength=len(centres)).to(features)
        centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), centres)
    return centres + mean, torch.cdist(features, centres).argmin(1)


def most_reachable(
    descent: FeatureDescent, start: Candidate, centres: Features, trial: int = 50, steps: int = 8
) -> tuple[Features, float]:
    """Return the centre (D,) with the smallest mean distance after a trial on a few images, and the passes spent."""
    few = FeatureDescent(
        descent.encoder, descent.clean[:trial], descent.threat, 2 * descent.relative_step, descent.batch_size
    )
    first = Candidate(start.images[:trial], start.features[:trial])
    distances = []
    for centre in centres:
        reached = few.run(towards(centre), first, steps)
        # the mean distance: a mean square is dominated by images that cannot move, a median ignores half of them
        distances.append(float((reached.features - centre).square().sum(1).sqrt().mean()))
    return centres[distances.index(min(distances))], float(len(centres) * steps * len(first.images))
