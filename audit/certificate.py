"""What no head on a layer can exceed: a bound on adversarial accuracy, with the images that show it.

If images of different classes can each be moved, inside their own balls, to the same feature vector, no head gets
all of them right, however it was trained. The bound counts how many it can keep at most.

Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023), for pairs of two classes; hubs,
Gauss-Newton search, several classes and the population limits are ours.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from audit.collisions import Meetings, find_hubs, join, meet_at, pair_meetings
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.meeting import FeatureMap, Hub, Layer, Search, SearchEffort
from audit.population import frozen_limit, sample_limit
from audit.programme import Bound, kept_at_most
from audit.threat import ThreatModel
from audit.types import Features, Images, Labels, keyed_generator

Tier = Literal["bit-identical at float32", "bit-identical at float16", "bit-identical at bfloat16", "below noise floor"]
"""What "the same feature vector" means; bounds of different tiers are never mixed.

Bit-identical at a precision: features computed in float64 and handed on in that precision are equal, so the bound
holds for every head on the features so rounded, exactly. Below the noise floor: any two that meet are no further
apart than one image from itself when the working network encodes it in batches of other sizes.
"""

_CASTS = {
    "bit-identical at float32": torch.float32,
    "bit-identical at float16": torch.float16,
    "bit-identical at bfloat16": torch.bfloat16,
}
TIERS: tuple[Tier, ...] = (
    "bit-identical at float32", "bit-identical at float16", "bit-identical at bfloat16", "below noise floor",
)  # fmt: skip

_PURPOSE = 8  # the key that separates this module's random streams from others'
_LARGE = 0.25  # share of the images: members of smaller hubs look for partners too, they may still lose them
_FEW = 16  # images that a layer's fitness and noise are judged by
_ARRIVED = 1e-9  # of the features' length: what the search counts as met before the tier has its say


@dataclass(frozen=True)
class CertificateSettings:
    """Which tier to certify at, how hard to search, and the population limit's confidence.

    `seconds` limits branch and bound: stopped early it gives a larger bound, never a wrong one.
    """

    tier: Tier = "bit-identical at float32"
    effort: SearchEffort = field(default_factory=SearchEffort)
    confidence: float = 0.95
    seconds: float = 60.0
    seed: int = 0
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise UnknownNameError("tier", self.tier, TIERS)


class NotApplicable(NamedTuple):
    """Why no certificate can be given for a layer."""

    reason: str


class Certificate(NamedTuple):
    """No head on the layer keeps more than `bound` says of these images; `population` limits it on all of their kind.

    `meetings` are the exhibits, all of one tier; `at_hubs` counts the images at each hub, `pairs` the pairs besides;
    `noise` is the layer's own, in feature units; `passes` counts forward+backward passes of single images.
    """

    bound: Bound
    population: float
    tier: Tier
    noise: float
    meetings: Meetings
    at_hubs: tuple[int, ...]
    pairs: int
    passes: float


class HeldOut(NamedTuple):
    """A population limit from hubs chosen on one half of the images and reached by the other half.

    `bound` is of the `images` (indices) of the second half, from those hubs alone.
    """

    bound: Bound
    population: float
    images: Tensor
    meetings: Meetings


@dataclass(frozen=True)
class FrozenHubs:
    """Hubs, the scale and noise they go with, and the images (indices) they were chosen on."""

    hubs: tuple[Hub, ...]
    scale: float
    noise: float
    chosen_on: frozenset[int]

    def check_fresh(self, images: Tensor) -> None:
        """Raise UsageError where an image had a say in the hubs: a limit from it would not hold."""
        if seen := self.chosen_on.intersection(images.tolist()):
            raise UsageError(
                f"image {min(seen)} helped to choose the hubs: the limit needs images that did not, "
                f"and {len(seen)} of {len(images)} did"
            )


def certify(
    layer: Layer, clean: Images, labels: Labels, threat: ThreatModel, settings: CertificateSettings
) -> Certificate | NotApplicable:
    """Return the certificate for a layer on clean images (N, C, H, W) with labels (N,), or why there is none.

    Every meeting that the search reports is checked again before it counts. Raises InvalidModelError for features
    that are not finite or give no gradient, UsageError where images and labels do not fit.
    """
    if reason := inapplicable(layer, clean, labels, threat):
        return NotApplicable(reason)
    search = Search(layer, clean, threat, settings.effort, settings.batch_size)
    noise = noise_floor(layer.working, clean)
    near = max(noise / 2, _ARRIVED * search.scale)
    _, hubs = find_hubs(search, near, settings.seed)
    left = torch.ones(len(clean), dtype=torch.bool, device=clean.device)
    left[hubs.members[hubs.at.bincount()[hubs.at] >= _LARGE * len(clean)]] = False
    pairs = pair_meetings(search, labels, left.nonzero().flatten(), near)
    meetings = _standing(search, join([hubs, pairs], search), settings.tier, noise)
    bound = bound_of(meetings, labels, settings.seconds)
    edges, stars = edges_and_hubs(meetings, labels)
    limit = sample_limit(bound.kept, len(clean), settings.confidence)
    at_hubs = tuple(len(star) for star in stars)
    return Certificate(bound, limit, settings.tier, noise, meetings, at_hubs, len(edges), search.passes)


def certify_held_out(
    layer: Layer, clean: Images, labels: Labels, threat: ThreatModel, settings: CertificateSettings
) -> HeldOut | NotApplicable:
    """Return the population limit of hubs chosen on a random half of the images and tried on the other half."""
    if reason := inapplicable(layer, clean, labels, threat):
        return NotApplicable(reason)
    if len(clean) < 2:
        return NotApplicable("two halves need at least two images, not one")
    order = torch.randperm(len(clean), generator=keyed_generator(settings.seed, _PURPOSE)).to(clean.device)
    first, second = order[: len(clean) // 2], order[len(clean) // 2 :]
    frozen = freeze_hubs(layer, clean, first, threat, settings)
    return reach_frozen(layer, frozen, (clean, labels, second), threat, settings)


def freeze_hubs(
    layer: Layer, clean: Images, images: Tensor, threat: ThreatModel, settings: CertificateSettings
) -> FrozenHubs:
    """Return hubs chosen on some of the clean images, by their indices (A,), and nothing else."""
    search = Search(layer, clean[images], threat, settings.effort, settings.batch_size)
    noise = noise_floor(layer.working, clean[images])
    hubs, _ = find_hubs(search, max(noise / 2, _ARRIVED * search.scale), settings.seed)
    return FrozenHubs(hubs, search.scale, noise, frozenset(images.tolist()))


def reach_frozen(
    layer: Layer,
    frozen: FrozenHubs,
    subject: tuple[Images, Labels, Tensor],
    threat: ThreatModel,
    settings: CertificateSettings,
) -> HeldOut:
    """Return how many of other images a head can keep that names one class at each frozen hub, and the limit.

    `subject` is all clean images, all labels and the indices (B,) to use; raises UsageError where one of these had a
    say in the hubs.
    """
    clean, labels, images = subject
    frozen.check_fresh(images)
    search = Search(layer, clean[images], threat, settings.effort, settings.batch_size, scale=frozen.scale)
    reached = meet_at(search, frozen.hubs, max(frozen.noise / 2, _ARRIVED * frozen.scale))
    meetings = _standing(search, reached, settings.tier, frozen.noise)
    bound = bound_of(meetings, labels[images], settings.seconds)
    return HeldOut(bound, frozen_limit(bound.kept, bound.images, settings.confidence), images, meetings)


def holds(features: Features, targets: Features, tier: Tier, noise: float) -> Tensor:
    """Return which features (R, D) are the same as their targets (R, D), in a tier's sense: (R,) bool."""
    if tier == "below noise floor":
        # half: two images at one target are then no further apart than the noise
        return (features - targets).norm(dim=1) <= noise / 2
    ours, theirs = features.to(_CASTS[tier]), targets.to(_CASTS[tier])
    return ((ours == theirs) & ours.isfinite()).all(1)


def bound_of(meetings: Meetings, labels: Labels, seconds: float) -> Bound:
    """Return the bound that meetings give for images with labels (N,)."""
    edges, hubs = edges_and_hubs(meetings, labels)
    return kept_at_most(labels.tolist(), edges, hubs, seconds)


def edges_and_hubs(meetings: Meetings, labels: Labels) -> tuple[list[list[int]], list[list[int]]]:
    """Return the meetings as pairs of images of two classes, and as hubs where more than two images meet."""
    at = meetings.at.tolist()
    groups: dict[int, set[int]] = {}
    for target, member in zip(at, meetings.members.tolist(), strict=True):
        groups.setdefault(target, set()).add(member)
    sorted_groups = [sorted(group) for group in groups.values()]
    edges = [group for group in sorted_groups if len(group) == 2 and labels[group[0]] != labels[group[1]]]
    return edges, [group for group in sorted_groups if len(group) > 2]


@torch.no_grad()
def noise_floor(working: FeatureMap, clean: Images) -> float:
    """Return how far one image's features typically move with the size of the batch it is encoded in.

    The median over some images of the largest distance to their features in a batch of one, in feature units.
    """
    few = clean[:_FEW]
    alone = torch.cat([working(image) for image in few.split(1)])
    others = [torch.cat([working(batch) for batch in few.split(size)]) for size in (2, 5, len(few))]
    return float(torch.stack([(other - alone).double().norm(dim=1) for other in others]).amax(0).median())


@torch.no_grad()
def inapplicable(layer: Layer, clean: Images, labels: Labels, threat: ThreatModel) -> str | None:
    """Return why no certificate can be given, or None.

    Raises UsageError where images and labels do not fit or the float64 copy is another network, InvalidModelError
    for features that are not finite.
    """
    if len(clean) != len(labels) or len(clean) == 0:
        raise UsageError(f"{len(clean)} images with {len(labels)} labels: one label for each of at least one is legal")
    if threat.norm != "linf":
        return f"the search keeps every pixel in its own interval, which is an linf ball, not {threat.norm}"
    few = clean[:_FEW].double()
    features, again = layer.precise(few), layer.precise(few)
    alone = torch.cat([layer.precise(image) for image in few.split(1)])
    width, pixels = features.shape[1], clean[0].numel()
    if width > pixels:
        return f"the layer has {width} features and the image {pixels} pixels: images can hardly be made to meet"
    allowed = 1e-9 * float(features.norm(dim=1).max())
    if _furthest(features, again) > allowed:
        return "two forward passes of the same images differ: the features are random"
    if _furthest(features, alone) > allowed:
        return "the features of an image depend on the other images of its batch"
    _check_copy(features, layer.working(clean[:_FEW]).double())
    return None


def _check_copy(precise: Features, working: Features) -> None:
    bad = int((~precise.isfinite()).any(1).sum())
    if bad:
        raise InvalidModelError(f"the layer's features are not finite for {bad} of {len(precise)} images")
    if _furthest(precise, working) > 1e-2 * float(precise.norm(dim=1).max()):
        raise UsageError("the float64 copy of the layer gives other features than the layer: it is another network")


def _furthest(ours: Features, theirs: Features) -> float:
    return float((ours - theirs).norm(dim=1).max())


def _standing(search: Search, meetings: Meetings, tier: Tier, noise: float) -> Meetings:
    """Return the meetings that a plain forward pass on the moved images, and a look at their balls, confirm."""
    features = search.features(meetings.moved, search.layer.precise) if len(meetings.moved) else meetings.targets[:0]
    same = holds(features, meetings.targets[meetings.at], tier, noise)
    inside = search.threat.distance(meetings.moved, search.clean[meetings.members].double()) <= search.threat.eps
    return meetings.kept(same & inside)
