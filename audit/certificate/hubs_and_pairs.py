"""Choose which images to collide: many at a common hub, or pairs of different classes.

A weaker search finds fewer collisions and gives a looser bound, but never an invalid one: `validity` checks every
collision from the moved images alone.

Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023), for pairs; hubs are our extension.
"""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from audit.certificate.collision_search import CollisionSearch, HubTarget
from audit.certificate.collisions import Collisions, concatenate
from audit.information.feature_merging import k_means
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Labels

_RIDGE = 1e-3
_ROUND = 48  # pairs tried at once; a round without a collision is the last, for nearer pairs are tried first
_FIRST_ROUND = 16  # without a collision, no more are tried


def inverse_covariance(features: Features) -> Tensor:
    """Return the regularised inverse covariance (D, D) of features (N, D), times the mean variance.

    Distances in this metric do not depend on the scale of single features.
    """
    centred = (features - features.mean(0)).double()
    covariance = centred.T @ centred / len(features)
    ridge = _RIDGE * covariance.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(covariance)).to(covariance)
    return torch.linalg.inv(covariance + ridge * eye) * (covariance.diagonal().mean() + ridge)


def choose_hub(search: CollisionSearch, among: Tensor, seed: int) -> HubTarget:
    """Return a hub for the images with indices `among` (A,): their mean, or the k-means centre nearest after a trial.

    The hub is then replaced by the mean of the features that the trial images reached, which is easier to reach.
    """
    features = search.encoded[among]
    metric = inverse_covariance(features)
    centres = [features.mean(0)]
    if len(among) >= 8:
        centres += list(k_means(features, 3, keyed_generator(seed, Purpose.HUBS, len(among)))[0])
    trial = among[torch.linspace(0, len(among) - 1, min(len(among), 8 + len(among) // 32)).long()]
    steps = max(1, search.effort.sign_steps)
    candidates: list[tuple[float, Features]] = []
    for centre in centres:
        moved = search.approach(trial[:, None], HubTarget(centre, metric), steps)[:, 0]
        reached = search.features(moved, search.layer.precise)
        distance = ((reached - centre) @ metric * (reached - centre)).sum(1)
        # rank by the median, which a few immovable images do not affect; move to the mean, which unlike a median per
        # feature stays on the plane that features may lie on (logits often have a constant sum)
        candidates.append((float(distance.median()), reached.mean(0)))
    return HubTarget(min(candidates, key=lambda candidate: candidate[0])[1], metric)


def find_hubs(search: CollisionSearch, tolerance: float, seed: int) -> tuple[tuple[HubTarget, ...], Collisions]:
    """Return hubs and the collisions at them; each hub is chosen for the images that reached none of the earlier ones.

    An image has reached a hub if its features are within `tolerance`, in feature units.
    """
    hubs: list[HubTarget] = []
    found = [_no_collisions(search)]
    remaining = torch.arange(len(search.clean), device=search.clean.device)
    while len(hubs) < search.effort.hubs and len(remaining) >= 2:
        hub = choose_hub(search, remaining, seed)
        collisions, remaining = _probed(search, hub, remaining, tolerance)
        if len(collisions.members) < 2:
            break
        hubs.append(hub)
        found.append(collisions)
    return tuple(hubs), concatenate(found)


def _probed(search: CollisionSearch, hub: HubTarget, images: Tensor, tolerance: float) -> tuple[Collisions, Tensor]:
    """Return what `_collide_at` does, after a trial of the search's probe if there are more images."""
    probe = search.effort.probe
    if probe == 0 or len(images) <= 2 * probe:
        return _collide_at(search, hub, images, tolerance)
    is_probe = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    is_probe[torch.linspace(0, len(images) - 1, probe).long()] = True
    first, missed = _collide_at(search, hub, images[is_probe], tolerance)
    if len(first.members) == 0:
        return first, images
    second, left = _collide_at(search, hub, images[~is_probe], tolerance)
    members = torch.cat([first.members, second.members])
    order = members.argsort()
    moved = torch.cat([first.moved, second.moved])[order]
    return Collisions(first.targets, members[order], torch.zeros_like(members), moved), torch.cat(
        [missed, left]
    ).sort()[0]


def collide_at_hubs(search: CollisionSearch, hubs: Sequence[HubTarget], tolerance: float) -> Collisions:
    """Return the collisions at given hubs: every image tries the hubs in order until it reaches one."""
    found = [_no_collisions(search)]
    remaining = torch.arange(len(search.clean), device=search.clean.device)
    for hub in hubs:
        if len(remaining) == 0:
            break
        collisions, remaining = _collide_at(search, hub, remaining, tolerance)
        found.append(collisions)
    return concatenate(found)


def _collide_at(search: CollisionSearch, hub: HubTarget, images: Tensor, tolerance: float) -> tuple[Collisions, Tensor]:
    """Return the collisions at a hub and the indices of the images that did not reach it."""
    moved, distance = search.collide(images[:, None], hub, search.effort.sign_steps)
    reached = distance <= tolerance
    members = images[reached]
    targets = hub.target.double()[None]
    return Collisions(targets, members, torch.zeros_like(members), moved[reached, 0]), images[~reached]


def candidate_pairs(features: Features, labels: Labels, among: Tensor, neighbours: int) -> Tensor:
    """Return pairs (E, 2) of images of different classes, nearest first.

    Each image of `among` (A,) is paired with its `neighbours` nearest images of other classes; features (N, D),
    labels (N,).
    """
    if len(among) < 2 or neighbours < 1:
        return among.new_empty(0, 2)
    chosen, classes = features[among].double(), labels[among]
    distance = torch.cdist(chosen, chosen).masked_fill(classes[:, None] == classes, float("inf"))
    nearest = distance.topk(min(neighbours, len(among) - 1), largest=False)
    rows = torch.arange(len(among), device=among.device)[:, None].expand_as(nearest.indices)
    pairs = torch.stack([rows, nearest.indices], 2)[nearest.values.isfinite()]
    pairs = pairs.sort(dim=1).values.unique(dim=0)
    return among[pairs[distance[pairs[:, 0], pairs[:, 1]].argsort(stable=True)]]


def find_pairs(search: CollisionSearch, labels: Labels, among: Tensor, tolerance: float) -> Collisions:
    """Return the collisions of two images of different classes among the images with indices `among` (A,).

    Pairs are tried by the distance of their clean features, all or as many as the budget of passes allows; each image
    of a pair has to come within `tolerance` of their common target, in feature units.
    """
    features = search.encoded
    metric = inverse_covariance(features)
    whitened = (features - features.mean(0)).double() @ torch.linalg.cholesky(metric)
    pairs = candidate_pairs(whitened, labels, among, search.effort.neighbours)
    hub = HubTarget(features.mean(0), metric)  # a pair may collide anywhere: the target only sets the scale
    if search.effort.pair_passes == inf and len(pairs):
        return _collide_pairs(search, pairs, hub, tolerance)
    found, allowed = [_no_collisions(search)], search.log.passes + search.effort.pair_passes * len(search.clean)
    collided = torch.zeros(len(search.clean), dtype=torch.bool, device=among.device)
    while len(pairs) and search.log.passes < allowed:
        chosen = _disjoint(pairs, collided, _ROUND if len(found) > 1 else _FIRST_ROUND)
        joined = _collide_pairs(search, pairs[chosen], hub, tolerance)
        if len(joined.members) == 0:
            break
        collided[joined.members] = True
        found.append(joined)
        pairs = pairs[~chosen]
    return concatenate(found)


def _disjoint(pairs: Tensor, collided: Tensor, count: int) -> Tensor:
    """Return a mask of the next pairs to try: the first `count` without a common image, of new images before others.

    Disjoint pairs lower the bound most. `collided` (N,) marks images of a collision.
    """
    known = collided[pairs].sum(1)
    used, chosen = set[int](), torch.zeros(len(pairs), dtype=torch.bool, device=pairs.device)
    listed = pairs.tolist()
    for row in known.argsort(stable=True).tolist():
        if used.isdisjoint(listed[row]):
            used.update(listed[row])
            chosen[row] = True
        if len(used) >= 2 * count:
            break
    return chosen


def _collide_pairs(search: CollisionSearch, pairs: Tensor, hub: HubTarget, tolerance: float) -> Collisions:
    moved, distance = search.collide(pairs, hub, search.effort.pair_steps)
    collided = distance <= 2 * tolerance
    if not bool(collided.any()):
        return _no_collisions(search)
    ends = search.features(moved[collided].flatten(0, 1), search.layer.precise).unflatten(0, (-1, 2))
    at = torch.arange(len(ends), device=ends.device).repeat_interleave(2)
    return Collisions(ends.mean(1), pairs[collided].flatten(), at, moved[collided].flatten(0, 1))


def _no_collisions(search: CollisionSearch) -> Collisions:
    return Collisions.empty(search.clean, search.encoded.shape[1])
