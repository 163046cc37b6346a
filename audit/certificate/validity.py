"""Validity checks: whether a layer can be certified, and which collisions hold independently of the search."""

import torch
from torch import Tensor

from audit.adversary.memory.limit import allowed
from audit.adversary.threat import ThreatModel
from audit.certificate.collisions import Collisions
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import PROBE_IMAGES, EqualityCriterion, EqualityTier, features_equal
from audit.errors import InvalidModelError, UsageError
from audit.types import Features, Images, Labels

_BATCH = 128
_FLOAT64_TOLERANCE = 1e-9  # of the largest feature norm: differences between equal float64 computations
_COPY_TOLERANCE = 1e-2  # of the largest feature norm: rounding of float32 against float64


@torch.no_grad()
def valid_rows(
    layer: DualPrecisionLayer,
    clean: Images,
    collisions: Collisions,
    threat: ThreatModel,
    criterion: EqualityCriterion,
) -> Tensor:
    """Return which rows (R,) of collisions hold: the moved image is in its ball and its features equal the target.

    Recomputes the features in float64; for the tier `proved`, runs the proof. `clean` (N, C, H, W) are the images that
    `collisions.members` indexes.
    """
    if len(collisions.members) == 0:
        return torch.zeros(0, dtype=torch.bool, device=clean.device)
    if criterion.tier == "proved":
        from audit.certificate.proof.root import prove_collisions

        return prove_collisions(layer.precise, clean, collisions, threat)
    features = torch.cat([layer.precise(batch) for batch in collisions.moved.split(allowed(_BATCH))])
    equal = features_equal(features, collisions.targets[collisions.at], criterion)
    return equal & (threat.distance(collisions.moved, clean[collisions.members].double()) <= threat.eps)


@torch.no_grad()
def reason_not_applicable(layer: DualPrecisionLayer, clean: Images, labels: Labels, tier: EqualityTier) -> str | None:
    """Return why a layer cannot be certified at a tier on images (N, C, H, W) with labels (N,), or None.

    Raises UsageError where images and labels do not fit or the float64 copy is another network, InvalidModelError
    for features that are not finite.
    """
    if len(clean) != len(labels) or len(clean) == 0:
        raise UsageError(f"{len(clean)} images with {len(labels)} labels: give at least one image, each with one label")
    probe = clean[:PROBE_IMAGES].double()
    features, repeated = layer.precise(probe), layer.precise(probe)
    alone = torch.cat([layer.precise(image) for image in probe.split(1)])
    dimension, pixels = features.shape[1], clean[0].numel()
    if dimension > pixels:
        return (
            f"the layer has {dimension} features but the image only {pixels} pixels: collisions are unlikely to exist"
        )
    tolerance = _FLOAT64_TOLERANCE * float(features.norm(dim=1).max())
    if _largest_distance(features, repeated) > tolerance:
        return "two forward passes of the same images differ: the features are random"
    if _largest_distance(features, alone) > tolerance:
        return "the features of an image depend on the other images of its batch"
    _check_float64_copy(features, layer.working(clean[:PROBE_IMAGES]).double())
    if tier != "proved":
        return None
    from audit.certificate.proof.root import reason_unprovable

    return reason_unprovable(layer.precise, clean)


def _check_float64_copy(precise: Features, working: Features) -> None:
    non_finite = int((~precise.isfinite()).any(1).sum())
    if non_finite:
        raise InvalidModelError(f"the layer's features are not finite for {non_finite} of {len(precise)} images")
    if _largest_distance(precise, working) > _COPY_TOLERANCE * float(precise.norm(dim=1).max()):
        raise UsageError("the features of the float64 copy differ from those of the layer: it is another network")


def _largest_distance(first: Features, second: Features) -> float:
    return float((first - second).norm(dim=1).max())
