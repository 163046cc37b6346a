"""Minimum-norm attacks in l2: the distance from an image to the nearest adversarial image.

Each image is searched separately and deterministically: results depend neither on the batch size nor on other images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.label_attack import margin
from audit.adversary.memory.limit import allowed
from audit.adversary.passes import frozen_parameters, input_gradient, outputs_of
from audit.adversary.staged.outcome import logits_of
from audit.adversary.threat import L2
from audit.errors import UsageError
from audit.types import Images, Labels, as_images, as_labels, standard_torch_state

_INSIDE = 1 - 1e-4  # atanh of a black or white pixel is infinite; Adam recovers from atanh 5, not from 10


class MinimumNormResult(NamedTuple):
    """The nearest adversarial images met (N, C, H, W), their l2 distances `norms` (N,) in pixel units, and the cost.

    Without an adversarial image the distance is infinite and the image is the clean one; the distance of an image that
    is misclassified without an attack is zero. `passes` counts forward+backward passes of single images.
    """

    images: Images
    norms: Tensor
    passes: int

    def broken(self, eps: float) -> Tensor:
        """Return which images an l2 adversary of radius eps breaks, (N,) bool."""
        return self.norms <= eps


@dataclass(frozen=True)
class CarliniWagner:
    """Settings of the Carlini-Wagner attack: `searches` values of c, each with `steps` steps of Adam on atanh(pixels).

    Raises UsageError for a count below 1, or a real value that is not finite and positive.
    """

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
    """Settings of DDN: each of `steps` steps scales the radius, at first `initial_norm`, by 1 - gamma or 1 + gamma.

    Distances below about initial_norm * (1 - gamma)^steps, 0.006 by default, are not reached. With many classes, the
    cross-entropy averages the directions to all other classes, and distances may be a fifth too large. Raises
    UsageError for a setting that is not legal.
    """

    steps: int = 100
    initial_norm: float = 1.0
    gamma: float = 0.05
    batch_size: int = 256

    def __post_init__(self) -> None:
        _check_counts(self, "steps", "batch_size")
        _check_positive(self, "initial_norm")
        if not 0 < self.gamma < 1:
            raise UsageError(f"gamma {self.gamma!r} of DDN is outside (0, 1), the relative change of the radius")


@standard_torch_state()
def carlini_wagner(network: nn.Module, images: Images, labels: Labels, settings: CarliniWagner) -> MinimumNormResult:
    """Minimise ||x' - x||^2 + c * margin(x') with Adam for images (N, C, H, W), with a binary search for c per image.

    Raises InvalidModelError if an output or gradient of the network is missing or not finite.

    Source: Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", sections 5 and 6.1.
    """

    def search(best: MinimumNormResult, true: Labels) -> int:
        weight, low, high = (best.norms.new_full(best.norms.shape, c) for c in (settings.initial_c, 0.0, torch.inf))
        clean = best.images.clone()
        for _ in range(settings.searches):
            broken = _descend(network, clean, true, weight, settings, best)
            high = torch.where(broken, torch.minimum(high, weight), high)
            low = torch.where(broken, low, torch.maximum(low, weight))
            weight = torch.where(high.isfinite(), (low + high) / 2, 10 * weight)
        return settings.searches * settings.steps * len(clean)

    return _search_batches(search, network, images, labels, settings.batch_size)


@standard_torch_state()
def ddn(network: nn.Module, images: Images, labels: Labels, settings: DDN) -> MinimumNormResult:
    """Ascend the cross-entropy of images (N, C, H, W) on spheres that shrink around adversarial iterates.

    Raises InvalidModelError if an output or gradient of the network is missing or not finite.

    Source: Rony et al. 2019, "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and
    Defenses", algorithm 1.
    """

    def search(best: MinimumNormResult, true: Labels) -> int:
        clean, ball = best.images.clone(), L2(settings.initial_norm)
        current = clean
        radius = best.norms.new_full(best.norms.shape, settings.initial_norm)
        for step in range(settings.steps):
            leaf = current.detach().requires_grad_()
            logits = outputs_of(network, leaf)
            gradient = input_gradient(F.cross_entropy(logits, true, reduction="sum"), leaf)
            adversarial = _update_nearest(best, current, logits.detach(), true, clean)
            size = 0.01 + 0.99 * (1 + cos(pi * step / settings.steps)) / 2  # annealed from 1 to .01
            delta = current - clean + size * ball.steepest(gradient, clean)
            radius = radius * torch.where(adversarial, 1 - settings.gamma, 1 + settings.gamma)
            current = (clean + _column(radius, clean) * ball.steepest(delta, clean)).clamp(0, 1)
        return settings.steps * len(clean)

    return _search_batches(search, network, images, labels, settings.batch_size)


def _descend(
    network: nn.Module, clean: Images, labels: Labels, weight: Tensor, settings: CarliniWagner, best: MinimumNormResult
) -> Tensor:
    """Run Adam for fixed weights c (N,) and return which images became adversarial on the way, (N,) bool."""
    position = torch.atanh((2 * clean - 1) * _INSIDE)
    adam = torch.optim.Adam([position], lr=settings.learning_rate)
    broken = torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(settings.steps):
        images = (position.tanh() + 1) / 2
        leaf = images.detach().requires_grad_()
        logits = outputs_of(network, leaf)
        adversarial = _update_nearest(best, images, logits.detach(), labels, clean)
        broken |= adversarial
        # the gradient of the margin by itself: that of the distance would hide a missing one
        gradient = input_gradient(margin(logits, labels).sum(), leaf)
        descent = 2 * (images - clean) + _column(torch.where(adversarial, 0.0, weight), clean) * gradient
        position.grad = descent * 2 * images * (1 - images)  # the derivative of (tanh + 1) / 2
        adam.step()
    return broken


def _update_nearest(best: MinimumNormResult, images: Images, logits: Tensor, labels: Labels, clean: Images) -> Tensor:
    """Write adversarial images nearer than the nearest so far into `best`; return which are adversarial, (N,) bool."""
    adversarial = ~(margin(logits, labels) > 0)
    norms = (images - clean).flatten(1).norm(dim=1)
    better = adversarial & (norms < best.norms)
    best.images[better], best.norms[better] = images[better], norms[better]
    return adversarial


def _search_batches(
    search: Callable[[MinimumNormResult, Labels], int],
    network: nn.Module,
    images: Images,
    labels: Labels,
    batch_size: int,
) -> MinimumNormResult:
    """Search from the correctly classified images in batches; discard results that a plain forward pass rejects."""
    images, labels = as_images(images), as_labels(labels)
    found = images.clone()
    norms = images.new_zeros(len(images))
    passes = 0
    correct = _correct(network, found, labels, batch_size).nonzero().flatten()
    with frozen_parameters(network):
        for index in correct.split(allowed(batch_size)) if len(correct) else ():
            best = MinimumNormResult(found[index], norms.new_full(index.shape, torch.inf), 0)
            passes += search(best, labels[index])
            found[index], norms[index] = best.images, best.norms
    unconfirmed = _correct(network, found, labels, batch_size)
    found[unconfirmed], norms[unconfirmed] = images[unconfirmed], torch.inf
    return MinimumNormResult(found, norms, passes)


def _correct(network: nn.Module, images: Images, labels: Labels, batch_size: int) -> Tensor:
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
