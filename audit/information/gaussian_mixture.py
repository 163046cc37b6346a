"""Information of a Gaussian mixture with one component per feature vector: proven bounds, samples, and its gradient.

Smoothed features of N images are a mixture of N Gaussians. The (N, N) table of distances is computed a few rows at a
time, so that memory grows linearly in N.

Source: Kolchinsky & Tracey 2017, "Estimating Mixture Entropy with Pairwise Distances", eqs. 10 and 13.
"""

from collections.abc import Iterator
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from audit.types import Features

# Part of the (N, N) table held at once: what fits in a processor's cache, but enough rows for an efficient matrix
# product, and never more than the maximum.
_CACHED_BYTES, _FAST_ROWS, _MAX_BYTES = 4 * 2**20, 64, 32 * 2**20


class InformationBounds(NamedTuple):
    """Lower and upper bound on an information, in nats."""

    lower: float
    upper: float


def guaranteed_bounds(features: Features) -> InformationBounds:
    """Return proven bounds on I(J; f_J + N(0, I)) in nats, for a uniformly drawn row J of features (N, D).

    -(1/N) sum_i ln (1/N) sum_j exp(-|f_i - f_j|^2 / 2v) with v = 4 (lower) and v = 1 (upper). They hold for the N
    images, not for the population they are drawn from.

    Source: Kolchinsky & Tracey 2017: pairwise Chernoff (alpha = 1/2) and Kullback-Leibler distances.
    """
    features = in_float64(features)
    halves = _half_squares(features)
    wide, narrow = torch.zeros_like(halves), torch.zeros_like(halves)  # sums of the kernel over all rows
    for rows in _row_blocks(features):
        # distances are symmetric: those to earlier rows have been added already
        powers = _log_kernel(features[rows], features[rows.start :], halves[rows], halves[rows.start :], 4.0)
        weights = powers.exp_()
        weights.diagonal().fill_(1.0)  # exact value of each row with itself
        _add_symmetric(wide, rows, weights)
        _add_symmetric(narrow, rows, weights.square_().square_())  # exp(x / 4) to the fourth: variance one
    ceiling = log(len(features))
    return InformationBounds(ceiling - float(wide.log().mean()), ceiling - float(narrow.log().mean()))


def plug_in_terms(
    features: Features, generator: torch.Generator, draws: int, *, mirrored: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the terms (N,), (N,) of two plug-in estimates for features (N, D) with standard normal noise, in nats.

    The mean of the first estimates I(J; f_J + N(0, I)) of the N rows without bias from `draws` draws per row. The
    second leaves out each draw's own row. For the population the first is biased downwards, the second upwards.
    `mirrored` uses each draw with both signs, so that what is linear in the noise, most of its variance, cancels.
    """
    features = in_float64(features)
    halves, count, signs = _half_squares(features), len(features), (1, -1) if mirrored else (1,)
    lower, upper = torch.zeros_like(halves), torch.zeros_like(halves)
    for _ in range(draws):
        noise = torch.randn(features.shape, generator=generator).to(features.device)
        for rows in _row_blocks(features):
            centres, shifts = features[rows], noise[rows].to(features)
            powers = torch.addmm(halves, centres, features.T, beta=-1).sub_(halves[rows, None])
            powers.diagonal(rows.start).fill_(-torch.inf)
            tilt = shifts @ features.T
            tilt -= torch.linalg.vecdot(centres, shifts)[:, None]
            for sign in signs:
                # log of the other rows' kernel sum relative to the own row's kernel, whose exponent is -|noise|^2 / 2
                others = torch.add(powers, tilt, alpha=sign).logsumexp(1)
                lower[rows] -= others.logaddexp(torch.zeros_like(others)) - log(count)
                upper[rows] -= others - log(max(1, count - 1))
    return lower / (draws * len(signs)), upper / (draws * len(signs))


def mean_shift(features: Features, generator: torch.Generator, draws: int) -> Features:
    """Return N times the gradient (N, D) of the smoothed information with respect to features (N, D).

    f_i - E[sum_j w_j f_j], w being the posterior over rows given f_i plus noise. Each draw is used with both signs, so
    that the noise itself cancels.
    """
    gradient, halves = torch.zeros_like(features), _half_squares(features)
    for _ in range(draws):
        noise = torch.randn(features.shape, generator=generator).to(features)
        for rows in _row_blocks(features):
            # terms that are constant within a row cancel in the posterior
            powers = torch.addmm(halves, features[rows], features.T, beta=-1)
            tilt = noise[rows] @ features.T
            posteriors = (powers + tilt).softmax(1).add_(powers.sub_(tilt).softmax(1))
            gradient[rows] += torch.addmm(features[rows], posteriors, features, beta=2, alpha=-1)
    return gradient / (2 * draws)


def in_float64(features: Features) -> Features:
    """Return features (N, D) in float64, except on Apple's GPUs, which do not support it.

    In float32, distances are lost in the squares of features far larger than the noise, and values can exceed ln N.
    """
    return features if features.device.type == "mps" else features.double()


def log_kernel(rows: Tensor, features: Features, variance: float) -> Tensor:
    """Return -|r_i - f_j|^2 / (2 variance) for rows (M, D) and features (N, D): (M, N)."""
    return _log_kernel(rows, features, _half_squares(rows), _half_squares(features), variance)


def _log_kernel(rows: Tensor, features: Tensor, own: Tensor, halves: Tensor, variance: float) -> Tensor:
    products = torch.addmm(halves, rows, features.T, beta=-1 / variance, alpha=1 / variance)
    return products.sub_(own[:, None], alpha=1 / variance).clamp_max_(0)


def _half_squares(rows: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows, rows) / 2


def _row_blocks(features: Tensor) -> Iterator[slice]:
    """Yield the blocks of rows, of at least one row, whose part of the (N, N) table is held at once."""
    count = len(features)
    row_bytes = features.element_size() * count
    block = max(1, min(max(_CACHED_BYTES // row_bytes, _FAST_ROWS), _MAX_BYTES // row_bytes))
    for start in range(0, count, block):
        yield slice(start, min(count, start + block))


def _add_symmetric(sums: Tensor, rows: slice, weights: Tensor) -> None:
    """Add weights (M, N - start) of a block to the sums (N,) of its rows, and of the columns to the right of it."""
    sums[rows] += weights.sum(1)
    sums[rows.stop :] += weights[:, rows.stop - rows.start :].sum(0)
