"""Named tensor types with their shapes, and the interfaces of encoders and objectives."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Images = Tensor
"""(N, C, H, W), float32 in [0, 1]."""

Features = Tensor
"""(N, D), float32."""

Scores = Tensor
"""(N, N), entry [i, j] = T(x_i, z_j): joint pairs on the diagonal, product pairs elsewhere."""

Labels = Tensor
"""(N,), int64."""


class ObjectiveValue(NamedTuple):
    """Value of an objective for each of N images: `value` (N,) to minimise, and `done` (N,) bool.

    An image that is done needs no further steps.
    """

    value: Tensor
    done: Tensor


class Encoded(NamedTuple):
    """Output of an encoder: features (N, D), and log-probabilities (N, K) of the network, K = 0 if not available."""

    features: Tensor
    log_probs: Tensor


FeatureMap = Callable[[Images], Features]
"""Maps images (N, C, H, W) to features (N, D)."""

Encoder = Callable[[Images], Encoded]

Objective = Callable[[Images, Tensor], ObjectiveValue]
"""Maps images (N, C, H, W) and their indices (N,) in the data set to an `ObjectiveValue`."""
