"""Which images are within reach of an attack, by the margins that it met so far.

The margin falls fast in the first steps along the gradient and slowly afterwards: on five networks, hundreds of passes
more took away at most half of what the first twenty had taken. That holds where gradients lead somewhere. So an
image is given up only if gradients took at least three times as much as random vertices of the ball; masked gradients,
and images of very few pixels, take no more than these.
"""

import torch
from torch import Tensor

_ADVANTAGE = 3.0


class Reach:
    """Margins (N,) of the clean images and the smallest ones at random vertices of the ball."""

    def __init__(self, clean: Tensor) -> None:
        self._clean, self._at_random = clean, clean.clone()
        self._compared = False

    def compare(self, index: Tensor, margins: Tensor) -> None:
        """Take margins (A,) of images of indices (A,) at random vertices of the ball into account."""
        self._at_random[index] = torch.minimum(self._at_random[index], margins)
        self._compared = True

    def within(self, margins: Tensor, limit: float) -> Tensor:
        """Return which images (N,) have a margin of at most `limit` times what they lost, or too little to tell.

        `margins` (N,) are the smallest ones met. Without a comparison with random vertices every image is within.
        """
        lost, by_chance = self._clean - margins, self._clean - self._at_random
        led = (lost > _ADVANTAGE * by_chance) & self._compared
        return ~led | (margins <= limit * lost)
