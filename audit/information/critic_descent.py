"""Representation vulnerability: normal-case less worst-case mutual information.

The worst case is searched with the perturbed images as state: every round moves each image one projected step down
the critic's value while the critic keeps learning; then the moved images are frozen and a *fresh* critic is fitted
on them. Any set of moved images gives an upper bound of the infimum, less only the critic's own deficit.

Source: Zhu, Zhang & Evans 2020, Definition 3.1 and section 4.1.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.gradients import input_gradient
from audit.adversary.threat import ThreatModel
from audit.errors import UsageError
from audit.information.bounds import BOUNDS
from audit.information.critic_training import (
    CriticTraining,
    Splits,
    critic_optimiser,
    critic_step,
    encode,
    encode_splits,
    fit_critic,
)  # fmt: skip
from audit.information.estimator import CLEAN, NOTHING_KNOWN, Known, MIEstimate, Vulnerability
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images

_CARRIED, _MERGED = "carried", "merged into "
_ANSWER = re.compile(rf"{_MERGED}(\d+)")
_TRIAL_ANSWERS, _TRIAL_IMAGES = 10, 50
_HEATS = ((2, 4), (4, 1))  # steps of a trial, and how many answers are left after it


@dataclass(frozen=True)
class WorstCaseSearch:
    """How the images are moved: first together, then out of the critic's sight.

    `collapse_steps` projected steps drive all images towards one common answer, the one that a short trial on a few
    training images merges best: information is not convex in the images, and a local search from the clean ones
    shuffles answers where it could merge them. Then `rounds` of one
    step each make the critic's value small while images that gave the common answer keep giving it, with
    `critic_steps` critic steps after each, on features just computed, which cost no pass through the network. Steps
    start at `relative_step` x eps, four times that while collapsing, and shrink linearly to a tenth of it. Every
    `every` rounds a fresh critic reads the images: where its validation value, in nats, fell by less than `tolerance`,
    or has no more than that left to fall, the search ends.
    """

    collapse_steps: int = 20
    rounds: int = 40
    relative_step: float = 0.1
    critic_steps: int = 5
    every: int = 10
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        for name in ("rounds", "critic_steps", "collapse_steps", "every"):
            if getattr(self, name) < 1:
                raise UsageError(f"search {name} {getattr(self, name)!r} must be at least 1")
        if not 0 < self.relative_step <= 2:
            raise UsageError(f"search relative_step {self.relative_step!r} is outside (0, 2]: it is a multiple of eps")
        if not 0 <= self.tolerance < float("inf"):
            raise UsageError(f"search tolerance {self.tolerance!r} must be at least 0 and finite: it is in nats")


class Adversary(NamedTuple):
    """A threat model and how hard to search inside it."""

    threat: ThreatModel
    search: WorstCaseSearch


def estimate_vulnerability(
    encoder: Encoder,
    images: Splits,
    training: CriticTraining,
    adversary: Adversary,
    seed: int,
    known: Known = NOTHING_KNOWN,
) -> Vulnerability:
    """Return normal- and worst-case MI on one split; `which` of the result counts the held-out images.

    The worst case is the smallest candidate, chosen on validation images: the images unmoved, merged, and what the
    search made of those. At eps = 0 it is the normal case exactly. The images of `known.start`, and the `others` of
    the result, are those for training, then those for validation (then those held out). `passes` counts
    forward+backward passes of single images through the network, plain forwards as a half.
    """
    lab = _Laboratory(encoder, images, training, adversary, seed, known)
    normal = known.normal or lab.fit(images)[1]
    everything = torch.arange(len(images.test))
    if adversary.threat.eps == 0:
        return Vulnerability(normal, normal, images.test, everything, 0.5 * lab.total, CLEAN)
    candidates = {CLEAN: (normal, images), **lab.moved()}
    served = min(candidates, key=lambda name: candidates[name][0].validated)
    worst, found = candidates[served]
    others = torch.cat([found.train, found.validation])
    return Vulnerability(normal, worst, found.test, everything, lab.passes, served, others)


class _Target(NamedTuple):
    """Where images are merged: one answer, or for layers without answers the middle of the features."""

    answer: int | None
    middle: Tensor
    scale: Tensor


class _Kept(NamedTuple):
    """An answer, and which images (N,) bool must go on giving it."""

    answer: int | None
    images: Tensor


@dataclass
class _Laboratory:
    """What stays the same while one split's images are moved and critics are fitted to them."""

    encoder: Encoder
    clean: Splits
    training: CriticTraining
    adversary: Adversary
    seed: int
    known: Known = NOTHING_KNOWN
    passes: float = field(default=0.0, init=False)

    @property
    def total(self) -> int:
        return sum(len(part) for part in self.clean)

    def moved(self) -> dict[str, tuple[MIEstimate, Splits]]:
        """Return the images merged, and out of the critic's sight from there; those to start from stand first."""
        begun, found, effort = self.clean, {}, self.adversary.search
        if self.known.start is not None:
            begun = Splits(*self.known.start.split([len(part) for part in self.clean]))
            found[_CARRIED] = self.fit(begun)[1], begun
            effort = replace(effort, collapse_steps=ceil(effort.collapse_steps / 4), rounds=ceil(effort.rounds / 4))
        collapsed, kind = self.collapse(begun, effort.collapse_steps), f"{_MERGED}{self.target.answer}"
        critic, best = self.fit(collapsed)
        found[kind] = best, collapsed
        if best.validated <= effort.tolerance:
            return found
        for hidden in self.search(collapsed, critic, effort):
            read = self.fit(hidden)[1]
            gained = best.validated - read.validated
            if gained > 0:
                found[f"{kind}, hidden"], best = (read, hidden), read
            if gained < effort.tolerance:
                break
        return found

    def fit(self, images: Splits) -> tuple[nn.Module, MIEstimate]:
        self.passes += 0.5 * self.total
        encoded = encode_splits(self.encoder, images, self.training.batch_size)
        return fit_critic(images, encoded, self.training, self.seed)

    @cached_property
    def target(self) -> _Target:
        """The answer to merge the images into.

        The one that served, or that most of the images to start from give; else, of the ten likeliest, the one that a
        short trial reaches best.
        """
        known = self._encoded(self.clean.train)
        middle, scale = known.features.mean(0), known.features.std(0).clamp_min(1e-12)
        classes = known.answers.shape[1]
        if not classes:
            return _Target(None, middle, scale)
        if self.known.start is not None:
            given = self._encoded(self.known.start).answers.argmax(1)
            return _Target(int(given.bincount().argmax()), middle, scale)
        if served := _ANSWER.match(self.known.served):
            return _Target(int(served[1]), middle, scale)
        likely = known.answers.mean(0).topk(min(_TRIAL_ANSWERS, classes)).indices.tolist()
        return _Target(self._reached_best(likely, middle, scale), middle, scale)

    def _reached_best(self, answers: list[int], middle: Tensor, scale: Tensor) -> int:
        """Return the answer that a few images are driven to best: in two heats, the second one of the best four."""
        few = self.clean.train[:_TRIAL_IMAGES]
        moved = dict.fromkeys(answers, few)
        for steps, left in _HEATS:
            self.passes += steps * len(moved) * len(few)
            moved = {
                answer: self._driven(images, few, _Target(answer, middle, scale), steps)
                for answer, images in moved.items()
            }
            share = {
                answer: float(self._encoded(images).answers[:, answer].exp().mean()) for answer, images in moved.items()
            }
            moved = {answer: moved[answer] for answer in sorted(moved, key=lambda answer: -share[answer])[:left]}
        return next(iter(moved))

    def collapse(self, begun: Splits, steps: int) -> Splits:
        """Return the images driven towards one answer; without answers, towards the middle of the features."""
        self.passes += steps * self.total
        pairs = zip(begun, self.clean, strict=True)
        return Splits(*(self._driven(start, clean, self.target, steps) for start, clean in pairs))

    def _driven(self, start: Images, clean: Images, target: _Target, steps: int) -> Images:
        threat, moved, buffer = self.adversary.threat, start.clone(), torch.empty_like(start)
        walls = threat.walls(clean)
        for done in range(steps):
            size = 4 * self._step_size(done / steps)
            for first in range(0, len(clean), self.training.batch_size):
                some = slice(first, first + self.training.batch_size)
                gradient = _collapse_gradient(self.encoder, moved[some], target)
                threat.step_into(buffer[some], moved[some], (gradient, size), *(wall[some] for wall in walls))
            moved, buffer = buffer, moved
        return moved

    def search(self, start: Splits, critic: nn.Module, search: WorstCaseSearch) -> Iterator[Splits]:
        """Yield, every few rounds, the images moved down the critic's value; the critic is trained along."""
        threat = self.adversary.threat
        batches, critic_batches = (
            keyed_generator(self.seed, Purpose.MINE_SEARCH),
            keyed_generator(self.seed, Purpose.MINE_SEARCH_CRITIC),
        )
        moved = start.map(Tensor.clone)
        holding = [_gives(self._encoded(part).answers, self.target.answer) for part in moved]
        known = self._encoded(moved.train).features
        optimiser, walls = critic_optimiser(critic, self.training), [threat.walls(part) for part in self.clean]
        for done in range(search.rounds):
            size = self._step_size(done / search.rounds)
            self.passes += self.total
            for number, (part, sides) in enumerate(zip(moved, walls, strict=True)):
                for chosen in _shuffled_batches(part, self.training.batch_size, batches):
                    kept = _Kept(self.target.answer, holding[number][chosen])
                    gradient, features = _hiding_gradient(self.encoder, critic, part[chosen], kept, self.training)
                    some = part[chosen]
                    stepped = torch.empty_like(some)
                    threat.step_into(stepped, some, (gradient, size), *(wall[chosen] for wall in sides))
                    part[chosen] = stepped
                    if number == 0:
                        known[chosen] = features
            for _ in range(search.critic_steps):
                critic_step(critic, optimiser, moved.train, known, self.training, critic_batches)
            if (done + 1) % search.every == 0 or done + 1 == search.rounds:
                yield moved.map(Tensor.clone)

    def _encoded(self, images: Images) -> Encoded:
        self.passes += 0.5 * len(images)
        return encode(self.encoder, images, self.training.batch_size)

    def _step_size(self, progress: float) -> float:
        return self.adversary.threat.eps * self.adversary.search.relative_step * (1 - 0.9 * progress)


def _gives(answers: Tensor, wanted: int | None) -> Tensor:
    if wanted is None:
        return torch.zeros(len(answers), dtype=torch.bool, device=answers.device)
    return answers.argmax(1) == wanted


def _collapse_gradient(encoder: Encoder, images: Images, target: _Target) -> Tensor:
    leaf = images.detach().requires_grad_()
    encoded = encoder(leaf)
    if target.answer is not None:
        distance = -encoded.answers[:, target.answer].sum()
    else:
        distance = ((encoded.features - target.middle) / target.scale).square().sum()
    return input_gradient(distance, leaf)


def _hiding_gradient(
    encoder: Encoder, critic: nn.Module, images: Images, kept: _Kept, training: CriticTraining
) -> tuple[Tensor, Features]:
    """Return the gradient of the bound through both arguments of T(x, g(x)), and the features met on the way.

    Images about to lose the common answer are pulled back to it instead.
    """
    critic.eval()
    leaf = images.detach().requires_grad_()
    encoded = encoder(leaf)
    value = BOUNDS[training.bound](critic(leaf, encoded.features)) * len(images)
    if kept.answer is not None and kept.images.any():
        answers = encoded.answers[kept.images]
        others = answers.scatter(1, torch.full_like(answers[:, :1], kept.answer, dtype=torch.long), -torch.inf)
        lead = answers[:, kept.answer] - others.amax(1)
        # a lead of one nat is safe; below it, regaining it outweighs anything the critic may see
        value = value + 10 * (1 - lead).clamp_min(0).sum()
    return input_gradient(value, leaf), encoded.features.detach()


def _shuffled_batches(images: Images, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Random batches of nearly equal size, as indices: a pair needs others beside it, so none may be left alone."""
    pieces = max(1, min(round(len(images) / batch_size), len(images) // 2))
    return list(torch.randperm(len(images), generator=generator).to(images.device).tensor_split(pieces))
