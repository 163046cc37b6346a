"""Threat models: a norm, a radius in pixel units, and the pixel range.

Each norm defines the projection onto its ball, the steepest direction of unit norm, and a random point in the ball.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Self

import torch
from torch import Tensor

from audit.adversary.norms import eps_fault
from audit.errors import UnknownNameError, UsageError
from audit.types import Images


@dataclass(frozen=True)
class ThreatModel(ABC):
    """Set of legal images x' around a clean image x: ||x' - x|| <= eps, with pixels in `pixel_range`.

    `eps` is in pixel units. Raises UsageError for a radius that is not legal (`audit.adversary.norms.eps_fault`).
    """

    eps: float
    pixel_range: tuple[float, float] = (0.0, 1.0)

    norm: ClassVar[str]
    dimension_power: ClassVar[float]  # the norm of (1, ..., 1) is D to this power

    def __post_init__(self) -> None:
        fault = eps_fault(self.eps, self.norm)
        if fault:
            raise UsageError(fault)

    def within(self, images: Images) -> Self:
        """Return the threat model with a radius of at most the diameter of all legal images of that shape.

        A larger radius changes no set of legal images, but its steps would only reach corners of the pixel range.
        """
        low, high = self.pixel_range
        diameter = (high - low) * float(images[:1].numel() ** self.dimension_power)
        return self if self.eps <= diameter or len(images) == 0 else replace(self, eps=diameter)

    def project(self, images: Images, clean: Images) -> Images:
        """Project images (N, C, H, W) onto the eps-ball around `clean` and the pixel range; return (N, C, H, W).

        Legal images are returned bit for bit.
        """
        legal = self.distance(images, clean) <= self.eps
        kept = torch.where(per_image(legal, images), images, self._nearest(images, clean))
        return kept.clamp(*self.pixel_range)

    def step(self, images: Images, gradient: Tensor, clean: Images, size: float) -> Images:
        """Return the images (N, C, H, W) after one projected descent step of length `size` in the norm."""
        return self.project(images - size * self.steepest(gradient, images), clean)

    def step_bounds(self, clean: Images) -> tuple[Tensor, ...]:
        """Return the tensors (N, ...) that `step_into` needs, computed once for many steps."""
        return (clean,)

    def step_into(self, out: Images, images: Images, descent: tuple[Tensor, float], *bounds: Tensor) -> None:
        """Write the images after one projected step into `out`; `descent` is (gradient, step length)."""
        gradient, size = descent
        out.copy_(self.step(images, gradient, bounds[0], size))

    def random_start(self, clean: Images, generator: torch.Generator) -> Images:
        """Return random legal images around `clean` (N, C, H, W); numbers are drawn on the CPU, whatever the device."""
        delta = self._random_delta(len(clean), clean[0].numel(), generator)
        return self.project(clean + delta.view(clean.shape).to(clean), clean)

    @abstractmethod
    def distance(self, images: Images, clean: Images) -> Tensor:
        """Return the norm of the perturbation per image, (N,)."""

    @abstractmethod
    def steepest(self, gradient: Tensor, images: Images) -> Tensor:
        """Return the directions d (N, C, H, W), ||d|| = 1, that maximise <gradient, d> per image."""

    def _nearest(self, images: Images, clean: Images) -> Images:
        """Return the nearest point of the eps-ball for each image."""
        delta = self._shrink((images - clean).flatten(1)).view_as(images)
        inside, slack = clean + delta, 1e-6
        # clean + delta rounds and may leave the ball, so that a second projection would move the image again
        while (outside := self.distance(inside, clean) > self.eps).any():
            inside = torch.where(per_image(outside, images), clean + delta * max(0.0, 1 - slack), inside)
            slack *= 4
        return inside

    @abstractmethod
    def _shrink(self, delta: Tensor) -> Tensor:
        """Return the nearest point of the ball around zero to each row of delta (N, D)."""

    @abstractmethod
    def _random_delta(self, count: int, size: int, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Linf(ThreatModel):
    """The l-inf ball: every pixel changes by at most eps, in pixel units of images in [0, 1]; eps is at most 1."""

    norm: ClassVar[str] = "linf"
    dimension_power: ClassVar[float] = 0.0

    def distance(self, images: Images, clean: Images) -> Tensor:
        """Return the largest absolute pixel change per image, (N,)."""
        return (images - clean).flatten(1).abs().amax(1)

    def steepest(self, gradient: Tensor, images: Images) -> Tensor:  # noqa: ARG002
        """Return the sign of the gradient."""
        return gradient.sign()

    def step_bounds(self, clean: Images) -> tuple[Tensor, ...]:
        """Return the lowest and the highest legal values of every pixel."""
        low, high = self.pixel_range
        return (clean - self.eps).clamp_(min=low), (clean + self.eps).clamp_(max=high)

    def step_into(self, out: Images, images: Images, descent: tuple[Tensor, float], *bounds: Tensor) -> None:
        """Write the images after one step into `out`, with a third of the memory traffic and no allocation."""
        gradient, size = descent
        torch.sub(images, torch.sign(gradient, out=out), alpha=size, out=out).clamp_(*bounds)

    def _nearest(self, images: Images, clean: Images) -> Images:
        # clamp pixels, not differences: legal pixels of an illegal image are kept bit for bit
        return torch.minimum(torch.maximum(images, clean - self.eps), clean + self.eps)

    def _shrink(self, delta: Tensor) -> Tensor:
        return delta.clamp(-self.eps, self.eps)

    def _random_delta(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        return self.eps * (2 * torch.rand(count, size, generator=generator) - 1)


@dataclass(frozen=True)
class L2(ThreatModel):
    """The l2 ball: the Euclidean length of the perturbation is at most eps, in pixel units of images in [0, 1]."""

    norm: ClassVar[str] = "l2"
    dimension_power: ClassVar[float] = 0.5

    def distance(self, images: Images, clean: Images) -> Tensor:
        """Return the Euclidean length of the perturbation per image, (N,)."""
        return (images - clean).flatten(1).norm(dim=1)

    def steepest(self, gradient: Tensor, images: Images) -> Tensor:  # noqa: ARG002
        """Return the gradient divided by its length; zero stays zero."""
        peak = gradient.flatten(1).abs().amax(1)
        # divide by the largest entry first: squares of tiny gradients (1e-25) underflow, those of large ones overflow
        scaled = gradient / per_image(torch.where(peak > 0, peak, 1.0), gradient)
        return scaled / per_image(scaled.flatten(1).norm(dim=1).clamp_min(1.0), gradient)

    def _shrink(self, delta: Tensor) -> Tensor:
        length = delta.norm(dim=1, keepdim=True)
        return delta * (self.eps / length.clamp_min(1e-30)).clamp_max(1)

    def _random_delta(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        direction = torch.randn(count, size, generator=generator)
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return self.eps * direction * torch.rand(count, 1, generator=generator) ** (1 / size)


@dataclass(frozen=True)
class L1(ThreatModel):
    """The l1 ball: the absolute changes of all pixels sum to at most eps, in pixel units of images in [0, 1].

    A step changes the k pixels of largest gradient that are not at the end of their range, with
    k = ceil(eps / (half the pixel range)), at most 1 % of the pixels and at least one. The exact steepest direction
    changes a single pixel and needs one step for each; with more than k pixels the search misses the best vertex.
    """

    norm: ClassVar[str] = "l1"
    dimension_power: ClassVar[float] = 1.0
    moved_share: ClassVar[float] = 0.01

    def project(self, images: Images, clean: Images) -> Images:
        """Project images (N, C, H, W) exactly onto the intersection of the l1 ball and the pixel range.

        Source: Croce & Hein 2021, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers",
        proposition 2.1.
        """
        clamped = images.clamp(*self.pixel_range)
        legal = self.distance(clamped, clean) <= self.eps
        if legal.all():
            return clamped
        return torch.where(per_image(legal, images), clamped, self._nearest(images, clean)).clamp(*self.pixel_range)

    def distance(self, images: Images, clean: Images) -> Tensor:
        """Return the sum of absolute pixel changes per image, (N,)."""
        return (images - clean).flatten(1).abs().sum(1)

    def steepest(self, gradient: Tensor, images: Images) -> Tensor:
        """Return the signs of the k largest gradient entries whose pixels can move, divided by k."""
        low, high = self.pixel_range
        blocked = ((gradient > 0) & (images <= low)) | ((gradient < 0) & (images >= high))
        movable = gradient.masked_fill(blocked, 0.0).flatten(1)
        count = max(1, min(self._half_range_pixels, int(self.moved_share * movable.shape[1])))
        chosen = movable.abs().topk(count, dim=1).indices
        direction = torch.zeros_like(movable).scatter(1, chosen, movable.gather(1, chosen).sign())
        return (direction / direction.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)

    def sparse_start(self, clean: Images, generator: torch.Generator) -> Images:
        """Return random legal images that differ from `clean` (N, C, H, W) in few pixels, like vertices of the ball."""
        count, size = len(clean), clean[0].numel()
        most = min(size, max(1, 3 * self._half_range_pixels // 2))
        pixels = torch.randint(1, most + 1, (count, 1), generator=generator)
        chosen = torch.rand(count, size, generator=generator).argsort(1).argsort(1) < pixels
        signs = torch.randint(0, 2, (count, size), generator=generator) * 2.0 - 1.0
        # twice eps in all, because about half of the pixels reach the end of their range
        delta = 2 * self.eps * chosen * signs / pixels
        return self.project(clean + delta.view(clean.shape).to(clean), clean)

    @property
    def _half_range_pixels(self) -> int:
        """Number of pixels that can change by half the pixel range within eps."""
        low, high = self.pixel_range
        return ceil(self.eps / (0.5 * (high - low)))

    def _nearest(self, images: Images, clean: Images) -> Images:
        low, high = self.pixel_range
        delta = (images - clean).flatten(1)
        room = torch.where(delta > 0, high - clean.flatten(1), clean.flatten(1) - low)
        kept = delta.sign() * (delta.abs() - self._threshold(delta.abs(), room)).clamp_min(0).minimum(room)
        return super()._nearest(clean + kept.view_as(clean), clean)  # the base class corrects rounding

    def _threshold(self, size: Tensor, room: Tensor) -> Tensor:
        """Return t (N, 1) such that sum(clamp(size - t, 0, room)) = eps, for sizes and rooms (N, D).

        The sum is piecewise linear and decreasing in t, with breakpoints at size - room and size.
        """
        breakpoints, order = torch.cat([size, size - room], 1).sort(dim=1, descending=True)
        slope = torch.where(order < size.shape[1], 1.0, -1.0)
        slopes, offsets = slope.cumsum(1), (slope * breakpoints).cumsum(1)
        # the solution lies before the first breakpoint with a sum above eps
        last = ((offsets - breakpoints * slopes <= self.eps).sum(1, keepdim=True) - 1).clamp_min(0)
        threshold = (offsets.gather(1, last) - self.eps) / slopes.gather(1, last).clamp_min(1)
        return threshold.clamp_min(0)

    def _shrink(self, delta: Tensor) -> Tensor:
        # soft-thresholding, Duchi et al. 2008, "Efficient Projections onto the l1-Ball", figure 1
        return delta.sign() * (delta.abs() - self._threshold(delta.abs(), delta.abs())).clamp_min(0)

    def _random_delta(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        # exponential magnitudes divided by the sum of D + 1 draws, with random signs, are uniform in the ball
        draws = -torch.rand(count, size + 1, generator=generator).clamp_min(1e-30).log()
        signs = torch.randint(0, 2, (count, size), generator=generator) * 2.0 - 1.0
        return self.eps * signs * draws[:, :size] / draws.sum(1, keepdim=True)


THREATS: dict[str, type[ThreatModel]] = {"linf": Linf, "l2": L2, "l1": L1}


def threat_model(norm: str, eps: float) -> ThreatModel:
    """Return the threat model of a norm's name with radius `eps` in pixel units.

    Raises UnknownNameError for an unknown norm, UsageError for a radius that is not legal.
    """
    if norm.lower() not in THREATS:
        raise UnknownNameError("norm", norm, THREATS)
    return THREATS[norm.lower()](eps)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Return values (N,) as a tensor (N, 1, 1, 1) that images (N, C, H, W) can be multiplied by."""
    return values.view(-1, *[1] * (images.dim() - 1))


def start_at_any_distance(threat: ThreatModel, clean: Images, generator: torch.Generator) -> Images:
    """Return random legal images, at distances from `clean` (N, C, H, W) that are uniform up to that of a random one.

    In many dimensions almost all of a ball is near its surface, where a descent hardly leaves the side it starts on.
    """
    shares = torch.rand((len(clean), 1, 1, 1), generator=generator, dtype=torch.float32).to(clean)
    return threat.project(clean + shares * (threat.random_start(clean, generator) - clean), clean)
