"""Minimum-norm attacks in the Euclidean norm: how near is the nearest image with another label?

Each image's search is its own, with no random draw: neither the batch size nor other images decide anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.accuracy import logits_of
from audit.adversary.gradients import input_gradient
from audit.adversary.label_attack import margin
from audit.adversary.threat import L2
from audit.errors import UsageError
from audit.types import Images, Labels

_EDGE = 1 - 1e-4  # atanh of a black or white pixel is infinite, and Adam comes back from 5 but not from 10


class Nearest(NamedTuple):
    """The nearest adversarial images met (N, C, H, W), their L2 distances (N,) in pixel units, and the cost.

    The distance is infinite, and the image the clean one, where no adversarial image was met; zero where the clean
    image is lost already. `passes` counts forward+backward passes of single images.
    """

    images: Images
    norms: Tensor
    passes: int

    def broken(self, eps: float) -> Tensor:
        """Return which images fall to an L2 adversary of radius eps: (N,) bool."""
        return self.norms <= eps


@dataclass(frozen=True)
class CarliniWagner:
    """How hard to search: `searches` of the weight c, each of `steps` of Adam in the space of atanh(pixels)."""

    steps: int = 200
    searches: int = 6
    learning_rate: float = 0.03
    initial_c: float = 1.0
    batch_size: int = 256

    def __post_init__(self) -> None:
        _check_counts(self, "steps", "searches", "batch_size")
        _check_positive(self, "learning_rate", "initial_c")


@dataclass(frozen=True)
class DDN:
    """How hard to search: `steps`, of which each scales the radius, `initial_norm` at first, by 1 - or + `gamma`.

    Boundaries nearer than about `initial_norm * (1 - gamma) ** steps` are out of reach: .006 at the defaults. With
    many classes its cross-entropy pulls towards all others at once, and it may stop a fifth too far out.
    """

    steps: int = 100
    initial_norm: float = 1.0
    gamma: float = 0.05
    batch_size: int = 256

    def __post_init__(self) -> None:
        _check_counts(self, "steps", "batch_size")
        _check_positive(self, "initial_norm")
        if not 0 < self.gamma < 1:
            raise UsageError(f"gamma {self.gamma!r} is outside (0, 1): it is the share by which the radius changes")


def carlini_wagner(network: nn.Module, images: Images, labels: Labels, settings: CarliniWagner) -> Nearest:
    """Return the nearest images found by descent on distance^2 + c * margin, c searched per image.

    Raises InvalidModelError where the network gives no finite output or gradient.

    Source: Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", sections 5 and 6.1.
    """

    def search(best: Nearest, wanted: Labels) -> int:
        weight, low, high = (best.norms.new_full(best.norms.shape, c) for c in (settings.initial_c, 0.0, torch.inf))
        clean = best.images.clone()
        for _ in range(settings.searches):
            won = _descend(network, clean, wanted, weight, settings, best)
            high = torch.where(won, torch.minimum(high, weight), high)
            low = torch.where(won, low, torch.maximum(low, weight))
            weight = torch.where(high.isfinite(), (low + high) / 2, 10 * weight)
        return settings.searches * settings.steps * len(clean)

    return _by_batches(search, network, images, labels, settings.batch_size)


def ddn(network: nn.Module, images: Images, labels: Labels, settings: DDN) -> Nearest:
    """Return the nearest images found by cross-entropy ascent on a sphere that shrinks inside the other class.

    Raises InvalidModelError where the network gives no finite output or gradient.

    Source: Rony et al. 2019, "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and
    Defenses", algorithm 1.
    """

    def search(best: Nearest, wanted: Labels) -> int:
        clean, ball = best.images.clone(), L2(settings.initial_norm)
        current = clean
        radius = best.norms.new_full(best.norms.shape, settings.initial_norm)
        for step in range(settings.steps):
            leaf = current.detach().requires_grad_()
            logits = network(leaf)
            gradient = input_gradient(F.cross_entropy(logits, wanted, reduction="sum"), leaf)
            lost = _keep(best, current, logits.detach(), wanted, clean)
            size = 0.01 + 0.99 * (1 + cos(pi * step / settings.steps)) / 2  # annealed from 1 to .01
            delta = current - clean + size * ball.steepest(gradient, clean)
            radius = radius * torch.where(lost, 1 - settings.gamma, 1 + settings.gamma)
            current = (clean + _column(radius, clean) * ball.steepest(delta, clean)).clamp(0, 1)
        return settings.steps * len(clean)

    return _by_batches(search, network, images, labels, settings.batch_size)


def _descend(
    network: nn.Module, clean: Images, labels: Labels, weight: Tensor, settings: CarliniWagner, best: Nearest
) -> Tensor:
    """Run Adam once for given weights c (N,) and return which images were lost on the way: (N,) bool."""
    position = torch.atanh((2 * clean - 1) * _EDGE)
    adam = torch.optim.Adam([position], lr=settings.learning_rate)
    won = torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(settings.steps):
        images = (position.tanh() + 1) / 2
        leaf = images.detach().requires_grad_()
        logits = network(leaf)
        lost = _keep(best, images, logits.detach(), labels, clean)
        won |= lost
        # the margin's gradient alone: that of the distance would hide a network that gives none
        gradient = input_gradient(margin(logits, labels).sum(), leaf)
        descent = 2 * (images - clean) + _column(torch.where(lost, 0.0, weight), clean) * gradient
        position.grad = descent * 2 * images * (1 - images)  # the slope of (tanh + 1) / 2
        adam.step()
    return won


def _keep(best: Nearest, images: Images, logits: Tensor, labels: Labels, clean: Images) -> Tensor:
    """Write the lost images nearer than the nearest so far into `best`; return which are lost: (N,) bool."""
    lost = ~(margin(logits, labels) > 0)
    norms = (images - clean).flatten(1).norm(dim=1)
    better = lost & (norms < best.norms)
    best.images[better], best.norms[better] = images[better], norms[better]
    return lost


def _by_batches(
    search: Callable[[Nearest, Labels], int], network: nn.Module, images: Images, labels: Labels, batch_size: int
) -> Nearest:
    """Search from the images that are right, by batches; what a plain forward pass does not confirm is not found."""
    found = images.detach().clone()
    norms = images.new_zeros(len(images))
    passes = 0
    right = _right(network, found, labels, batch_size).nonzero().flatten()
    for index in right.split(batch_size) if len(right) else ():
        best = Nearest(found[index], norms.new_full(index.shape, torch.inf), 0)
        passes += search(best, labels[index])
        found[index], norms[index] = best.images, best.norms
    unconfirmed = _right(network, found, labels, batch_size)
    found[unconfirmed], norms[unconfirmed] = images.detach()[unconfirmed], torch.inf
    return Nearest(found, norms, passes)


def _right(network: nn.Module, images: Images, labels: Labels, batch_size: int) -> Tensor:
    if len(images) == 0:
        return torch.zeros_like(labels, dtype=torch.bool)
    return margin(logits_of(network, images, batch_size), labels) > 0


def _column(values: Tensor, images: Images) -> Tensor:
    return values.view(-1, *[1] * (images.dim() - 1))


def _check_counts(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise UsageError(f"{name} {getattr(settings, name)!r} of {type(settings).__name__} must be at least 1")


def _check_positive(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < float("inf"):
            raise UsageError(
                f"{name} {getattr(settings, name)!r} of {type(settings).__name__} must be finite and above 0"
            )
