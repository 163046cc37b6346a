"""What no head on a layer can exceed: a bound on adversarial accuracy, with the images that show it.

If images of different classes can each be moved, inside their own balls, to the same feature vector, no head gets
all of them right, however it was trained. The bound counts how many it can keep at most.

Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023), for pairs of two classes; hubs,
Gauss-Newton search, several classes and the population limits are ours.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.certificate.collision_search import Attempt, Hub, Layer, Search, SearchEffort, Watch
from audit.certificate.collisions import Meetings, find_hubs, join, meet_at, pair_meetings
from audit.certificate.equality import FEW, TIERS, Standard, Tier, noise_floor, standing
from audit.certificate.packing import Bound, kept_at_most
from audit.certificate.population import frozen_limit, sample_limit
from audit.certificate.proof.root import unprovable
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Images, Labels

_LARGE = 0.25  # share of the images: members of smaller hubs look for partners too, they may still lose them
_ARRIVED = 1e-9  # of the features' length: what the search counts as met before the tier has its say

VERSION = 2  # of the search: raised whenever the same settings may find other meetings


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
    batch_size: int = 32  # on a CPU a larger one is slower: its images and Jacobians leave the cache

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise UnknownNameError("tier", self.tier, TIERS)


class NotApplicable(NamedTuple):
    """Why no certificate can be given for a layer."""

    reason: str


class Certificate(NamedTuple):
    """No head on the layer keeps more than `bound` says of these images; `population` limits it on all of their kind.

    `meetings` are the exhibits, all of one tier; `at_hubs` counts the images at each hub, `pairs` the pairs besides;
    `noise` is the layer's own and `scale` its features' length, in feature units; `passes` counts forward+backward
    passes of single images; `attempts` are all the search tried, met or not.
    """

    bound: Bound
    population: float
    tier: Tier
    noise: float
    meetings: Meetings
    at_hubs: tuple[int, ...]
    pairs: int
    passes: float
    scale: float
    attempts: tuple[Attempt, ...]


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
    layer: Layer,
    clean: Images,
    labels: Labels,
    threat: ThreatModel,
    settings: CertificateSettings,
    watch: Watch = lambda _stage, _converged: None,
) -> Certificate | NotApplicable:
    """Return the certificate for a layer on clean images (N, C, H, W) with labels (N,), or why there is none.

    Every meeting that the search reports is checked again before it counts; `watch` hears how many images have met
    something so far. Raises InvalidModelError for features that are not finite or give no gradient, UsageError where
    images and labels do not fit.
    """
    if reason := inapplicable(layer, clean, labels, threat, settings.tier):
        return NotApplicable(reason)
    search = Search(layer, clean, threat, settings.effort, settings.batch_size, watch=watch)
    noise = noise_floor(layer.working, clean)
    near = max(noise / 2, _ARRIVED * search.scale)
    _, hubs = find_hubs(search, near, settings.seed)
    left = torch.ones(len(clean), dtype=torch.bool, device=clean.device)
    left[hubs.members[hubs.at.bincount()[hubs.at] >= _LARGE * len(clean)]] = False
    pairs = pair_meetings(search, labels, left.nonzero().flatten(), near)
    meetings = _standing(search, join([hubs, pairs], search), Standard(settings.tier, noise))
    return assemble(search, meetings, labels, noise, settings)


def assemble(
    search: Search, meetings: Meetings, labels: Labels, noise: float, settings: CertificateSettings
) -> Certificate:
    """Return the certificate that meetings which stand give for a search's images, with labels (N,)."""
    bound = bound_of(meetings, labels, settings.seconds)
    edges, stars = edges_and_hubs(meetings, labels)
    return Certificate(
        bound, sample_limit(bound.kept, len(labels), settings.confidence), settings.tier, noise, meetings,
        tuple(len(star) for star in stars), len(edges), search.passes, search.scale, tuple(search.attempts),
    )  # fmt: skip


def certify_held_out(
    layer: Layer, clean: Images, labels: Labels, threat: ThreatModel, settings: CertificateSettings
) -> HeldOut | NotApplicable:
    """Return the population limit of hubs chosen on a random half of the images and tried on the other half."""
    if reason := inapplicable(layer, clean, labels, threat, settings.tier):
        return NotApplicable(reason)
    if len(clean) < 2:
        return NotApplicable("two halves need at least two images, not one")
    order = torch.randperm(len(clean), generator=keyed_generator(settings.seed, Purpose.CERTIFICATE_SPLIT)).to(
        clean.device
    )
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
    meetings = _standing(search, reached, Standard(settings.tier, frozen.noise))
    bound = bound_of(meetings, labels[images], settings.seconds)
    return HeldOut(bound, frozen_limit(bound.kept, bound.images, settings.confidence), images, meetings)


def bound_of(meetings: Meetings, labels: Labels, seconds: float) -> Bound:
    """Return the bound that meetings give for images with labels (N,)."""
    edges, hubs = edges_and_hubs(meetings, labels)
    return kept_at_most(labels.tolist(), edges, hubs, seconds)


def edges_and_hubs(meetings: Meetings, labels: Labels) -> tuple[list[list[int]], list[list[int]]]:
    """Return the meetings as pairs of images of two classes, and as hubs where more than two images meet."""
    at, classes = meetings.at.tolist(), labels.tolist()  # one wait for a GPU, not two a pair
    groups: dict[int, set[int]] = {}
    for target, member in zip(at, meetings.members.tolist(), strict=True):
        groups.setdefault(target, set()).add(member)
    sorted_groups = [sorted(group) for group in groups.values()]
    edges = [group for group in sorted_groups if len(group) == 2 and classes[group[0]] != classes[group[1]]]
    return edges, [group for group in sorted_groups if len(group) > 2]


@torch.no_grad()
def inapplicable(layer: Layer, clean: Images, labels: Labels, threat: ThreatModel, tier: Tier) -> str | None:
    """Return why no certificate of a tier can be given, or None.

    Raises UsageError where images and labels do not fit or the float64 copy is another network, InvalidModelError
    for features that are not finite.
    """
    if len(clean) != len(labels) or len(clean) == 0:
        raise UsageError(f"{len(clean)} images with {len(labels)} labels: one label for each of at least one is legal")
    if threat.norm != "linf":
        return f"the search keeps every pixel in its own interval, which is an linf ball, not {threat.norm}"
    few = clean[:FEW].double()
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
    _check_copy(features, layer.working(clean[:FEW]).double())
    return unprovable(layer.precise, clean) if tier == "proved" else None


def _check_copy(precise: Features, working: Features) -> None:
    bad = int((~precise.isfinite()).any(1).sum())
    if bad:
        raise InvalidModelError(f"the layer's features are not finite for {bad} of {len(precise)} images")
    if _furthest(precise, working) > 1e-2 * float(precise.norm(dim=1).max()):
        raise UsageError("the float64 copy of the layer gives other features than the layer: it is another network")


def _furthest(ours: Features, theirs: Features) -> float:
    return float((ours - theirs).norm(dim=1).max())


def _standing(search: Search, meetings: Meetings, standard: Standard) -> Meetings:
    """Return the meetings that stand when looked at again, and count the look."""
    search.passes += len(meetings.members) / 2
    return meetings.kept(standing(search.layer, search.clean, meetings, search.threat, standard))
