"""Certify a frozen layer: bound the adversarial accuracy of every head on it by collisions of features.

If images of different classes can be moved, each inside its own ball, to one feature vector, every head misclassifies
all of them but those of one class, however it was trained. The maximum number of images that a labelling of the
collisions classifies correctly bounds the adversarial accuracy of any head.

Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023), for pairs of two classes; hubs, the
Gauss-Newton search, more classes and the population bounds are our extension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.certificate.collision_search import CollisionSearch, HubTarget, SearchProgress
from audit.certificate.collisions import Collisions, concatenate, pairs_and_hubs
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import EqualityCriterion, noise_floor
from audit.certificate.hubs_and_pairs import collide_at_hubs, find_hubs, find_pairs
from audit.certificate.packing import collision_bound
from audit.certificate.population import held_out_limit, sample_limit
from audit.certificate.results import Certificate, HeldOutBound, NotApplicable
from audit.certificate.settings import CertificateSettings
from audit.certificate.validity import reason_not_applicable, valid_rows
from audit.errors import UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels

_LARGE_HUB = 0.25  # share of the images: members of smaller hubs are also tried in pairs, which may tighten the bound
_REACHED = 1e-9  # of the features' scale: least tolerance of the search, before the criterion of the tier


@dataclass(frozen=True)
class FrozenHubs:
    """Hubs with the scale and noise floor of their features, and the indices of the images they were chosen on."""

    hubs: tuple[HubTarget, ...]
    scale: float
    noise: float
    chosen_on: frozenset[int]

    def check_disjoint(self, images: Tensor) -> None:
        """Raise UsageError if one of these image indices was used to choose the hubs: the bound would not hold."""
        if seen := self.chosen_on.intersection(images.tolist()):
            raise UsageError(
                f"the hubs were chosen on image {min(seen)} and {len(seen)} of the {len(images)} given images in all: "
                "the held-out bound needs images that were not used to choose the hubs"
            )


def certify(
    layer: DualPrecisionLayer,
    clean: Images,
    labels: Labels,
    threat: ThreatModel,
    settings: CertificateSettings,
    on_progress: SearchProgress = lambda _stage, _collided: None,
) -> Certificate | NotApplicable:
    """Return a certified upper bound on the adversarial accuracy of any head on a layer, or why there is none.

    Searches collisions of clean images (N, C, H, W) in [0, 1] with labels (N,), where image i may move to any legal x'
    in its ball (l-inf, l2 or l1, in pixel units); keeps those that hold at the tier of the settings; and returns

        max over labels y_t of the collision targets t of #{i : y_t = label of i at every target t of image i},

    as a count of images and as a bound on the population. Every collision is validated independently of the search.
    `on_progress` is called with a stage and the number of images that have collided so far.

    Raises InvalidModelError for features that are not finite or give no gradient, UsageError where images and labels
    do not fit or the float64 copy of the layer is another network.

    Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023): for pairs of two classes the
    bound is N minus a maximum matching of the graph of collisions. Hubs and more classes are our extension.
    """
    if reason := _reason_not_applicable(layer, clean, labels, settings):
        return NotApplicable(reason)
    search = CollisionSearch(layer, clean, threat, settings.effort, settings.batch_size, on_progress=on_progress)
    noise = noise_floor(layer.working, clean)
    tolerance = _tolerance(noise, search.scale)
    _, at_hubs = find_hubs(search, tolerance, settings.seed)
    remaining = torch.ones(len(clean), dtype=torch.bool, device=clean.device)
    remaining[at_hubs.members[at_hubs.at.bincount()[at_hubs.at] >= _LARGE_HUB * len(clean)]] = False
    pairs = find_pairs(search, labels, remaining.nonzero().flatten(), tolerance)
    collisions = _valid(search, concatenate([at_hubs, pairs]), EqualityCriterion(settings.tier, noise))
    return _certificate(search, collisions, labels, noise, settings)


def certify_held_out(
    layer: DualPrecisionLayer, clean: Images, labels: Labels, threat: ThreatModel, settings: CertificateSettings
) -> HeldOutBound | NotApplicable:
    """Return a population bound from hubs that are chosen on a random half of the images and tried on the other half.

    Clean images (N, C, H, W) in [0, 1], labels (N,), radius in pixel units. The hubs do not depend on the second half,
    so the Clopper-Pearson limit of its bound holds for the best deterministic head on the distribution of the images.

    Raises what `certify` raises.

    Source: Clopper & Pearson 1934 for the limit; Bhagoji, Cullina & Zhao (AdvML-Frontiers 2023) for collisions on a
    fixed feature extractor; frozen hubs are our extension.
    """
    if reason := _reason_not_applicable(layer, clean, labels, settings):
        return NotApplicable(reason)
    if len(clean) < 2:
        return NotApplicable("a held-out bound needs at least two images, not one")
    generator = keyed_generator(settings.seed, Purpose.CERTIFICATE_SPLIT)
    order = torch.randperm(len(clean), generator=generator).to(clean.device)
    first, second = order[: len(clean) // 2], order[len(clean) // 2 :]
    frozen = freeze_hubs(layer, clean, first, threat, settings)
    return bound_at_frozen_hubs(layer, frozen, (clean, labels, second), threat, settings)


def freeze_hubs(
    layer: DualPrecisionLayer, clean: Images, indices: Tensor, threat: ThreatModel, settings: CertificateSettings
) -> FrozenHubs:
    """Return hubs chosen on the clean images (N, C, H, W) with the given indices (A,) alone."""
    search = CollisionSearch(layer, clean[indices], threat, settings.effort, settings.batch_size)
    noise = noise_floor(layer.working, clean[indices])
    hubs, _ = find_hubs(search, _tolerance(noise, search.scale), settings.seed)
    return FrozenHubs(hubs, search.scale, noise, frozenset(indices.tolist()))


def bound_at_frozen_hubs(
    layer: DualPrecisionLayer,
    frozen: FrozenHubs,
    sample: tuple[Images, Labels, Tensor],
    threat: ThreatModel,
    settings: CertificateSettings,
) -> HeldOutBound:
    """Return the bound from collisions of held-out images at frozen hubs, and its limit on the population.

    `sample` is all clean images (N, C, H, W), all labels (N,) and the indices (B,) of the held-out ones. Raises
    UsageError if one of these was used to choose the hubs.
    """
    clean, labels, indices = sample
    frozen.check_disjoint(indices)
    search = CollisionSearch(layer, clean[indices], threat, settings.effort, settings.batch_size, frozen.scale)
    found = collide_at_hubs(search, frozen.hubs, _tolerance(frozen.noise, frozen.scale))
    collisions = _valid(search, found, EqualityCriterion(settings.tier, frozen.noise))
    bound = collision_bound(collisions, labels[indices], settings.seconds)
    return HeldOutBound(bound, held_out_limit(bound.kept, bound.images, settings.confidence), indices, collisions)


def _reason_not_applicable(
    layer: DualPrecisionLayer, clean: Images, labels: Labels, settings: CertificateSettings
) -> str | None:
    """Return why a layer cannot be certified, or why it is not tried at this cost, or None."""
    if reason := reason_not_applicable(layer, clean, labels, settings.tier):
        return reason
    with torch.no_grad():
        dimension = layer.working(clean[:1]).shape[1]
    passes = (1 + dimension) / 2
    if passes <= settings.jacobian_passes:
        return None
    return (
        f"a single Jacobian of its {dimension:,} features costs {passes:,.0f} passes an image, more than the limit of "
        f"{settings.jacobian_passes:,.0f}, which --pair-passes inf lifts"
    )


def _tolerance(noise: float, scale: float) -> float:
    return max(noise / 2, _REACHED * scale)


def _valid(search: CollisionSearch, collisions: Collisions, criterion: EqualityCriterion) -> Collisions:
    """Return the collisions that hold, and count the passes of the check."""
    search.log.spend(len(collisions.members) / 2)
    return collisions.select(valid_rows(search.layer, search.clean, collisions, search.threat, criterion))


def _certificate(
    search: CollisionSearch, collisions: Collisions, labels: Labels, noise: float, settings: CertificateSettings
) -> Certificate:
    bound = collision_bound(collisions, labels, settings.seconds)
    pairs, hubs = pairs_and_hubs(collisions, labels)
    return Certificate(
        bound=bound,
        population=sample_limit(bound.kept, len(labels), settings.confidence),
        tier=settings.tier,
        noise=noise,
        collisions=collisions,
        at_hubs=tuple(len(hub) for hub in hubs),
        pairs=len(pairs),
        passes=search.log.passes,
        scale=search.scale,
        attempts=tuple(search.log.attempts),
    )
