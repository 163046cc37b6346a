"""Mutual information between images and their representation: a critic fitted, and what it says held out.

A critic learns on training images, its step is chosen on validation images, and the value comes from held-out ones.

Source: Belghazi et al. 2018 (MINE); Zhu, Zhang & Evans 2020, section 4.1.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from math import hypot, isfinite, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.information.bounds import BOUNDS, donsker_varadhan, infonce_terms, offsets
from audit.information.critics import CriticShape, build_critic
from audit.information.estimator import MIEstimate, Subject
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images


@dataclass(frozen=True)
class CriticTraining:
    """How a critic is trained: AdamW on a bound, early-stopped on validation images.

    `patience` is in steps without a new best validation value; `every` is how often that is read. What is read and
    kept is the moving average of the weights, in which each step's own count for 1 - `averaging`; 0 is no average.
    One set of defaults serves images and vectors, so that what is calibrated is what is run.
    """

    bound: str = "infonce"
    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    every: int = 10
    patience: int = 80
    averaging: float = 0.95
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
        if not 0 <= self.averaging < 1:
            raise UsageError(f"critic training averaging {self.averaging!r} is outside [0, 1)")
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
    order = torch.randperm(count, generator=keyed_generator(seed, Purpose.CRITIC_SPLIT))
    return Splits(order[:first], order[first:second], order[second:])


def split_images(images: Images, seed: int, train: float = 0.5, validation: float = 0.2) -> Splits:
    """Return a seeded, disjoint split; raises UsageError where a part would hold fewer than ten images."""
    parts = split_indices(len(images), seed, train, validation)
    return parts.map(lambda index: images[index.to(images.device)])


@torch.no_grad()
def encode(encoder: Encoder, images: Images, batch_size: int) -> Encoded:
    """Return features and answers for all images; raises InvalidModelError where a feature is not finite."""
    parts = [encoder(batch) for batch in images.split(batch_size)]
    return _finite(Encoded(*(torch.cat(each) for each in zip(*parts, strict=True))))


def encode_clean(subject: Subject, batch_size: int) -> Encoded:
    """Return features and answers of a subject's images as they are: known, or else encoded now.

    Raises InvalidModelError where a feature is not finite.
    """
    return encode(subject.encoder, subject.images, batch_size) if subject.clean is None else _finite(subject.clean)


def _finite(encoded: Encoded) -> Encoded:
    bad = int((~encoded.features.isfinite()).any(1).sum())
    if bad:
        raise InvalidModelError(f"the representation is not finite for {bad} of {len(encoded.features)} images")
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
    live = build_critic(
        images.train, encoded.train.features, training.shape, keyed_generator(seed, Purpose.CRITIC_WEIGHTS)
    )
    critic = copy.deepcopy(live).requires_grad_(False)  # the moving average of the live one
    optimiser = critic_optimiser(live, training)
    batches = keyed_generator(seed, Purpose.CRITIC_BATCHES)
    course = _Course()
    for step in range(training.steps + 1):
        if step % training.every == 0:
            course.read(step, critic, _terms(critic, images.validation, encoded.validation))
            if step - course.best_step >= training.patience:
                course.ended = True
                break
        if step < training.steps:
            value = critic_step(live, optimiser, images.train, encoded.train.features, training, batches)
            _average(critic, live, training.averaging, step)
            if step % training.every == 0:
                course.trained.append((step, value))
    critic.load_state_dict(course.weights)
    return critic.requires_grad_(True), _estimate(critic, images, encoded, course)


@dataclass
class _Course:
    """What validation images said while a critic was trained, and the weights it liked best."""

    best: float = -torch.inf
    best_error: float = 0.0
    best_step: int = 0
    ended: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)
    trained: list[tuple[int, float]] = field(default_factory=list)

    def read(self, step: int, critic: nn.Module, terms: Tensor) -> None:
        """Note one reading, and keep the weights if it is the best."""
        value = float(terms.mean())
        self.history.append((step, value))
        if value > self.best or not self.weights:
            self.best, self.best_step, self.weights = value, step, copy.deepcopy(critic.state_dict())
            self.best_error = float(terms.std()) / sqrt(len(terms))


@torch.no_grad()
def _average(average: nn.Module, live: nn.Module, weight: float, step: int) -> None:
    """Move an average of weights towards the live ones: early on faster, as there is nothing yet worth keeping."""
    share = 1 - min(weight, (1 + step) / (10 + step)) if weight else 1.0
    torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), share)


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
def _estimate(critic: nn.Module, images: Splits, encoded: EncodedSplits, course: _Course) -> MIEstimate:
    critic.eval()
    scores = critic(images.test, encoded.test.features)
    by_critic, by_label = infonce_terms(scores), label_surprise(encoded.test.answers)
    # the offsets come from other images, so what is left is one fixed critic on the held-out ones
    ratios = scores - offsets(critic(images.test, encoded.validation.features))[:, None]
    # without answers only the critic speaks, even where it comes out under zero
    lifted = encoded.test.answers.shape[1] > 0 and bool(by_label.mean() > by_critic.mean())
    terms = by_label if lifted else by_critic
    count = len(images.test)
    return MIEstimate(
        nats=float(terms.mean()),
        stderr=float(terms.std()) / sqrt(count),
        images=count,
        ceiling=log(count),
        validated=max(course.best, float(label_surprise(encoded.validation.answers).mean())),
        parts={
            "critic": float(by_critic.mean()),
            "labels": float(by_label.mean()),
            "donsker-varadhan": float(donsker_varadhan(ratios)),
        },
        history=tuple(course.history),
        training_history=tuple(course.trained),
        flags=_training_flags(course, by_critic),
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


def _training_flags(course: _Course, held_out: Tensor) -> tuple[str, ...]:
    """Return what speaks against a fit: it blew up, was cut short, or learnt the training images by heart."""
    values = [value for _, value in course.history]
    if not all(isfinite(value) for value in values):
        return ("not_converged: the critic's value stopped being finite while it trained",)
    flags = []
    if len(values) > 2 and not course.ended:
        last, best = course.history[-1][0], course.best_step
        still = last - best <= course.history[1][0]
        flags.append(
            "not_converged: the critic was still improving at its last step"
            if still
            else f"not_converged: training ended at step {last}, too soon after its best step {best} to be sure of it"
        )
    learnt = course.trained[-1][1] - course.trained[0][1] if course.trained else 0.0
    if len(values) > 3 and course.best_step <= course.history[2][0] and learnt > max(course.best, 0) + 0.5:
        flags.append(
            f"over_fitted: the critic was at its best at step {course.best_step}, while its training value "
            f"went on to {course.trained[-1][1]:.2f}"
        )
    value, error = float(held_out.mean()), float(held_out.std()) / sqrt(len(held_out))
    if course.best - value > 3 * hypot(error, course.best_error):
        flags.append(f"over_fitted: the held-out value {value:.2f} is far below the validation value {course.best:.2f}")
    return tuple(flags)
