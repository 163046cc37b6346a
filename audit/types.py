"""Tensor names with shapes, and the one seam between searches and what they minimise. Imports nothing of ours."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Images = Tensor
"""(N, C, H, W), float32 in [0, 1]."""

Features = Tensor
"""(N, D), float32."""

Scores = Tensor
"""(N, N), entry [i, j] = T(x_i, z_j): the diagonal holds joint pairs, the rest product pairs."""

Labels = Tensor
"""(N,), int64."""


class Judged(NamedTuple):
    """What an objective says of N images: the value to make small (N,), and which need no more work (N,) bool."""

    value: Tensor
    done: Tensor


class Encoded(NamedTuple):
    """What one forward pass tells a critic: the features (N, D), and the network's log-probabilities (N, K).

    An encoder without a head has K = 0.
    """

    features: Tensor
    answers: Tensor


Encoder = Callable[[Images], Encoded]

Objective = Callable[[Images, Tensor], Judged]
"""Maps images (N, C, H, W) and their indices (N,) in the whole set to a `Judged`."""
