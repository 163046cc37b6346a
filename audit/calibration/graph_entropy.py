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
    maximal sets of classes that meet. A search knows the label too, so that the minimum is over
    p(clique | class, label): a convex programme, solved by mirror descent.

    Source: Koerner 1973, "Coding of an Information Source Having Ambiguous Alphabet and the Entropy of Graphs".

    >>> round(least_label_information([[0.0], [1.0]], 0.4), 4), round(least_label_information([[0.0], [1.0]], 0.6), 4)
    (0.6931, 0.0)
    """
    centres = np.asarray(points, float)
    membership = _maximal_cliques(np.abs(centres[:, None] - centres[None]).max(2) <= 2 * eps + 1e-9)
    classes = len(centres)
    labels_given_class = (1 - label_noise) * np.eye(classes) + label_noise / classes
    allowed = np.repeat(membership[:, None], classes, 1)  # class, label, clique
    choice = allowed / allowed.sum(2, keepdims=True)
    least = np.inf
    for _ in range(_STEPS):
        joint = np.einsum("cy,cyz->yz", labels_given_class, choice) / classes
        least = min(least, _information(joint))
        gradient = np.log(np.maximum(joint, 1e-300) / np.maximum(joint.sum(0), 1e-300))
        choice = choice * np.exp(-_RATE * (gradient - gradient.min(1, keepdims=True))) * allowed
        choice /= choice.sum(2, keepdims=True)
    return max(0.0, float(least))


def _maximal_cliques(adjacent: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return the membership (K, C) of K vertices in the C maximal cliques of a small graph."""
    found: list[set[int]] = []
    for size in range(len(adjacent), 0, -1):
        for group in combinations(range(len(adjacent)), size):
            if all(adjacent[a, b] for a, b in combinations(group, 2)) and not any(set(group) <= each for each in found):
                found.append(set(group))
    return np.array([[float(vertex in clique) for clique in found] for vertex in range(len(adjacent))])


def _information(joint: npt.NDArray[np.float64]) -> float:
    product = joint.sum(1, keepdims=True) * joint.sum(0)
    ratio = np.maximum(joint, 1e-300) / np.maximum(product, 1e-300)
    return float(np.sum(np.where(joint > 0, joint * np.log(ratio), 0.0)))
