"""Variational bounds on mutual information: from critic scores to nats.

Every bound takes scores (N, N) whose entry [i, j] is T(x_i, z_j): the diagonal holds joint pairs. A bound's value is
a lower bound of the MI only on samples the critic was not trained on. Where the text speaks of product pairs, they
are all off-diagonal ones.
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
"""Where SMILE clips the scores of product pairs: the middle of what its authors tried."""


def donsker_varadhan(scores: Scores) -> Tensor:
    """Return E_joint[T] - ln E_product[exp T] in nats.

    Source: Donsker & Varadhan 1983; Belghazi et al. 2018 (MINE), eq. 5.
    """
    return scores.diagonal().mean() - _off_diagonal_log_mean_exp(scores)


def nwj(scores: Scores) -> Tensor:
    """Return 1 + E_joint[T] - E_product[exp T] in nats: never above the Donsker-Varadhan value of the same scores.

    Largest where exp T is the density ratio itself, so an offset of T costs nats.

    Source: Nguyen, Wainwright & Jordan 2010; Poole et al. 2019, eq. 4, with its critic less one.
    """
    return 1 + scores.diagonal().mean() - _off_diagonal_log_mean_exp(scores).exp()


def infonce(scores: Scores) -> Tensor:
    """Return the InfoNCE value in nats; never above ln N.

    Source: van den Oord et al. 2018; Poole et al. 2019, eq. 12.
    """
    return infonce_terms(scores).mean()


def infonce_terms(scores: Scores) -> Tensor:
    """Return each sample's contribution (N,) to the InfoNCE value, whose spread gives its standard error."""
    return scores.diagonal() - scores.logsumexp(1) + log(len(scores))


def smile(scores: Scores) -> Tensor:
    """Return Donsker-Varadhan with product scores clipped to +-`SMILE_CLIP`, in nats, with Jensen-Shannon's gradient.

    Clipped, the value grows without limit when all scores are shifted up, so it cannot be climbed itself.

    Source: Song & Ermon 2020, eq. 9 and their released code.
    """
    clipped = scores.detach().clamp(-SMILE_CLIP, SMILE_CLIP)
    value = scores.detach().diagonal().mean() - _off_diagonal_log_mean_exp(clipped)
    climbed = jensen_shannon(scores)
    return value + (climbed - climbed.detach())


def jensen_shannon(scores: Scores) -> Tensor:
    """Return twice the bound on the Jensen-Shannon divergence of joint and product pairs: an objective, not MI.

    2 ln 2 - E_joint[softplus(-T)] - E_product[softplus(T)]: at most 2 ln 2, largest where exp T is the density ratio.

    Source: Nowozin, Cseke & Tomioka 2016; Hjelm et al. 2019, eq. 4.
    """
    count = len(scores)
    product = F.softplus(scores).sum() - F.softplus(scores.diagonal()).sum()
    return _jensen_shannon(scores.diagonal(), product / (count * (count - 1)))


def offsets(scores: Scores) -> Tensor:
    """Return each image's ln E_product[exp T] (N,) from scores (N, M) against features it is not paired with.

    A critic trained by InfoNCE has an arbitrary offset for each image. Less these it is a log density ratio, and its
    Donsker-Varadhan value on other features means something.
    """
    return scores.logsumexp(1) - log(scores.shape[1])


def donsker_varadhan_of(pairs: Pairs) -> Tensor:
    """Return E_joint[T] - ln E_product[exp T] in nats, from pairs: T is free up to a constant.

    Source: Donsker & Varadhan 1983.
    """
    return pairs.joint.mean() - _log_mean_exp(pairs.product, pairs.product.numel())


def jensen_shannon_of(pairs: Pairs) -> Tensor:
    """Return 2 ln 2 + E_joint[ln sigmoid T] + E_product[ln(1 - sigmoid T)] in nats, from pairs: T has no freedom.

    Source: Nowozin, Cseke & Tomioka 2016, Table 6.
    """
    return _jensen_shannon(pairs.joint, F.softplus(pairs.product).mean())


def energy_of(pairs: Pairs) -> Tensor:
    """Return E_joint[T] - E_x[ln E_y[exp T]] in nats, from pairs: T is free up to a function of x.

    Where the product pairs hold all K labels, this is ln K less the softmax cross-entropy.

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
"""Training objectives by name; the value reported is InfoNCE's, whichever trained the critic."""


def _off_diagonal_log_mean_exp(scores: Scores) -> Tensor:
    count = len(scores)
    hidden = scores.masked_fill(torch.eye(count, dtype=torch.bool, device=scores.device), -torch.inf)
    return _log_mean_exp(hidden, count * (count - 1))


def _log_mean_exp(scores: Tensor, count: int) -> Tensor:
    return scores.flatten().logsumexp(0) - log(count)


def _jensen_shannon(joint: Tensor, product: Tensor) -> Tensor:
    """The bound from joint scores (N,) and the mean softplus of product scores ()."""
    return 2 * log(2) - F.softplus(-joint).mean() - product
