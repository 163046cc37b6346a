"""Attacks on a classifier's label: objectives for `pgd.minimise`, smallest where the attack wins."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.types import Images, Judged, Labels, Objective


def margin(logits: Tensor, labels: Labels) -> Tensor:
    """Return the true class's logit less the largest other one, (N,): negative exactly where the label is lost.

    A tie counts as lost: it is not a correct answer either. A NaN margin is above nothing, so lost too.
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return true - others


def cross_entropy_objective(network: nn.Module, labels: Labels) -> Objective:
    """Return the objective that maximises the cross-entropy of the true label."""

    def objective(images: Images, index: Tensor) -> Judged:
        logits, wanted = network(images), labels[index]
        value = -F.cross_entropy(logits, wanted, reduction="none")
        return Judged(value, ~(margin(logits.detach(), wanted) > 0))

    return objective


def margin_objective(network: nn.Module, labels: Labels) -> Objective:
    """Return the objective that minimises the margin; it keeps a gradient where cross-entropy saturates.

    Source: Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", f6 in section 5.1.
    """

    def objective(images: Images, index: Tensor) -> Judged:
        value = margin(network(images), labels[index])
        return Judged(value, ~(value.detach() > 0))

    return objective
