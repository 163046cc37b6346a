"""Variational bounds on mutual information, in nats, from critic scores.

Scores (N, N) have the entries [i, j] = T(x_i, z_j): joint pairs on the diagonal, product pairs off it. The values are
lower bounds on the mutual information only on samples that the critic was not trained on.
"""

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.types import Scores

Bound = Callable[[Scores], Tensor]


class Pairs(NamedTuple):
    """Scores of joint pairs (N,) and of product pairs (N, K), row i of which shares x_i with joint pair i."""

    joint: Tensor
    product: Tensor


SMILE_CLIP = 5.0
"""Clip of SMILE for the scores of product pairs: the middle of the values that its authors tried."""


def donsker_varadhan(scores: Scores) -> Tensor:
    """Return E_joint[T] - ln E_product[exp T] in nats.

    Source: Donsker & Varadhan 1983; Belghazi et al. 2018 (MINE), eq. 5.
    """
    return scores.diagonal().mean() - _off_diagonal_log_mean_exp(scores)


def nwj(scores: Scores) -> Tensor:
    """Return 1 + E_joint[T] - E_product[exp T] in nats, at most the Donsker-Varadhan value of the same scores.

    It is largest if exp T is the density ratio; a constant offset of T lowers it.

    Source: Nguyen, Wainwright & Jordan 2010; Poole et al. 2019, eq. 4, with the critic reduced by one.
    """
    return 1 + scores.diagonal().mean() - _off_diagonal_log_mean_exp(scores).exp()


def infonce(scores: Scores) -> Tensor:
    """Return (1/N) sum_i [T_ii - ln (1/N) sum_j exp T_ij] in nats, at most ln N.

    Source: van den Oord et al. 2018; Poole et al. 2019, eq. 12.
    """
    return infonce_terms(scores).mean()


def infonce_terms(scores: Scores) -> Tensor:
    """Return the terms (N,) of the InfoNCE value in nats; their deviation over sqrt(N) is its standard error."""
    return scores.diagonal() - scores.logsumexp(1) + log(len(scores))


def smile(scores: Scores) -> Tensor:
    """Return Donsker-Varadhan with product scores clipped to +-`SMILE_CLIP`, in nats, with Jensen-Shannon's gradient.

    The clipped value itself is no objective: it grows without limit if a constant is added to all scores.

    Source: Song & Ermon 2020, eq. 9 and their released code.
    """
    clipped = scores.detach().clamp(-SMILE_CLIP, SMILE_CLIP)
    value = scores.detach().diagonal().mean() - _off_diagonal_log_mean_exp(clipped)
    objective = jensen_shannon(scores)
    return value + (objective - objective.detach())


def jensen_shannon(scores: Scores) -> Tensor:
    """Return 2 ln 2 - E_joint[softplus(-T)] - E_product[softplus(T)] in nats, an objective and no estimate of MI.

    Twice a lower bound on the Jensen-Shannon divergence of joint and product pairs, at most 2 ln 2; largest if exp T is
    the density ratio.

    Source: Nowozin, Cseke & Tomioka 2016; Hjelm et al. 2019, eq. 4.
    """
    count = len(scores)
    product = F.softplus(scores).sum() - F.softplus(scores.diagonal()).sum()
    return _jensen_shannon(scores.diagonal(), product / (count * (count - 1)))


def offsets(scores: Scores) -> Tensor:
    """Return ln (1/M) sum_j exp T_ij of each image (N,), from scores (N, M) against features of other images.

    A critic trained by InfoNCE is a log density ratio up to an arbitrary offset for each image. The Donsker-Varadhan
    value requires that the offsets be subtracted.
    """
    return scores.logsumexp(1) - log(scores.shape[1])


def donsker_varadhan_of(pairs: Pairs) -> Tensor:
    """Return E_joint[T] - ln E_product[exp T] in nats, from pairs; it fixes T up to a constant.

    Source: Donsker & Varadhan 1983.
    """
    return pairs.joint.mean() - _log_mean_exp(pairs.product, pairs.product.numel())


def jensen_shannon_of(pairs: Pairs) -> Tensor:
    """Return 2 ln 2 + E_joint[ln sigmoid T] + E_product[ln(1 - sigmoid T)] in nats, from pairs; it fixes T.

    Source: Nowozin, Cseke & Tomioka 2016, Table 6.
    """
    return _jensen_shannon(pairs.joint, F.softplus(pairs.product).mean())


def energy_of(pairs: Pairs) -> Tensor:
    """Return E_joint[T] - E_x[ln E_y[exp T]] in nats, from pairs; it fixes T up to a function of x.

    If the product pairs of each x hold all K labels, this is ln K minus the softmax cross-entropy.

    Source: Zhu, An & Niu 2020, the energy-based objective.
    """
    return (pairs.joint - offsets(pairs.product)).mean()


BOUNDS: dict[str, Bound] = {
    "donsker-varadhan": donsker_varadhan,
    "infonce": infonce,
    "jensen-shannon": jensen_shannon,
    "nwj": nwj,
    "smile": smile,
}
"""Training objectives by name; the reported value is the InfoNCE bound of the trained critic in every case."""


def _off_diagonal_log_mean_exp(scores: Scores) -> Tensor:
    count = len(scores)
    masked = scores.masked_fill(torch.eye(count, dtype=torch.bool, device=scores.device), -torch.inf)
    return _log_mean_exp(masked, count * (count - 1))


def _log_mean_exp(scores: Tensor, count: int) -> Tensor:
    return scores.flatten().logsumexp(0) - log(count)


def _jensen_shannon(joint: Tensor, product: Tensor) -> Tensor:
    """Return the bound from joint scores (N,) and the mean softplus of product scores ()."""
    return 2 * log(2) - F.softplus(-joint).mean() - product
