"""Shares of a sample with Wilson score intervals."""

from math import sqrt
from typing import NamedTuple

from audit.errors import UsageError


class Proportion(NamedTuple):
    """A measured share with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    images: int


def wilson(successes: int, count: int, z: float = 1.959964) -> Proportion:
    """Return a share with its Wilson score interval; raises UsageError unless 0 <= successes <= count and count > 0.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    >>> low, high = wilson(50, 100)[1:3]
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)
    """
    if not 0 <= successes <= count or count == 0:
        raise UsageError(f"{successes} of {count} images is not a share: at least one image is needed")
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # rounding must not leave the share outside its own interval, nor the interval outside [0, 1]
    return Proportion(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), count)
