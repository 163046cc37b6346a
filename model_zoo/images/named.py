"""Read the named data sets: the digits bundled with scikit-learn, and those that torchvision downloads."""

import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audit.errors import EnvironmentFault, UsageError
from audit.types import empty_pixels

UNKNOWN_PREPROCESSING = (
    "where the model's preprocessing is not known, add it to its file: reference, such as "
    "resize=256&crop=224&interpolation=bicubic"
)
_DIGITS_TEST = 900
_DIGITS_SEED = 20210419


def check_count(count: int | None, available: int, owner: object) -> None:
    """Raise UsageError where more images are asked for than there are, before any is decoded."""
    if count is not None and count > available:
        raise UsageError(f"{count} images were asked for; {owner} has {available}")


@dataclass(frozen=True)
class RawImages:
    """Pixels (M, C, H, W), uint8 or float, with labels (M,); `available` is the size of the whole data set.

    `numbered` is whether the data set names no classes, so that `classes` are the numbers themselves.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    indices: tuple[int, ...]
    available: int
    numbered: bool = False

    def first(self, count: int | None) -> "RawImages":
        """Return the first `count` images; None: all."""
        if count is None:
            return self
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count], indices=self.indices[:count])

    def balanced(self, count: int) -> "RawImages":
        """Return the first images of each class, equally many of each, in the original order; raises UsageError."""
        classes = len(self.classes)
        if count % classes:
            raise UsageError(
                f"{count} images cannot be shared equally by {classes} classes; ask for a multiple of {classes}"
            )
        ranks = torch.stack([(self.labels == label).cumsum(0) for label in range(classes)])
        rank = ranks.gather(0, self.labels[None]).squeeze(0)
        fewest = min(int(row[-1]) for row in ranks)
        if count // classes > fewest:
            raise UsageError(f"{count} images of {classes} classes need {count // classes} each; one has only {fewest}")
        chosen = (rank <= count // classes).nonzero().flatten()
        indices = tuple(self.indices[index] for index in chosen.tolist())
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen], indices=indices)


def stack(decoded: Iterable[tuple[str, Tensor]], count: int) -> Tensor:
    """Return `count` decoded images (C, H, W), each with its origin, as one tensor; they are taken one at a time.

    Raises UsageError for unequal shapes.
    """
    rest = iter(decoded)
    origin, first = next(rest)
    pixels = empty_pixels((count, *first.shape), first)
    pixels[0] = first
    for number, (other, image) in enumerate(rest, 1):
        if image.shape != first.shape:
            sizes = " and ".join("x".join(map(str, tensor.shape)) for tensor in (first, image))
            message = f"{origin} and {other} are {sizes}; all images must share channels and size"
            raise UsageError(f"{message}: {UNKNOWN_PREPROCESSING}")
        pixels[number] = image
    return pixels


def read_digits(split: str) -> RawImages:
    """Return scikit-learn's handwritten digits, (1, 8, 8): 897 for training, 900 for testing, stratified by class.

    Source: Alpaydin & Kaynak 1998, as bundled with scikit-learn (1,797 images, 16 grey levels).
    """
    # Imported here because scikit-learn takes a second that other data sets do not need.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = np.asarray(bunch.target)
    train, test = _split_digits(labels)
    chosen = test if split == "test" else train
    return RawImages(
        pixels=torch.from_numpy(bunch.images[chosen] / 16.0).float().unsqueeze(1),
        labels=torch.from_numpy(labels[chosen]),
        classes=tuple(str(digit) for digit in range(10)),
        indices=tuple(int(index) for index in chosen),
        available=len(chosen),
    )


def _split_digits(labels: "np.ndarray[Any, Any]") -> tuple[list[int], list[int]]:
    """Return the fixed training and test indices in random order, so that any prefix is a random sample."""
    # RandomState, because numpy guarantees that its stream never changes.
    order = np.random.RandomState(_DIGITS_SEED).permutation(len(labels))
    totals = np.bincount(labels)
    shares = totals * _DIGITS_TEST / len(labels)
    quotas = np.floor(shares).astype(int)
    rest = np.argsort(quotas - shares, kind="stable")[: _DIGITS_TEST - quotas.sum()]
    quotas[rest] += 1
    train: list[int] = []
    test: list[int] = []
    for index in map(int, order):
        label = labels[index]
        taken = quotas[label] > 0
        quotas[label] -= taken
        (test if taken else train).append(index)
    return train, test


def read_torchvision(name: str, split: str, data_dir: Path, *, offline: bool) -> RawImages:
    """Return a split of a torchvision data set stored in `data_dir`, downloaded into it unless `offline`.

    Raises EnvironmentFault where it is missing and cannot be downloaded.
    """
    with _torchvision_errors(name, data_dir, offline):
        dataset = _open(name, split, data_dir, download=not offline)
    pixels = torch.as_tensor(np.asarray(dataset.data))
    labels = torch.as_tensor(np.asarray(dataset.labels if name == "svhn" else dataset.targets))
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    elif name != "svhn":  # CIFAR is stored channels last
        pixels = pixels.permute(0, 3, 1, 2)
    classes = tuple(getattr(dataset, "classes", None) or (str(digit) for digit in range(10)))
    return RawImages(pixels, labels, classes, tuple(range(len(labels))), len(labels))


def _open(name: str, split: str, data_dir: Path, *, download: bool) -> Any:
    # Imported here because torchvision takes a second that other data sets do not need.
    from torchvision import datasets

    root, train = str(data_dir), split == "train"
    table: dict[str, Callable[[], Any]] = {
        "cifar10": lambda: datasets.CIFAR10(root, train=train, download=download),
        "cifar100": lambda: datasets.CIFAR100(root, train=train, download=download),
        "mnist": lambda: datasets.MNIST(root, train=train, download=download),
        "fashion-mnist": lambda: datasets.FashionMNIST(root, train=train, download=download),
        "svhn": lambda: datasets.SVHN(root, split=split, download=download),
    }
    return table[name]()


@contextmanager
def _torchvision_errors(name: str, data_dir: Path, offline: bool) -> Iterator[None]:
    """Convert the errors of torchvision for a missing or unreachable data set to EnvironmentFault."""
    try:
        with warnings.catch_warnings(), _safe_tar_extraction():
            warnings.simplefilter("ignore")  # numpy deprecation warnings about the stored arrays
            yield
    except Exception as error:  # torchvision raises any type for damaged files
        why = "offline mode does not fetch it" if offline else "it could not be fetched"
        message = f"data set {name} is not complete in {data_dir} and {why} ({type(error).__name__})"
        raise EnvironmentFault(f"{message}; fetch it on a machine with a network and copy that folder here") from error


@contextmanager
def _safe_tar_extraction() -> Iterator[None]:
    """Confine the members of archives that torchvision extracts to their folder: it sets no extraction filter."""
    former = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = former
