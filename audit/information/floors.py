"""What measurements say of estimates: floors under mutual information, and the flags raised where one is broken.

Accuracies are *measured*; MI values, RV and the bounds computed from them are *estimates*. A measurement beats an
estimate: an estimate under its floor is flagged `contradicted`, shown, and never ranked.
"""

from collections.abc import Iterable
from math import log
from typing import NamedTuple

from torch import Tensor

from audit.adversary.attack_checks import Check, failed, verdict
from audit.information.estimator import FloorKind
from audit.proportion import wilson
from audit.theory import information_floor


class Spread(NamedTuple):
    """An estimate over seeds: mean and standard error, in nats."""

    nats: float
    stderr: float


class Floors(NamedTuple):
    """What I(X; g(X)) is at least, in nats, on clean images and on the worst-case images found.

    Data processing: I(X; g(X)) >= H(argmax) and >= I(Y; g(X)) >= d(accuracy || largest class share), for any layer
    that the whole network's answer passes through. `slack` is by how much an entropy of the few held-out images
    errs low beside one of all images: (K - 1) / 2n (Miller 1955).
    """

    normal: float
    worst: float
    slack: float = 0.0


def label_entropy(predictions: Tensor) -> float:
    """Return the entropy of a sample of predicted classes (N,), in nats.

    Source: the plug-in estimate, which errs low: a floor computed from it stays a floor.
    """
    shares = predictions.bincount().double() / len(predictions)
    return -sum(float(share) * log(float(share)) for share in shares if share > 0)


def largest_share(labels: Tensor) -> float:
    """Return the share of the most frequent class among labels (N,)."""
    return float(labels.bincount().max()) / len(labels)


def floor(predictions: Tensor, labels: Tensor, class_share: float, kind: FloorKind) -> float:
    """Return the data-processing floor in nats that predictions (N,) put under what they were computed from.

    d(accuracy || largest class share), the accuracy by the low end of its interval; for `answers`, which are a function
    of the features, the larger of that and the entropy of the predictions.
    """
    right = wilson(int((predictions == labels).sum()), len(labels))
    known = information_floor(right.low, class_share)
    return max(known, label_entropy(predictions)) if kind == "answers" else known


def estimate_flags(normal: Spread, worst: Spread, floors: Floors | None, ceiling: float) -> list[str]:
    """Return every flag that the numbers of one record earn, most serious first."""
    flags: list[str] = []
    if floors is not None:
        flags += _contradiction("normal_nats", normal, floors.normal, floors.slack)
        flags += _contradiction("worst_nats", worst, floors.worst, floors.slack)
    if worst.nats > normal.nats + 2 * (worst.stderr + normal.stderr):
        flags.append(f"contradicted: worst_nats {worst.nats:.2f} is above normal_nats {normal.nats:.2f}")
    if normal.nats > ceiling - 0.2:
        flags.append(f"saturated: normal_nats {normal.nats:.2f} is at its ceiling ln(images) = {ceiling:.2f}")
    flags += [
        f"negative: {name} {spread.nats:.2f} is under zero beyond its error"
        for name, spread in (("normal_nats", normal), ("worst_nats", worst))
        if spread.nats < -2 * spread.stderr
    ]
    return flags


def bound_flags(bound: float, adversarial_low: float) -> list[str]:
    """Return the flag of an estimated bound on accuracy that lies under an accuracy measured."""
    if bound >= adversarial_low:
        return []
    return [f"contradicted: the bound {bound:.3f} is under the measured adversarial accuracy's {adversarial_low:.3f}"]


def distrust_flags(checks: Iterable[Check]) -> list[str]:
    """Return the flag of an attack that failed a trust check, worded as `checks.verdict` words its figure."""
    checks = tuple(checks)
    names = _named(failed(checks))
    return [f"untrusted: the adversarial accuracy ({verdict(checks)}) failed {names}"] if names else []


def search_distrust_flags(checks: Iterable[Check]) -> list[str]:
    """Return the flag of a worst case whose objective misleads: a failed search makes it seem larger than it is."""
    names = _named(failed(checks))
    said = "untrusted: the worst-case information is an upper bound, its search not trustworthy"
    return [f"{said}: {names}"] if names else []


def _named(checks: Iterable[Check]) -> str:
    return ", ".join(f"{check.number} {check.name}" for check in checks)


def _contradiction(name: str, spread: Spread, least: float, slack: float) -> list[str]:
    missing = least - spread.nats
    if missing <= 2 * spread.stderr + slack:
        return []
    return [f"contradicted: {name} {spread.nats:.2f} is under its measured floor {least:.2f} by {missing:.2f} nats"]
