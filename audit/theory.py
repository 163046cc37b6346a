"""Closed forms of the theory, in plain floats: nats in, fractions out."""

from math import isnan, log, log1p

from audit.errors import UsageError


def max_adversarial_accuracy(worst_case_nats: float, num_classes: int) -> float:
    """Return Theorem 3.4's ceiling on the adversarial accuracy of any head, clipped to [1/K, 1].

    With `worst_case_nats` estimated, the result is an *estimated bound*: the theorem needs an upper bound of the
    worst-case MI, and a trained critic gives neither. Raises UsageError for fewer than two classes or a NaN.

    Source: Zhu, Zhang & Evans 2020, Theorem 3.4: 1 - (I + ln 2) / ln K bounds the adversarial risk from below.

    >>> round(max_adversarial_accuracy(1.0, 10), 4)
    0.7353
    >>> max_adversarial_accuracy(-1.0, 10), max_adversarial_accuracy(3.0, 10)
    (0.1, 1.0)
    """
    if num_classes < 2:
        raise UsageError(f"num_classes {num_classes!r} must be at least 2")
    if isnan(worst_case_nats):
        raise UsageError("worst_case_nats is not a number: there is no bound to compute from it")
    return min(1.0, max(1.0 / num_classes, (worst_case_nats + log(2)) / log(num_classes)))


def min_adversarial_risk(worst_case_nats: float, num_classes: int) -> float:
    """Return Theorem 3.4 as printed: the least adversarial risk of any head, clipped to [0, 1 - 1/K].

    >>> round(min_adversarial_risk(1.0, 10), 4)
    0.2647
    """
    return 1.0 - max_adversarial_accuracy(worst_case_nats, num_classes)


def binary_divergence(p: float, q: float) -> float:
    """Return the KL divergence d(p || q) of two coins, in nats.

    >>> round(binary_divergence(0.8633, 0.1), 3)
    1.603
    >>> binary_divergence(1.0, 0.5) == log(2)
    True
    """
    first = p * log(p / q) if p > 0 else 0.0
    second = (1 - p) * (log1p(-p) - log1p(-q)) if p < 1 else 0.0
    return first + second


def max_accuracy(nats: float, largest_share: float) -> float:
    """Return the largest accuracy of any head that sees `nats` of information about labels: exact Fano, any prior.

    `largest_share` is that of the largest class. The result is at least it: a head that sees nothing can name that
    class. Raises UsageError for negative nats, or a share outside (0, 1].

    Source: Fano's inequality in its exact form, d(accuracy || pi_max) <= I(Y; Z).

    >>> [round(max_accuracy(nats, 0.1), 3) for nats in (0.0, 0.5, 1.0, 1.5, 2.0)]
    [0.1, 0.495, 0.689, 0.837, 0.951]
    """
    if not (nats >= 0 and 0 < largest_share <= 1):
        raise UsageError(f"nats {nats!r} must be at least 0 and largest_share {largest_share!r} a share above 0")
    low, high = largest_share, 1.0
    if binary_divergence(high, largest_share) <= nats:
        return 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if binary_divergence(middle, largest_share) <= nats else (low, middle)
    return low


def information_floor(accuracy: float, largest_share: float) -> float:
    """Return the least I(Y; Z) in nats that a head of this accuracy on Z proves; zero at or below chance.

    `largest_share` is the share of the largest class. Any estimate of I(X; Z) below it is refuted. Raises UsageError
    for shares outside [0, 1], or a largest one of 0.

    Source: Fano's inequality in its exact, any-prior form, d(accuracy || pi_max) <= I(Y; Z).

    >>> information_floor(0.95, 0.1) > 1.99 and information_floor(0.1, 0.1) == 0.0
    True
    """
    if not (0 <= accuracy <= 1 and 0 < largest_share <= 1):
        raise UsageError(f"accuracy {accuracy!r} and largest_share {largest_share!r} must be shares between 0 and 1")
    return binary_divergence(accuracy, largest_share) if accuracy > largest_share else 0.0
