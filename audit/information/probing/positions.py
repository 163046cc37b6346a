"""Positions of a worst-case search: perturbed images, their encoding, and what a quick panel reads of the label."""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from audit.information.encoding import encode
from audit.information.estimator import Origin
from audit.information.probing.opponents import FieldDescent
from audit.information.probing.panel import Panel, Reading
from audit.types import Encoded, Encoder, Images, Labels, empty_pixels, image_slices

CHOICE_SEED_OFFSET = 1_000_003  # candidates are compared on folds that no reported value uses


class Position(NamedTuple):
    """Perturbed images (N, C, H, W), their encoding, the reading that positions are compared by, and their origin."""

    images: Images
    encoded: Encoded
    reading: Reading
    origin: Origin

    @property
    def nats(self) -> float:
        """Return the label information read, in nats."""
        return self.reading.nats


class PositionReader:
    """Moves, encodes and reads images of one sample; counts the passes."""

    def __init__(self, encoder: Encoder, labels: Labels, panel: Panel, seed: int, batch_size: int) -> None:
        self.encoder, self.labels, self.panel, self.seed = encoder, labels, panel, seed
        self.batch_size, self.passes = batch_size, 0.0

    def moved(
        self, descent: FieldDescent, start: Images, sizes: Sequence[float], share: Tensor | None = None
    ) -> Images:
        """Return images after steps of these sizes, each of one pass an image."""
        self.passes += len(sizes) * len(start)
        return descent.run(start, sizes, share)

    def at(self, images: Images, origin: Origin) -> Position:
        """Return the position of images, encoded at half a pass each."""
        self.passes += 0.5 * len(images)
        return self.read(images, encode(self.encoder, images, self.batch_size), origin)

    def read(self, images: Images, encoded: Encoded, origin: Origin, enough: float = inf) -> Position:
        """Return the position of images whose encoding is known; a reading of `enough` nats may be too small."""
        reading = self.panel.read(encoded, self.labels, self.seed + CHOICE_SEED_OFFSET, enough)
        return Position(images, encoded, reading, origin)

    def quickly(self, encoded: Encoded) -> float:
        """Return what neighbours alone read, in nats."""
        panel = self.panel._replace(members=("neighbours",))
        return panel.read(encoded, self.labels, self.seed + CHOICE_SEED_OFFSET).nats


def chosen(values: Sequence[Tensor], which: Tensor) -> Tensor:
    """Return a tensor (N, ...) whose row n is that of the tensor number `which[n]`."""
    result = empty_pixels(values[0].shape, values[0])
    for part in image_slices(result):
        rows = values[0][part].clone()
        for number, value in enumerate(values[1:], 1):
            here = which[part] == number
            rows[here] = value[part][here]
        result[part] = rows
    return result


class Mixture(NamedTuple):
    """Images that each stand where the position number `which[n]` of a group has them."""

    group: Sequence[Position]
    which: Tensor

    @classmethod
    def draw(cls, group: Sequence[Position], generator: torch.Generator) -> "Mixture":
        """Return a mixture of equal shares of the positions."""
        count, device = len(group[0].images), group[0].images.device
        return cls(group, torch.randint(len(group), (count,), generator=generator).to(device))

    def encoded(self) -> Encoded:
        """Return the encoding of the images, which needs no pass."""
        parts = zip(*(position.encoded for position in self.group), strict=True)
        return Encoded(*(chosen(part, self.which) for part in parts))

    def images(self) -> Images:
        """Return the images (N, C, H, W)."""
        return chosen([position.images for position in self.group], self.which)
