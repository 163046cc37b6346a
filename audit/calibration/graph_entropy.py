"""Least label information of classes at points whose l-inf boxes overlap, by graph entropy."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

_STEPS = 4000
_RATE = 0.5


def least_label_information(points: Sequence[Sequence[float]], eps: float, label_noise: float = 0.0) -> float:
    """Return min I(Y; Z) in nats over moves of equally likely points (K, D) by at most eps in l-inf.

    Each point is a class; with the probability `label_noise`, the label is drawn from all classes instead. Boxes that
    overlap pairwise have a common point (Helly's theorem for boxes), and what is told is least if Z names one of the
    maximal sets of classes that meet: the minimum over p(clique | class) is a convex programme, solved by mirror
    descent.

    Source: Koerner 1973, "Coding of an Information Source Having Ambiguous Alphabet and the Entropy of Graphs".

    >>> round(least_label_information([[0.0], [1.0]], 0.4), 4), round(least_label_information([[0.0], [1.0]], 0.6), 4)
    (0.6931, 0.0)
    """
    centres = np.asarray(points, float)
    membership = _maximal_cliques(np.abs(centres[:, None] - centres[None]).max(2) <= 2 * eps + 1e-9)
    classes = len(centres)
    labels_given_class = (1 - label_noise) * np.eye(classes) + label_noise / classes
    choice = membership / membership.sum(1, keepdims=True)
    least = _information(choice, labels_given_class)
    for _ in range(_STEPS):
        joint = labels_given_class.T @ choice / classes
        share = np.maximum(joint.sum(0), 1e-300)
        gradient = labels_given_class @ np.log(np.maximum(joint, 1e-300) / (share / classes))
        choice = choice * np.exp(-_RATE * (gradient - gradient.min(1, keepdims=True))) * membership
        choice /= choice.sum(1, keepdims=True)
        least = min(least, _information(choice, labels_given_class))
    return max(0.0, least)


def _maximal_cliques(adjacent: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return the membership (K, C) of K vertices in the C maximal cliques of a small graph."""
    found: list[set[int]] = []
    for size in range(len(adjacent), 0, -1):
        for group in combinations(range(len(adjacent)), size):
            if all(adjacent[a, b] for a, b in combinations(group, 2)) and not any(set(group) <= each for each in found):
                found.append(set(group))
    return np.array([[float(vertex in clique) for clique in found] for vertex in range(len(adjacent))])


def _information(choice: npt.NDArray[np.float64], labels_given_class: npt.NDArray[np.float64]) -> float:
    joint = labels_given_class.T @ choice / len(choice)
    product = joint.sum(1, keepdims=True) * joint.sum(0)
    ratio = np.maximum(joint, 1e-300) / np.maximum(product, 1e-300)
    return float(np.sum(np.where(joint > 0, joint * np.log(ratio), 0.0)))
