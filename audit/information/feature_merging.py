"""Moving images so that their features come together: what every worst case of a representation is made of.

One loop takes projected steps in the pixels along a pull on the features; the pulls differ: to given targets, or to
where the features are dense. Information is not convex in the images, so a search needs several starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.gradients import input_gradient
from audit.adversary.threat import ThreatModel
from audit.types import Encoder, Features, Images

Pull = Callable[[Features], Features]
"""Maps features (N, D) to the direction (N, D) that each should leave along."""


class Moved(NamedTuple):
    """Images (N, C, H, W), features met on the way to them (N, D), and the passes spent."""

    images: Images
    features: Features
    passes: float = 0.0


@dataclass(frozen=True)
class Mover:
    """An encoder, the clean images (N, C, H, W) and the ball that each may be moved in.

    Steps are `relative_step` x eps for the share `hold` of them, and then shrink linearly to a tenth of it.
    """

    encoder: Encoder
    clean: Images
    threat: ThreatModel
    relative_step: float = 0.2
    batch_size: int = 256
    hold: float = 0.0

    def along(self, pull: Pull, start: Moved, steps: int) -> Moved:
        """Return the images after so many projected steps along a pull, one pass an image and step.

        The pull is computed for all images from the features met in the step before; the features returned are
        those of the last pass, one step behind the images.
        """
        images, features = start.images.clone(), start.features.clone()
        buffer, walls = torch.empty_like(images), self.threat.walls(self.clean)
        for done in range(steps):
            direction = pull(features)
            shrunk = max(0.0, done / steps - self.hold) / (1 - self.hold)
            size = self.threat.eps * self.relative_step * (1 - 0.9 * shrunk)
            for first in range(0, len(images), self.batch_size):
                some = slice(first, first + self.batch_size)
                gradient, features[some] = self._gradient(images[some], direction[some])
                self.threat.step_into(buffer[some], images[some], (gradient, size), *(wall[some] for wall in walls))
            images, buffer = buffer, images
        return Moved(images, features, start.passes + steps * len(images))

    def _gradient(self, images: Images, direction: Features) -> tuple[Tensor, Features]:
        leaf = images.detach().requires_grad_()
        features = self.encoder(leaf).features
        return input_gradient(features, leaf, direction), features.detach()


def towards(targets: Features) -> Pull:
    """Return the pull that takes each feature vector to its target: targets (N, D), or (D,) for one common target."""
    return lambda features: features - targets


def k_means(features: Features, count: int, generator: torch.Generator, rounds: int = 10) -> tuple[Features, Tensor]:
    """Return `count` centres (K, D) of features (N, D) and which one is each vector's nearest (N,).

    Source: Lloyd 1982, from the spread-out seeds of Arthur & Vassilvitskii 2007.
    """
    middle = features.mean(0)
    features = features - middle  # cdist loses the distances of vectors far from zero
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
    return centres + middle, torch.cdist(features, centres).argmin(1)


def hub(mover: Mover, start: Moved, centres: Features, trial: int = 50, steps: int = 8) -> tuple[Features, float]:
    """Return the centre (D,) that a short trial on a few images brings them nearest to, and the passes it cost."""
    few = Mover(mover.encoder, mover.clean[:trial], mover.threat, 2 * mover.relative_step, mover.batch_size)
    first = Moved(start.images[:trial], start.features[:trial])
    left = []
    for centre in centres:
        reached = few.along(towards(centre), first, steps)
        # plain distances: squares let a few that cannot be moved decide, a median the half that sits there already
        left.append(float((reached.features - centre).square().sum(1).sqrt().mean()))
    return centres[left.index(min(left))], float(len(centres) * steps * len(first.images))
