"""What Table 1 is run with: data sets and their radii, and scales from a laptop's minutes to the authors' settings."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from audit.adversary.label_attack import TIERS, LabelAttack, Stage
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf, ThreatModel
from audit.errors import UnknownNameError, UsageError
from audit.storage import digest
from audit.training.classifiers import ClassifierTraining
from audit.training.heads import HeadFit
from audit.training.mutual_information import MITraining
from audit.training.objectives import ScorerShape
from audit.types import Images, Labels
from model_zoo.images.load import ImageRequest, load_images

PAPER_PGD = PGD(steps=7, relative_step=0.32, random_start=False)
"""The authors' search: 7 steps from the clean image, 0.01 at 8/255; the same share of every other radius."""
PAPER_ATTACK = LabelAttack((Stage("ce", PAPER_PGD),))
VERSION = 1
"""Raised when rows would come out differently from the same settings."""
_VALIDATION, _TEST = 0.1, 0.2
_WIDE = 64


@dataclass(frozen=True)
class Subject:
    """A data set as the paper attacks it: l-inf radius in pixel units, and how images are varied for training."""

    eps: float
    shift: int = 0
    flip: bool = False


SUBJECTS = {
    "digits": Subject(0.2),
    "mnist": Subject(0.3),
    "fashion-mnist": Subject(0.1),
    "svhn": Subject(4 / 255),
    "cifar10": Subject(8 / 255, shift=4, flip=True),
}
"""The paper's four data sets with its radii, and the bundled digits with the radius they are audited at."""


@dataclass(frozen=True)
class Scale:
    """How large Table 1 is: widths, epochs, rates, and how many images; None for all there are.

    `rate`, `head_rate` and `supervised_rate` are Adam's for encoders, heads and classifiers; `robust_epochs` are of
    heads that PGD trains, which cost as much as `head_epochs` of eight others; `seeds` is how many by default.
    """

    width: int
    critic: ScorerShape
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
    "tiny": Scale(
        width=16, critic=ScorerShape(width=64), image_branch="detached", epochs=40, rate=1e-3, head_epochs=30,
        robust_epochs=20, head_rate=5e-3, supervised_epochs=30, supervised_rate=4e-3,
    ),
    "small": Scale(
        width=16, critic=ScorerShape(width=64), image_branch="detached", epochs=10, rate=1e-3, head_epochs=30,
        robust_epochs=6, head_rate=5e-3, supervised_epochs=8, supervised_rate=4e-3, every=5, train_images=6000,
        test_images=1500,
    ),
    "paper": Scale(
        width=_WIDE, critic=ScorerShape(), image_branch="detached", epochs=500, rate=1e-4, head_epochs=100,
        robust_epochs=100, head_rate=1e-4, supervised_epochs=150, supervised_rate=1e-4, batch_size=128, every=5,
        seeds=4,
    ),
}  # fmt: skip
"""`paper` has the authors' widths, rates and 500 epochs; how long they trained heads and classifiers is not told."""


class Sample(NamedTuple):
    """Images (M, C, H, W) in [0, 1] with labels (M,)."""

    images: Images
    labels: Labels


class Parts(NamedTuple):
    """What is learned from, what early stopping watches, what is reported; and how many classes there are."""

    train: Sample
    validation: Sample
    test: Sample
    classes: int


@dataclass(frozen=True)
class Table1Request:
    """Which table: the data set, where its images are if not in its usual place, and how large.

    `data` and `train_data` are references such as `parquet:PATH`; with `data` alone its last fifth is the test part.
    """

    dataset: str
    scale: Scale
    scale_name: str = "custom"
    data: str | None = None
    train_data: str | None = None
    data_dir: Path = Path("data")
    offline: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in SUBJECTS:
            raise UnknownNameError("data set of Table 1", self.dataset, SUBJECTS)
        if self.scale.attack not in TIERS:
            raise UnknownNameError("attack tier", self.scale.attack, TIERS)
        if self.train_data is not None and self.data is None:
            raise UsageError(f"train_data {self.train_data!r} needs data: say which images are reported on")

    @property
    def subject(self) -> Subject:
        """Return the data set's radius and augmentation."""
        return SUBJECTS[self.dataset]

    @property
    def threat(self) -> ThreatModel:
        """Return the threat model, l-inf."""
        return Linf(self.subject.eps)

    def mutual_information(self, beta: float, seed: int) -> MITraining:
        """Return how an encoder is trained without labels."""
        scale, subject = self.scale, self.subject
        return MITraining(
            beta=beta, threat=self.threat, pgd=PAPER_PGD, critic=scale.critic, epochs=scale.epochs,
            batch_size=scale.batch_size, learning_rate=scale.rate, shift=subject.shift, flip=subject.flip, seed=seed,
            image_branch=scale.image_branch, precision=scale.precision,  # type: ignore[arg-type]
        )  # fmt: skip

    def head(self, kind: str, classes: int, *, robust: bool, seed: int) -> HeadFit:
        """Return how a head is trained on a frozen encoder."""
        scale = self.scale
        return HeadFit(
            classes=classes, kind=kind, threat=self.threat if robust else None, pgd=PAPER_PGD,  # type: ignore[arg-type]
            epochs=scale.robust_epochs if robust else scale.head_epochs, batch_size=scale.batch_size,
            learning_rate=scale.head_rate, every=scale.every, seed=seed,
        )  # fmt: skip

    def classifier(self, *, robust: bool, seed: int) -> ClassifierTraining:
        """Return how encoder and head are trained together on labels."""
        scale = self.scale
        return ClassifierTraining(
            epochs=scale.supervised_epochs, batch_size=scale.batch_size, learning_rate=scale.supervised_rate,
            weight_decay=0.0, shift=self.subject.shift, threat=self.threat if robust else None, pgd=PAPER_PGD,
            seed=seed,
        )  # fmt: skip

    def identity(self, parts: Parts) -> str:
        """Return a hash of all that decides the rows but the seed: settings and images."""
        settings = asdict(self.scale) | {"seeds": 0, "dataset": self.dataset, "eps": self.subject.eps}
        seen = [[len(part.images), float(part.images.double().sum()), int(part.labels.sum())] for part in parts[:3]]
        return digest({"version": VERSION, "settings": settings, "images": seen})[:16]


def load_parts(request: Table1Request) -> Parts:
    """Return the three parts of the images: the last tenth of those to learn from is for validation.

    A single file of `request.data` gives its first four fifths to learn from and the last fifth to report on. Raises
    what `load_images` raises, and UsageError where a part would be empty.
    """
    train, test, classes = _train_and_test(request)
    scale = request.scale
    train = Sample(*(each[: scale.train_images] for each in train))
    test = Sample(*(each[: scale.test_images] for each in test))
    held = int(_VALIDATION * len(train.images))
    if held < 1 or len(test.images) < 1:
        raise UsageError(f"{len(train.images)} images to learn from are too few: a tenth of them is for validation")
    fitted, validation = (Sample(*(each[part] for each in train)) for part in (slice(-held), slice(-held, None)))
    return Parts(fitted, validation, test, classes)


def _train_and_test(request: Table1Request) -> tuple[Sample, Sample, int]:
    asked = ImageRequest(data_dir=request.data_dir, offline=request.offline)
    if request.data is None:
        sets = [load_images(request.dataset, replace(asked, split=split)) for split in ("train", "test")]
    else:
        sets = [load_images(ref, asked) for ref in (request.train_data, request.data) if ref is not None]
    train, test = (Sample(each.images, each.labels) for each in (sets[0], sets[-1]))
    if len(sets) == 1:
        cut = len(train.images) - int(_TEST * len(train.images))
        train, test = (Sample(*(each[part] for each in train)) for part in (slice(cut), slice(cut, None)))
    return train, test, max(len(each.classes) for each in sets)
