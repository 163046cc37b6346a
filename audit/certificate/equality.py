"""Tiers of feature equality: what "the same feature vector" means, from an exact proof to the noise of the encoder."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from audit.errors import UnknownNameError, UsageError
from audit.types import FeatureMap, Features, Images

EqualityTier = Literal[
    "proved", "bit-identical at float32", "bit-identical at float16", "bit-identical at bfloat16", "below noise floor"
]
"""The sense in which features of a collision are equal; bounds of different tiers are never combined.

Proved: near every witness, inside its ball, lies an image whose features equal the target in real arithmetic (see
`audit.certificate.proof.root`). Bit-identical at a precision: features computed in float64 and rounded to that
precision are equal, so the bound holds exactly for every head on the rounded features. Below noise floor: two colliding
images are no further apart than one image from itself when it is encoded in batches of different sizes.
"""

_DTYPES = {
    "bit-identical at float32": torch.float32,
    "bit-identical at float16": torch.float16,
    "bit-identical at bfloat16": torch.bfloat16,
}
PROBE_IMAGES = 16  # images on which a layer's determinism and noise are measured
EQUALITY_TIERS: tuple[EqualityTier, ...] = (
    "proved",
    "bit-identical at float32",
    "bit-identical at float16",
    "bit-identical at bfloat16",
    "below noise floor",
)


def find_tier(name: str) -> EqualityTier:
    """Return the tier with a name; raises UnknownNameError."""
    for tier in EQUALITY_TIERS:
        if tier == name:
            return tier
    raise UnknownNameError("tier", name, EQUALITY_TIERS)


class EqualityCriterion(NamedTuple):
    """A tier, and the layer's noise floor in feature units, which only the tier `below noise floor` uses."""

    tier: EqualityTier
    noise: float


def features_equal(features: Features, targets: Features, criterion: EqualityCriterion) -> Tensor:
    """Return which features (R, D) equal their targets (R, D), as a mask (R,).

    Raises UsageError for the tier `proved`, which needs the network besides the features.
    """
    if criterion.tier == "proved":
        raise UsageError("features alone cannot establish the tier 'proved': it needs the network")
    if criterion.tier == "below noise floor":
        # half the noise: two images at one target are then no further apart than the noise
        return (features - targets).norm(dim=1) <= criterion.noise / 2
    dtype = _DTYPES[criterion.tier]
    rounded, rounded_targets = features.to(dtype), targets.to(dtype)
    return ((rounded == rounded_targets) & rounded.isfinite()).all(1)


@torch.no_grad()
def noise_floor(working: FeatureMap, clean: Images) -> float:
    """Return the distance, in feature units, by which the batch size changes the features of one image.

    Median over the first images of `clean` (N, C, H, W) of the largest distance to their features in a batch of one.
    """
    probe = clean[:PROBE_IMAGES]
    alone = torch.cat([working(image) for image in probe.split(1)])
    batched = [torch.cat([working(batch) for batch in probe.split(size)]) for size in (2, 5, len(probe))]
    return float(torch.stack([(other - alone).double().norm(dim=1) for other in batched]).amax(0).median())
