"""The information of a mixture of Gaussians, one at each feature vector: proven bounds, draws, and its descent.

On n images the smoothed features are a mixture of n Gaussians, whose information about the image is known between
two guaranteed bounds and, by drawing from the mixture, nearly exactly. The (N, N) table of distances is made and
used up a few rows at a time, so memory grows with N, not with its square.

Source: Kolchinsky & Tracey 2017, "Estimating Mixture Entropy with Pairwise Distances", eqs. 10 and 13.
"""

from collections.abc import Iterator
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from audit.types import Features

# Of the (N, N) table so much is held at once that it stays in a processor's cache, but enough rows for a matrix product
# to be fast, and never more than the most.
_CACHED_BYTES, _FAST_ROWS, _MOST_BYTES = 4 * 2**20, 64, 32 * 2**20


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
    halves = _half_squares(features)
    wide, narrow = torch.zeros_like(halves), torch.zeros_like(halves)  # how much weight lies about each row
    for rows in _slices(features):
        # distances are symmetric: those to the rows before are known already
        powers = _exponents(features[rows], features[rows.start :], halves[rows], halves[rows.start :], 4.0)
        weights = powers.exp_()
        weights.diagonal().fill_(1.0)  # of each row to itself, free of rounding
        _add_both_ways(wide, rows, weights)
        _add_both_ways(narrow, rows, weights.square_().square_())  # exp(x / 4) to the fourth: variance one
    ceiling = log(len(features))
    return Pair(ceiling - float(wide.log().mean()), ceiling - float(narrow.log().mean()))


def plug_in_terms(features: Features, generator: torch.Generator, draws: int) -> tuple[Tensor, Tensor]:
    """Return each row's part (N,) in the plug-in pair for features (N, D) under noise of deviation one, in nats.

    The mean of the first is I(J; f_J + N(0, 1)) of the n rows, exact up to the draws; the second leaves each draw's
    own row out, which errs high where the first errs low beside the population.
    """
    features = precise(features)
    halves, count = _half_squares(features), len(features)
    lower, upper = torch.zeros_like(halves), torch.zeros_like(halves)
    for _ in range(draws):
        noise = torch.randn(features.shape, generator=generator).to(features.device)
        for rows in _slices(features):
            here, away = features[rows], noise[rows].to(features)
            powers = torch.addmm(halves, here + away, features.T, beta=-1)
            powers.diagonal(rows.start).fill_(-torch.inf)
            # all other rows' weight in units of the own row's, whose exponent is -|noise|^2 / 2
            others = powers.logsumexp(1) - halves[rows] - torch.linalg.vecdot(here, away)
            lower[rows] -= others.logaddexp(torch.zeros_like(others)) - log(count)
            upper[rows] -= others - log(max(1, count - 1))
    return lower / draws, upper / draws


def mean_shift(features: Features, generator: torch.Generator, draws: int) -> Features:
    """Return the descent direction (N, D) of the smoothed information: from where each row's noisy copies seem to be.

    The gradient of the mixture's entropy at f_i is f_i - E[sum_j w_j f_j], w the posterior of the rows given a noisy
    copy of row i; each draw is used with both signs, which cancels the noise itself.
    """
    away, halves = torch.zeros_like(features), _half_squares(features)
    for _ in range(draws):
        noise = torch.randn(features.shape, generator=generator).to(features)
        for rows in _slices(features):
            # what a row has in common cancels in its posterior
            middle = torch.addmm(halves, features[rows], features.T, beta=-1)
            tilt = noise[rows] @ features.T
            posteriors = (middle + tilt).softmax(1).add_(middle.sub_(tilt).softmax(1))
            away[rows] += torch.addmm(features[rows], posteriors, features, beta=2, alpha=-1)
    return away / (2 * draws)


def precise(features: Features) -> Features:
    """Return features (N, D) in float64: in float32 squares far above the noise drown their distances.

    Values above ln n were met there. Apple's GPUs have no float64.
    """
    return features if features.device.type == "mps" else features.double()


def exponents(rows: Tensor, features: Features, variance: float) -> Tensor:
    """Return -|r_i - f_j|^2 / 2 variance for rows (M, D) and features (N, D): (M, N)."""
    return _exponents(rows, features, _half_squares(rows), _half_squares(features), variance)


def _exponents(rows: Tensor, features: Tensor, own: Tensor, halves: Tensor, variance: float) -> Tensor:
    products = torch.addmm(halves, rows, features.T, beta=-1 / variance, alpha=1 / variance)
    return products.sub_(own[:, None], alpha=1 / variance).clamp_max_(0)


def _half_squares(rows: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows, rows) / 2


def _slices(features: Tensor) -> Iterator[slice]:
    """Yield runs of rows whose part of the (N, N) table is held at once: at least one row."""
    count = len(features)
    row_bytes = features.element_size() * count
    held = max(1, min(max(_CACHED_BYTES // row_bytes, _FAST_ROWS), _MOST_BYTES // row_bytes))
    for start in range(0, count, held):
        yield slice(start, min(count, start + held))


def _add_both_ways(sums: Tensor, rows: slice, weights: Tensor) -> None:
    """Add weights (M, N - start) of pairs to the sums (N,) of the rows and of the columns right of them."""
    sums[rows] += weights.sum(1)
    sums[rows.stop :] += weights[:, rows.stop - rows.start :].sum(0)
