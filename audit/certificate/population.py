"""From images at hand to all images of their kind: what no head exceeds on the population, with confidence.

Let Z be the most of n independent images that any one head keeps right. The best head keeps n A of them on average,
so n A <= E Z: no price for the choice of the head. A bound computed from the collisions that a search found is at
least Z, whatever was tried on the same images, so a limit that grows with Z may use it in place of Z.
"""

from math import log, sqrt

from scipy.stats import beta

from audit.errors import UsageError


def mcdiarmid(kept: float, images: int, confidence: float = 0.95) -> float:
    """Return the upper limit of the best head's population accuracy: U + sqrt(ln(1/a) / 2n), U = kept / n.

    One image changes Z by at most one. `kept` may be the bound of deterministic or of randomised heads and limits
    the same heads. Raises UsageError for counts or a confidence that are none.

    Source: McDiarmid 1989, "On the method of bounded differences".

    >>> round(mcdiarmid(50, 500), 4)
    0.1547
    """
    spent = _spent(kept, images, confidence)
    return min(1.0, kept / images + sqrt(spent / (2 * images)))


def self_bounding(kept: float, images: int, confidence: float = 0.95) -> float:
    """Return the upper limit from n A <= Z + L + sqrt(2 Z L + L^2), L = ln(1/a): the better one for Z < n/4.

    Leaving image i out lowers Z by at most what the best head keeps of it, and these sum to Z: Z is self-bounding, so
    P(Z <= E Z - t) <= exp(-t^2 / 2 E Z). Solved for E Z.

    Source: Boucheron, Lugosi & Massart 2000, "A sharp concentration inequality with applications".

    >>> round(self_bounding(50, 500), 4)
    0.1411
    """
    spent = _spent(kept, images, confidence)
    return min(1.0, (kept + spent + sqrt(2 * kept * spent + spent * spent)) / images)


def sample_limit(kept: float, images: int, confidence: float = 0.95) -> float:
    """Return the smaller of `mcdiarmid` and `self_bounding`, at the confidence of either.

    Each fails exactly when Z lies under a threshold that E Z fixes, so their smaller one fails when Z lies under the
    higher of two thresholds: that is one of the two events, and no more likely than it.
    """
    return min(mcdiarmid(kept, images, confidence), self_bounding(kept, images, confidence))


def frozen_limit(kept: int, images: int, confidence: float = 0.95) -> float:
    """Return the upper limit of the best deterministic head's population accuracy from hubs chosen on other images.

    `kept` of `images` is the bound from those hubs alone, without pairs. An image is lost if it can be moved to a hub
    whose answer is not its class: once the hubs are fixed, that is the image's own affair. For the answers that are
    best on the population the number kept is therefore binomial, and `kept` is no less: it is the best of all answers,
    and a search that misses ways to a hub only raises it. So the Clopper-Pearson limit of `kept` holds at the full
    level. There is no division by the number of classes: the limit of the best answer alone has to hold.

    Raises UsageError for counts or a confidence that are none.

    Source: Clopper & Pearson 1934, "The Use of Confidence or Fiducial Limits".

    >>> round(frozen_limit(0, 100), 4)
    0.0295
    """
    _spent(kept, images, confidence)
    return 1.0 if kept == images else float(beta.ppf(confidence, kept + 1, images - kept))


def _spent(kept: float, images: int, confidence: float) -> float:
    """Return L = ln(1/a), a = 1 - confidence."""
    if not 0 < confidence < 1:
        raise UsageError(f"confidence {confidence!r} is not between 0 and 1: write 0.95 for 95 %")
    if images < 1 or not 0 <= kept <= images:
        raise UsageError(f"{kept} kept of {images} images is not a count: legal are 0 to {images} of at least one")
    return -log(1 - confidence)
