"""Confidence limits on the adversarial accuracy of the best head on the population, from a bound on a sample.

Let Z be the maximum number of n independent images that any one head classifies correctly under the adversary, and A
the accuracy of the best head on the population. That head classifies n A of the images correctly on average, so
n A <= E Z, without a correction for choosing the head. A bound from the collisions of a search on the same images is
at least Z; limits that increase with Z may therefore use it in place of Z.
"""

from math import log, sqrt

from scipy.stats import beta

from audit.errors import UsageError


def mcdiarmid_limit(kept: float, images: int, confidence: float = 0.95) -> float:
    """Return the upper limit U + sqrt(ln(1/a) / 2n) on the accuracy of the best head, U = kept / n, a = 1 - confidence.

    Holds because one image changes Z by at most one. `kept` bounds either deterministic or randomised heads, and the
    limit is for the same heads. Raises UsageError for illegal counts or confidences.

    Source: McDiarmid 1989, "On the method of bounded differences".

    >>> round(mcdiarmid_limit(50, 500), 4)
    0.1547
    """
    log_inverse = _log_inverse_level(kept, images, confidence)
    return min(1.0, kept / images + sqrt(log_inverse / (2 * images)))


def self_bounding_limit(kept: float, images: int, confidence: float = 0.95) -> float:
    """Return the upper limit from n A <= Z + L + sqrt(2 Z L + L^2), L = ln(1/a); tighter than McDiarmid for Z < n/4.

    Removing image i lowers Z by at most the share of it that the best head keeps, and these sum to Z: Z is
    self-bounding, so P(Z <= E Z - t) <= exp(-t^2 / 2 E Z). The limit solves this for E Z. Raises UsageError for
    illegal counts or confidences.

    Source: Boucheron, Lugosi & Massart 2000, "A sharp concentration inequality with applications".

    >>> round(self_bounding_limit(50, 500), 4)
    0.1411
    """
    log_inverse = _log_inverse_level(kept, images, confidence)
    return min(1.0, (kept + log_inverse + sqrt(2 * kept * log_inverse + log_inverse * log_inverse)) / images)


def sample_limit(kept: float, images: int, confidence: float = 0.95) -> float:
    """Return the smaller of `mcdiarmid_limit` and `self_bounding_limit`, at the same confidence.

    Each fails exactly if Z is below a threshold determined by E Z. Their minimum fails if Z is below the larger
    threshold, which is one of the two events. Raises UsageError for illegal counts or confidences.
    """
    return min(mcdiarmid_limit(kept, images, confidence), self_bounding_limit(kept, images, confidence))


def held_out_limit(kept: int, images: int, confidence: float = 0.95) -> float:
    """Return the upper limit on the accuracy of the best deterministic head, from hubs chosen on other images.

    `kept` of `images` is the bound from collisions at these hubs alone, without pairs. For fixed hubs and the labels
    at them that are best on the population, each image is lost independently of the others, so the number kept is
    binomial. `kept` is no smaller: it is the maximum over labels, and collisions that the search misses only raise it.
    The Clopper-Pearson limit of `kept` therefore holds at the full confidence, without a correction for the number of
    classes. Raises UsageError for illegal counts or confidences.

    Source: Clopper & Pearson 1934, "The Use of Confidence or Fiducial Limits".

    >>> round(held_out_limit(0, 100), 4)
    0.0295
    """
    _log_inverse_level(kept, images, confidence)
    return 1.0 if kept == images else float(beta.ppf(confidence, kept + 1, images - kept))


def _log_inverse_level(kept: float, images: int, confidence: float) -> float:
    """Return L = ln(1/a), a = 1 - confidence, after checking counts and confidence."""
    if not 0 < confidence < 1:
        raise UsageError(f"confidence {confidence!r} is not between 0 and 1: write 0.95 for 95 %")
    if images < 1 or not 0 <= kept <= images:
        raise UsageError(f"{kept} kept of {images} images is illegal: legal are 0 to {images}, of at least one image")
    return -log(1 - confidence)
