"""Vulnerability at the level of labels: how far answers can be merged, and what features still tell of the class."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.adversary.pgd import PGD, Found, minimise
from audit.adversary.threat import ThreatModel
from audit.errors import MismatchError, UsageError
from audit.information.critic_training import encode, encode_clean, label_surprise
from audit.information.estimator import (
    CLEAN,
    NOTHING_KNOWN,
    Estimator,
    FloorKind,
    Known,
    MIEstimate,
    Subject,
    Vulnerability,
)
from audit.information.floors import label_entropy
from audit.information.probes import FITS, ProbeTraining, fit_linear, label_terms
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images, Judged, Labels, Objective

_CARRIED, _AIMED = "carried", "answer "
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
        return _entropy(encode_clean(subject, self.batch_size).answers)

    def vulnerability(
        self, subject: Subject, threat: ThreatModel, seed: int, known: Known = NOTHING_KNOWN
    ) -> Vulnerability:
        """Return both cases; the worst is the least entropy over targets of the images moved to one."""
        normal, which = known.normal or self.normal(subject, seed), torch.arange(len(subject.images))
        best, least, served = subject.images, normal, CLEAN
        if threat.eps == 0:
            return Vulnerability(normal, normal, best, which, 0.5 * len(which), served)
        targets, passes = self._targets(subject, threat, seed, known)
        passes += 0.5 * len(which)
        candidates = [] if known.start is None else [(_CARRIED, known.start)]
        for target in targets:
            found = self._aimed(subject, target, threat, seed, known.start)
            passes += found.passes
            # an image that never gives the wanted answer may as well stay where it was: both are legal
            stayed = torch.where(found.done[:, None, None, None], found.images, subject.images)
            candidates += [(f"{_AIMED}{target}", images) for images in (found.images, stayed)]
        for name, images in candidates:
            entropy = _entropy(encode(subject.encoder, images, self.batch_size).answers)
            if entropy.nats < least.nats:
                best, least, served = images, entropy, name
        return Vulnerability(normal, least, best, which, passes + 0.5 * len(candidates) * len(which), served)

    def _targets(self, subject: Subject, threat: ThreatModel, seed: int, known: Known) -> tuple[list[int], float]:
        """Return the answers to aim at, and the passes that finding them cost.

        The one that served, or that most of the images to start from give; else those that a few images reach best.
        """
        if known.served.startswith(_AIMED):
            return [int(known.served.removeprefix(_AIMED))], 0.0
        if known.start is None:
            return self._reachable(subject, threat, seed)
        given = encode(subject.encoder, known.start, self.batch_size).answers.argmax(1)
        return [int(given.bincount().argmax())], 0.5 * len(given)

    def _reachable(self, subject: Subject, threat: ThreatModel, seed: int) -> tuple[list[int], float]:
        """Return the targets that most of a few images reach, and the passes that finding them cost."""
        answers = encode_clean(subject, self.batch_size).answers
        likely = answers.mean(0).topk(min(self.targets, answers.shape[1])).indices.tolist()
        if len(likely) <= self.kept:
            return likely, 0.0
        few = subject._replace(images=subject.images[:_TRIAL])
        trials = [self._aimed(few, target, threat, seed) for target in likely]
        # then by how near the rest came
        reached = [(int(found.done.sum()), -float(found.value.mean())) for found in trials]
        best = sorted(range(len(likely)), key=reached.__getitem__, reverse=True)[: self.kept]
        return [likely[number] for number in best], float(sum(found.passes for found in trials))

    def _aimed(
        self, subject: Subject, target: int, threat: ThreatModel, seed: int, start: Images | None = None
    ) -> Found:
        generator = keyed_generator(seed, Purpose.TARGETED_MERGE, target)
        search = PGD(self.steps, self.relative_step, batch_size=self.batch_size)
        return minimise(targeted_objective(subject.encoder, target), subject.images, threat, search, generator, start)


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
        return self._read(subject, encode_clean(subject, self.batch_size).features, seed)

    def vulnerability(
        self, subject: Subject, threat: ThreatModel, seed: int, known: Known = NOTHING_KNOWN
    ) -> Vulnerability:
        """Return both cases; candidates are compared by linear probes on other folds than the value is read with."""
        normal, which = known.normal or self.normal(subject, seed), torch.arange(len(subject.images))
        if threat.eps == 0:
            return Vulnerability(normal, normal, subject.images, which, 0.5 * len(which), CLEAN)
        attacks = _Attacks(self, subject, threat, seed)
        found = attacks.again(known.start) if known.start is not None else attacks.candidates(known.served)
        candidates = {CLEAN: subject.images, **found}
        served = min(candidates, key=lambda name: attacks.value(candidates[name]))
        images = candidates[served]
        worst = (
            normal
            if served == CLEAN
            else self._read(subject, encode(subject.encoder, images, self.batch_size).features, seed)
        )
        return Vulnerability(normal, worst, images, which, attacks.passes, served)

    def _read(self, subject: Subject, features: Features, seed: int) -> MIEstimate:
        terms = {name: label_terms(features, subject.labels, seed, self.probes, name) for name in FITS}
        value, best = max((float(values.mean()), name) for name, values in terms.items())
        parts = {name: float(values.mean()) for name, values in terms.items()}
        error = float(terms[best].std()) / sqrt(len(features))
        return MIEstimate(value, error, len(features), label_entropy(subject.labels), value, parts)


def _entropy(answers: Tensor) -> MIEstimate:
    if answers.shape[1] == 0:
        raise MismatchError("label-level needs a layer that carries the network's whole answer, such as logits")
    terms = label_surprise(answers)
    nats = float(terms.mean())
    ceiling = log(min(answers.shape))
    return MIEstimate(nats, float(terms.std()) / sqrt(len(terms)), len(terms), ceiling, nats)


class _Attacks:
    """The images that label attacks make of one subject, by the name of the attack, and the passes that cost."""

    def __init__(self, settings: LabelInformation, subject: Subject, threat: ThreatModel, seed: int) -> None:
        self.settings, self.subject, self.threat, self.seed = settings, subject, threat, seed
        self.passes = 0.0

    def candidates(self, served: str) -> dict[str, Images]:
        """Return the images attacked through the own answer, merged, and through two linear probes.

        Where it is known which of them served, no other.
        """
        served = "" if served == _CARRIED else served  # another seed had something to start from
        encoder, labels, clean = (
            self.subject.encoder,
            self.subject.labels,
            encode_clean(self.subject, self.settings.batch_size),
        )
        found = {}
        if clean.answers.shape[1]:
            if served in ("", "own answer"):
                found["own answer"] = self._moved(_likelihood(lambda images: encoder(images).answers, labels), 0)
            if served in ("", "merged"):
                found["merged"] = self._moved(_merging(encoder, int(clean.answers.mean(0).argmax())), 1)
        if served in ("", CLEAN, "probe", "probe again"):
            found["probe"] = self._moved(self._against(clean), 2)
            # one step of the game between attack and probe: a probe that knows the attacked features
            found["probe again"] = self._moved(self._against(self._encoded(found["probe"])), 3)
        return found

    def again(self, images: Images) -> dict[str, Images]:
        """Return images that were attacked before, and what an attack on a probe that knows them makes of the clean."""
        return {_CARRIED: images, "probe again": self._moved(self._against(self._encoded(images)), 3, images)}

    def _against(self, known: Encoded) -> Objective:
        """Return the attack on a linear probe that is fitted on features (N, D)."""
        encoder, labels = self.subject.encoder, self.subject.labels
        probe = fit_linear(known.features, labels, int(labels.max()) + 1, self.settings.probes)
        return _likelihood(lambda images: probe(encoder(images).features), labels)

    def value(self, images: Images) -> float:
        """Return the label information of moved images by linear probes on folds of their own."""
        terms = label_terms(self._encoded(images).features, self.subject.labels, self.seed + _OTHER_FOLDS,
                            self.settings.probes, "linear")  # fmt: skip
        return float(terms.mean())

    def _moved(self, objective: Objective, number: int, start: Images | None = None) -> Images:
        settings = self.settings
        search = PGD(settings.steps, settings.relative_step, batch_size=settings.batch_size)
        generator = keyed_generator(self.seed, Purpose.PROBE_ATTACK, number)
        found = minimise(objective, self.subject.images, self.threat, search, generator, start)
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
