"""Estimator `label-level`: entropy of the predicted classes, and the smallest one that targeted attacks leave."""

from dataclasses import dataclass
from math import log, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from audit.adversary.pgd import PGD, SearchResult, minimise
from audit.adversary.threat import ThreatModel
from audit.errors import MismatchError
from audit.information.encoding import encode, encode_clean, label_surprise
from audit.information.estimator import (
    ATTACKED,
    CARRIED,
    CLEAN,
    COLD_START,
    Estimator,
    EstimatorInputs,
    MIEstimate,
    Origin,
    Vulnerability,
    WarmStart,
)
from audit.information.settings import LabelEntropySettings
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoder, Images, Objective, ObjectiveValue, equal_pixels

_TARGETED = "answer"  # kind of origin; its value is the target class
_TRIAL_IMAGES = 100  # of the trial that chooses the target classes


@dataclass(frozen=True)
class LabelEntropy(LabelEntropySettings, Estimator):
    """Entropy of the predicted class in nats, and its minimum over targeted attacks.

    H(argmax g(X)) = -sum_k p_k ln p_k with p_k the frequency of class k among the N images, at most ln min(N, K).
    Features are logits (N, K). In the worst case, images are attacked towards one target class at a time: of the
    `targets` most likely classes, the `kept` ones that a trial on a few images reaches best. Attacks are PGD with
    `steps` steps of `relative_step` * eps.

    Raises UsageError for a setting that is not legal; MismatchError for a layer that does not determine the logits.

    Source: Shannon 1948; Zhu, Zhang & Evans 2020, Definition 3.1, for the representation argmax g.
    """

    quantity: ClassVar[str] = "H(argmax g(X))"
    version: ClassVar[int] = 3
    bounds_heads: ClassVar[bool] = False

    def normal(self, inputs: EstimatorInputs, seed: int) -> MIEstimate:  # noqa: ARG002
        """Return the entropy of the classes predicted for the clean images."""
        return _entropy_estimate(encode_clean(inputs, self.batch_size).log_probs)

    def vulnerability(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart = COLD_START
    ) -> Vulnerability:
        """Return the normal case, and the smallest entropy over the target classes as the worst case."""
        normal, indices = warm_start.normal or self.normal(inputs, seed), torch.arange(len(inputs.images))
        if threat.eps == 0:
            return Vulnerability(normal, normal, inputs.images, indices, 0.5 * len(indices), CLEAN)
        targets, passes = self._choose_targets(inputs, threat, seed, warm_start)
        passes += 0.5 * len(indices)
        given = ((CARRIED, warm_start.images), (ATTACKED, warm_start.attacked))
        candidates = [(origin, images) for origin, images in given if images is not None]
        for target in targets:
            found = self._attack(inputs, target, threat, seed, warm_start.images)
            passes += found.passes
            # also with the clean image wherever the attack fails: both are legal
            reset = torch.where(found.done[:, None, None, None], found.images, inputs.images)
            candidates += [(Origin(_TARGETED, target), images) for images in (found.images, reset)]
        worst, adversarial, origin = normal, inputs.images, CLEAN
        for candidate, images in candidates:
            entropy = _entropy_estimate(encode(inputs.encoder, images, self.batch_size).log_probs)
            if entropy.nats < worst.nats:
                worst, adversarial, origin = entropy, images, candidate
        passes += 0.5 * len(candidates) * len(indices)
        return Vulnerability(normal, worst, adversarial, indices, passes, origin)

    def read_worst(self, inputs: EstimatorInputs, images: Images, seed: int) -> MIEstimate:
        """Return the entropy of the classes predicted for perturbed images."""
        if equal_pixels(images, inputs.images):
            return self.normal(inputs, seed)
        return _entropy_estimate(encode(inputs.encoder, images, self.batch_size).log_probs)

    def _choose_targets(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart
    ) -> tuple[list[int], float]:
        """Return the target classes, and the passes spent on choosing them.

        The target of the other seed's worst case; else the most frequent class among the warm start's predictions;
        else those that a trial reaches best.
        """
        origin = warm_start.origin
        if origin is not None and origin.kind == _TARGETED and origin.value is not None:
            return [int(origin.value)], 0.0
        if warm_start.images is None:
            return self._try_targets(inputs, threat, seed)
        predicted = encode(inputs.encoder, warm_start.images, self.batch_size).log_probs.argmax(1)
        return [int(predicted.bincount().argmax())], 0.5 * len(predicted)

    def _try_targets(self, inputs: EstimatorInputs, threat: ThreatModel, seed: int) -> tuple[list[int], float]:
        """Return the targets that most images of a trial reach, and the passes spent."""
        log_probs = encode_clean(inputs, self.batch_size).log_probs
        likely = log_probs.mean(0).topk(min(self.targets, log_probs.shape[1])).indices.tolist()
        if len(likely) <= self.kept:
            return likely, 0.0
        few = inputs._replace(images=inputs.images[:_TRIAL_IMAGES])
        trials = [self._attack(few, target, threat, seed) for target in likely]
        # ties are broken by the mean margin
        reached = [(int(found.done.sum()), -float(found.value.mean())) for found in trials]
        best = sorted(range(len(likely)), key=reached.__getitem__, reverse=True)[: self.kept]
        return [likely[number] for number in best], float(sum(found.passes for found in trials))

    def _attack(
        self, inputs: EstimatorInputs, target: int, threat: ThreatModel, seed: int, start: Images | None = None
    ) -> SearchResult:
        generator = keyed_generator(seed, Purpose.TARGETED_MERGE, target)
        pgd = PGD(self.steps, self.relative_step, batch_size=self.batch_size)
        return minimise(targeted_objective(inputs.encoder, target), inputs.images, threat, pgd, generator, start)


def targeted_objective(encoder: Encoder, target: int) -> Objective:
    """Return the margin max_{k != target} log p_k - log p_target, done where it is negative."""

    def objective(images: Images, _index: Tensor) -> ObjectiveValue:
        log_probs = encoder(images).log_probs
        others = log_probs.scatter(1, torch.full_like(log_probs[:, :1], target, dtype=torch.long), -torch.inf)
        value = others.amax(1) - log_probs[:, target]
        return ObjectiveValue(value, value.detach() < 0)

    return objective


def _entropy_estimate(log_probs: Tensor) -> MIEstimate:
    if log_probs.shape[1] == 0:
        raise MismatchError("label-level needs a layer that determines the network's logits, such as logits")
    terms = label_surprise(log_probs)
    nats = float(terms.mean())
    ceiling = log(min(log_probs.shape))
    return MIEstimate(nats, float(terms.std()) / sqrt(len(terms)), len(terms), ceiling, nats)
