"""Variational bounds on mutual information: from critic scores to nats.

Every bound takes scores (N, N) whose entry [i, j] is T(x_i, z_j): the diagonal holds joint pairs. A bound's value is
a lower bound of the MI only on samples the critic was not trained on.
"""

from collections.abc import Callable
from math import log

import torch
from torch import Tensor

from audit.types import Scores

Bound = Callable[[Scores], Tensor]


def donsker_varadhan(scores: Scores) -> Tensor:
    """Return E_joint[T] - ln E_product[exp T] in nats, product pairs being all off-diagonal ones.

    Source: Donsker & Varadhan 1983; Belghazi et al. 2018 (MINE), eq. 5.
    """
    return scores.diagonal().mean() - _off_diagonal_log_mean_exp(scores)


def infonce(scores: Scores) -> Tensor:
    """Return the InfoNCE value in nats; never above ln N.

    Source: van den Oord et al. 2018; Poole et al. 2019, eq. 12.
    """
    return infonce_terms(scores).mean()


def infonce_terms(scores: Scores) -> Tensor:
    """Return each sample's contribution (N,) to the InfoNCE value, whose spread gives its standard error."""
    return scores.diagonal() - scores.logsumexp(1) + log(len(scores))


BOUNDS: dict[str, Bound] = {"donsker-varadhan": donsker_varadhan, "infonce": infonce}


def _off_diagonal_log_mean_exp(scores: Scores) -> Tensor:
    count = len(scores)
    hidden = scores.masked_fill(torch.eye(count, dtype=torch.bool, device=scores.device), -torch.inf)
    return hidden.flatten().logsumexp(0) - log(count * (count - 1))
