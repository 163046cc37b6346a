"""What the paper's authors' released code computes, for replication only: `ref-local` and `ref-mean`.

A critic with batch norm scores every position of a strided view of the image against the representation; the worst
case is searched anew from the clean images before every critic step, so it is max-min, not the paper's min-max.

Source: Zhu, Zhang & Evans 2020, as their released code reads; Hjelm et al. 2019 (the critic's heads).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from audit.adversary.gradients import input_gradient
from audit.adversary.threat import ThreatModel
from audit.errors import UsageError
from audit.information.critic_training import encode_splits, split_images, split_indices
from audit.information.estimator import NOTHING_KNOWN, Estimator, History, Known, MIEstimate, Subject, Vulnerability
from audit.information.released.critic import ReferenceCritic, reference_ceiling, reference_influence, reference_value
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoder, Features, Images


class _Sample(NamedTuple):
    """Images (N, C, H, W) and the features (N, D) of them."""

    images: Images
    features: Features

    def part(self, chosen: Tensor) -> "_Sample":
        return _Sample(*(each[chosen.to(each.device)] for each in self))


class _Samples(NamedTuple):
    train: _Sample
    validation: _Sample
    test: _Sample


_Mover = Callable[[ReferenceCritic, _Sample], _Sample]
"""Maps the critic and a clean batch to the batch that the critic is to score."""


@dataclass(frozen=True)
class Reference(Estimator):
    """The authors' code: `ref-local` with a value per position, `ref-mean` with one of the scores averaged over them.

    Theirs are `width` 2048, `learning_rate` 1e-4 and 500 epochs of augmented training images (on CIFAR-10, 195,500
    steps); the defaults are cut down to a CPU and no image is augmented. At so few steps their rate leaves the critic
    where it was drawn, below zero, the longer the wider it is. As released: Adam at a constant rate, the last step's
    critic, batch norm in eval mode on held-out batches of at most `batch_size` images (here of nearly equal size).

    Before every critic step, `search_steps` projected steps of the absolute length `step_size` leave from the clean
    images, down the value of the whole batch; the iterate with the smallest value is kept for all of it. The critic's
    view of the moved image counts, but no gradient goes through it. The step does not follow the radius: in l-inf,
    at eps = 2/255 each step leaps to the edge of the ball, beyond eps = 0.07 seven never reach it; in l2 and l1 they
    move an image by no more than 0.07 in all, so set `step_size` there.
    """

    per_position: bool = True
    width: int = 64
    steps: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    search_steps: int = 7
    step_size: float = 0.01
    every: int = 20

    quantity: ClassVar[str] = "I(X; g(X))"
    ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("steps", 1), ("search_steps", 1), ("every", 1), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise UsageError(f"reference {name} {getattr(self, name)!r} must be at least {least}")
        for name in ("learning_rate", "step_size"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"reference {name} {getattr(self, name)!r} must be above 0 and finite")

    @property
    def name(self) -> str:
        """Return `ref-local` or `ref-mean`."""
        return "ref-local" if self.per_position else "ref-mean"

    def normal(self, subject: Subject, seed: int) -> MIEstimate:
        """Return the held-out value of the last step's critic, on the images as they are."""
        return _fit(self, _samples(self, subject, seed), _unmoved, seed)[0]

    def vulnerability(
        self, subject: Subject, threat: ThreatModel, seed: int, known: Known = NOTHING_KNOWN
    ) -> Vulnerability:
        """Return both cases; the worst-case images are those of the held-out part, moved against the last critic."""
        samples = _samples(self, subject, seed)
        which = split_indices(len(subject.images), seed).test
        normal = known.normal or _fit(self, samples, _unmoved, seed)[0]
        encoded = 0.5 * len(subject.images)
        if threat.eps == 0:
            return Vulnerability(normal, normal, samples.test.images, which, encoded)
        search = _Search(self, subject.encoder, threat)
        worst, moved = _fit(self, samples, search, seed)
        return Vulnerability(normal, worst, moved, which, encoded + search.passes)


def _samples(settings: Reference, subject: Subject, seed: int) -> _Samples:
    images = split_images(subject.images, seed)
    encoded = encode_splits(subject.encoder, images, settings.batch_size)
    return _Samples(*(_Sample(x, said.features) for x, said in zip(images, encoded, strict=True)))


def _unmoved(critic: ReferenceCritic, clean: _Sample) -> _Sample:  # noqa: ARG001
    return clean


class _Search:
    """Moves a batch from its clean images down the critic's value, through the representation alone."""

    def __init__(self, settings: Reference, encoder: Encoder, threat: ThreatModel) -> None:
        self.settings, self.encoder, self.threat = settings, encoder, threat
        self.passes = 0.0

    def __call__(self, critic: ReferenceCritic, clean: _Sample) -> _Sample:
        critic.eval()
        current, lowest, best = clean.images, float("inf"), clean
        for step in range(self.settings.search_steps + 1):
            last = step == self.settings.search_steps
            leaf = current.detach().requires_grad_(not last)
            with torch.no_grad():
                view = critic.view(current)
            with torch.set_grad_enabled(not last):
                features = self.encoder(leaf).features
                value = reference_value(critic.scores(view, features), self.settings.per_position)
            self.passes += len(leaf) * (0.5 if last else 1)
            if (found := float(value.detach())) < lowest:
                lowest, best = found, _Sample(current, features.detach())
            if not last:
                current = self.threat.step(current, input_gradient(value, leaf), clean.images, self.settings.step_size)
        return best


def _fit(settings: Reference, samples: _Samples, mover: _Mover, seed: int) -> tuple[MIEstimate, Images]:
    """Return the estimate by a critic trained on batches as they are moved, and the held-out images as moved."""
    critic = _fresh_critic(settings, samples.train, seed)
    optimiser = torch.optim.Adam(critic.parameters(), settings.learning_rate)
    batches = keyed_generator(seed, Purpose.RELEASED_BATCHES)
    history: list[tuple[int, float]] = []
    trained: list[tuple[int, float]] = []
    for step in range(settings.steps):
        order = torch.randperm(len(samples.train.images), generator=batches)
        value = _critic_step(
            settings, critic, optimiser, mover(critic, samples.train.part(order[: settings.batch_size]))
        )
        if step % settings.every == 0:
            trained.append((step, value))
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            history.append((step + 1, _read(settings, critic, mover, samples.validation).nats))
    held_out = _read(settings, critic, mover, samples.test)
    estimate = MIEstimate(
        nats=held_out.nats,
        stderr=held_out.stderr,
        images=len(samples.test.images),
        ceiling=reference_ceiling(critic.largest_score(), held_out.batch),
        validated=history[-1][1],
        history=tuple(history),
        training_history=tuple(trained),
        flags=_flags(tuple(history), held_out.stderr),
    )
    return estimate, held_out.images


def _fresh_critic(settings: Reference, train: _Sample, seed: int) -> ReferenceCritic:
    # torch's layers draw weights from the global generator as they are made, before ours replace them
    with torch.random.fork_rng(devices=[]):
        critic = ReferenceCritic(
            train.images, train.features, settings.width, keyed_generator(seed, Purpose.RELEASED_CRITIC)
        )
    return critic.to(train.images.device)


def _critic_step(
    settings: Reference, critic: ReferenceCritic, optimiser: torch.optim.Optimizer, batch: _Sample
) -> float:
    critic.train()
    value = reference_value(critic(*batch), settings.per_position)
    optimiser.zero_grad()
    (-value).backward()
    optimiser.step()
    return float(value.detach())


class _Reading(NamedTuple):
    """A value and its error in nats, the largest batch it was read on, and the images as they were moved for it."""

    nats: float
    stderr: float
    batch: int
    images: Images


def _read(settings: Reference, critic: ReferenceCritic, mover: _Mover, clean: _Sample) -> _Reading:
    count = len(clean.images)
    values, influences, moved = 0.0, [], []
    for chosen in torch.arange(count).tensor_split(-(-count // settings.batch_size)):
        batch = mover(critic, clean.part(chosen))
        critic.eval()
        with torch.no_grad():
            scores = critic(*batch)
        values += float(reference_value(scores, settings.per_position)) * len(chosen) / count
        influences.append(reference_influence(scores, settings.per_position))
        moved.append(batch.images)
    stderr = float(torch.cat(influences).std()) / sqrt(count)
    return _Reading(values, stderr, len(moved[0]), torch.cat(moved))


def _flags(history: History, stderr: float) -> tuple[str, ...]:
    """The last step's critic is reported wherever it stands: still rising, or past its best beyond the error."""
    values = [value for _, value in history]
    if not all(isfinite(value) for value in values):
        return ("not_converged: the critic's value stopped being finite while it trained",)
    if values[-1] == max(values):
        return ("not_converged: the critic was still improving at its last step",)
    if values[-1] < max(values) - 2 * stderr:
        return ("not_converged: the critic had been better on validation images before its last step",)
    return ()
