"""Threat models: a norm, a radius in pixel units, and the pixel range.

Three geometries, three small hooks each: `project` back into the ball, the `steepest` direction of unit norm,
and a `random_delta` inside the ball.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from audit.errors import UnknownNameError, UsageError
from audit.types import Images


@dataclass(frozen=True)
class ThreatModel(ABC):
    """What an adversary may do to an image: move it by at most `eps` in a norm, inside the pixel range.

    Raises UsageError for an eps that is negative, not finite, or beyond the diameter that makes sense.
    """

    eps: float
    pixel_range: tuple[float, float] = (0.0, 1.0)

    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 <= self.eps < float("inf"):
            raise UsageError(f"eps {self.eps!r} is not a finite radius >= 0 in pixel units (images lie in [0, 1])")

    def project(self, images: Images, clean: Images) -> Images:
        """Return legal images: inside the eps-ball around `clean` and inside the pixel range.

        Legal images come back bit for bit. Shapes (N, C, H, W) in and out.
        """
        legal = self.distance(images, clean) <= self.eps
        kept = torch.where(_per_image(legal, images), images, self._nearest(images, clean))
        return kept.clamp(*self.pixel_range)

    def step(self, images: Images, gradient: Tensor, clean: Images, size: float) -> Images:
        """Return the images after one projected step of length `size` down the gradient."""
        return self.project(images - size * self.steepest(gradient, images), clean)

    def walls(self, clean: Images) -> tuple[Tensor, ...]:
        """Return what `step_into` needs to know of the clean images: tensors (N, ...), made once for many steps."""
        return (clean,)

    def step_into(self, moved: Images, images: Images, descent: tuple[Tensor, float], *walls: Tensor) -> None:
        """Write the images after one projected step, of `descent` = (gradient, size), into `moved`."""
        gradient, size = descent
        moved.copy_(self.step(images, gradient, walls[0], size))

    def random_start(self, clean: Images, generator: torch.Generator) -> Images:
        """Return legal images drawn at random around `clean`; the draw is made on the CPU, whatever the device."""
        delta = self._random_delta(len(clean), clean[0].numel(), generator)
        return self.project(clean + delta.view(clean.shape).to(clean), clean)

    @abstractmethod
    def distance(self, images: Images, clean: Images) -> Tensor:
        """Return the norm of the difference, per image: (N,)."""

    @abstractmethod
    def steepest(self, gradient: Tensor, images: Images) -> Tensor:
        """Return the unit-norm direction along which the gradient's linear function grows fastest."""

    def _nearest(self, images: Images, clean: Images) -> Images:
        """Return the nearest point of the eps-ball to each image."""
        delta = self._shrink((images - clean).flatten(1)).view_as(images)
        inside, slack = clean + delta, 1e-6
        # adding delta to clean rounds, and may leave the ball again: then projecting twice would move the image twice
        while (outside := self.distance(inside, clean) > self.eps).any():
            inside = torch.where(_per_image(outside, images), clean + delta * max(0.0, 1 - slack), inside)
            slack *= 4
        return inside

    @abstractmethod
    def _shrink(self, delta: Tensor) -> Tensor:
        """Return the nearest point of the ball to each row of delta (N, D)."""

    @abstractmethod
    def _random_delta(self, count: int, size: int, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Linf(ThreatModel):
    """Every pixel moves by at most eps."""

    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps > 1:
            raise UsageError(f"eps {self.eps!r} is outside [0, 1], the range of pixels: write 8/255 for 8 grey levels")

    def distance(self, images: Images, clean: Images) -> Tensor:
        """Return the largest pixel change per image: (N,)."""
        return (images - clean).flatten(1).abs().amax(1)

    def steepest(self, gradient: Tensor, images: Images) -> Tensor:  # noqa: ARG002
        """Return the sign of the gradient."""
        return gradient.sign()

    def walls(self, clean: Images) -> tuple[Tensor, ...]:
        """Return the lowest and the highest legal pixels."""
        low, high = self.pixel_range
        return (clean - self.eps).clamp_(min=low), (clean + self.eps).clamp_(max=high)

    def step_into(self, moved: Images, images: Images, descent: tuple[Tensor, float], *walls: Tensor) -> None:
        """Take the step in a third of the memory traffic of the base class's, and in no memory of its own."""
        gradient, size = descent
        torch.sub(images, torch.sign(gradient, out=moved), alpha=size, out=moved).clamp_(*walls)

    def _nearest(self, images: Images, clean: Images) -> Images:
        # bounds on the pixels themselves: a legal pixel of an illegal image keeps its bits
        return torch.minimum(torch.maximum(images, clean - self.eps), clean + self.eps)

    def _shrink(self, delta: Tensor) -> Tensor:
        return delta.clamp(-self.eps, self.eps)

    def _random_delta(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        return self.eps * (2 * torch.rand(count, size, generator=generator) - 1)


@dataclass(frozen=True)
class L2(ThreatModel):
    """The Euclidean length of the change is at most eps."""

    norm: ClassVar[str] = "l2"

    def distance(self, images: Images, clean: Images) -> Tensor:
        """Return the Euclidean length of the change per image: (N,)."""
        return (images - clean).flatten(1).norm(dim=1)

    def steepest(self, gradient: Tensor, images: Images) -> Tensor:  # noqa: ARG002
        """Return the gradient scaled to length one (zero stays zero)."""
        peak = gradient.flatten(1).abs().amax(1)
        # the largest entry first: squares of saturated gradients (1e-25) underflow, of steep ones overflow
        scaled = gradient / _per_image(torch.where(peak > 0, peak, 1.0), gradient)
        return scaled / _per_image(scaled.flatten(1).norm(dim=1).clamp_min(1.0), gradient)

    def _shrink(self, delta: Tensor) -> Tensor:
        length = delta.norm(dim=1, keepdim=True)
        return delta * (self.eps / length.clamp_min(1e-30)).clamp_max(1)

    def _random_delta(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        direction = torch.randn(count, size, generator=generator)
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return self.eps * direction * torch.rand(count, 1, generator=generator) ** (1 / size)


@dataclass(frozen=True)
class L1(ThreatModel):
    """The absolute changes of all pixels sum to at most eps.

    A step moves the pixels with the largest gradient that still can move: as many as eps can pay for at half the
    pixel range each, at most one per cent and at least one. The exact steepest direction, a single pixel, needs
    one step per pixel changed; more pixels than eps can pay for never reach the best corner of the ball.
    """

    norm: ClassVar[str] = "l1"
    moved_share: ClassVar[float] = 0.01

    def project(self, images: Images, clean: Images) -> Images:
        """Return the nearest legal images; what a pixel cannot spend at the end of its range is left to the others.

        Source: Croce & Hein 2021, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers",
        proposition 2.1.
        """
        clamped = images.clamp(*self.pixel_range)
        legal = self.distance(clamped, clean) <= self.eps
        if legal.all():
            return clamped
        return torch.where(_per_image(legal, images), clamped, self._nearest(images, clean)).clamp(*self.pixel_range)

    def distance(self, images: Images, clean: Images) -> Tensor:
        """Return the sum of absolute changes per image: (N,)."""
        return (images - clean).flatten(1).abs().sum(1)

    def steepest(self, gradient: Tensor, images: Images) -> Tensor:
        """Return the signs of the largest movable gradient entries, scaled to a sum of one."""
        low, high = self.pixel_range
        blocked = ((gradient > 0) & (images <= low)) | ((gradient < 0) & (images >= high))
        movable = gradient.masked_fill(blocked, 0.0).flatten(1)
        count = max(1, min(self._payable, int(self.moved_share * movable.shape[1])))
        chosen = movable.abs().topk(count, dim=1).indices
        direction = torch.zeros_like(movable).scatter(1, chosen, movable.gather(1, chosen).sign())
        return (direction / direction.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)

    def sparse_start(self, clean: Images, generator: torch.Generator) -> Images:
        """Return legal images that differ from the clean ones in a few pixels, as the best corners of the ball do."""
        count, size = len(clean), clean[0].numel()
        few = torch.randint(1, min(size, max(1, 3 * self._payable // 2)) + 1, (count, 1), generator=generator)
        chosen = torch.rand(count, size, generator=generator).argsort(1).argsort(1) < few
        signs = torch.randint(0, 2, (count, size), generator=generator) * 2.0 - 1.0
        # twice eps in all: about half of them meet the end of their range
        delta = 2 * self.eps * chosen * signs / few
        return self.project(clean + delta.view(clean.shape).to(clean), clean)

    @property
    def _payable(self) -> int:
        """How many pixels eps can move by half the pixel range."""
        low, high = self.pixel_range
        return ceil(self.eps / (0.5 * (high - low)))

    def _nearest(self, images: Images, clean: Images) -> Images:
        low, high = self.pixel_range
        delta = (images - clean).flatten(1)
        wall = torch.where(delta > 0, high - clean.flatten(1), clean.flatten(1) - low)
        kept = delta.sign() * (delta.abs() - self._level(delta.abs(), wall)).clamp_min(0).minimum(wall)
        return super()._nearest(clean + kept.view_as(clean), clean)  # which sees to the rounding

    def _level(self, size: Tensor, wall: Tensor) -> Tensor:
        """Return the level (N, 1) that sizes (N, D) give up, up to their walls (N, D), for a sum of eps.

        The sum falls with the level, in straight lines that bend where an entry reaches its wall, and zero.
        """
        bends, order = torch.cat([size, size - wall], 1).sort(dim=1, descending=True)
        slope = torch.where(order < size.shape[1], 1.0, -1.0)
        many, whole = slope.cumsum(1), (slope * bends).cumsum(1)
        # at the first bend where the sum is above eps the level is passed; at the last one it is all walls
        before = ((whole - bends * many <= self.eps).sum(1, keepdim=True) - 1).clamp_min(0)
        level = (whole.gather(1, before) - self.eps) / many.gather(1, before).clamp_min(1)
        return level.clamp_min(0)

    def _shrink(self, delta: Tensor) -> Tensor:
        # Duchi et al. 2008: soft-threshold by the level at which the sum of magnitudes is eps
        return delta.sign() * (delta.abs() - self._level(delta.abs(), delta.abs())).clamp_min(0)

    def _random_delta(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        # exponential magnitudes with random signs, divided by their sum and one more draw: uniform in the ball
        draws = -torch.rand(count, size + 1, generator=generator).clamp_min(1e-30).log()
        signs = torch.randint(0, 2, (count, size), generator=generator) * 2.0 - 1.0
        return self.eps * signs * draws[:, :size] / draws.sum(1, keepdim=True)


THREATS: dict[str, type[ThreatModel]] = {"linf": Linf, "l2": L2, "l1": L1}


def threat_model(norm: str, eps: float) -> ThreatModel:
    """Return the threat model of a norm's name; raises UnknownNameError with the nearest legal names."""
    if norm.lower() not in THREATS:
        raise UnknownNameError("norm", norm, THREATS)
    return THREATS[norm.lower()](eps)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.dim() - 1))
