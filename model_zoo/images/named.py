"""The named data sets: scikit-learn's digits, which come with the package, and torchvision's, which are fetched."""

import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audit.errors import EnvironmentFault, UsageError

_DIGITS_TEST = 900
_DIGITS_SEED = 20210419


@dataclass(frozen=True)
class RawImages:
    """Pixels (M, C, H, W), uint8 or float, with labels (M,); `available` counts the images of the whole set."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    indices: tuple[int, ...]
    available: int

    def first(self, count: int | None) -> "RawImages":
        """Return the first `count` images (all when None)."""
        if count is None:
            return self
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count], indices=self.indices[:count])

    def balanced(self, count: int) -> "RawImages":
        """Return the first images of each class, equally many of each, in their own order; raises UsageError."""
        classes = len(self.classes)
        if count % classes:
            raise UsageError(f"{count} images cannot be shared by {classes} classes equally: ask for a multiple of it")
        ranks = torch.stack([(self.labels == label).cumsum(0) for label in range(classes)])
        rank = ranks.gather(0, self.labels[None]).squeeze(0)
        fewest = min(int(row[-1]) for row in ranks)
        if count // classes > fewest:
            raise UsageError(f"{count} images of {classes} classes need {count // classes} each; one has {fewest}")
        chosen = (rank <= count // classes).nonzero().flatten()
        indices = tuple(self.indices[index] for index in chosen.tolist())
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen], indices=indices)


def read_digits(split: str) -> RawImages:
    """Return scikit-learn's handwritten digits, (1, 8, 8): 897 for training, 900 for testing, classes in proportion.

    Source: Alpaydin & Kaynak 1998, as bundled with scikit-learn (1,797 images, 16 grey levels).
    """
    # Imported here because scikit-learn takes a second that other sets do not need.
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
    """Return the fixed training and test indices; both orders are random, so any beginning is a fair sample."""
    # RandomState, because numpy promises that its stream never changes.
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
    """Return a split of a torchvision data set kept in `data_dir`, fetched into it unless `offline`.

    Raises EnvironmentFault where it is not there and cannot be fetched.
    """
    with _explained(name, data_dir, offline):
        dataset = _open(name, split, data_dir, download=not offline)
    pixels = torch.as_tensor(np.asarray(dataset.data))
    labels = torch.as_tensor(np.asarray(dataset.labels if name == "svhn" else dataset.targets))
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    elif name != "svhn":  # the CIFAR sets are stored channels last
        pixels = pixels.permute(0, 3, 1, 2)
    classes = tuple(getattr(dataset, "classes", None) or (str(digit) for digit in range(10)))
    return RawImages(pixels, labels, classes, tuple(range(len(labels))), len(labels))


def _open(name: str, split: str, data_dir: Path, *, download: bool) -> Any:
    # Imported here because torchvision takes a second that other sets do not need.
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
def _explained(name: str, data_dir: Path, offline: bool) -> Iterator[None]:
    """Turn what torchvision raises for a missing or unreachable data set into one sentence."""
    try:
        with warnings.catch_warnings(), _contained_archives():
            warnings.simplefilter("ignore")  # numpy about the age of the stored arrays
            yield
    except Exception as error:  # damaged files fail in torchvision's readers with any kind
        why = "offline mode does not fetch it" if offline else "it could not be fetched"
        message = f"data set {name} is not complete in {data_dir} and {why} ({type(error).__name__})"
        raise EnvironmentFault(f"{message}; fetch it on a machine with a network and copy that folder here") from error


@contextmanager
def _contained_archives() -> Iterator[None]:
    """Let nothing that torchvision unpacks leave its folder: it asks for no filter, and the default is none."""
    former = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = former
