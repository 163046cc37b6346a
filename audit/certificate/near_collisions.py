"""The bound where nearness counts as meeting: what a small change of the features adds to one of the image."""

from collections.abc import Sequence
from typing import NamedTuple

from audit.certificate.certificate import Certificate, edges_and_hubs
from audit.certificate.packing import kept_at_most
from audit.types import Labels

_RELATIVE = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class CurvePoint(NamedTuple):
    """No head survives eps on the image and `delta` / 2 on the feature for more than `bound` of the images.

    `delta` is in feature units, `relative` the same as a share of the features' typical length.
    """

    delta: float
    relative: float
    bound: float


def delta_curve(
    certificate: Certificate, labels: Labels, seconds: float, relative: Sequence[float] = _RELATIVE
) -> tuple[CurvePoint, ...]:
    """Return the bound at growing distances, from what the certificate's search tried, labels (N,).

    Two images that get within delta of each other can both be taken to the middle by delta / 2 more; all images
    within delta / 2 of a hub can be taken to it. At 0 the curve is the certificate's own bound, and it never rises.
    Distances are the search's own: unlike the certificate, the curve leaves no file to check it by.
    """
    edges, hubs = edges_and_hubs(certificate.meetings, labels)
    kept, points = certificate.bound.kept, []
    for share in sorted(relative):
        delta = share * certificate.scale
        pairs, gathered = _within(certificate, delta)
        known = [hub for hub in hubs if not any(set(hub) <= set(other) for other in gathered)]
        every = sorted({tuple(pair) for pair in (*edges, *pairs)})
        bound = kept_at_most(labels.tolist(), every, [*known, *gathered], seconds)
        # more meetings never allow more: a search that was stopped may say so all the same
        kept = min(kept, bound.kept)
        points.append(CurvePoint(delta, share, kept / bound.images))
    return tuple(points)


def _within(certificate: Certificate, delta: float) -> tuple[list[list[int]], list[list[int]]]:
    pairs: list[list[int]] = []
    hubs: list[list[int]] = []
    for groups, apart in certificate.attempts:
        single = groups.shape[1] == 1
        near = groups[apart <= (delta / 2 if single else delta)]
        if single and len(near) > 1:
            hubs.append(near.flatten().tolist())
        elif not single:
            pairs += near.sort(dim=1).values.tolist()
    return pairs, hubs
