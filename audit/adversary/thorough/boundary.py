"""Walks along the decision boundary towards the clean image, from noisy images far outside the ball.

A descent inside the ball follows gradients near the clean image. Networks trained in l-inf are flat there; the nearest
adversarial image in l2 lies behind, and a walk reaches it from the other side of the boundary.
"""

import torch
from torch import Tensor

from audit.adversary.pgd import CLEAN_STEP, PGD, SearchResult, merged, restricted
from audit.adversary.thorough.stepwise import StepwiseSearch
from audit.adversary.threat import ThreatModel, per_image
from audit.types import Images, Objective, ObjectiveValue

_LEAST_NOISE, _MOST_NOISE = 0.2, 0.8  # standard deviation of a start, in pixel ranges
_FAINT, _EVERY = 0.25, 4  # every fourth start has a quarter of that noise
_TOWARDS_CLEAN = 0.1  # largest weight of the clean image's own nearest boundary point
_OVERSHOOT = 1.05  # of steps to the linearised boundary, which is not the boundary
_BACKWARD = 0.9  # of the distance to the clean image, after each adversarial image
_NEWTON_STEPS = 30  # of which a plane takes three to ten


def noisy_start(clean: Images, threat: ThreatModel, generator: torch.Generator, share: float = 1.0) -> Images:
    """Return clean images (N, C, H, W) with a share of normal noise of random length, most of which hides the image."""
    low, high = threat.pixel_range
    shares = torch.rand((len(clean), 1, 1, 1), generator=generator, dtype=torch.float32)
    lengths = share * (high - low) * (_LEAST_NOISE + (_MOST_NOISE - _LEAST_NOISE) * shares)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32)
    return (clean + (lengths * noise).to(clean)).clamp(low, high)


def unsearched(clean: Images) -> SearchResult:
    """Return the result of a search that has not begun: copies of the clean images (N, C, H, W), of infinite value."""
    value = clean.new_full((len(clean),), torch.inf)
    done = torch.zeros_like(value, dtype=torch.bool)
    return SearchResult(clean.clone(), value, done, torch.full_like(done, CLEAN_STEP, dtype=torch.long), 0, 0)


def boundary_search(
    objective: Objective, clean: Images, threat: ThreatModel, pgd: PGD, generator: torch.Generator
) -> SearchResult:
    """Walk from `pgd.restarts` noisy starts to l2 balls around clean images (N, C, H, W); return the nearest images.

    The objective is a margin, negative where an image is adversarial. An image is done once one lies in its ball; the
    others are projected onto theirs.
    """
    best = unsearched(clean)
    for restart in range(pgd.restarts):
        share = 1.0 if (restart + 1) % _EVERY else _FAINT
        start, left = noisy_start(clean, threat, generator, share), (~best.done).nonzero().flatten()
        if len(left) == 0:
            break
        found = boundary_walk(restricted(objective, left), clean[left], start[left], threat, pgd)
        best = merged(best, found, left, restart * (pgd.steps + 1))
    return best._replace(images=threat.project(best.images, clean))


def boundary_walk(objective: Objective, clean: Images, start: Images, threat: ThreatModel, pgd: PGD) -> SearchResult:
    """Walk `pgd.steps` steps from one start, until an adversarial image lies in the ball.

    Returned are the adversarial images (N, C, H, W) nearest to the clean ones in l2, with this distance as value; the
    last images of the walk, with an infinite value, where none was met. The pixel range is kept, the ball is not.

    Source: Croce & Hein 2020, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack",
    algorithm 1 (the starts are ours).
    """
    walk = _Walk(objective, clean, start, threat)
    passes, forwards = walk.run(pgd)
    images = torch.where(per_image(walk.distance.isfinite(), clean), walk.nearest, walk.images)
    return SearchResult(images, walk.distance, walk.done, walk.step, passes, forwards)


class _Walk(StepwiseSearch):
    """State of a walk: the current images, and the nearest adversarial ones with their distances."""

    def __init__(self, objective: Objective, clean: Images, start: Images, threat: ThreatModel) -> None:
        self.objective, self.clean, self.images, self.threat = objective, clean, start.clone(), threat
        self.nearest, self.distance, self.done, self.step = unsearched(clean)[:4]

    def _advance(self, step: int, index: Tensor) -> Tensor:
        """Step towards the boundary for images of indices (A,), and back towards the clean image beyond it."""
        (images, found, gradient), clean = self._evaluated(index), self.clean[index]
        beyond = self._observe(step, images, index, found)
        origin = torch.where(per_image(beyond, images), clean + _BACKWARD * (images - clean), images)
        targets, lengths = [], []
        for point in (origin, clean):
            value = found.value + ((point - images) * gradient).flatten(1).sum(1)
            move = nearest_on_plane(point, value, gradient, self.threat.pixel_range) - point
            targets.append(point + _OVERSHOOT * move)
            lengths.append(move.flatten(1).norm(dim=1))
        # the nearer the walk is to the boundary, the less it turns to the clean image
        weight = (lengths[0] / (lengths[0] + lengths[1]).clamp_min(1e-30)).clamp_max(_TOWARDS_CLEAN)
        moved = targets[0] + per_image(weight, images) * (targets[1] - targets[0])
        self.images[index] = moved.clamp(*self.threat.pixel_range)
        return index

    def _observe(self, step: int, images: Images, index: Tensor, found: ObjectiveValue) -> Tensor:
        """Keep adversarial images nearer than the nearest so far, and return which are adversarial, (A,)."""
        adversarial = found.done | (found.value <= 0)  # randomised networks are never done
        distance = (images - self.clean[index]).flatten(1).norm(dim=1)
        nearer = adversarial & (distance < self.distance[index])
        where = index[nearer]
        self.nearest[where], self.distance[where], self.step[where] = images[nearer], distance[nearer], step
        self.done[where] = self.threat.distance(images, self.clean[index])[nearer] <= self.threat.eps
        return adversarial


def nearest_on_plane(points: Images, values: Tensor, gradients: Tensor, pixel_range: tuple[float, float]) -> Images:
    """Return the points z in the pixel range nearest in l2 to `points` (N, C, H, W) with value + <gradient, z - x> = 0.

    Values are (N,). Where no such point exists, the pixels are at the ends of their range nearest to the plane.
    """
    low, high = pixel_range
    rows = points.flatten(1)
    normal = (-gradients * per_image(values.sign(), gradients)).flatten(1)
    room = torch.where(normal > 0, high - rows, rows - low)
    peak = normal.abs().amax(1, keepdim=True).clamp_min(torch.finfo(normal.dtype).tiny)
    size, goal = normal.abs() / peak, values.abs()[:, None] / peak  # squares of tiny gradients underflow
    # Newton's method in the multiplier: the sum is concave and piecewise linear, and rises to the goal from below
    multiplier = torch.zeros_like(goal)
    for _ in range(_NEWTON_STEPS):
        move = torch.minimum(multiplier * size, room)
        slope = size.square().masked_fill(multiplier * size >= room, 0.0).sum(1, keepdim=True)
        missing = (goal - (size * move).sum(1, keepdim=True)).clamp_min(0)
        change = torch.where(slope > 0, missing / slope.clamp_min(1e-30), 0.0)
        change = torch.where(change > 1e-6 * multiplier, change, 0.0)  # rows do not depend on each other
        if not change.any():
            break
        multiplier = multiplier + change
    move = torch.minimum(multiplier * size, room)
    return (rows + normal.sign() * move).clamp(low, high).view_as(points)
