"""Proportions with Wilson score intervals."""

from math import sqrt
from typing import NamedTuple

from audit.errors import UsageError


class Proportion(NamedTuple):
    """A proportion measured on `images` images, with its 95 % Wilson score interval [low, high]."""

    value: float
    low: float
    high: float
    images: int


def wilson(successes: int, count: int, z: float = 1.959964) -> Proportion:
    """Return successes / count with its Wilson score interval; `z` is the normal quantile of the confidence level.

    Raises UsageError unless 0 <= successes <= count and count > 0.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    >>> low, high = wilson(50, 100)[1:3]
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)
    """
    if not 0 <= successes <= count or count == 0:
        raise UsageError(
            f"{successes} of {count} images is not a proportion: legal is 0 to {max(count, 1)} of 1 or more"
        )
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # rounding must not put the proportion outside its interval, nor the interval outside [0, 1]
    return Proportion(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), count)
