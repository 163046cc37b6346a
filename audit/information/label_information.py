"""Estimator `label-information`: information about the label that probes extract from clean and attacked features."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import ThreatModel
from audit.information.encoding import encode, encode_clean
from audit.information.estimator import (
    CARRIED,
    CLEAN,
    COLD_START,
    Estimator,
    EstimatorInputs,
    FloorKind,
    MIEstimate,
    Origin,
    Vulnerability,
    WarmStart,
)
from audit.information.floors import empirical_entropy
from audit.information.probes import FITS, fit_linear, label_terms
from audit.information.settings import LabelInformationSettings
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images, Labels, Objective, ObjectiveValue

_LIKELIHOOD, _COMMON_CLASS = Origin("own answer"), Origin("merged")
_PROBE, _REFITTED_PROBE = Origin("probe"), Origin("probe again")
_CHOICE_SEED_OFFSET = 1_000_003  # candidates are compared on folds that no reported value uses


@dataclass(frozen=True)
class LabelInformation(LabelInformationSettings, Estimator):
    """Lower bound on I(Y; g(X)) in nats by the better of two cross-fitted probes.

    H(Y) - E[-ln q(Y | g(X))] with q a linear probe or a probe with one hidden layer, each fitted on other folds than
    the one it is evaluated on; at most H(Y), at most ln K. Features are (N, D), labels (N,).

    The worst case is the smallest value over five candidates: the clean images; images attacked to lower the
    network's likelihood of the label, or to raise its likelihood of one common class; images attacked through a linear
    probe on the clean features; and images attacked through a probe refitted on those. Attacks are PGD with `steps`
    steps of `relative_step` * eps. The first two attacks need a layer that determines the logits.

    Raises UsageError for a setting that is not legal; InvalidModelError if a feature or a gradient is not finite.

    Source: Barber & Agakov 2003, the variational bound H(Y) - E[-ln q]; Zhu, Zhang & Evans 2020, Definition 3.1, with
    the label in place of the image.
    """

    quantity: ClassVar[str] = "I(Y; g(X))"
    version: ClassVar[int] = 2
    floor_kind: ClassVar[FloorKind] = "labels"

    def normal(self, inputs: EstimatorInputs, seed: int) -> MIEstimate:
        """Return the label information of the clean images."""
        return self._estimate(inputs, encode_clean(inputs, self.batch_size).features, seed)

    def vulnerability(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart = COLD_START
    ) -> Vulnerability:
        """Return both cases; candidates are compared by linear probes on other folds than the reported value."""
        normal, indices = warm_start.normal or self.normal(inputs, seed), torch.arange(len(inputs.images))
        if threat.eps == 0:
            return Vulnerability(normal, normal, inputs.images, indices, 0.5 * len(indices), CLEAN)
        attacks = _ProbeAttacks(self, inputs, threat, seed)
        if warm_start.images is not None:
            found = attacks.continued(warm_start.images)
        else:
            found = attacks.candidates(warm_start.origin)
        candidates = {CLEAN: inputs.images, **found}
        origin = min(candidates, key=lambda each: attacks.value(candidates[each]))
        images = candidates[origin]
        worst = normal
        if origin != CLEAN:
            worst = self._estimate(inputs, encode(inputs.encoder, images, self.batch_size).features, seed)
        return Vulnerability(normal, worst, images, indices, attacks.passes, origin)

    def _estimate(self, inputs: EstimatorInputs, features: Features, seed: int) -> MIEstimate:
        terms = {name: label_terms(features, inputs.labels, seed, self.probes, name) for name in FITS}
        value, best = max((float(values.mean()), name) for name, values in terms.items())
        parts = {name: float(values.mean()) for name, values in terms.items()}
        error = float(terms[best].std()) / sqrt(len(features))
        return MIEstimate(value, error, len(features), empirical_entropy(inputs.labels), value, parts)


class _ProbeAttacks:
    """Attacked versions of one set of images by origin, with the passes spent."""

    def __init__(self, settings: LabelInformation, inputs: EstimatorInputs, threat: ThreatModel, seed: int) -> None:
        self.settings, self.inputs, self.threat, self.seed = settings, inputs, threat, seed
        self.passes = 0.0

    def candidates(self, origin: Origin | None) -> dict[Origin, Images]:
        """Return the images of every attack, or of the attack that found another seed's worst case (`origin`)."""
        if origin == CARRIED:  # the other seed had a warm start, this one has none
            origin = None
        encoder, labels = self.inputs.encoder, self.inputs.labels
        clean = encode_clean(self.inputs, self.settings.batch_size)
        found = {}
        if clean.log_probs.shape[1]:
            if origin in (None, _LIKELIHOOD):
                objective = _log_likelihood(lambda images: encoder(images).log_probs, labels)
                found[_LIKELIHOOD] = self._attack(objective, 0)
            if origin in (None, _COMMON_CLASS):
                objective = _common_class_objective(encoder, int(clean.log_probs.mean(0).argmax()))
                found[_COMMON_CLASS] = self._attack(objective, 1)
        if origin in (None, CLEAN, _PROBE, _REFITTED_PROBE):
            found[_PROBE] = self._attack(self._probe_objective(clean), 2)
            # one step of best response: a probe fitted on the attacked features
            found[_REFITTED_PROBE] = self._attack(self._probe_objective(self._encode(found[_PROBE])), 3)
        return found

    def continued(self, images: Images) -> dict[Origin, Images]:
        """Return the warm start, and an attack from there through a probe fitted on it."""
        attacked = self._attack(self._probe_objective(self._encode(images)), 3, images)
        return {CARRIED: images, _REFITTED_PROBE: attacked}

    def _probe_objective(self, encoded: Encoded) -> Objective:
        """Return the log-likelihood of the label under a linear probe fitted on features (N, D)."""
        encoder, labels = self.inputs.encoder, self.inputs.labels
        probe = fit_linear(encoded.features, labels, int(labels.max()) + 1, self.settings.probes)
        return _log_likelihood(lambda images: probe(encoder(images).features), labels)

    def value(self, images: Images) -> float:
        """Return the label information of images by linear probes, on folds that no reported value uses."""
        features, seed = self._encode(images).features, self.seed + _CHOICE_SEED_OFFSET
        return float(label_terms(features, self.inputs.labels, seed, self.settings.probes, "linear").mean())

    def _attack(self, objective: Objective, number: int, start: Images | None = None) -> Images:
        settings = self.settings
        pgd = PGD(settings.steps, settings.relative_step, batch_size=settings.batch_size)
        generator = keyed_generator(self.seed, Purpose.PROBE_ATTACK, number)
        found = minimise(objective, self.inputs.images, self.threat, pgd, generator, start)
        self.passes += found.passes
        return found.images

    def _encode(self, images: Images) -> Encoded:
        self.passes += 0.5 * len(images)
        return encode(self.inputs.encoder, images, self.settings.batch_size)


def _log_likelihood(logits_of: Callable[[Images], Tensor], labels: Labels) -> Objective:
    """Return ln p(label), never done, so that every image takes all steps."""

    def objective(images: Images, index: Tensor) -> ObjectiveValue:
        value = -F.cross_entropy(logits_of(images), labels[index], reduction="none")
        return ObjectiveValue(value, torch.zeros_like(value, dtype=torch.bool))

    return objective


def _common_class_objective(encoder: Encoder, target: int) -> Objective:
    """Return -ln p(target), never done, so that every image takes all steps."""

    def objective(images: Images, _index: Tensor) -> ObjectiveValue:
        value = -encoder(images).log_probs[:, target]
        return ObjectiveValue(value, torch.zeros_like(value, dtype=torch.bool))

    return objective
