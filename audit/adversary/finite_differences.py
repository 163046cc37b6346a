"""An attack that asks for the network's outputs only: differences of the margin along directions, one query each.

For networks whose gradients cannot be trusted, in any norm. Nothing is drawn at random, and no image's search depends
on another's.

Source: Guo et al. 2019, "Simple Black-box Adversarial Attacks" (orthonormal directions, of pixels or low frequencies);
Ilyas et al. 2018, "Black-box Adversarial Attacks with Limited Queries and Information" (gradients from differences).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.batching import Batches
from audit.adversary.label_attack import margin
from audit.adversary.threat import ThreatModel
from audit.errors import UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels

_REACH = 0.4  # how far a query looks, in radii of the ball: rounding, noise and flat steps hide shorter differences
_FARTHEST = 0.5  # and no pixel by more than this
_ROUND = 30  # directions between two moves, where there are not queries enough for all of them
_WALK, _STRIDE = 20, 0.25  # projected steps to where a linear margin is least, in radii


class Asked(NamedTuple):
    """The images (N, C, H, W) of the smallest margins met, those margins (N,), and the forward passes spent."""

    images: Images
    margins: Tensor
    forwards: int


@dataclass(frozen=True)
class Differences:
    """How many `queries` an image may cost; `batch_size` bounds memory and decides nothing else.

    Where all pixels can be asked about at least once, they are, and again after every move: what is linear is left
    at once. Larger images are asked along as many directions as there are queries for, those of the lowest
    frequencies first; in the l1 ball, where few pixels move, along single pixels, those near the centre likelier.
    All channels move together first, then apart.
    """

    queries: int = 300
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("queries", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} of a search by differences must be at least 1")

    @torch.no_grad()
    def search(self, network: nn.Module, images: Images, labels: Labels, threat: ThreatModel) -> Asked:
        """Return, per image (N, C, H, W), the legal one with the smallest margin met; lost images are left alone."""
        asking = _Asking(network, images, labels, threat, self.batch_size)
        size = images[0].numel() if len(images) else 0
        everything = size + 2 <= self.queries
        left = self.queries - 1  # the clean image was the first
        while left > 1 and asking.standing.any():
            for directions in _directions(tuple(images.shape[1:]), threat, self.queries):
                asked = directions[: left - 1]
                asking.look(asked.to(images))
                asking.move()
                left -= len(asked) + 1
                if left < 2 or not asking.standing.any():
                    break
            if not everything:
                break
            asking.forget()
        return Asked(asking.images, asking.margins, asking.forwards)


class _Asking:
    """Where each image has got to, and what is known of the margin's gradient."""

    def __init__(self, network: nn.Module, clean: Images, labels: Labels, threat: ThreatModel, batch_size: int) -> None:
        self.network, self.clean, self.labels, self.threat = network, clean, labels, threat
        self.batches, self.forwards = Batches(batch_size), 0
        self.images, self.gradient = clean.clone(), torch.zeros_like(clean)
        self.share = clean.new_ones(len(clean))
        everyone = torch.arange(len(clean), device=clean.device)
        self.margins = self._margins(clean, everyone) if len(clean) else clean.new_zeros(0)

    @property
    def standing(self) -> Tensor:
        """Which images (N,) are still right."""
        return self.margins > 0

    def look(self, directions: Tensor) -> None:
        """Add what one query along each direction (B, C, H, W) tells to the gradients."""
        index = self.standing.nonzero().flatten()
        images, margins = self.images[index], self.margins[index]
        for direction in directions:
            moved = self._probe(images, direction)
            change = self._margins(moved, index) - margins
            move = moved - images
            slope = change / move.flatten(1).square().sum(1).clamp_min(1e-30)
            # where the network gives no number there, that direction tells nothing
            self.gradient[index] += _per_image(slope.nan_to_num(0.0, 0.0, 0.0), move) * move

    def move(self) -> None:
        """Go to where the margin would be least if it were linear, or part of the way where that led up."""
        index = self.standing.nonzero().flatten()
        clean, images = self.clean[index], self.images[index]
        goal = clean
        for _ in range(_WALK):
            goal = self.threat.step(goal, self.gradient[index], clean, _STRIDE * self.threat.eps)
        moved = self.threat.project(images + _per_image(self.share[index], images) * (goal - images), clean)
        margins = self._margins(moved, index)
        better = ~(margins >= self.margins[index])
        self.share[index] *= torch.where(better, 2.0, 0.5)
        self.share.clamp_(max=1.0)
        self.images[index[better]], self.margins[index[better]] = moved[better], margins[better]

    def forget(self) -> None:
        """Start the gradients anew: those known are of where the images were."""
        self.gradient.zero_()

    def _probe(self, images: Images, direction: Tensor) -> Images:
        """Return the images moved along a direction, to the side where the pixel range leaves more room."""
        length = float(self.threat.distance(direction[None], torch.zeros_like(direction)[None]))
        scale = min(_REACH * self.threat.eps / length, _FARTHEST / float(direction.abs().max()))
        up, down = ((images + sign * scale * direction).clamp(*self.threat.pixel_range) for sign in (1, -1))
        room = [(side - images).flatten(1).norm(dim=1) for side in (up, down)]
        return torch.where(_per_image(room[0] >= room[1], images), up, down)

    def _margins(self, images: Images, index: Tensor) -> Tensor:
        self.forwards += len(images)
        return self.batches.run(lambda batch, chosen: margin(self.network(batch), self.labels[chosen]), images, index)


def _directions(shape: tuple[int, ...], threat: ThreatModel, queries: int) -> Iterator[Tensor]:
    """Yield directions (B, C, H, W) of length one, round by round: all pixels at once, or as many as are asked for."""
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
    """Return the places of an (H, W) table of frequencies, the lowest first."""
    down, across = torch.arange(height)[:, None] / height, torch.arange(width) / width
    return (down.square() + across.square()).flatten().argsort(stable=True)


def _pixel_order(height: int, width: int) -> Tensor:
    """Return the places of an (H, W) image, at random, those near the centre likelier to come first."""
    down, across = torch.arange(height)[:, None] - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    distance = (down.square() + across.square()).flatten()
    chance = torch.rand(height * width, generator=keyed_generator(Purpose.PIXEL_ORDER))
    return (distance / distance.max().clamp_min(1e-30) + 0.5 * chance).argsort(stable=True)


def _waves(places: Tensor, height: int, width: int) -> Tensor:
    """Return orthonormal products of cosines (B, H, W)."""
    down, across = _cosines(height)[places // width], _cosines(width)[places % width]
    return down[:, :, None] * across[:, None, :]


def _cosines(length: int) -> Tensor:
    """Return the orthonormal cosine transform (length, length), a frequency a row."""
    frequency, place = torch.arange(length)[:, None], torch.arange(length) + 0.5
    table = (pi * frequency * place / length).cos() * sqrt(2 / length)
    table[0] /= sqrt(2)
    return table


def _pixels(places: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.one_hot(places, height * width).float().view(-1, height, width)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.dim() - 1))
