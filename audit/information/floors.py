"""Data-processing floors: lower bounds on information, in nats, from measured predictions.

I(X; g(X)) >= H(argmax) and I(X; g(X)) >= I(Y; g(X)) >= d(accuracy || largest class share), for every layer that
determines the network's logits.
"""

from math import log
from typing import NamedTuple

from torch import Tensor

from audit.information.estimator import FloorKind
from audit.proportion import wilson
from audit.theory import information_floor

_LEAST_A_CLASS = 2  # images: one to learn the class from, one to be read


class InformationFloors(NamedTuple):
    """Lower bounds on the estimates in nats, on clean images (`normal`) and on the worst-case images (`worst`).

    `slack` = (K - 1) / 2n is the bias of a plug-in entropy of n images relative to one of all images.

    Source: Miller 1955 (the slack).
    """

    normal: float
    worst: float
    slack: float = 0.0


def empirical_entropy(classes: Tensor) -> float:
    """Return the entropy of a sample of classes (N,) in nats.

    Source: the plug-in estimate, which is biased downwards, so that a floor computed from it remains a floor.
    """
    shares = classes.bincount().double() / len(classes)
    return -sum(float(share) * log(float(share)) for share in shares if share > 0)


def largest_share(labels: Tensor) -> float:
    """Return the share of the most frequent class among labels (N,)."""
    return float(labels.bincount().max()) / len(labels)


def few_a_class(labels: Tensor) -> str:
    """Return in words that labels (N,) have fewer than two images a class, too few to learn one from; "" if not."""
    classes = len(labels.unique())
    if len(labels) >= _LEAST_A_CLASS * classes:
        return ""
    return f"{len(labels)} images of {classes} classes are fewer than {_LEAST_A_CLASS} a class"


def prediction_floor(predictions: Tensor, labels: Tensor, class_share: float, kind: FloorKind) -> float:
    """Return the floor in nats that predictions (N,) imply for the features they were computed from.

    d(accuracy || class_share) with the lower end of the accuracy's interval; for `predictions`, the maximum of that
    and the entropy of the predictions, which are a function of the features.

    Source: the data-processing inequality; Fano's inequality, `audit.theory.information_floor`.
    """
    correct = wilson(int((predictions == labels).sum()), len(labels))
    by_accuracy = information_floor(correct.low, class_share)
    return max(by_accuracy, empirical_entropy(predictions)) if kind == "predictions" else by_accuracy
