"""The certified bound as a function of feature distance: near collisions count when the features move a little too."""

from collections.abc import Sequence

from audit.certificate.collisions import pairs_and_hubs
from audit.certificate.packing import packing_bound
from audit.certificate.results import Certificate, CurvePoint
from audit.types import Labels

_RELATIVE_DELTAS = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def delta_curve(
    certificate: Certificate, labels: Labels, seconds: float, relative: Sequence[float] = _RELATIVE_DELTAS
) -> tuple[CurvePoint, ...]:
    """Return the bound for perturbations of eps on the image and delta / 2 on the features, for increasing delta.

    Labels (N,); `relative` are the deltas as fractions of the features' scale; `seconds` limits each optimisation.
    Two images whose features come within delta collide if both feature vectors may move by delta / 2; so do all images
    within delta / 2 of a hub. The curve starts at the certified bound and never increases. It rests on distances that
    the search measured: no witness file backs it.
    """
    pairs, hubs = pairs_and_hubs(certificate.collisions, labels)
    kept, points = certificate.bound.kept, []
    for fraction in sorted(relative):
        delta = fraction * certificate.scale
        near_pairs, near_hubs = _within(certificate, delta)
        other_hubs = [hub for hub in hubs if not any(set(hub) <= set(other) for other in near_hubs)]
        all_pairs = sorted({tuple(pair) for pair in (*pairs, *near_pairs)})
        bound = packing_bound(labels.tolist(), all_pairs, [*other_hubs, *near_hubs], seconds)
        # more collisions never raise the optimum, but a stopped branch and bound may return more
        kept = min(kept, bound.kept)
        points.append(CurvePoint(delta, fraction, kept / bound.images))
    return tuple(points)


def _within(certificate: Certificate, delta: float) -> tuple[list[list[int]], list[list[int]]]:
    """Return the pairs within delta of each other, and for each hub the images within delta / 2."""
    pairs: list[list[int]] = []
    hubs: list[list[int]] = []
    for groups, distance in certificate.attempts:
        at_hub = groups.shape[1] == 1
        near = groups[distance <= (delta / 2 if at_hub else delta)]
        if at_hub and len(near) > 1:
            hubs.append(near.flatten().tolist())
        elif not at_hub:
            pairs += near.sort(dim=1).values.tolist()
    return pairs, hubs
