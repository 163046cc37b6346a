"""Settings of Table 1: data sets with their radii, and scales from minutes on a laptop to the authors' settings."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from audit.adversary.label_attack import TIERS, LabelAttack, Stage
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf, ThreatModel
from audit.errors import UnknownNameError, UsageError
from audit.storage import digest
from audit.training.classifiers import ClassifierTraining
from audit.training.heads import HeadFitSettings
from audit.training.mutual_information import MITraining
from audit.training.objectives import ObjectiveSettings
from audit.types import Images, Labels
from model_zoo.images.datasets import ImageRequest, load_images

PAPER_PGD = PGD(steps=7, relative_step=0.32, random_start=False)
"""The search of the authors: 7 steps from the clean image, of size 0.01 at 8/255, scaled with the radius."""
PAPER_ATTACK = LabelAttack((Stage("ce", PAPER_PGD),))
VERSION = 2
"""Incremented when the same settings give other rows."""
_VALIDATION, _TEST = 0.1, 0.2
_WIDE = 64


@dataclass(frozen=True)
class DatasetSettings:
    """The l-inf radius of a data set in pixel units, and the augmentation in training."""

    eps: float
    shift: int = 0
    flip: bool = False


DATASETS = {
    "digits": DatasetSettings(0.2),
    "mnist": DatasetSettings(0.3),
    "fashion-mnist": DatasetSettings(0.1),
    "svhn": DatasetSettings(4 / 255),
    "cifar10": DatasetSettings(8 / 255, shift=4, flip=True),
}
"""The four data sets of the paper with their radii, and the bundled digits with their audited radius."""


@dataclass(frozen=True)
class Table1Scale:
    """Size of Table 1: widths, epochs, learning rates, and numbers of images (None: all).

    `rate`, `head_rate` and `supervised_rate` are learning rates of Adam for encoders, heads and classifiers;
    `robust_epochs` are epochs of heads with PGD training, each eight times as costly; `seeds` is the default number of
    seeds.
    """

    width: int
    critic: ObjectiveSettings
    image_branch: str
    epochs: int
    rate: float
    head_epochs: int
    robust_epochs: int
    head_rate: float
    supervised_epochs: int
    supervised_rate: float
    batch_size: int = 64
    every: int = 2
    train_images: int | None = None
    test_images: int | None = None
    attack: str = "audit"
    precision: str = "float32"
    seeds: int = 3


SCALES = {
    "tiny": Table1Scale(
        width=16,
        critic=ObjectiveSettings(width=64),
        image_branch="detached",
        epochs=40,
        rate=1e-3,
        head_epochs=30,
        robust_epochs=20,
        head_rate=5e-3,
        supervised_epochs=30,
        supervised_rate=4e-3,
    ),
    "small": Table1Scale(
        width=16,
        critic=ObjectiveSettings(width=64),
        image_branch="detached",
        epochs=10,
        rate=1e-3,
        head_epochs=30,
        robust_epochs=6,
        head_rate=5e-3,
        supervised_epochs=8,
        supervised_rate=4e-3,
        every=5,
        train_images=6000,
        test_images=1500,
    ),
    "paper": Table1Scale(
        width=_WIDE,
        critic=ObjectiveSettings(),
        image_branch="detached",
        epochs=500,
        rate=1e-4,
        head_epochs=100,
        robust_epochs=100,
        head_rate=1e-4,
        supervised_epochs=150,
        supervised_rate=1e-4,
        batch_size=128,
        every=5,
        seeds=4,
    ),
}
"""`paper` has the authors' widths, rates and 500 epochs; their epochs of heads and classifiers are unpublished."""


class LabelledImages(NamedTuple):
    """Images (M, C, H, W) in [0, 1] with labels (M,)."""

    images: Images
    labels: Labels


class DataSplits(NamedTuple):
    """Images for training, for early stopping and for the reported accuracies, and the number of classes."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    classes: int

    def to(self, device: torch.device) -> "DataSplits":
        """Return the images on a device."""
        train, validation, test = (LabelledImages(*(each.to(device) for each in part)) for part in self[:3])
        return DataSplits(train, validation, test, self.classes)


@dataclass(frozen=True)
class Table1Request:
    """The data set of a table, its scale, and the location of its images other than `data_dir`.

    `data` and `train_data` are references such as `parquet:PATH`; with `data` alone, its last fifth is for testing.
    """

    dataset: str
    scale: Table1Scale
    scale_name: str = "custom"
    data: str | None = None
    train_data: str | None = None
    data_dir: Path = Path("data")
    offline: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise UnknownNameError("data set of Table 1", self.dataset, DATASETS)
        if self.scale.attack not in TIERS:
            raise UnknownNameError("attack tier", self.scale.attack, TIERS)
        if self.train_data is not None and self.data is None:
            raise UsageError(f"train_data {self.train_data!r} needs data: name the images to report on")

    @property
    def dataset_settings(self) -> DatasetSettings:
        """The radius and augmentation of the data set."""
        return DATASETS[self.dataset]

    @property
    def threat(self) -> ThreatModel:
        """The l-inf threat model."""
        return Linf(self.dataset_settings.eps)

    def mutual_information(self, beta: float, seed: int) -> MITraining:
        """Return the training settings of an encoder without labels."""
        scale, dataset = self.scale, self.dataset_settings
        return MITraining(
            beta=beta,
            threat=self.threat,
            pgd=PAPER_PGD,
            critic=scale.critic,
            epochs=scale.epochs,
            batch_size=scale.batch_size,
            learning_rate=scale.rate,
            shift=dataset.shift,
            flip=dataset.flip,
            seed=seed,
            image_branch=scale.image_branch,  # type: ignore[arg-type]
            precision=scale.precision,  # type: ignore[arg-type]
        )

    def head(self, kind: str, classes: int, *, robust: bool, seed: int) -> HeadFitSettings:
        """Return the training settings of a head on a frozen encoder."""
        scale = self.scale
        return HeadFitSettings(
            classes=classes,
            kind=kind,  # type: ignore[arg-type]
            threat=self.threat if robust else None,
            pgd=PAPER_PGD,
            epochs=scale.robust_epochs if robust else scale.head_epochs,
            batch_size=scale.batch_size,
            learning_rate=scale.head_rate,
            every=scale.every,
            seed=seed,
        )

    def classifier(self, *, robust: bool, seed: int) -> ClassifierTraining:
        """Return the settings of supervised training of encoder and head."""
        scale = self.scale
        return ClassifierTraining(
            epochs=scale.supervised_epochs,
            batch_size=scale.batch_size,
            learning_rate=scale.supervised_rate,
            weight_decay=0.0,
            shift=self.dataset_settings.shift,
            threat=self.threat if robust else None,
            pgd=PAPER_PGD,
            seed=seed,
        )

    def identity(self, splits: DataSplits) -> str:
        """Return a hash of everything that determines the rows except the seed: settings and images."""
        settings = asdict(self.scale) | {"seeds": 0, "dataset": self.dataset, "eps": self.dataset_settings.eps}
        images = [[len(part.images), float(part.images.double().sum()), int(part.labels.sum())] for part in splits[:3]]
        return digest({"version": VERSION, "settings": settings, "images": images})[:16]


def load_splits(request: Table1Request) -> DataSplits:
    """Return the images divided into training, validation (the last tenth of the training images) and test.

    `request.data` alone gives its first four fifths for training and its last fifth for testing. Raises the errors of
    `load_images`, and UsageError where a part would be empty.
    """
    train, test, classes = _train_and_test(request)
    scale = request.scale
    train = LabelledImages(*(each[: scale.train_images] for each in train))
    test = LabelledImages(*(each[: scale.test_images] for each in test))
    held_out = int(_VALIDATION * len(train.images))
    if held_out < 1 or len(test.images) < 1:
        raise UsageError(f"{len(train.images)} training images are too few: a tenth of them is for validation")
    parts = slice(-held_out), slice(-held_out, None)
    fit, validation = (LabelledImages(*(each[part] for each in train)) for part in parts)
    return DataSplits(fit, validation, test, classes)


def _train_and_test(request: Table1Request) -> tuple[LabelledImages, LabelledImages, int]:
    image_request = ImageRequest(data_dir=request.data_dir, offline=request.offline)
    if request.data is None:
        sets = [load_images(request.dataset, replace(image_request, split=split)) for split in ("train", "test")]
    else:
        sets = [load_images(ref, image_request) for ref in (request.train_data, request.data) if ref is not None]
    train, test = (LabelledImages(each.images, each.labels) for each in (sets[0], sets[-1]))
    if len(sets) == 1:
        cut = len(train.images) - int(_TEST * len(train.images))
        train, test = (LabelledImages(*(each[part] for each in train)) for part in (slice(cut), slice(cut, None)))
    return train, test, max(len(each.classes) for each in sets)
