"""Representation vulnerability by a critic: normal-case minus worst-case mutual information of one split.

The worst-case search keeps the perturbed images as its state. It first moves them towards one class; then every round
takes one projected step down the critic's value and trains the critic further. Every few rounds a fresh critic takes
over, fitted on another half of the images. New critics are fitted on the result. The information of any images inside
the balls is an upper bound on the minimum; the critics' value is an upper bound up to the critics' own error.

Source: Zhu, Zhang & Evans 2020, Definition 3.1 and section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.passes import deviations, input_gradient
from audit.adversary.threat import ThreatModel
from audit.information.bounds import BOUNDS
from audit.information.critic_training import critic_optimiser, critic_step, estimate_fixed, fit_division
from audit.information.encoding import Division, EncodedSplits, Splits, encode
from audit.information.estimator import CARRIED, CLEAN, COLD_START, MIEstimate, Origin, Vulnerability, WarmStart
from audit.information.feature_merging import BatchGradient, Descent, step_sizes
from audit.information.settings import CriticTraining, WorstCaseSearch
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images

_MERGED = "merged into"  # kind of origin; its value is the target class
_DESCENDED = "{}, hidden"
_TRIAL_CLASSES, _TRIAL_IMAGES = 10, 50
_TRIAL_ROUNDS = ((2, 4), (4, 1))  # steps of each round of a trial, and the number of classes left after it


class Adversary(NamedTuple):
    """A threat model, and the settings of the worst-case search inside it."""

    threat: ThreatModel
    search: WorstCaseSearch


def estimate_vulnerability(
    encoder: Encoder,
    images: Splits,
    training: CriticTraining,
    adversary: Adversary,
    seed: int,
    warm_start: WarmStart = COLD_START,
) -> Vulnerability:
    """Return normal- and worst-case mutual information in nats of one split; `indices` counts the held-out images.

    The worst case is the candidate with the smallest validation value: the clean images, those merged into one class,
    and those after descending the critic's value. At eps = 0 both cases are equal. Images of `warm_start`, and
    `others` of the result, are ordered training, validation (held-out). `passes` counts forward+backward passes of
    single images; a forward pass alone counts as half. Raises InvalidModelError if a feature or a gradient is not
    finite.

    Source: Zhu, Zhang & Evans 2020, Definition 3.1.
    """
    network = _CountingEncoder(encoder, training.batch_size)
    search = _WorstCase(network, images, training, adversary, seed, warm_start)
    normal = warm_start.normal or search.estimate(images)
    indices = torch.arange(len(images.test))
    if adversary.threat.eps == 0:
        return Vulnerability(normal, normal, images.test, indices, 0.5 * sum(map(len, images)), CLEAN)
    candidates = {CLEAN: (normal, images), **search.candidates()}
    origin = min(candidates, key=lambda each: candidates[each][0].validated)
    worst, adversarial = candidates[origin]
    others = torch.cat([adversarial.train, adversarial.validation])
    return Vulnerability(normal, worst, adversarial.test, indices, network.passes, origin, others)


@dataclass
class _CountingEncoder:
    """An encoder that counts forward+backward passes of single images; a forward pass alone counts as half."""

    encoder: Encoder
    batch_size: int
    passes: float = field(default=0.0, init=False)

    def encode(self, images: Images) -> Encoded:
        """Return the encoding of images (N, C, H, W), without gradients."""
        self.passes += 0.5 * len(images)
        return encode(self.encoder, images, self.batch_size)


@dataclass
class _WorstCase:
    """Search of the worst case of one split: candidates, each with the estimate of a critic fitted on it."""

    network: _CountingEncoder
    clean: Splits
    training: CriticTraining
    adversary: Adversary
    seed: int
    warm_start: WarmStart

    def candidates(self) -> dict[Origin, tuple[MIEstimate, Splits]]:
        """Return the warm start if there is one, the merged images, and those after descending the critic's value."""
        start, found, search = self.clean, {}, self.adversary.search
        if self.warm_start.images is not None:
            start = Splits(*self.warm_start.images.split([len(part) for part in self.clean]))
            found[CARRIED] = self.estimate(start), start
            search = replace(search, collapse_steps=ceil(search.collapse_steps / 4), rounds=ceil(search.rounds / 4))
        merging = _Merging(self.network, self.clean, self.adversary, self.warm_start)
        merged, target = merging.run(start, search.collapse_steps), merging.target.label
        # records show the missing class of an encoder without log-probabilities, too
        origin = Origin(f"{_MERGED} None") if target is None else Origin(_MERGED, target)
        found[origin] = self.estimate(merged), merged
        if found[origin][0].validated > search.tolerance:
            descended = self._descend(merged, target, search)
            found[origin.refined(_DESCENDED)] = self.estimate(descended), descended
        return found

    def estimate(self, images: Splits) -> MIEstimate:
        """Return the mean held-out estimate of new critics on images, each with its own division of them."""
        encoded = EncodedSplits(*map(self.network.encode, images))
        return estimate_fixed(images, encoded, self.training, self.adversary.search.repeats, self.seed)

    def _descend(self, start: Splits, target: int | None, search: WorstCaseSearch) -> Splits:
        """Return the images after descending the value of one critic after the other, none of which `estimate` uses."""
        moved, held, sizes = start, None, step_sizes(self.adversary.threat.eps * search.relative_step, search.rounds)
        for block, first in enumerate(range(0, len(sizes), search.every)):
            number, encoded = search.repeats + block, EncodedSplits(*map(self.network.encode, moved))
            held = held or Splits(*(_predicts(part.log_probs, target) for part in encoded))
            critic, estimate = fit_division(moved, encoded, self.training, self.seed, number)
            if estimate.validated <= search.tolerance:
                break
            division = Division.draw(self.clean, self.seed, number)
            features = division.encoded(encoded).train.features
            opponent = _Opponent(critic, number, features, target, division.of(held))
            moved = division.undone(
                self._descend_one(division.of(moved), division.of(self.clean), opponent, sizes[first:][: search.every])
            )
        return moved

    def _descend_one(self, start: Splits, clean: Splits, opponent: "_Opponent", sizes: Sequence[float]) -> Splits:
        """Return images after a few rounds of descending one critic's value; the critic is trained in between."""
        threat, critic, target = self.adversary.threat, opponent.critic, opponent.target
        batches = keyed_generator(self.seed, Purpose.MINE_SEARCH, opponent.number)
        critic_batches = keyed_generator(self.seed, Purpose.MINE_SEARCH_CRITIC, opponent.number)
        moved, train_features, merged = start.map(Tensor.clone), opponent.features.clone(), opponent.held
        optimiser, bounds = critic_optimiser(critic, self.training), [threat.step_bounds(part) for part in clean]
        for size in sizes:
            self.network.passes += sum(map(len, clean))
            for images, part_merged, part_bounds in zip(moved, merged, bounds, strict=True):
                for index in _shuffled_batches(images, self.training.batch_size, batches):
                    batch = images[index]
                    held = _HeldClass(target, part_merged[index])
                    gradient, features = _descent_gradient(self.network.encoder, critic, batch, held, self.training)
                    stepped = torch.empty_like(batch)
                    threat.step_into(stepped, batch, (gradient, size), *(bound[index] for bound in part_bounds))
                    images[index] = stepped
                    if images is moved.train:
                        train_features[index] = features
            for _ in range(self.adversary.search.critic_steps):
                critic_step(critic, optimiser, moved.train, train_features, self.training, critic_batches)
        return moved


class _Opponent(NamedTuple):
    """A critic with its number, training features, and the class that the images `held` (bool) must keep."""

    critic: nn.Module
    number: int
    features: Features
    target: int | None
    held: Splits


class _MergeTarget(NamedTuple):
    """The class that images are moved to; without log-probabilities, the mean of the standardised features."""

    label: int | None
    mean: Tensor
    deviation: Tensor


@dataclass
class _Merging:
    """Projected descent of all images towards one class, or without log-probabilities towards the mean features."""

    network: _CountingEncoder
    clean: Splits
    adversary: Adversary
    warm_start: WarmStart

    def run(self, start: Splits, steps: int) -> Splits:
        """Return the images after `steps` steps towards the target, four times as large as later ones."""
        self.network.passes += steps * sum(map(len, self.clean))
        pairs = zip(start, self.clean, strict=True)
        return Splits(*(self._descend(images, clean, self.target, steps) for images, clean in pairs))

    @cached_property
    def target(self) -> _MergeTarget:
        """The target of all images.

        The most frequent class among the warm start's predictions; else the class of another seed's worst case; else
        the one of the ten most likely classes that a trial reaches best.
        """
        clean = self.network.encode(self.clean.train)
        smallest = min(1e-12, 1e-6 * float(clean.features.abs().max())) or 1e-12
        mean, deviation = clean.features.mean(0), deviations(clean.features).clamp_min(smallest)
        classes = clean.log_probs.shape[1]
        if not classes:
            return _MergeTarget(None, mean, deviation)
        images, origin = self.warm_start.images, self.warm_start.origin
        if images is not None:
            predicted = self.network.encode(images).log_probs.argmax(1)
            return _MergeTarget(int(predicted.bincount().argmax()), mean, deviation)
        if origin is not None and origin.kind == _MERGED and origin.value is not None:
            return _MergeTarget(int(origin.value), mean, deviation)
        likely = clean.log_probs.mean(0).topk(min(_TRIAL_CLASSES, classes)).indices.tolist()
        return _MergeTarget(self._most_reachable(likely, mean, deviation), mean, deviation)

    def _most_reachable(self, labels: list[int], mean: Tensor, deviation: Tensor) -> int:
        """Return the class that a few images reach best, in rounds that keep the best classes only."""
        clean = self.clean.train[:_TRIAL_IMAGES]
        moved = dict.fromkeys(labels, clean)
        for steps, left in _TRIAL_ROUNDS:
            self.network.passes += steps * len(moved) * len(clean)
            moved = {
                label: self._descend(images, clean, _MergeTarget(label, mean, deviation), steps)
                for label, images in moved.items()
            }
            share = {
                label: float(self.network.encode(images).log_probs[:, label].exp().mean())
                for label, images in moved.items()
            }
            moved = {label: moved[label] for label in sorted(moved, key=lambda label: -share[label])[:left]}
        return next(iter(moved))

    def _descend(self, start: Images, clean: Images, target: _MergeTarget, steps: int) -> Images:
        threat, search = self.adversary
        sizes = step_sizes(4 * threat.eps * search.relative_step, steps)

        def next_gradient() -> BatchGradient:
            return lambda images, _batch: _merge_gradient(self.network.encoder, images, target)

        return Descent(clean, threat, sizes, self.network.batch_size).run(start, next_gradient)


def _predicts(log_probs: Tensor, label: int | None) -> Tensor:
    if label is None:
        return torch.zeros(len(log_probs), dtype=torch.bool, device=log_probs.device)
    return log_probs.argmax(1) == label


def _merge_gradient(encoder: Encoder, images: Images, target: _MergeTarget) -> Tensor:
    leaf = images.detach().requires_grad_()
    encoded = encoder(leaf)
    if target.label is not None:
        distance = -encoded.log_probs[:, target.label].sum()
    else:
        distance = ((encoded.features - target.mean) / target.deviation).square().sum()
    return input_gradient(distance, leaf)


class _HeldClass(NamedTuple):
    """A class, and which images (N,) bool must keep it as their prediction."""

    label: int | None
    images: Tensor


def _descent_gradient(
    encoder: Encoder, critic: nn.Module, images: Images, held: _HeldClass, training: CriticTraining
) -> tuple[Tensor, Features]:
    """Return the gradient of the bound through both arguments of T(x, g(x)), and the features of the images.

    A penalty keeps merged images in their class.
    """
    critic.eval()
    leaf = images.detach().requires_grad_()
    encoded = encoder(leaf)
    value = BOUNDS[training.bound](critic(leaf, encoded.features)) * len(images)
    if held.label is not None and held.images.any():
        log_probs = encoded.log_probs[held.images]
        others = log_probs.scatter(1, torch.full_like(log_probs[:, :1], held.label, dtype=torch.long), -torch.inf)
        margin = log_probs[:, held.label] - others.amax(1)
        # below a margin of one nat the penalty outweighs any change of the critic's value
        value = value + 10 * (1 - margin).clamp_min(0).sum()
    return input_gradient(value, leaf), encoded.features.detach()


def _shuffled_batches(images: Images, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Return random batches of nearly equal size, as indices; none has a single image, which forms no product pair."""
    pieces = max(1, min(round(len(images) / batch_size), len(images) // 2))
    return list(torch.randperm(len(images), generator=generator).to(images.device).tensor_split(pieces))
