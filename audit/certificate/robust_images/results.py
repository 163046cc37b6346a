"""What is known about each image at one threat model: the ledger, its proofs and the budget of their search."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from audit.errors import UsageError
from audit.types import Images

Method = Literal["intervals", "lines"]
"""Ranges before activations by intervals alone, or tightened by lines and with slopes that may be optimised."""
METHODS: tuple[Method, ...] = ("intervals", "lines")


@dataclass(frozen=True)
class BoundEffort:
    """Budget of bounds. It affects only how many images are proved, never whether a proof is valid.

    `passes` limits the backward passes of lines before activations, in forward+backward passes of one image;
    `slope_steps` is the number of steps of the optimisation of slopes, `slope_rate` its first step length.
    """

    passes: float = 150.0
    slope_steps: int = 20
    slope_rate: float = 0.2


class Slopes(NamedTuple):
    """Lower slopes of all ReLU entries (S, A), uint8 in units of 1/255, for bounds of the true class of images
    `image` (S,) over classes `other` (S,)."""

    image: Tensor
    other: Tensor
    levels: Tensor

    @classmethod
    def none(cls) -> "Slopes":
        """Return no slopes."""
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(empty, empty.clone(), torch.zeros(0, 0, dtype=torch.uint8))

    @classmethod
    def joined(cls, parts: Sequence["Slopes"]) -> "Slopes":
        """Return the slopes of several sets of images as one."""
        some = [part for part in parts if len(part.image)]
        return cls(*(torch.cat(each) for each in zip(*some, strict=True))) if some else cls.none()

    def of_images(self, index: Tensor) -> "Slopes":
        """Return the slopes of images `index` (A,), with `image` an index into these."""
        match = self.image.to(index)[:, None] == index
        rows = match.any(1)
        return Slopes(
            match.int().argmax(1)[rows] if len(index) else self.image[:0], self.other[rows], self.levels[rows]
        )

    def renamed(self, names: Tensor) -> "Slopes":
        """Return the slopes with image k called `names[k]`."""
        return self._replace(image=names[self.image.to(names)])


class Ledger(NamedTuple):
    """What is known about each of N images at one threat model.

    `broken` (B,) are indices of images with an adversarial image in `adversarial` (B, C, H, W) float64; `intervals`
    (P,) and `lines` (Q,) are indices of images proved by these methods, `slopes` those of some proofs by lines, with
    indices of images. `reason` says why nothing is proved, if the network cannot be read. `passes` counts
    forward+backward passes of single images; those of lines are counted by their multiplications.
    """

    images: int
    broken: Tensor
    adversarial: Images
    intervals: Tensor
    lines: Tensor
    slopes: Slopes
    effort: BoundEffort
    reason: str = ""
    passes: float = 0.0

    @property
    def proved(self) -> int:
        """The number of images that are proved."""
        return len(self.intervals) + len(self.lines)

    @property
    def undecided(self) -> int:
        """The number of images that are neither proved nor broken."""
        return self.images - self.proved - len(self.broken)

    def of_method(self, method: Method) -> Tensor:
        """Return the indices of the images proved by a method."""
        return self.intervals if method == "intervals" else self.lines

    def columns(self, confidence: float) -> dict[str, Any]:
        """Return the columns of a row that come from the ledger; raises UsageError for an illegal confidence."""
        counts = {"proved": self.proved, "broken": len(self.broken), "undecided": self.undecided}
        shares: dict[str, Any] = {name: count / self.images for name, count in counts.items()}
        shares |= {"kept_population": self.population(confidence), "ledger_passes": round(self.passes)}
        return {**shares, "ledger_reason": self.reason}

    def population(self, confidence: float) -> tuple[float, float]:
        """Return limits that contain the network's adversarial accuracy on the population with this confidence.

        Each side is a Clopper-Pearson limit at half the error probability. The images have to be an independent
        sample. Raises UsageError for an illegal confidence.

        Source: Clopper & Pearson 1934, "The Use of Confidence or Fiducial Limits".
        """
        if not 0 < confidence < 1:
            raise UsageError(f"confidence {confidence!r} is not between 0 and 1: write 0.95 for 95 %")
        tail, count, kept = (1 - confidence) / 2, self.images, self.images - len(self.broken)
        low = float(beta.ppf(tail, self.proved, count - self.proved + 1)) if self.proved else 0.0
        high = float(beta.ppf(1 - tail, kept + 1, count - kept)) if kept < count else 1.0
        return low, high
