"""Estimators `ref-local` and `ref-mean`: the paper's authors' released code, for replication only.

A critic with batch norm scores every position of a strided view of the image against the representation. The worst
case is searched again from the clean images before every critic step, which is max-min, not the paper's min-max.

Source: the released code of Zhu, Zhang & Evans 2020; Hjelm et al. 2019 (the critic's heads).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from audit.adversary.passes import input_gradient
from audit.adversary.threat import ThreatModel
from audit.flags import FlagCode, flag
from audit.information.encoding import encode_splits, split_images, split_indices
from audit.information.estimator import (
    COLD_START,
    Estimator,
    EstimatorInputs,
    History,
    MIEstimate,
    Vulnerability,
    WarmStart,
)
from audit.information.released.critic import ReferenceCritic, reference_ceiling, reference_influence, reference_value
from audit.information.settings import ReferenceSettings
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoder, Features, Images


class _EncodedImages(NamedTuple):
    """Images (N, C, H, W) and their features (N, D)."""

    images: Images
    features: Features

    def select(self, indices: Tensor) -> "_EncodedImages":
        return _EncodedImages(*(each[indices.to(each.device)] for each in self))


class _EncodedParts(NamedTuple):
    train: _EncodedImages
    validation: _EncodedImages
    test: _EncodedImages


_Perturbation = Callable[[ReferenceCritic, _EncodedImages], _EncodedImages]
"""Maps the critic and a clean batch to the batch that the critic scores."""


@dataclass(frozen=True)
class Reference(ReferenceSettings, Estimator):
    """Estimate of I(X; g(X)) in nats by the released code: one value a position, or one of the averaged scores.

    The value is `released.critic.reference_value` on held-out images; it has no upper limit in the number of images
    alone. Images are (N, C, H, W) of at least 8 x 8 pixels, features (N, D). Released are `width` 2048,
    `learning_rate` 1e-4 and 500 epochs of augmented training images (on CIFAR-10, 195,500 steps); the defaults are
    reduced to a CPU and images are not augmented. With few steps the released rate leaves the value of a wide critic
    below zero. As released: Adam with a constant rate, the critic of the last step, batch norm in eval mode on
    held-out batches of at most `batch_size` images (here of nearly equal size).

    Before every critic step, `search_steps` projected steps of the absolute length `step_size` start from the clean
    images and descend the value of the whole batch; the iterate with the smallest value is used. The critic scores
    the perturbed image, but no gradient passes through its view of it. The step size does not depend on eps: in
    l-inf, one step at eps = 2/255 reaches the edge of the ball, and beyond eps = 0.07 seven steps do not reach it; in
    l2 and l1 an image moves by at most 0.07, so set `step_size` there.

    Raises UsageError for images that are too small or too few or a setting that is not legal; InvalidModelError if a
    feature or a gradient is not finite.

    Source: the released code of Zhu, Zhang & Evans 2020.
    """

    quantity: ClassVar[str] = "I(X; g(X))"
    ranks: ClassVar[bool] = False

    def normal(self, inputs: EstimatorInputs, seed: int) -> MIEstimate:
        """Return the held-out value of the last step's critic on the clean images."""
        return _fit(self, _encoded_parts(self, inputs, seed), _unperturbed, seed)[0]

    def vulnerability(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart = COLD_START
    ) -> Vulnerability:
        """Return both cases; the adversarial images are the held-out ones, perturbed against the last critic."""
        parts = _encoded_parts(self, inputs, seed)
        indices = split_indices(len(inputs.images), seed).test
        normal = warm_start.normal or _fit(self, parts, _unperturbed, seed)[0]
        passes = 0.5 * len(inputs.images)
        if threat.eps == 0:
            return Vulnerability(normal, normal, parts.test.images, indices, passes)
        descent = _CriticDescent(self, inputs.encoder, threat)
        worst, adversarial = _fit(self, parts, descent, seed)
        return Vulnerability(normal, worst, adversarial, indices, passes + descent.passes)


def _encoded_parts(settings: Reference, inputs: EstimatorInputs, seed: int) -> _EncodedParts:
    images = split_images(inputs.images, seed)
    encoded = encode_splits(inputs.encoder, images, settings.batch_size)
    return _EncodedParts(*(_EncodedImages(x, each.features) for x, each in zip(images, encoded, strict=True)))


def _unperturbed(critic: ReferenceCritic, clean: _EncodedImages) -> _EncodedImages:  # noqa: ARG001
    return clean


class _CriticDescent:
    """Projected descent of the critic's value from the clean images, through the representation alone."""

    def __init__(self, settings: Reference, encoder: Encoder, threat: ThreatModel) -> None:
        self.settings, self.encoder, self.threat = settings, encoder, threat
        self.passes = 0.0

    def __call__(self, critic: ReferenceCritic, clean: _EncodedImages) -> _EncodedImages:
        critic.eval()
        current, lowest, best = clean.images, float("inf"), clean
        for step in range(self.settings.search_steps + 1):
            last = step == self.settings.search_steps
            leaf = current.detach().requires_grad_(not last)
            with torch.no_grad():
                view = critic.view(current)
            with torch.set_grad_enabled(not last):
                features = self.encoder(leaf).features
                value = reference_value(critic.scores(view, features), per_position=self.settings.per_position)
            self.passes += len(leaf) * (0.5 if last else 1)
            if (found := float(value.detach())) < lowest:
                lowest, best = found, _EncodedImages(current, features.detach())
            if not last:
                current = self.threat.step(current, input_gradient(value, leaf), clean.images, self.settings.step_size)
        return best


def _fit(
    settings: Reference, parts: _EncodedParts, perturbation: _Perturbation, seed: int
) -> tuple[MIEstimate, Images]:
    """Return the estimate of a critic trained on perturbed batches, and the perturbed held-out images."""
    critic = _new_critic(settings, parts.train, seed)
    optimiser = torch.optim.Adam(critic.parameters(), settings.learning_rate)
    batches = keyed_generator(seed, Purpose.RELEASED_BATCHES)
    history: list[tuple[int, float]] = []
    training_history: list[tuple[int, float]] = []
    for step in range(settings.steps):
        order = torch.randperm(len(parts.train.images), generator=batches)
        batch = perturbation(critic, parts.train.select(order[: settings.batch_size]))
        value = _critic_step(settings, critic, optimiser, batch)
        if step % settings.every == 0:
            training_history.append((step, value))
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            history.append((step + 1, _evaluate(settings, critic, perturbation, parts.validation).nats))
    held_out = _evaluate(settings, critic, perturbation, parts.test)
    estimate = MIEstimate(
        nats=held_out.nats,
        stderr=held_out.stderr,
        images=len(parts.test.images),
        ceiling=reference_ceiling(critic.largest_score(), held_out.batch),
        validated=history[-1][1],
        history=tuple(history),
        training_history=tuple(training_history),
        flags=_flags(tuple(history), held_out.stderr),
    )
    return estimate, held_out.images


def _new_critic(settings: Reference, train: _EncodedImages, seed: int) -> ReferenceCritic:
    # the constructors of torch draw weights from the global generator; keyed draws replace them
    with torch.random.fork_rng(devices=[]):
        critic = ReferenceCritic(
            train.images, train.features, settings.width, keyed_generator(seed, Purpose.RELEASED_CRITIC)
        )
    return critic.to(train.images.device)


def _critic_step(
    settings: Reference, critic: ReferenceCritic, optimiser: torch.optim.Optimizer, batch: _EncodedImages
) -> float:
    critic.train()
    value = reference_value(critic(*batch), per_position=settings.per_position)
    optimiser.zero_grad()
    (-value).backward()
    optimiser.step()
    return float(value.detach())


class _Evaluation(NamedTuple):
    """A value and its standard error in nats, the size of the largest batch, and the perturbed images."""

    nats: float
    stderr: float
    batch: int
    images: Images


def _evaluate(
    settings: Reference, critic: ReferenceCritic, perturbation: _Perturbation, clean: _EncodedImages
) -> _Evaluation:
    count = len(clean.images)
    value, influences, perturbed = 0.0, [], []
    for indices in torch.arange(count).tensor_split(-(-count // settings.batch_size)):
        batch = perturbation(critic, clean.select(indices))
        critic.eval()
        with torch.no_grad():
            scores = critic(*batch)
        value += float(reference_value(scores, per_position=settings.per_position)) * len(indices) / count
        influences.append(reference_influence(scores, per_position=settings.per_position))
        perturbed.append(batch.images)
    stderr = float(torch.cat(influences).std()) / sqrt(count)
    return _Evaluation(value, stderr, len(perturbed[0]), torch.cat(perturbed))


def _flags(history: History, stderr: float) -> tuple[str, ...]:
    """Return the flag of a last step that is the best one, or worse than the best one by two standard errors."""
    values = [value for _, value in history]
    if not all(isfinite(value) for value in values):
        return (flag(FlagCode.NOT_CONVERGED, "the critic's value diverged during training"),)
    if values[-1] == max(values):
        return (flag(FlagCode.NOT_CONVERGED, "the critic was still improving at its last step"),)
    if values[-1] < max(values) - 2 * stderr:
        return (flag(FlagCode.NOT_CONVERGED, "the critic was better on validation images at an earlier step"),)
    return ()
