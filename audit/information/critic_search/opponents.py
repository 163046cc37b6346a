"""Later stages of the worst-case search of `mine`: merged images are mixed, and moved down the value of critics.

Merged images keep their class under both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.memory.counting import count_passes
from audit.adversary.passes import input_gradient
from audit.information.bounds import BOUNDS
from audit.information.critic_search.merging import LONGER, Adversary, CountingEncoder
from audit.information.critic_training import critic_optimiser, critic_step, fit_division
from audit.information.dependence import KernelDependence
from audit.information.encoding import Division, EncodedSplits, Splits
from audit.information.feature_merging import BatchGradient, Descent, step_sizes
from audit.information.settings import CriticTraining
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Features, Images

_SHARPNESS = 1.0  # of the kernel between features
_ALIKE = 16  # images of which one counts as alike: how far their mean distance is
_VIEW = 8  # pixels to which images are averaged down before they are compared
_MARGIN = 1.0  # nats by which merged images keep their class
_PENALTY = 10.0  # of a smaller margin: it outweighs any change of the other value


class HeldClass(NamedTuple):
    """A class, and which images (N,) bool must keep it as their prediction; no class without log-probabilities."""

    label: int | None
    images: Tensor

    @classmethod
    def of(cls, encoded: Encoded, label: int | None) -> "HeldClass":
        """Return the images whose prediction is the class."""
        if label is None:
            return cls(None, torch.zeros(len(encoded.features), dtype=torch.bool, device=encoded.features.device))
        return cls(label, encoded.log_probs.argmax(1) == label)

    def penalty(self, log_probs: Tensor, index: Tensor | slice) -> Tensor:
        """Return the penalty of images with these indices, given their log-probabilities (M, K)."""
        held = self.images[index]
        if self.label is None or not bool(held.any()):
            return log_probs.new_zeros(())
        log_probs = log_probs[held]
        others = log_probs.scatter(1, torch.full_like(log_probs[:, :1], self.label, dtype=torch.long), -torch.inf)
        margin = log_probs[:, self.label] - others.amax(1)
        return _PENALTY * (_MARGIN - margin).clamp_min(0).sum()


@dataclass
class Mixing:
    """Projected descent of images (N, C, H, W) to where a kernel between features tells least of which are alike."""

    network: CountingEncoder
    clean: Images
    adversary: Adversary

    def run(self, start: Images, target: int | None, steps: int) -> Images:
        """Return the images after `steps` steps, each of one pass an image."""
        encoded = self.network.encode(start)
        held, dependence = HeldClass.of(encoded, target), KernelDependence(encoded.features.clone(), _SHARPNESS)
        views = torch.nn.functional.adaptive_avg_pool2d(self.clean, _VIEW).flatten(1)
        everything = torch.arange(len(start), device=start.device)
        self.network.passes += steps * len(start)

        def next_gradient() -> BatchGradient:
            dependence.renew()

            def gradient_of(images: Images, batch: slice) -> Tensor:
                leaf, index = images.detach().requires_grad_(), everything[batch]
                encoded = self.network.encoder(leaf)
                weights = _alikeness(views, index, dependence.known)
                told = dependence.told(encoded.features, index, weights).clamp_min(0).sum()
                return input_gradient(told + held.penalty(encoded.log_probs, index), leaf)

            return gradient_of

        threat, search = self.adversary
        sizes = step_sizes(LONGER * threat.eps * search.relative_step, steps)
        return Descent(self.clean, threat, sizes, self.network.batch_size).run(start, next_gradient)


def _alikeness(views: Tensor, index: Tensor, known: Tensor) -> Tensor:
    """Return how alike images with these indices (M,) and known ones (K,) are, (M, K); each row has the mean 1."""
    squares = torch.cdist(views[index], views[known]).square().masked_fill(index[:, None] == known, torch.inf)
    nearest = squares.topk(max(1, len(known) // _ALIKE), largest=False).values.mean(1, keepdim=True)
    weights = (-2 * squares / nearest.clamp_min(torch.finfo(squares.dtype).tiny)).exp()
    return weights / weights.mean(1, keepdim=True)


@dataclass
class CriticGame:
    """Projected descent of images down the mean value of the last critics, the newest of which is trained on them.

    `clean` are the clean images of the given division; `held` numbers the images through in that order. `number` is
    that of the next critic and of its division.
    """

    network: CountingEncoder
    clean: Splits
    training: CriticTraining
    adversary: Adversary
    seed: int
    held: HeldClass
    number: int
    critics: list[nn.Module] = field(default_factory=list)

    def play(self, start: Splits, rounds: int) -> tuple[Splits, bool]:
        """Return the images after a number of rounds, and whether a critic found no more than the tolerance left."""
        search, moved = self.adversary.search, start
        sizes = step_sizes(self.adversary.threat.eps * search.relative_step, rounds)
        for first in range(0, rounds, search.every):
            encoded = EncodedSplits(*map(self.network.encode, moved))
            critic, estimate = fit_division(moved, encoded, self.training, self.seed, self.number)
            if estimate.validated <= search.tolerance:
                return moved, True
            self.critics = [*self.critics, critic][-search.memory :]
            moved = self._against_newest(moved, encoded, sizes[first:][: search.every])
            self.number += 1
        return moved, False

    def _against_newest(self, start: Splits, encoded: EncodedSplits, sizes: Sequence[float]) -> Splits:
        """Return images after rounds in the division of the newest critic."""
        division, threat = Division.draw(self.clean, self.seed, self.number), self.adversary.threat
        moved, held = division.of(start).map(Tensor.clone), self.held.images[division.order].split(division.sizes)
        parts = [
            _Part(images, threat.step_bounds(clean), HeldClass(self.held.label, kept))
            for images, clean, kept in zip(moved, division.of(self.clean), held, strict=True)
        ]
        features = division.encoded(encoded).train.features.clone()
        batches = keyed_generator(self.seed, Purpose.MINE_SEARCH, self.number)
        critic_batches = keyed_generator(self.seed, Purpose.MINE_SEARCH_CRITIC, self.number)
        optimiser = critic_optimiser(self.critics[-1], self.training)
        for size in sizes:
            self.network.passes += sum(map(len, moved))
            for part in parts:
                for index in shuffled_batches(part.images, self.training.batch_size, batches):
                    found = self._step(part, index, size)
                    if part.images is moved.train:
                        features[index] = found
            for _ in range(self.adversary.search.critic_steps):
                critic_step(self.critics[-1], optimiser, moved.train, features, self.training, critic_batches)
        return division.undone(moved)

    def _step(self, part: "_Part", index: Tensor, size: float) -> Features:
        """Move the images of one batch by one step in place; return their features before it."""
        leaf = part.images[index].detach().requires_grad_()
        encoded, bound = self.network.encoder(leaf), BOUNDS[self.training.bound]
        values = []
        for critic in self.critics:
            critic.eval()
            values.append(bound(critic(leaf, encoded.features)))  # the gradient passes through both arguments
        value = torch.stack(values).mean() * len(index) + part.held.penalty(encoded.log_probs, index)
        stepped = torch.empty_like(leaf)
        bounds = (each[index] for each in part.bounds)
        self.adversary.threat.step_into(stepped, leaf.detach(), (input_gradient(value, leaf), size), *bounds)
        part.images[index] = stepped
        count_passes(len(index))
        return encoded.features.detach()


class _Part(NamedTuple):
    """Images that are moved in place, the tensors that bound their steps, and which of them must keep a class."""

    images: Images
    bounds: Sequence[Tensor]
    held: HeldClass


def shuffled_batches(images: Images, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Return random batches of nearly equal size, as indices; none has a single image, which forms no product pair."""
    pieces = max(1, min(round(len(images) / batch_size), len(images) // 2))
    return list(torch.randperm(len(images), generator=generator).to(images.device).tensor_split(pieces))
