"""Vulnerability at the level of labels: how far answers can be merged, and what features still tell of the class."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.errors import MismatchError, UsageError
from audit.estimates import Estimator, FloorKind, MIEstimate, Subject, Vulnerability
from audit.information import encode, label_surprise
from audit.kinds import label_entropy
from audit.pgd import PGD, Found, minimise
from audit.probes import FITS, Probe, ProbeTraining, fit_linear, label_terms
from audit.threat import ThreatModel
from audit.types import Encoded, Encoder, Images, Judged, Labels, Objective, keyed_generator

_TARGETED, _ATTACK = range(71, 73)
_TRIAL = 100  # images that choose the targets
_OTHER_FOLDS = 1_000_003  # added to a seed: folds that no reported value uses


@dataclass(frozen=True)
class LabelLevel(Estimator):
    """The entropy of the network's answers, less the least that targeted attacks leave of it: exact and discrete.

    Each of the `targets` likeliest answers is tried on a few images; the `kept` ones that these reach best (all, where
    there are no more) are aimed at with all.
    """

    targets: int = 10
    kept: int = 3
    steps: int = 30
    relative_step: float = 0.2
    batch_size: int = 256

    quantity: ClassVar[str] = "H(argmax g(X))"
    limits_heads: ClassVar[bool] = False
    memory_only: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __post_init__(self) -> None:
        for name in ("targets", "kept"):
            if getattr(self, name) < 1:
                raise UsageError(f"label-level {name} {getattr(self, name)!r} must be at least 1")
        PGD(self.steps, self.relative_step, batch_size=self.batch_size)  # which says what is legal

    @property
    def name(self) -> str:
        """Return the estimator as tables show it."""
        return "label-level"

    def normal(self, subject: Subject, seed: int) -> MIEstimate:  # noqa: ARG002
        """Return the entropy of the answers to the images as they are."""
        return self._entropy(subject.encoder, subject.images)

    def vulnerability(
        self, subject: Subject, threat: ThreatModel, seed: int, normal: MIEstimate | None = None
    ) -> Vulnerability:
        """Return both cases; the worst is the least entropy over targets of the images moved to one."""
        normal, which = normal or self.normal(subject, seed), torch.arange(len(subject.images))
        best, least, passes = subject.images, normal, 0.5 * len(which)
        if threat.eps == 0:
            return Vulnerability(normal, normal, best, which, passes)
        targets, cost = self._reachable(subject, threat, seed)
        passes += cost
        for target in targets:
            found = self._aimed(subject.encoder, target, subject.images, threat, seed)
            passes += found.passes + len(which)
            # an image that never gives the wanted answer may as well stay where it was: both are legal
            stayed = torch.where(found.done[:, None, None, None], found.images, subject.images)
            for images in (found.images, stayed):
                entropy = self._entropy(subject.encoder, images)
                if entropy.nats < least.nats:
                    best, least = images, entropy
        return Vulnerability(normal, least, best, which, passes)

    def _reachable(self, subject: Subject, threat: ThreatModel, seed: int) -> tuple[list[int], float]:
        """Return the targets that most of a few images reach, and the passes that finding them cost."""
        answers = encode(subject.encoder, subject.images, self.batch_size).answers
        likely = answers.mean(0).topk(min(self.targets, answers.shape[1])).indices.tolist()
        if len(likely) <= self.kept:
            return likely, 0.0
        trials = [self._aimed(subject.encoder, target, subject.images[:_TRIAL], threat, seed) for target in likely]
        # then by how near the rest came
        reached = [(int(found.done.sum()), -float(found.value.mean())) for found in trials]
        best = sorted(range(len(likely)), key=reached.__getitem__, reverse=True)[: self.kept]
        return [likely[number] for number in best], float(sum(found.passes for found in trials))

    def _aimed(self, encoder: Encoder, target: int, images: Images, threat: ThreatModel, seed: int) -> Found:
        generator = keyed_generator(seed, _TARGETED, target)
        search = PGD(self.steps, self.relative_step, batch_size=self.batch_size)
        return minimise(targeted_objective(encoder, target), images, threat, search, generator)

    def _entropy(self, encoder: Encoder, images: Images) -> MIEstimate:
        answers = encode(encoder, images, self.batch_size).answers
        if answers.shape[1] == 0:
            raise MismatchError("label-level needs a layer that carries the network's whole answer, such as logits")
        terms = label_surprise(answers)
        nats = float(terms.mean())
        ceiling = log(min(answers.shape[1], len(images)))
        return MIEstimate(nats, float(terms.std()) / sqrt(len(terms)), len(terms), ceiling, nats)


@dataclass(frozen=True)
class LabelInformation(Estimator):
    """What features tell of the label: its entropy less the log loss of the better of two cross-fitted probes.

    The worst case is the smallest value over images attacked through the network's own answer, through a linear probe
    on the clean features, through one fitted on those attacked images, and merged into one answer.
    """

    probes: ProbeTraining = field(default_factory=ProbeTraining)
    steps: int = 20
    relative_step: float = 0.2
    batch_size: int = 256

    quantity: ClassVar[str] = "I(Y; g(X))"
    floor_kind: ClassVar[FloorKind] = "labels"
    memory_only: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __post_init__(self) -> None:
        PGD(self.steps, self.relative_step, batch_size=self.batch_size)  # which says what is legal

    @property
    def name(self) -> str:
        """Return the estimator as tables show it."""
        return "label-information"

    def normal(self, subject: Subject, seed: int) -> MIEstimate:
        """Return the label information of the images as they are."""
        return self._read(subject, subject.images, seed)

    def vulnerability(
        self, subject: Subject, threat: ThreatModel, seed: int, normal: MIEstimate | None = None
    ) -> Vulnerability:
        """Return both cases; candidates are compared by linear probes on other folds than the value is read with."""
        normal, which = normal or self.normal(subject, seed), torch.arange(len(subject.images))
        if threat.eps == 0:
            return Vulnerability(normal, normal, subject.images, which, 0.5 * len(which))
        candidates = _Candidates(self, subject, threat, seed)
        images = min([subject.images, *candidates.images()], key=candidates.value)
        worst = normal if images is subject.images else self._read(subject, images, seed)
        return Vulnerability(normal, worst, images, which, candidates.passes)

    def _read(self, subject: Subject, images: Images, seed: int) -> MIEstimate:
        features = encode(subject.encoder, images, self.batch_size).features
        terms = {name: label_terms(features, subject.labels, seed, self.probes, name) for name in FITS}
        value, best = max((float(values.mean()), name) for name, values in terms.items())
        parts = {name: float(values.mean()) for name, values in terms.items()}
        error = float(terms[best].std()) / sqrt(len(images))
        return MIEstimate(value, error, len(images), label_entropy(subject.labels), value, parts)


class _Candidates:
    """The images that label attacks make of one subject, and the passes that cost."""

    def __init__(self, settings: LabelInformation, subject: Subject, threat: ThreatModel, seed: int) -> None:
        self.settings, self.subject, self.threat, self.seed = settings, subject, threat, seed
        self.passes = 0.0

    def images(self) -> list[Images]:
        """Return the images attacked through the own answer, merged, and through two linear probes."""
        encoder, labels, clean = self.subject.encoder, self.subject.labels, self._encoded(self.subject.images)
        found = []
        if clean.answers.shape[1]:
            found.append(self._moved(_likelihood(lambda images: encoder(images).answers, labels), 0))
            likeliest = int(clean.answers.mean(0).argmax())
            found.append(self._moved(_merging(encoder, likeliest), 1))
        probe = self._probe(clean.features)
        found.append(self._moved(_likelihood(lambda images: probe(encoder(images).features), labels), 2))
        # one step of the game between attack and probe: a probe that knows the attacked features
        again = self._probe(self._encoded(found[-1]).features)
        found.append(self._moved(_likelihood(lambda images: again(encoder(images).features), labels), 3))
        return found

    def value(self, images: Images) -> float:
        """Return the label information of moved images by linear probes on folds of their own."""
        terms = label_terms(self._encoded(images).features, self.subject.labels, self.seed + _OTHER_FOLDS,
                            self.settings.probes, "linear")  # fmt: skip
        return float(terms.mean())

    def _probe(self, features: Tensor) -> Probe:
        labels = self.subject.labels
        return fit_linear(features, labels, int(labels.max()) + 1, self.settings.probes)

    def _moved(self, objective: Objective, number: int) -> Images:
        settings = self.settings
        search = PGD(settings.steps, settings.relative_step, batch_size=settings.batch_size)
        generator = keyed_generator(self.seed, _ATTACK, number)
        found = minimise(objective, self.subject.images, self.threat, search, generator)
        self.passes += found.passes
        return found.images

    def _encoded(self, images: Images) -> Encoded:
        self.passes += 0.5 * len(images)
        return encode(self.subject.encoder, images, self.settings.batch_size)


def targeted_objective(encoder: Encoder, target: int) -> Objective:
    """Return the objective that is smallest where the answer is `target`, by the lead of the likeliest other one."""

    def objective(images: Images, _index: Tensor) -> Judged:
        answers = encoder(images).answers
        others = answers.scatter(1, torch.full_like(answers[:, :1], target, dtype=torch.long), -torch.inf)
        value = others.amax(1) - answers[:, target]
        return Judged(value, value.detach() < 0)

    return objective


def _likelihood(logits_of: Callable[[Images], Tensor], labels: Labels) -> Objective:
    """The log-likelihood of the label: every image is pushed on to the last step, as far as it goes."""

    def objective(images: Images, index: Tensor) -> Judged:
        value = -F.cross_entropy(logits_of(images), labels[index], reduction="none")
        return Judged(value, torch.zeros_like(value, dtype=torch.bool))

    return objective


def _merging(encoder: Encoder, target: int) -> Objective:
    """The surprise at one common answer, pushed on to the last step."""

    def objective(images: Images, _index: Tensor) -> Judged:
        value = -encoder(images).answers[:, target]
        return Judged(value, torch.zeros_like(value, dtype=torch.bool))

    return objective
