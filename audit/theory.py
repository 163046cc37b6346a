"""Closed forms of the theory, in plain floats: nats in, fractions out."""

from collections.abc import Sequence
from math import fsum, inf, isclose, isnan, log, log1p

from audit.errors import UsageError


def max_adversarial_accuracy(worst_case_nats: float, num_classes: int) -> float:
    """Return Theorem 3.4's ceiling on the adversarial accuracy of any head, clipped to [1/K, 1].

    With `worst_case_nats` estimated, the result is an *estimated bound*: the theorem needs an upper bound of the
    worst-case MI, and a trained critic gives neither. Raises UsageError for fewer than two classes or a NaN.

    Source: Zhu, Zhang & Evans 2020, Theorem 3.4: 1 - (I + ln 2) / ln K bounds the adversarial risk from below.

    >>> [round(max_adversarial_accuracy(nats, 10), 3) for nats in (0.0, 0.5, 1.0, 1.08, 1.5)]
    [0.301, 0.518, 0.735, 0.77, 0.952]
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

    Raises UsageError as `max_adversarial_accuracy` does.

    Source: Zhu, Zhang & Evans 2020, Theorem 3.4.

    >>> round(min_adversarial_risk(1.0, 10), 3)
    0.265
    """
    return 1.0 - max_adversarial_accuracy(worst_case_nats, num_classes)


def binary_entropy(p: float) -> float:
    """Return the entropy H2(p) of a coin, in nats; raises UsageError for a probability outside [0, 1].

    Source: Shannon 1948, section 6.

    >>> binary_entropy(0.5) == log(2), binary_entropy(0.0), binary_entropy(1.0)
    (True, 0.0, 0.0)
    """
    if not 0 <= p <= 1:
        raise UsageError(f"probability {p!r} must be between 0 and 1")
    return -p * log(p) - (1 - p) * log1p(-p) if 0 < p < 1 else 0.0


def vulnerability_range(adversarial_gap: float) -> tuple[float, float]:
    """Return the least and the largest RV in nats that an adversarial gap allows: Theorem 3.2, corrected.

    RV lies between ln 2 - H2(1/2 - AG/2) and ln 2 - H2(max(1/2 - AG, 0)), for two equally likely classes and a
    representation that is itself the sign, the answer of the classifier. **The paper prints the two bounds
    exchanged**: as printed the lower one exceeds the upper one. Raises UsageError for a gap outside [0, 1].

    Source: Zhu, Zhang & Evans 2020, Theorem 3.2, with its bounds in the right order.

    >>> [round(nats, 4) for nats in vulnerability_range(0.34134)]
    [0.0594, 0.2557]
    >>> vulnerability_range(0.0), vulnerability_range(1.0) == (log(2), log(2))
    ((0.0, 0.0), True)
    """
    if not 0 <= adversarial_gap <= 1:
        raise UsageError(f"adversarial_gap {adversarial_gap!r} must be between 0 and 1")
    return _entropy_deficit(adversarial_gap), _entropy_deficit(min(2 * adversarial_gap, 1.0))


def _entropy_deficit(bias: float) -> float:
    # ln 2 - H2((1 - bias) / 2), without the cancellation that loses a small bias
    upper = (1 + bias) * log1p(bias)
    return (upper + (1 - bias) * log1p(-bias)) / 2 if bias < 1 else log(2)


def binary_divergence(p: float, q: float) -> float:
    """Return the KL divergence d(p || q) of two coins, in nats; infinite where q rules out what p allows.

    Raises UsageError for a probability outside [0, 1].

    Source: Kullback & Leibler 1951, for two outcomes.

    >>> round(binary_divergence(0.8633, 0.1), 3), round(binary_divergence(0.95, 0.1), 2)
    (1.603, 1.99)
    >>> binary_divergence(1.0, 0.5) == log(2)
    True
    """
    if not (0 <= p <= 1 and 0 <= q <= 1):
        raise UsageError(f"probabilities {p!r} and {q!r} must be between 0 and 1")
    return max(0.0, _divergence_term(p, q, p - q) + _divergence_term(1 - p, 1 - q, q - p))


def _divergence_term(p: float, q: float, difference: float) -> float:
    # the difference comes exact from outside: near p = q the two terms cancel to its square
    if p == 0:
        return 0.0
    if q == 0:
        return inf
    return p * (log1p(difference / q) if q / 2 < p < 2 * q else log(p) - log(q))


def max_accuracy(nats: float, largest_share: float) -> float:
    """Return the largest accuracy of any head that sees `nats` of information about labels: exact Fano, any prior.

    `largest_share` is that of the largest class. The result is at least it: a head that sees nothing can name that
    class. Raises UsageError for negative nats, or a share outside (0, 1].

    Source: Fano's inequality in its exact form, d(accuracy || pi_max) <= I(Y; Z).

    >>> [round(max_accuracy(nats, 0.1), 3) for nats in (0.0, 0.5, 1.0, 1.08, 1.5, 2.0)]
    [0.1, 0.495, 0.689, 0.715, 0.837, 0.951]
    >>> [round(max_accuracy(nats, 0.5), 3) for nats in (0.0, 0.1, 0.25, 0.5)]
    [0.5, 0.72, 0.838, 0.952]
    >>> [round(max_accuracy(nats, 0.01), 3) for nats in (0.0, 1.0, 2.0)]
    [0.01, 0.357, 0.581]
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


def max_top_m_accuracy(nats: float, shares: Sequence[float], m: int) -> float:
    """Return the largest top-m accuracy of any head that sees `nats` of information about labels, any prior.

    `shares` (K,) are those of the classes. With m = 1 it is `max_accuracy`; with m = K it is 1. Raises UsageError for
    negative nats, shares that are negative or do not sum to 1, or m outside 1..K.

    Source: Fano's inequality in its exact form for lists, d(accuracy || sum of the m largest pi) <= I(Y; Z).

    >>> [round(max_top_m_accuracy(nats, [0.1] * 10, 1), 3) for nats in (0.0, 0.5, 1.0)]
    [0.1, 0.495, 0.689]
    >>> round(max_top_m_accuracy(0.25, [0.1] * 10, 5), 3)
    0.838
    """
    if not all(share >= 0 for share in shares) or not isclose(fsum(shares), 1, abs_tol=1e-6):
        raise UsageError(f"shares must each be at least 0 and sum to 1; theirs is {fsum(shares)!r}")
    if not 1 <= m <= len(shares):
        raise UsageError(f"m {m!r} must be between 1 and the number of classes, {len(shares)}")
    if m == len(shares):
        return max_accuracy(nats, 1.0)
    return max_accuracy(nats, min(1.0, fsum(sorted(shares)[-m:])))


def information_floor(accuracy: float, largest_share: float) -> float:
    """Return the least I(Y; Z) in nats that a head of this accuracy on Z proves; zero at or below chance.

    `largest_share` is the share of the largest class. Any estimate of I(X; Z) below it is refuted. Raises UsageError
    for shares outside [0, 1], or a largest one of 0.

    Source: Fano's inequality in its exact, any-prior form, d(accuracy || pi_max) <= I(Y; Z).

    >>> round(information_floor(0.8633, 0.1), 3), round(information_floor(0.95, 0.1), 2), information_floor(0.1, 0.1)
    (1.603, 1.99, 0.0)
    """
    if not (0 <= accuracy <= 1 and 0 < largest_share <= 1):
        raise UsageError(f"accuracy {accuracy!r} and largest_share {largest_share!r} must be shares between 0 and 1")
    return binary_divergence(accuracy, largest_share) if accuracy > largest_share else 0.0
