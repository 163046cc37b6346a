"""Label information of features by a panel of cross-fitted classifiers, the largest value of which counts."""

from collections.abc import Sequence
from math import inf, log, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from audit.adversary.passes import deviations
from audit.errors import InvalidModelError, UsageError
from audit.information.probing.members import MEMBERS, Fitted, LogProbs, Readers, Sample
from audit.proportion import Proportion, wilson
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Features, Labels

ALL_MEMBERS = tuple(MEMBERS)
_QUICK_FOLDS = 3
_FEWEST_SAMPLES = 4  # two folds of two
_SHARPEST = 4.0  # largest factor of log-likelihood ratios
_PRIOR_SHARE = 0.02  # mixed into every answer: a leaf of one class is no certainty
_CELL_OFFSET = 0.6180339  # of the grid that features are rounded to: no simple fraction, so points are not on edges

Array = npt.NDArray[np.float64]


class Reading(NamedTuple):
    """What a panel reads of the labels: the largest value over its members in nats, at least 0, and its standard error.

    `parts` are the nats of every member, `member` the largest; `accuracy` is the largest cross-fitted accuracy.
    """

    nats: float
    stderr: float
    member: str
    parts: dict[str, float]
    accuracy: Proportion


class _CrossFitted(NamedTuple):
    """Each sample's term of H(Y) - log loss (N,), and whether the likeliest class is its label (N,)."""

    terms: Array
    correct: npt.NDArray[np.bool_]


class Panel(NamedTuple):
    """A panel that reads label information: `members` by name, cross-fitted over the probes' folds.

    `quick` saves time where candidates are compared: three folds, whose out-of-sample answers decide the temperature
    together, instead of nested ones inside each fold. `unit` (D,) is the scale of the features, by default their own
    standard deviation; of images under attack it is that of the clean ones.
    """

    readers: Readers
    members: Sequence[str] = ALL_MEMBERS
    quick: bool = False
    unit: Tensor | None = None

    @torch.no_grad()
    def read(self, encoded: Encoded, labels: Labels, seed: int, enough: float = inf) -> Reading:
        """Return the reading of features (N, D) and labels (N,), in nats; the seed determines the folds.

        In expectation every member's value is at most I(Y; Z) unless the panel is `quick`: a log loss is at least
        H(Y | Z) whatever the probabilities are. The largest of several is biased upwards by less than its standard
        error. Probabilities may be calibrated on training samples: p ~ prior^(1 - b) p^b, with b < 0 if a
        search made a vote of neighbours point away from the label. Members after the first that reads `enough` nats
        are not asked.

        Source: Barber & Agakov 2003, the variational bound H(Y) - E[-ln q].
        """
        if len(labels) < _FEWEST_SAMPLES:
            raise UsageError(f"{len(labels)} images are too few to read labels: at least {_FEWEST_SAMPLES} are needed")
        sample = Sample(Encoded(self._rounded(encoded.features), encoded.log_probs), labels, self._components)
        if sample.own is not None and not bool(sample.own.isfinite().any(1).all()):
            raise InvalidModelError("the network's logits are not finite for any class that occurs among the labels")
        folds = self._folds(sample.labels, seed)
        found, parts = dict[str, _CrossFitted](), dict[str, float]()
        for name in self.members:
            if (name != "own" or sample.own is not None) and max(parts.values(), default=-inf) < enough:
                found[name] = self._cross_fitted(name, sample, folds, seed)
                parts[name] = float(found[name].terms.mean())
        best = max(parts, key=parts.__getitem__)
        stderr = float(found[best].terms.std(ddof=1)) / sqrt(len(labels))
        correct = max(int(each.correct.sum()) for each in found.values())
        return Reading(max(0.0, parts[best]), stderr, best, parts, wilson(correct, len(labels)))

    @property
    def _components(self) -> int:
        return self.readers.panel.components

    def _folds(self, labels: Labels, seed: int) -> tuple[Tensor, ...]:
        order = torch.randperm(len(labels), generator=keyed_generator(seed, Purpose.PROBE_FOLDS))
        count = min(_QUICK_FOLDS, self.readers.probes.folds) if self.quick else self.readers.probes.folds
        return order.to(labels.device).chunk(count)

    def _rounded(self, features: Features) -> Features:
        grain = self.readers.panel.grain
        if grain == 0:
            return features
        unit = deviations(features, correction=0) if self.unit is None else self.unit
        cell = (grain * unit).clamp_min(torch.finfo(features.dtype).tiny)
        middle = features.mean(0)
        rounded = middle + ((features - middle) / cell + _CELL_OFFSET).round() * cell
        return torch.where(rounded.isfinite(), rounded, features)

    def _cross_fitted(self, name: str, sample: Sample, folds: Sequence[Tensor], seed: int) -> _CrossFitted:
        if self.quick:
            return self._quick(name, sample, folds, seed)
        labels = sample.labels.cpu().numpy()
        terms, correct = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool)
        for number, held_out in enumerate(folds):
            rest = [*folds[number + 1 :], *folds[:number]]
            rest = rest if len(rest) > 1 else list(rest[0].chunk(2))
            training = torch.cat(rest)
            prior = _prior(labels[training.cpu().numpy()], sample.classes)
            fitted = MEMBERS[name](sample, training, self.readers, seed)
            honest, where = self._honest(name, sample, fitted, rest, seed)
            sharpness = _sharpness(_mixed(honest, prior), labels[where.cpu().numpy()], prior)
            index = held_out.cpu().numpy()
            answers = _sharpened(_mixed(fitted.predict(held_out), prior), prior, sharpness)
            terms[index] = answers[np.arange(len(index)), labels[index]]
            correct[index] = answers.argmax(1) == labels[index]
        return _CrossFitted(terms - _shares(labels, sample.classes)[labels], correct)

    def _honest(
        self, name: str, sample: Sample, fitted: Fitted, rest: Sequence[Tensor], seed: int
    ) -> tuple[LogProbs, Tensor]:
        """Return out-of-sample log-probabilities within the training samples, and the indices they are of."""
        if fitted.honest is not None:
            return fitted.honest, torch.cat(list(rest))
        inner = MEMBERS[name](sample, torch.cat(list(rest[1:])), self.readers, seed)
        return inner.predict(rest[0]), rest[0]

    def _quick(self, name: str, sample: Sample, folds: Sequence[Tensor], seed: int) -> _CrossFitted:
        labels = sample.labels.cpu().numpy()
        everything = torch.arange(len(labels), device=sample.labels.device)
        if name in ("neighbours", "forest", "own"):
            honest = MEMBERS[name](sample, everything, self.readers, seed).honest
            assert honest is not None
        else:
            honest = np.zeros((len(labels), sample.classes))
            for number, held_out in enumerate(folds):
                training = torch.cat([*folds[number + 1 :], *folds[:number]])
                fitted = MEMBERS[name](sample, training, self.readers, seed)
                honest[held_out.cpu().numpy()] = fitted.predict(held_out)
        prior = _prior(labels, sample.classes)
        answers = _mixed(honest, prior)
        answers = _sharpened(answers, prior, _sharpness(answers, labels, prior))
        terms = answers[np.arange(len(labels)), labels] - _shares(labels, sample.classes)[labels]
        return _CrossFitted(terms, answers.argmax(1) == labels)


def _shares(labels: npt.NDArray[np.int64], classes: int) -> Array:
    return np.log(np.bincount(labels, minlength=classes) / len(labels))


def _prior(labels: npt.NDArray[np.int64], classes: int) -> Array:
    """Return the log of the smoothed class shares among training labels, which may lack a class."""
    counts = np.bincount(labels, minlength=classes) + 0.5
    return np.log(counts / counts.sum())


def _mixed(answers: LogProbs, prior: Array) -> LogProbs:
    return np.logaddexp(answers + log(1 - _PRIOR_SHARE), prior + log(_PRIOR_SHARE))


def _sharpened(answers: LogProbs, prior: Array, sharpness: float) -> LogProbs:
    """Return the log of prior^(1 - b) p^b, normalised, for the sharpness b."""
    scores = prior + sharpness * (answers - prior)
    normalised: LogProbs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return normalised


def _sharpness(answers: LogProbs, labels: npt.NDArray[np.int64], prior: Array) -> float:
    """Return the sharpness b of the smallest log loss, which is convex in b."""
    from scipy.optimize import minimize_scalar

    def loss(sharpness: float) -> float:
        return -float(_sharpened(answers, prior, sharpness)[np.arange(len(labels)), labels].mean())

    limits = (-_SHARPEST, _SHARPEST)
    return float(minimize_scalar(loss, bounds=limits, method="bounded", options={"xatol": 1e-2}).x)
