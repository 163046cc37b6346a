"""What "the same feature vector" means: tiers of certificates, from a proof down to the encoder's own jitter."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.certificate.collision_search import FeatureMap, Layer
from audit.certificate.collisions import Meetings
from audit.certificate.proof.root import proved
from audit.errors import UsageError
from audit.types import Features, Images

Tier = Literal[
    "proved", "bit-identical at float32", "bit-identical at float16", "bit-identical at bfloat16", "below noise floor"
]
"""What "the same feature vector" means; bounds of different tiers are never mixed.

Proved: near every witness, inside its ball, lies an image whose features are the target exactly, in real arithmetic,
as `audit.certificate.proof.root` says. Bit-identical at a precision: features computed in float64 and handed on in that precision are
equal, so the bound holds for every head on the features so rounded, exactly. Below the noise floor: any two that meet
are no further apart than one image from itself when the working network encodes it in batches of other sizes.
"""

_CASTS = {
    "bit-identical at float32": torch.float32,
    "bit-identical at float16": torch.float16,
    "bit-identical at bfloat16": torch.bfloat16,
}
TIERS: tuple[Tier, ...] = (
    "proved", "bit-identical at float32", "bit-identical at float16", "bit-identical at bfloat16", "below noise floor",
)  # fmt: skip

FEW = 16  # images that a layer's fitness and noise are judged by
_BATCH = 128


class Standard(NamedTuple):
    """A tier, and the layer's own noise in feature units, which one of the tiers compares with."""

    tier: Tier
    noise: float


def holds(features: Features, targets: Features, tier: Tier, noise: float) -> Tensor:
    """Return which features (R, D) are the same as their targets (R, D), in a tier's sense: (R,) bool.

    Raises UsageError for the tier that no look at features can decide.
    """
    if tier == "proved":
        raise UsageError(f"features alone cannot show the tier {tier!r}: it needs the network")
    if tier == "below noise floor":
        # half: two images at one target are then no further apart than the noise
        return (features - targets).norm(dim=1) <= noise / 2
    ours, theirs = features.to(_CASTS[tier]), targets.to(_CASTS[tier])
    return ((ours == theirs) & ours.isfinite()).all(1)


@torch.no_grad()
def standing(layer: Layer, clean: Images, meetings: Meetings, threat: ThreatModel, standard: Standard) -> Tensor:
    """Return which rows (R,) of meetings stand: a plain forward pass on the moved images and a look at their balls.

    For the tier `proved` it is the proof that has to succeed.
    `clean` (N, C, H, W) are the images that `meetings.members` counts.
    """
    if len(meetings.members) == 0:
        return torch.zeros(0, dtype=torch.bool, device=clean.device)
    if standard.tier == "proved":
        return proved(layer.precise, clean, meetings, threat)
    features = torch.cat([layer.precise(batch) for batch in meetings.moved.split(_BATCH)])
    same = holds(features, meetings.targets[meetings.at], *standard)
    return same & (threat.distance(meetings.moved, clean[meetings.members].double()) <= threat.eps)


@torch.no_grad()
def noise_floor(working: FeatureMap, clean: Images) -> float:
    """Return how far one image's features typically move with the size of the batch it is encoded in.

    The median over some images of the largest distance to their features in a batch of one, in feature units.
    """
    few = clean[:FEW]
    alone = torch.cat([working(image) for image in few.split(1)])
    others = [torch.cat([working(batch) for batch in few.split(size)]) for size in (2, 5, len(few))]
    return float(torch.stack([(other - alone).double().norm(dim=1) for other in others]).amax(0).median())
