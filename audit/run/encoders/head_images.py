"""Images that the heads of an encoder are trained on: others than those that it is audited on, or folds of these."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from audit.hashing import image_hashes, tensors_sha256
from audit.information.floors import few_a_class
from audit.random_keys import Purpose, keyed_generator
from audit.run.encoders.plan import Fold, HeadPlan
from audit.types import Images, Labels, selected_pixels
from model_zoo.images.datasets import ImageSet

HEADS_VERSION = 1
"""Of the heads of encoders: increment when a change of their choice or training changes numbers."""

_LEAST = 2  # images of a class that a head needs to learn it and to be measured on it


def heads_identity(images_sha256: str) -> dict[str, Any]:
    """Return what a cell's identity states of heads: their version, and the hash of the images in `head_plan`."""
    return {"version": HEADS_VERSION, "images_sha256": images_sha256}


def images_after(found: ImageSet, count: int) -> ImageSet | None:
    """Return the images of a set after the first `count`; None if there are none."""
    if len(found.labels) <= count:
        return None
    images, labels = found.images[count:], found.labels[count:]
    sha256 = tensors_sha256(images, labels)
    return replace(found, images=images, labels=labels, indices=found.indices[count:], sha256=sha256)


class Labelled(Protocol):
    """Images (N, C, H, W) with labels (N,)."""

    @property
    def images(self) -> Images:
        """The images."""
        ...

    @property
    def labels(self) -> Labels:
        """The labels."""
        ...


def head_plan(audited: Labelled, others: ImageSet | None, seed: int) -> HeadPlan:
    """Return how the heads of an encoder are trained.

    They are trained on `others`, without copies of audited images, if these hold two images of the classes of most
    audited images. Else the audited images are cross-fitted: each half, with half of every class, is measured with
    heads trained on the other half. Neither is possible with fewer than two audited images a class.
    """
    if others is not None:
        found = _without_copies(others, audited)
        if len(found.labels) and 2 * _covered(found.labels, audited.labels) > len(audited.labels):
            where = "of the training split" if others.split == "train" else "that follow the audited ones"
            everything = torch.arange(len(audited.labels))
            fold = Fold(found.images, found.labels, everything)
            return HeadPlan((fold,), f"{len(found.labels)} images {where}")
    few = few_a_class(audited.labels)
    if few:
        return HeadPlan((), "", f"no accuracy can be measured: {few}")
    first, second = _halves(audited.labels, seed)
    folds = [
        Fold(selected_pixels(audited.images, train), audited.labels[train], test)
        for train, test in ((first, second), (second, first))
    ]
    return HeadPlan(tuple(folds), "the other half of the audited images (cross-fitting)")


class _Sample(NamedTuple):
    images: Images
    labels: Labels


def _without_copies(others: ImageSet, audited: Labelled) -> _Sample:
    known = set(image_hashes(audited.images))
    new = torch.tensor([each not in known for each in image_hashes(others.images)], dtype=torch.bool)
    new = new.to(others.images.device)
    return _Sample(selected_pixels(others.images, new), others.labels[new])


def _covered(training: Labels, labels: Labels) -> int:
    """Return how many labels (N,) are of a class with at least two training images."""
    classes = int(max(training.max(), labels.max())) + 1
    counts = torch.bincount(training, minlength=classes)
    return int((counts[labels] >= _LEAST).sum())


def _halves(labels: Labels, seed: int) -> Sequence[Tensor]:
    """Return the indices of two halves of the images, with half of the images of every class in each."""
    order = torch.randperm(len(labels), generator=keyed_generator(seed, Purpose.HEAD_FOLDS))
    sorted_by_class = order[labels.cpu()[order].argsort(stable=True)]
    return sorted_by_class[::2].sort().values, sorted_by_class[1::2].sort().values
