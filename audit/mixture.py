"""The information of a mixture of Gaussians, one at each feature vector: proven bounds, draws, and its descent.

On n images the smoothed features are a mixture of n Gaussians, whose information about the image is known between
two guaranteed bounds and, by drawing from the mixture, nearly exactly.

Source: Kolchinsky & Tracey 2017, "Estimating Mixture Entropy with Pairwise Distances", eqs. 10 and 13.
"""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from audit.types import Features

_ROWS = 1024  # how many rows of the (N, N) table are held at once


class Pair(NamedTuple):
    """Two values in nats between which the information lies."""

    lower: float
    upper: float


def guaranteed_pair(features: Features) -> Pair:
    """Return proven bounds on I(J; f_J + N(0, 1)) for a uniformly drawn row J of features (N, D), in nats.

    The information of the n images, at most ln n; not of the population they come from.

    Source: Kolchinsky & Tracey 2017: pairwise Chernoff (alpha 1/2) and Kullback-Leibler distances.
    """
    features = precise(features)
    upper = torch.cat([-_log_mean_exp(rows, features, 1.0) for rows in features.split(_ROWS)])
    lower = torch.cat([-_log_mean_exp(rows, features, 4.0) for rows in features.split(_ROWS)])
    return Pair(float(lower.mean()), float(upper.mean()))


def plug_in_terms(features: Features, generator: torch.Generator, draws: int) -> tuple[Tensor, Tensor]:
    """Return each row's part (N,) in the plug-in pair for features (N, D) under noise of deviation one, in nats.

    The mean of the first is I(J; f_J + N(0, 1)) of the n rows, exact up to the draws; the second leaves each draw's
    own row out, which errs high where the first errs low beside the population.
    """
    features = precise(features)
    lower, upper = features.new_zeros(len(features)), features.new_zeros(len(features))
    everything = torch.arange(len(features), device=features.device)
    for _ in range(draws):
        noise = torch.randn(features.shape, generator=generator).to(features)
        for chosen in everything.split(_ROWS):
            powers = exponents(features[chosen] + noise[chosen], features, 1.0)
            entropy = noise[chosen].square().sum(1) / 2
            lower[chosen] -= powers.logsumexp(1) - log(len(features)) + entropy
            powers.scatter_(1, chosen[:, None], -torch.inf)
            upper[chosen] -= powers.logsumexp(1) - log(max(1, len(features) - 1)) + entropy
    return lower / draws, upper / draws


def mean_shift(features: Features, generator: torch.Generator, draws: int) -> Features:
    """Return the descent direction (N, D) of the smoothed information: from where each row's noisy copies seem to be.

    The gradient of the mixture's entropy at f_i is f_i - E[sum_j w_j f_j], w the posterior of the rows given a noisy
    copy of row i; each draw is used with both signs, which cancels the noise itself.
    """
    away = torch.zeros_like(features)
    everything = torch.arange(len(features), device=features.device)
    for _ in range(draws):
        noise = torch.randn(features.shape, generator=generator).to(features)
        for sign in (1, -1):
            for chosen in everything.split(_ROWS):
                posterior = exponents(features[chosen] + sign * noise[chosen], features, 1.0).softmax(1)
                away[chosen] += features[chosen] - posterior @ features
    return away / (2 * draws)


def precise(features: Features) -> Features:
    """Return features (N, D) in float64: in float32 squares far above the noise drown their distances.

    Values above ln n were met there. Apple's GPUs have no float64.
    """
    return features if features.device.type == "mps" else features.double()


def _log_mean_exp(rows: Tensor, features: Features, variance: float) -> Tensor:
    return exponents(rows, features, variance).logsumexp(1) - log(len(features))


def exponents(rows: Tensor, features: Features, variance: float) -> Tensor:
    """Return -|r_i - f_j|^2 / 2 variance for rows (M, D) and features (N, D): (M, N)."""
    squares = rows.square().sum(1, keepdim=True) + features.square().sum(1) - 2 * rows @ features.T
    return squares.clamp_min_(0).div_(-2 * variance)
