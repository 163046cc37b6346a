"""A gradient-free attack: descent along finite differences of the margin, one query for each direction.

For networks with masked gradients, in any norm. The search is deterministic and independent of other images.

Source: Guo et al. 2019, "Simple Black-box Adversarial Attacks" (orthonormal directions, of pixels or low frequencies);
Ilyas et al. 2018, "Black-box Adversarial Attacks with Limited Queries and Information" (gradients from differences).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.label_attack import margin
from audit.adversary.passes import Batches, outputs_of
from audit.adversary.threat import ThreatModel, per_image
from audit.errors import UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels, as_images, as_labels, standard_torch_state

_STEP = 0.4  # of a difference, in radii: rounding, noise and piecewise constant layers hide shorter ones
_LARGEST_CHANGE = 0.5  # of a pixel
_ROUND = 30  # directions between two moves, where queries do not suffice for all directions
_PROJECTED_STEPS, _STEP_LENGTH = 20, 0.25  # to the minimum of a linear margin; the length in radii


class QueryResult(NamedTuple):
    """The images (N, C, H, W) of smallest margin met, these margins (N,), and the number of forward passes."""

    images: Images
    margins: Tensor
    forwards: int


@dataclass(frozen=True)
class FiniteDifferences:
    """Gradient-free search with at most `queries` forward passes an image.

    If the queries suffice for one difference in every pixel, the gradient is estimated in full and again after every
    move. Larger images are queried along as many orthonormal directions as there are queries: cosines of the lowest
    frequencies, or in the l1 norm single pixels, preferably near the centre; first grey directions, then colours.
    `batch_size` limits memory and does not affect the result. Raises UsageError for a count below 1.
    """

    queries: int = 300
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("queries", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} of a search by differences must be at least 1")

    @standard_torch_state()
    @torch.no_grad()
    def search(self, network: nn.Module, images: Images, labels: Labels, threat: ThreatModel) -> QueryResult:
        """Return the legal images of smallest margin met for images (N, C, H, W) with labels (N,).

        Images that are misclassified are not searched further.

        Source: Guo et al. 2019 (directions); Ilyas et al. 2018 (gradient estimate).
        """
        images, labels, threat = as_images(images), as_labels(labels), threat.within(images)
        descent = _QueryDescent(network, images, labels, threat, self.batch_size)
        size = images[0].numel() if len(images) else 0
        all_pixels = size + 2 <= self.queries
        left = self.queries - 1  # the clean image took the first
        while left > 1 and descent.correct.any():
            for directions in _directions(tuple(images.shape[1:]), threat, self.queries):
                queried = directions[: left - 1]
                descent.query(queried.to(images))
                descent.move()
                left -= len(queried) + 1
                if left < 2 or not descent.correct.any():
                    break
            if not all_pixels:
                break
            descent.reset_gradient()
        return QueryResult(descent.images, descent.margins, descent.forwards)


class _QueryDescent:
    """State of the search: the current images, their margins, and the estimated gradients of the margin."""

    def __init__(self, network: nn.Module, clean: Images, labels: Labels, threat: ThreatModel, batch_size: int) -> None:
        self.network, self.clean, self.labels, self.threat = network, clean, labels, threat
        self.batches, self.forwards = Batches(batch_size), 0
        self.images, self.gradient = clean.clone(), torch.zeros_like(clean)
        self.step_share = clean.new_ones(len(clean))
        index = torch.arange(len(clean), device=clean.device)
        self.margins = self._margins(clean, index) if len(clean) else clean.new_zeros(0)

    @property
    def correct(self) -> Tensor:
        """Which images (N,) are still classified correctly."""
        return self.margins > 0

    def query(self, directions: Tensor) -> None:
        """Query along each direction (B, C, H, W), and add the differences to the gradient estimates."""
        index = self.correct.nonzero().flatten()
        images, margins = self.images[index], self.margins[index]
        for direction in directions:
            moved = self._shifted(images, direction)
            change = self._margins(moved, index) - margins
            move = moved - images
            slope = change / move.flatten(1).square().sum(1).clamp_min(1e-30)
            # ignore directions with a non-finite output
            self.gradient[index] += per_image(slope.nan_to_num(0.0, 0.0, 0.0), move) * move

    def move(self) -> None:
        """Step to the minimum of the linearised margin, or a part of the way after a step that increased the margin."""
        index = self.correct.nonzero().flatten()
        clean, images = self.clean[index], self.images[index]
        target = clean
        for _ in range(_PROJECTED_STEPS):
            target = self.threat.step(target, self.gradient[index], clean, _STEP_LENGTH * self.threat.eps)
        moved = self.threat.project(images + per_image(self.step_share[index], images) * (target - images), clean)
        margins = self._margins(moved, index)
        better = ~(margins >= self.margins[index])
        self.step_share[index] *= torch.where(better, 2.0, 0.5)
        self.step_share.clamp_(max=1.0)
        self.images[index[better]], self.margins[index[better]] = moved[better], margins[better]

    def reset_gradient(self) -> None:
        """Reset the gradient estimates, which are of the images before the last move."""
        self.gradient.zero_()

    def _shifted(self, images: Images, direction: Tensor) -> Images:
        """Return the images shifted along a direction, with the sign that the pixel range clamps less."""
        length = float(self.threat.distance(direction[None], torch.zeros_like(direction)[None]))
        scale = min(_STEP * self.threat.eps / length, _LARGEST_CHANGE / float(direction.abs().max()))
        up, down = ((images + sign * scale * direction).clamp(*self.threat.pixel_range) for sign in (1, -1))
        room = [(side - images).flatten(1).norm(dim=1) for side in (up, down)]
        return torch.where(per_image(room[0] >= room[1], images), up, down)

    def _margins(self, images: Images, index: Tensor) -> Tensor:
        self.forwards += len(images)
        return self.batches.run(
            lambda batch, chosen: margin(outputs_of(self.network, batch), self.labels[chosen]), images, index
        )


def _directions(shape: tuple[int, ...], threat: ThreatModel, queries: int) -> Iterator[Tensor]:
    """Yield orthonormal directions (B, C, H, W) in rounds: all pixels in one, or at most `queries` for each colour."""
    channels, height, width = shape
    size = channels * height * width
    if size + 2 <= queries:
        yield torch.eye(size).view(size, *shape)
        return
    order = _pixel_order(height, width) if threat.norm == "l1" else _frequency_order(height, width)
    for colour in _cosines(channels):  # the first is grey
        for chosen in order[:queries].split(_ROUND):
            planes = _pixels(chosen, height, width) if threat.norm == "l1" else _waves(chosen, height, width)
            yield planes[:, None] * colour.view(-1, 1, 1)


def _frequency_order(height: int, width: int) -> Tensor:
    """Return the indices of an (H, W) table of frequencies in ascending order."""
    down, across = torch.arange(height)[:, None] / height, torch.arange(width) / width
    return (down.square() + across.square()).flatten().argsort(stable=True)


def _pixel_order(height: int, width: int) -> Tensor:
    """Return the indices of an (H, W) image in random order, preferably from the centre outwards."""
    down, across = torch.arange(height)[:, None] - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    distance = (down.square() + across.square()).flatten()
    chance = torch.rand(height * width, generator=keyed_generator(Purpose.PIXEL_ORDER))
    return (distance / distance.max().clamp_min(1e-30) + 0.5 * chance).argsort(stable=True)


def _waves(places: Tensor, height: int, width: int) -> Tensor:
    """Return the two-dimensional cosines (B, H, W) of some indices (B,), orthonormal."""
    down, across = _cosines(height)[places // width], _cosines(width)[places % width]
    return down[:, :, None] * across[:, None, :]


def _cosines(length: int) -> Tensor:
    """Return the orthonormal discrete cosine transform (length, length), one frequency in each row."""
    frequency, place = torch.arange(length)[:, None], torch.arange(length) + 0.5
    table = (pi * frequency * place / length).cos() * sqrt(2 / length)
    table[0] /= sqrt(2)
    return table


def _pixels(places: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.one_hot(places, height * width).float().view(-1, height, width)
