"""Mutual information between images and their representation: a critic fitted, and what it says held out.

A critic learns on training images, its step is chosen on validation images, and the value comes from held-out ones.

Source: Belghazi et al. 2018 (MINE); Zhu, Zhang & Evans 2020, section 4.1.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.bounds import BOUNDS, infonce_terms
from audit.critics import CriticShape, build_critic
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.estimates import MIEstimate
from audit.types import Encoded, Encoder, Features, Images, keyed_generator

_SPLIT, _CRITIC, _BATCHES = range(21, 24)


@dataclass(frozen=True)
class CriticTraining:
    """How a critic is trained: AdamW on a bound, early-stopped on validation images.

    `patience` is in steps without a new best validation value; `every` is how often that is read.
    """

    bound: str = "infonce"
    steps: int = 400
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    every: int = 10
    patience: int = 80
    shape: CriticShape = field(default_factory=CriticShape)

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            raise UnknownNameError("bound", self.bound, BOUNDS)
        for name in ("steps", "every", "patience"):
            if getattr(self, name) < 1:
                raise UsageError(f"critic training {name} {getattr(self, name)!r} must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"critic training learning_rate {self.learning_rate!r} must be above 0 and finite")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"critic training weight_decay {self.weight_decay!r} must be at least 0 and finite")
        if self.batch_size < 2:
            raise UsageError(
                f"critic training batch_size {self.batch_size!r} must be at least 2: one pair has no others"
            )


class Splits(NamedTuple):
    """Disjoint sets of images, or their indices.

    The critic learns on `train`, its step is chosen on `validation`, the value comes from `test`.
    """

    train: Images
    validation: Images
    test: Images

    def map(self, function: Callable[[Tensor], Tensor]) -> "Splits":
        """Return the splits with a function applied to each."""
        return Splits(*(function(part) for part in self))


class EncodedSplits(NamedTuple):
    """What the network says of each of the `Splits`."""

    train: Encoded
    validation: Encoded
    test: Encoded


def split_indices(count: int, seed: int, train: float = 0.5, validation: float = 0.2) -> Splits:
    """Return seeded, disjoint indices; raises UsageError where a part would hold fewer than ten images."""
    first, second = int(train * count), int((train + validation) * count)
    if min(first, second - first, count - second) < 10:
        raise UsageError(
            f"{count} images are too few: training, validation and held-out sets need 10 each, so 50 in all"
        )
    order = torch.randperm(count, generator=keyed_generator(seed, _SPLIT))
    return Splits(order[:first], order[first:second], order[second:])


def split_images(images: Images, seed: int, train: float = 0.5, validation: float = 0.2) -> Splits:
    """Return a seeded, disjoint split; raises UsageError where a part would hold fewer than ten images."""
    parts = split_indices(len(images), seed, train, validation)
    return parts.map(lambda index: images[index.to(images.device)])


@torch.no_grad()
def encode(encoder: Encoder, images: Images, batch_size: int) -> Encoded:
    """Return features and answers for all images; raises InvalidModelError where a feature is not finite."""
    parts = [encoder(batch) for batch in images.split(batch_size)]
    encoded = Encoded(*(torch.cat(each) for each in zip(*parts, strict=True)))
    bad = int((~encoded.features.isfinite()).any(1).sum())
    if bad:
        raise InvalidModelError(f"the representation is not finite for {bad} of {len(images)} images")
    return encoded


def encode_splits(encoder: Encoder, images: Splits, batch_size: int) -> EncodedSplits:
    """Return features and answers for each split."""
    return EncodedSplits(*(encode(encoder, part, batch_size) for part in images))


def estimate_mi(encoder: Encoder, images: Splits, training: CriticTraining, seed: int) -> MIEstimate:
    """Return the held-out estimate of I(X; g(X)) in nats."""
    return fit_critic(images, encode_splits(encoder, images, training.batch_size), training, seed)[1]


def fit_critic(
    images: Splits, encoded: EncodedSplits, training: CriticTraining, seed: int
) -> tuple[nn.Module, MIEstimate]:
    """Return a critic trained on fixed images and features, at its best validation step, and its held-out estimate."""
    critic = build_critic(images.train, encoded.train.features, training.shape, keyed_generator(seed, _CRITIC))
    optimiser = critic_optimiser(critic, training)
    batches = keyed_generator(seed, _BATCHES)
    best, best_step, weights = -torch.inf, 0, copy.deepcopy(critic.state_dict())
    history: list[tuple[int, float]] = []
    trained: list[tuple[int, float]] = []
    for step in range(training.steps + 1):
        if step % training.every == 0:
            value = float(_terms(critic, images.validation, encoded.validation).mean())
            history.append((step, value))
            if value > best:
                best, best_step, weights = value, step, copy.deepcopy(critic.state_dict())
            if step - best_step >= training.patience:
                break
        if step < training.steps:
            value = critic_step(critic, optimiser, images.train, encoded.train.features, training, batches)
            if step % training.every == 0:
                trained.append((step, value))
    critic.load_state_dict(weights)
    return critic, _estimate(critic, images, encoded, history, trained)


def critic_step(
    critic: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Images,
    features: Features,
    training: CriticTraining,
    batches: torch.Generator,
) -> float:
    """Take one ascent step on a random batch of pairs and return the bound's value there, in nats."""
    critic.train()
    chosen = torch.randperm(len(images), generator=batches)[: training.batch_size].to(images.device)
    value = BOUNDS[training.bound](critic(images[chosen], features[chosen]))
    optimiser.zero_grad()
    (-value).backward()
    optimiser.step()
    return float(value.detach())


def critic_optimiser(critic: nn.Module, training: CriticTraining) -> torch.optim.Optimizer:
    """Return the optimiser a critic is trained with."""
    return torch.optim.AdamW(critic.parameters(), training.learning_rate, weight_decay=training.weight_decay)


@torch.no_grad()
def _terms(critic: nn.Module, images: Images, encoded: Encoded) -> Tensor:
    critic.eval()
    return infonce_terms(critic(images, encoded.features))


@torch.no_grad()
def _estimate(
    critic: nn.Module,
    images: Splits,
    encoded: EncodedSplits,
    history: list[tuple[int, float]],
    trained: list[tuple[int, float]],
) -> MIEstimate:
    by_critic, by_label = _terms(critic, images.test, encoded.test), label_surprise(encoded.test.answers)
    # without answers only the critic speaks, even where it comes out under zero
    lifted = encoded.test.answers.shape[1] > 0 and bool(by_label.mean() > by_critic.mean())
    terms = by_label if lifted else by_critic
    validated = max(max(value for _, value in history), float(label_surprise(encoded.validation.answers).mean()))
    count = len(images.test)
    return MIEstimate(
        nats=float(terms.mean()),
        stderr=float(terms.std()) / sqrt(count),
        images=count,
        ceiling=log(count),
        validated=validated,
        parts={"critic": float(by_critic.mean()), "labels": float(by_label.mean())},
        history=tuple(history),
        training_history=tuple(trained),
        flags=_training_flags(history),
    )


def label_surprise(answers: Tensor) -> Tensor:
    """Return -ln of how often each image's answer is given (N,): its mean is the entropy of the answers, in nats.

    `answers` are log-probabilities (N, K); with K = 0 the surprise is zero.

    Source: the plug-in entropy, which errs low.
    """
    if answers.shape[1] == 0:
        return answers.new_zeros(len(answers))
    given = answers.argmax(1)
    return -(given.bincount()[given].to(answers) / len(given)).log()


def _training_flags(history: list[tuple[int, float]]) -> tuple[str, ...]:
    """Early stopping never reached: the best validation value is among the last readings, or the critic blew up."""
    values = [value for _, value in history]
    if not all(isfinite(value) for value in values):
        return ("not_converged: the critic's value stopped being finite while it trained",)
    still_rising = len(values) > 2 and values.index(max(values)) >= len(values) - 2
    return ("not_converged: the critic was still improving at its last step",) if still_rising else ()
