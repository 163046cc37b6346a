"""Closed forms of the theory in floating point: information in nats, accuracies and risks as fractions."""

from math import inf, isnan, log, log1p

from audit.errors import UsageError


def adversarial_accuracy_bound(worst_case_nats: float, num_classes: int) -> float:
    """Return the upper bound (I + ln 2) / ln K on any head's adversarial accuracy, clipped to [1/K, 1].

    I is `worst_case_nats`, K is `num_classes`. If I is an estimate, so is the bound: the theorem requires an upper
    bound of the worst-case information, which a trained critic does not give. Raises UsageError for fewer than two
    classes or a NaN.

    Source: Zhu, Zhang & Evans 2020, Theorem 3.4: 1 - (I + ln 2) / ln K bounds the adversarial risk from below.

    >>> [round(adversarial_accuracy_bound(nats, 10), 3) for nats in (0.0, 0.5, 1.0, 1.08, 1.5)]
    [0.301, 0.518, 0.735, 0.77, 0.952]
    >>> adversarial_accuracy_bound(-1.0, 10), adversarial_accuracy_bound(3.0, 10)
    (0.1, 1.0)
    """
    if num_classes < 2:
        raise UsageError(f"num_classes {num_classes!r} must be at least 2")
    if isnan(worst_case_nats):
        raise UsageError("worst_case_nats is nan: it must be a number")
    return min(1.0, max(1.0 / num_classes, (worst_case_nats + log(2)) / log(num_classes)))


def adversarial_risk_bound(worst_case_nats: float, num_classes: int) -> float:
    """Return the lower bound 1 - (I + ln 2) / ln K on any head's adversarial risk, clipped to [0, 1 - 1/K].

    Raises UsageError as `adversarial_accuracy_bound` does.

    Source: Zhu, Zhang & Evans 2020, Theorem 3.4.

    >>> round(adversarial_risk_bound(1.0, 10), 3)
    0.265
    """
    return 1.0 - adversarial_accuracy_bound(worst_case_nats, num_classes)


def binary_entropy(p: float) -> float:
    """Return the binary entropy H2(p) in nats; raises UsageError for a probability outside [0, 1].

    Source: Shannon 1948, section 6.

    >>> binary_entropy(0.5) == log(2), binary_entropy(0.0), binary_entropy(1.0)
    (True, 0.0, 0.0)
    """
    if not 0 <= p <= 1:
        raise UsageError(f"probability {p!r} must be between 0 and 1")
    return -p * log(p) - (1 - p) * log1p(-p) if 0 < p < 1 else 0.0


def vulnerability_range(adversarial_gap: float) -> tuple[float, float]:
    """Return the lower and the upper bound of Theorem 3.2 on RV in nats, given the adversarial gap AG.

    ln 2 - H2(1/2 - AG/2) <= RV <= ln 2 - H2(max(1/2 - AG, 0)), for two equally likely classes and a representation
    that is the predicted class itself. **The paper prints the two bounds in the wrong order.** Raises UsageError for a
    gap outside [0, 1].

    Source: Zhu, Zhang & Evans 2020, Theorem 3.2, bounds exchanged.

    >>> [round(nats, 4) for nats in vulnerability_range(0.34134)]
    [0.0594, 0.2557]
    >>> vulnerability_range(0.0), vulnerability_range(1.0) == (log(2), log(2))
    ((0.0, 0.0), True)
    """
    if not 0 <= adversarial_gap <= 1:
        raise UsageError(f"adversarial_gap {adversarial_gap!r} must be between 0 and 1")
    return _entropy_deficit(adversarial_gap), _entropy_deficit(min(2 * adversarial_gap, 1.0))


def _entropy_deficit(bias: float) -> float:
    # ln 2 - H2((1 - bias) / 2), without cancellation for small biases
    upper = (1 + bias) * log1p(bias)
    return (upper + (1 - bias) * log1p(-bias)) / 2 if bias < 1 else log(2)


def binary_divergence(p: float, q: float) -> float:
    """Return the binary KL divergence d(p || q) = p ln(p / q) + (1 - p) ln((1 - p) / (1 - q)) in nats.

    Infinite if p is not absolutely continuous with respect to q. Raises UsageError for a probability outside [0, 1].

    Source: Kullback & Leibler 1951.

    >>> round(binary_divergence(0.8633, 0.1), 3), round(binary_divergence(0.95, 0.1), 2)
    (1.603, 1.99)
    >>> binary_divergence(1.0, 0.5) == log(2)
    True
    """
    if not (0 <= p <= 1 and 0 <= q <= 1):
        raise UsageError(f"probabilities {p!r} and {q!r} must be between 0 and 1")
    return max(0.0, _divergence_term(p, q, p - q) + _divergence_term(1 - p, 1 - q, q - p))


def _divergence_term(p: float, q: float, difference: float) -> float:
    # the caller passes the exact difference: near p = q the two terms cancel to second order
    if p == 0:
        return 0.0
    if q == 0:
        return inf
    return p * (log1p(difference / q) if q / 2 < p < 2 * q else log(p) - log(q))


def fano_accuracy_bound(nats: float, largest_share: float) -> float:
    """Return the largest accuracy a >= pi_max with d(a || pi_max) <= I, an upper bound for every head.

    I is `nats` of information about the labels, pi_max is `largest_share`, the share of the largest class, which a
    constant prediction achieves. Raises UsageError for negative nats or a share outside (0, 1].

    Source: Fano's inequality in its exact form for any prior, d(accuracy || pi_max) <= I(Y; Z).

    >>> [round(fano_accuracy_bound(nats, 0.1), 3) for nats in (0.0, 0.5, 1.0, 1.08, 1.5, 2.0)]
    [0.1, 0.495, 0.689, 0.715, 0.837, 0.951]
    >>> [round(fano_accuracy_bound(nats, 0.5), 3) for nats in (0.0, 0.1, 0.25, 0.5)]
    [0.5, 0.72, 0.838, 0.952]
    >>> [round(fano_accuracy_bound(nats, 0.01), 3) for nats in (0.0, 1.0, 2.0)]
    [0.01, 0.357, 0.581]
    """
    if not (nats >= 0 and 0 < largest_share <= 1):
        raise UsageError(f"nats {nats!r} must be at least 0 and largest_share {largest_share!r} must be in (0, 1]")
    low, high = largest_share, 1.0
    if binary_divergence(high, largest_share) <= nats:
        return 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if binary_divergence(middle, largest_share) <= nats else (low, middle)
    return low


def information_floor(accuracy: float, largest_share: float) -> float:
    """Return d(accuracy || pi_max), a lower bound on I(Y; Z) in nats given a head's accuracy; 0 at or below chance.

    pi_max is `largest_share`, the share of the largest class. Since I(X; Z) >= I(Y; Z), an estimate of I(X; Z) below
    the bound is wrong. Raises UsageError for an accuracy outside [0, 1] or a share outside (0, 1].

    Source: Fano's inequality in its exact form for any prior, d(accuracy || pi_max) <= I(Y; Z).

    >>> round(information_floor(0.8633, 0.1), 3), round(information_floor(0.95, 0.1), 2), information_floor(0.1, 0.1)
    (1.603, 1.99, 0.0)
    """
    if not (0 <= accuracy <= 1 and 0 < largest_share <= 1):
        raise UsageError(f"accuracy {accuracy!r} must be in [0, 1] and largest_share {largest_share!r} in (0, 1]")
    return binary_divergence(accuracy, largest_share) if accuracy > largest_share else 0.0
