"""Collisions: images of a data set, moved inside their own balls until their features coincide."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from audit.types import Images, Labels


class Collisions(NamedTuple):
    """Collision witnesses: row r claims g(moved[r]) = targets[at[r]], where moved[r] lies in the ball of an image.

    `targets` (T, D) float64 are feature vectors; `members` (R,) int64 are indices of clean images, `at` (R,) int64
    indices of targets; `moved` (R, C, H, W) float64 are images in [0, 1]. The fields are named like the tensors of a
    witness file.
    """

    targets: Tensor
    members: Tensor
    at: Tensor
    moved: Tensor

    @classmethod
    def empty(cls, clean: Images, dimension: int) -> "Collisions":
        """Return no collisions, for images like `clean` (N, C, H, W) and features of `dimension` coordinates."""
        indices = torch.empty(0, dtype=torch.int64, device=clean.device)
        targets = torch.empty(0, dimension, dtype=torch.float64, device=clean.device)
        moved = torch.empty(0, *clean.shape[1:], dtype=torch.float64, device=clean.device)
        return cls(targets, indices, indices, moved)

    def select(self, rows: Tensor) -> "Collisions":
        """Return the rows of a mask (R,), without the targets that no row uses any more."""
        used, at = self.at[rows].unique(return_inverse=True)
        return Collisions(self.targets[used], self.members[rows], at, self.moved[rows])


def concatenate(parts: Sequence[Collisions]) -> Collisions:
    """Return the rows and targets of one or more sets of collisions as one set."""
    targets, members, at, moved = zip(*parts, strict=True)
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part.targets))
    shifted = [indices + offset for indices, offset in zip(at, offsets, strict=False)]
    return Collisions(torch.cat(targets), torch.cat(members), torch.cat(shifted), torch.cat(moved))


def pairs_and_hubs(collisions: Collisions, labels: Labels) -> tuple[list[list[int]], list[list[int]]]:
    """Return the targets with exactly two images, of different classes, as pairs; those with more images as hubs.

    Pairs and hubs are lists of image indices; labels (N,).
    """
    at, classes = collisions.at.tolist(), labels.tolist()  # one device synchronisation instead of two a pair
    groups: dict[int, set[int]] = {}
    for target, member in zip(at, collisions.members.tolist(), strict=True):
        groups.setdefault(target, set()).add(member)
    sorted_groups = [sorted(group) for group in groups.values()]
    pairs = [group for group in sorted_groups if len(group) == 2 and classes[group[0]] != classes[group[1]]]
    return pairs, [group for group in sorted_groups if len(group) > 2]
