"""Label information by the number of images: what classifiers read of quarters, halves and the whole of a sample."""

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from audit.information.probing.panel import Panel, Reading
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Labels

MEMBERS = ("linear", "neighbours", "forest")  # the network's own output is fitted on no image, the others are slow
_PARTS = (4, 2, 1)
_FEWEST_A_CLASS = 2  # images of a part

Points = tuple[tuple[int, float], ...]
"""(images, nats) pairs, in ascending order."""


def learning_curves(panel: Panel, encoded: Encoded, labels: Labels, seed: int) -> dict[str, Points]:
    """Return each member's mean reading of the quarters, of the halves, and of the whole of a sample, in nats.

    Parts are balanced over the labels (N,); those of fewer than two images a class on average are left out. Readings
    are those of a quick panel, so that the last one differs from a whole panel's.
    """
    quick = panel._replace(members=[name for name in MEMBERS if name in panel.members], quick=True)
    order = _by_class(labels, keyed_generator(seed, Purpose.PROBE_PARTS))
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in quick.members}
    for count in _PARTS if curves else ():
        if count > 1 and len(labels) < count * _FEWEST_A_CLASS * len(labels.unique()):
            continue
        parts = [order[start::count] for start in range(count)]
        read = [quick.read(Encoded(*(each[part] for each in encoded)), labels[part], seed).parts for part in parts]
        for name, points in curves.items():
            points.append((round(len(labels) / count), fmean(each[name] for each in read)))
    return {name: tuple(points) for name, points in curves.items()}


def growth(points: Points) -> float:
    """Return in nats how much more would be read of any number of images, if the missing part falls as 1 / images.

    The larger of two extrapolations, from the quarters and from the halves; at least 0.

    >>> growth(((100, 1.0), (200, 1.5), (400, 1.75)))
    0.25
    """
    (count, whole), *fewer = reversed(points)
    return max([0.0, *((whole - nats) / (count / images - 1) for images, nats in fewer)])


def extrapolated(reading: Reading, curves: Mapping[str, Points]) -> float:
    """Return the largest value in nats that a member of the panel has, or would have of any number of images."""
    return max([reading.nats, *(reading.parts[name] + growth(points) for name, points in curves.items())])


def largest(curves: Mapping[str, Points]) -> Points:
    """Return the largest reading of the members at each number of images."""
    return tuple((points[0][0], max(nats for _, nats in points)) for points in zip(*curves.values(), strict=True))


def _by_class(labels: Labels, generator: torch.Generator) -> Tensor:
    """Return the indices of labels (N,) in random order within each class, one class after the other."""
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    return order[labels[order].argsort(stable=True)]
