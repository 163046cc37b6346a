"""What an estimator is: a way to put a number, with its doubt, on what a representation tells of the images.

Source: Zhu, Zhang & Evans 2020, Definition 3.1 (representation vulnerability).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from audit.threat import ThreatModel
from audit.types import Encoder, Images, Labels, Objective

History = tuple[tuple[int, float], ...]
"""(step, nats) pairs."""

FloorKind = Literal["answers", "labels", "smoothed"]


@dataclass(frozen=True)
class MIEstimate:
    """One estimate in nats, with its doubt.

    `stderr` is over the `images` the value was read on; `ceiling` is what the estimator could at most have said of so
    many images; `parts` are other readings of the same fit, by name, in nats; `validated` is the counterpart of
    `nats` by which choices are made, so that the reported value stays untouched by them; `history` and
    `training_history` are curves on validation and training images, empty where nothing is trained.
    """

    nats: float
    stderr: float
    images: int
    ceiling: float
    validated: float
    parts: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    history: History = ()
    training_history: History = ()
    flags: tuple[str, ...] = ()


class Vulnerability(NamedTuple):
    """Normal- and worst-case estimates of one seed, and the worst-case images found.

    `moved` (M, C, H, W) are the images the worst case was read on, `which` (M,) tells which of the subject's they are.
    `passes` counts forward+backward passes of single images through the network, plain forwards as a half.
    """

    normal: MIEstimate
    worst: MIEstimate
    moved: Images
    which: Tensor
    passes: float

    @property
    def nats(self) -> float:
        """Return RV: normal less worst, in nats."""
        return self.normal.nats - self.worst.nats

    @property
    def stderr(self) -> float:
        """Return the sampling error of RV, as if its two parts were independent (shared images make it smaller)."""
        return hypot(self.normal.stderr, self.worst.stderr)


class Subject(NamedTuple):
    """What an estimator is asked about: an encoder, images (N, C, H, W) and their labels (N,)."""

    encoder: Encoder
    images: Images
    labels: Labels


@dataclass(frozen=True)
class Estimator(ABC):
    """One way to estimate the normal case and the worst case inside an eps-ball.

    Members are frozen dataclasses: their fields are all that decides their numbers beside the subject and the seed.
    `quantity` says what the nats are nats of; `ranks` whether models may be ranked by its RV; `limits_heads` whether
    its worst case limits any head on the layer (then the Fano bounds follow from it); `floor_kind` which measurements
    refute it: the entropy of the network's answers and its accuracy, the accuracy alone, or that of logits seen through
    noise of the deviation `parts["noise"]`; `memory_only` names fields that bound memory and decide no number.
    """

    quantity: ClassVar[str]
    ranks: ClassVar[bool] = True
    limits_heads: ClassVar[bool] = True
    floor_kind: ClassVar[FloorKind] = "answers"
    memory_only: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the estimator as tables show it, such as `mine-infonce`."""

    @abstractmethod
    def normal(self, subject: Subject, seed: int) -> MIEstimate:
        """Return the estimate on the images as they are."""

    def objective(self, subject: Subject) -> Objective | None:  # noqa: ARG002
        """Return what the worst case makes small, image by image, so that its gradient can be checked.

        Its indices are those of the subject's images. None where an estimator has no such objective.
        """
        return None

    @abstractmethod
    def vulnerability(
        self, subject: Subject, threat: ThreatModel, seed: int, normal: MIEstimate | None = None
    ) -> Vulnerability:
        """Return both cases; `normal` saves the normal one where it is known for this subject and seed.

        At eps = 0 the worst case is the normal case exactly.
        """
