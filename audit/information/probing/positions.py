"""Positions of a worst-case search: perturbed images, their encoding, and what a quick panel reads of the label."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from audit.information.encoding import encode
from audit.information.estimator import Origin
from audit.information.probing.panel import Panel, Reading
from audit.types import Encoded, Encoder, Images, Labels

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
    """Encodes and reads images of one sample; counts the passes."""

    def __init__(self, encoder: Encoder, labels: Labels, panel: Panel, seed: int, batch_size: int) -> None:
        self.encoder, self.labels, self.panel, self.seed = encoder, labels, panel, seed
        self.batch_size, self.passes = batch_size, 0.0

    def at(self, images: Images, origin: Origin) -> Position:
        """Return the position of images, encoded at half a pass each."""
        self.passes += 0.5 * len(images)
        return self.read(images, encode(self.encoder, images, self.batch_size), origin)

    def read(self, images: Images, encoded: Encoded, origin: Origin) -> Position:
        """Return the position of images whose encoding is known."""
        return Position(images, encoded, self.panel.read(encoded, self.labels, self.seed + CHOICE_SEED_OFFSET), origin)

    def quickly(self, encoded: Encoded) -> float:
        """Return what neighbours alone read, in nats."""
        panel = self.panel._replace(members=("neighbours",))
        return panel.read(encoded, self.labels, self.seed + CHOICE_SEED_OFFSET).nats


def mixed(positions: Iterable[Position], generator: torch.Generator) -> tuple[Images, Encoded]:
    """Return images that each stand where a random one of several positions has them, with their encoding."""
    group = list(positions)
    count, device = len(group[0].images), group[0].images.device
    which = torch.randint(len(group), (count,), generator=generator).to(device)

    def chosen(values: list[Tensor]) -> Tensor:
        result = values[0].clone()
        for number, value in enumerate(values[1:], 1):
            result[which == number] = value[which == number]
        return result

    parts = zip(*(position.encoded for position in group), strict=True)
    return chosen([position.images for position in group]), Encoded(*(chosen(list(part)) for part in parts))
