"""What an estimator is: a way to put a number, with its doubt, on what a representation tells of the images.

Source: Zhu, Zhang & Evans 2020, Definition 3.1 (representation vulnerability).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.types import Encoded, Encoder, Images, Labels, Objective

History = tuple[tuple[int, float], ...]
"""(step, nats) pairs."""

CLEAN = "clean"
"""The candidate for a worst case that no search touched: the images as they are."""

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
    `served` names the candidate that the worst case was read on; `others` are the moved images that `which` leaves out,
    in their order.
    """

    normal: MIEstimate
    worst: MIEstimate
    moved: Images
    which: Tensor
    passes: float
    served: str = ""
    others: Images | None = None

    @property
    def start(self) -> Images:
        """Return all images that were moved, in the subject's order: where another search may start."""
        if self.others is None:
            return self.moved
        images = self.moved.new_empty(len(self.moved) + len(self.others), *self.moved.shape[1:])
        read = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        read[self.which] = True
        images[self.which], images[~read] = self.moved, self.others
        return images

    @property
    def nats(self) -> float:
        """Return RV: normal less worst, in nats."""
        return self.normal.nats - self.worst.nats

    @property
    def stderr(self) -> float:
        """Return the sampling error of RV, as if its two parts were independent (shared images make it smaller)."""
        return hypot(self.normal.stderr, self.worst.stderr)


class Known(NamedTuple):
    """What earlier work leaves to a search of the worst case: any of it saves passes, none of it is needed.

    `normal` is the normal case of this subject and seed. `start` (N, C, H, W) are the worst-case images of a smaller
    ball, or of a layer further on: they are one candidate, and the search goes on from them with a part of its
    steps. `served` is the `Vulnerability.served` of another seed: the search makes do with that kind of candidate.
    """

    normal: MIEstimate | None = None
    start: Images | None = None
    served: str = ""


NOTHING_KNOWN = Known()


class Subject(NamedTuple):
    """What an estimator is asked about: an encoder, images (N, C, H, W) and their labels (N,).

    `clean` is what the encoder says of the images as they are, where that is known already.
    """

    encoder: Encoder
    images: Images
    labels: Labels
    clean: Encoded | None = None


@dataclass(frozen=True)
class Estimator(ABC):
    """One way to estimate the normal case and the worst case inside an eps-ball.

    Members are frozen dataclasses: their fields are all that decides their numbers beside the subject and the seed.
    `quantity` says what the nats are nats of; `ranks` whether models may be ranked by its RV; `limits_heads` whether
    its worst case limits any head on the layer (then the Fano bounds follow from it); `floor_kind` which measurements
    refute it: the entropy of the network's answers and its accuracy, the accuracy alone, or that of logits seen through
    noise of the deviation `parts["noise"]`; `memory_only` names fields that bound memory and decide no number;
    `reads_answers` is false where the subject's encoder need not give the network's answers.
    """

    quantity: ClassVar[str]
    ranks: ClassVar[bool] = True
    limits_heads: ClassVar[bool] = True
    floor_kind: ClassVar[FloorKind] = "answers"
    reads_answers: ClassVar[bool] = True
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
        self, subject: Subject, threat: ThreatModel, seed: int, known: Known = NOTHING_KNOWN
    ) -> Vulnerability:
        """Return both cases; what is known of them already saves passes.

        At eps = 0 the worst case is the normal case exactly.
        """
