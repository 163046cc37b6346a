"""Searching for images that meet: each moved inside its own ball, their features become the same vector.

Many at once at a hub, or two of different classes anywhere. A weak search finds fewer meetings and costs only
tightness; that what it found does meet is checked elsewhere, from the images alone.

Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023), for pairs; hubs are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from audit.certificate.collision_search import Hub, Search
from audit.information.feature_merging import k_means
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Labels

_RIDGE = 1e-3


class Meetings(NamedTuple):
    """Exhibits: row r says that image `members[r]`, moved to `moved[r]`, has the features `targets[at[r]]`.

    targets (T, D) float64, members (R,) and at (R,) int64, moved (R, C, H, W) float64.
    """

    targets: Tensor
    members: Tensor
    at: Tensor
    moved: Tensor

    def kept(self, rows: Tensor) -> "Meetings":
        """Return the rows that a mask (R,) names; targets that nobody meets at any more go too."""
        used, at = self.at[rows].unique(return_inverse=True)
        return Meetings(self.targets[used], self.members[rows], at, self.moved[rows])


def join(parts: Sequence[Meetings], like: Search) -> Meetings:
    """Return several sets of exhibits as one; none at all gives an empty one for the search's images."""
    device, width = like.clean.device, like.encoded.shape[1]
    targets = [torch.empty(0, width, dtype=torch.float64, device=device)]
    index = [torch.empty(0, dtype=torch.int64, device=device)]
    moved = [torch.empty(0, *like.clean.shape[1:], dtype=torch.float64, device=device)]
    before = 0
    at = list(index)
    for part in parts:
        at.append(part.at + before)
        before += len(part.targets)
    return Meetings(
        torch.cat(targets + [part.targets for part in parts]),
        torch.cat(index + [part.members for part in parts]),
        torch.cat(at),
        torch.cat(moved + [part.moved for part in parts]),
    )


def metric_of(features: Features) -> Tensor:
    """Return the inverse covariance (D, D) of features (N, D): distances in it do not depend on the features' scale."""
    centred = (features - features.mean(0)).double()
    covariance = centred.T @ centred / len(features)
    ridge = _RIDGE * covariance.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(covariance)).to(covariance)
    return torch.linalg.inv(covariance + ridge * eye) * (covariance.diagonal().mean() + ridge)


def choose_hub(search: Search, among: Tensor, seed: int) -> Hub:
    """Return a hub for the images `among` (A,): their mean, or the centre of clusters a trial comes nearer to.

    After the trial the hub moves to the middle of where its images got to, which more of them can reach.
    """
    features = search.encoded[among]
    metric = metric_of(features)
    centres = [features.mean(0)]
    if len(among) >= 8:
        centres += list(k_means(features, 3, keyed_generator(seed, Purpose.HUBS, len(among)))[0])
    few = among[torch.linspace(0, len(among) - 1, min(len(among), 8 + len(among) // 32)).long()]
    steps = max(1, search.effort.sign_steps)
    found: list[tuple[float, Features]] = []
    for centre in centres:
        moved = search.approach(few[:, None], Hub(centre, metric), steps)[:, 0]
        reached = search.features(moved, search.layer.precise)
        left = ((reached - centre) @ metric * (reached - centre)).sum(1)
        # by the typical image: a few that cannot be moved at all must not decide; a mean, unlike a median of each
        # feature, stays on the plane that features may lie on (logits often have one sum)
        found.append((float(left.median()), reached.mean(0)))
    return Hub(min(found, key=lambda trial: trial[0])[1], metric)


def find_hubs(search: Search, near: float, seed: int) -> tuple[tuple[Hub, ...], Meetings]:
    """Return hubs, one after the other, each chosen for the images that reached none before, and who meets there.

    `near` is the distance up to which an image counts as arrived.
    """
    hubs: list[Hub] = []
    found: list[Meetings] = []
    left = torch.arange(len(search.clean), device=search.clean.device)
    while len(hubs) < search.effort.hubs and len(left) >= 2:
        hub = choose_hub(search, left, seed)
        met, left = _bring(search, hub, left, near)
        if len(met.members) < 2:
            break
        hubs.append(hub)
        found.append(met)
    return tuple(hubs), join(found, search)


def meet_at(search: Search, hubs: Sequence[Hub], near: float) -> Meetings:
    """Return who meets at given hubs: every image tries them in order until it arrives at one."""
    found = []
    left = torch.arange(len(search.clean), device=search.clean.device)
    for hub in hubs:
        if len(left) == 0:
            break
        met, left = _bring(search, hub, left, near)
        found.append(met)
    return join(found, search)


def _bring(search: Search, hub: Hub, images: Tensor, near: float) -> tuple[Meetings, Tensor]:
    moved, apart = search.meet(images[:, None], hub, search.effort.sign_steps)
    arrived = apart <= near
    members = images[arrived]
    return Meetings(hub.target.double()[None], members, torch.zeros_like(members), moved[arrived, 0]), images[~arrived]


def candidate_pairs(features: Features, labels: Labels, among: Tensor, neighbours: int) -> Tensor:
    """Return pairs (E, 2) of images `among` (A,) of different classes, each with its nearest few, nearest first."""
    if len(among) < 2 or neighbours < 1:
        return among.new_empty(0, 2)
    chosen, classes = features[among].double(), labels[among]
    distance = torch.cdist(chosen, chosen).masked_fill(classes[:, None] == classes, float("inf"))
    nearest = distance.topk(min(neighbours, len(among) - 1), largest=False)
    rows = torch.arange(len(among), device=among.device)[:, None].expand_as(nearest.indices)
    pairs = torch.stack([rows, nearest.indices], 2)[nearest.values.isfinite()]
    pairs = pairs.sort(dim=1).values.unique(dim=0)
    return among[pairs[distance[pairs[:, 0], pairs[:, 1]].argsort(stable=True)]]


def pair_meetings(search: Search, labels: Labels, among: Tensor, near: float) -> Meetings:
    """Return the meetings of two images of different classes among those given (A,), nearest clean features first."""
    features = search.encoded
    metric = metric_of(features)
    whitened = (features - features.mean(0)).double() @ torch.linalg.cholesky(metric)
    pairs = candidate_pairs(whitened, labels, among, search.effort.neighbours)
    if len(pairs) == 0:
        return join([], search)
    # the target only says how long features are; a pair meets wherever it can
    moved, apart = search.meet(pairs, Hub(features.mean(0), metric), search.effort.pair_steps)
    met = apart <= 2 * near
    ends = search.features(moved[met].flatten(0, 1), search.layer.precise).unflatten(0, (-1, 2))
    at = torch.arange(len(ends), device=ends.device).repeat_interleave(2)
    return Meetings(ends.mean(1), pairs[met].flatten(), at, moved[met].flatten(0, 1))
