"""Nearest-neighbour probe: a differentiable vote of the nearest features, in whitened principal components."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.adversary.passes import deviations
from audit.information.probing.settings import PanelSettings
from audit.types import Features, Labels

RIDGE = 0.05  # standardised deviation below which a principal direction counts for less
_PRIOR_VOTES = 0.5  # weight of the class shares, in votes of a neighbour at distance zero
_CHUNK = 1024  # features whose distances are in memory at once


class NeighbourProbe:
    """Class probabilities by a weighted vote of the nearest features; differentiable in the features asked for.

    Features (N, D) are standardised and projected on principal directions, in which distances d are measured; `panel`
    says on how many, and how many neighbours vote. A neighbour votes for its class with the weight exp(-2 d^2 / m), m
    the mean of d^2 over the neighbours.
    """

    def __init__(self, features: Features, labels: Labels, classes: int, panel: PanelSettings) -> None:
        self.mean, self.deviation = standard_units(features)
        values = (features - self.mean) / self.deviation
        directions, sizes = principal_directions(values, panel.components)
        self.rotation = directions / (sizes + RIDGE)
        self.known, self.votes = values @ self.rotation, F.one_hot(labels, classes).to(features)
        self.prior, self.neighbours = self.votes.mean(0), min(panel.neighbours, len(features) - 1)

    def __call__(self, features: Features, excluded: Tensor | None = None) -> Tensor:
        """Return log-probabilities (N, K) of features (N, D); `excluded` (N,) is one known feature without a vote."""
        parts = []
        for first in range(0, len(features), _CHUNK):
            batch = slice(first, first + _CHUNK)
            parts.append(self._log_probs(features[batch], None if excluded is None else excluded[batch]))
        return torch.cat(parts)

    def _log_probs(self, features: Features, excluded: Tensor | None) -> Tensor:
        points = ((features - self.mean) / self.deviation) @ self.rotation
        with torch.no_grad():
            # exact: by a matrix product, distances of merged features are rounding errors
            distances = torch.cdist(points, self.known, compute_mode="donot_use_mm_for_euclid_dist")
            if excluded is not None:
                distances.scatter_(1, excluded[:, None], torch.inf)
            nearest = distances.topk(self.neighbours, largest=False).indices
        squares = (points[:, None] - self.known[nearest]).square().sum(2)
        weights = (-2 * squares / squares.detach().mean(1, keepdim=True).clamp_min(1e-12)).exp()
        votes = (self.votes[nearest] * weights[:, :, None]).sum(1) + _PRIOR_VOTES * self.prior
        return (votes / votes.sum(1, keepdim=True)).clamp_min(1e-12).log()


def standard_units(features: Features) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) of features (N, D); constant features get an infinite deviation."""
    spread = deviations(features, correction=0)
    # dividing by the deviation of a constant feature would amplify rounding errors
    return features.mean(0), torch.where(spread > 1e-7 * features.abs().amax(0), spread, torch.inf)


def principal_directions(values: Features, most: int) -> tuple[Tensor, Tensor]:
    """Return the first principal directions (D, M) of centred values (N, D), and the deviations along them (M,)."""
    _, sizes, directions = torch.linalg.svd(values, full_matrices=False)
    kept = min(most, len(sizes))
    return directions[:kept].T, sizes[:kept] / sqrt(len(values))
