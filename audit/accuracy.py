"""Natural and adversarial accuracy of a classifier, measured, with intervals."""

from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.attacks import cross_entropy_objective, margin, margin_objective
from audit.errors import InvalidModelError, UsageError
from audit.pgd import PGD, minimise
from audit.threat import ThreatModel
from audit.types import Images, Labels, keyed_generator

_PURPOSE = 1  # the key that separates this module's random streams from others'


@dataclass(frozen=True)
class LabelAttack:
    """Which attack measures adversarial accuracy: PGD on the cross-entropy, then on the margin for survivors.

    The second loss breaks what more steps and restarts of the first do not.
    """

    cross_entropy: PGD = field(default_factory=lambda: PGD(steps=10, relative_step=0.25))
    margin: PGD = field(default_factory=lambda: PGD(steps=10, relative_step=0.25, random_start=False))
    version: int = 1

    @property
    def name(self) -> str:
        """Return the attack as tables show it, such as `pgd-ce-10+margin-10`."""
        return f"pgd-ce-{_hardness(self.cross_entropy)}+margin-{_hardness(self.margin)}"


class Proportion(NamedTuple):
    """A measured share with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    images: int


class Accuracy(NamedTuple):
    """What the label attack measured: natural, adversarial, which images stayed right (N,), the passes spent,
    and of what the images are: how many classes, and the share of the largest."""

    natural: Proportion
    adversarial: Proportion
    robust: Tensor
    passes: int
    num_classes: int
    largest_share: float


def wilson(successes: int, count: int, z: float = 1.959964) -> Proportion:
    """Return a share with its Wilson score interval; raises UsageError unless 0 <= successes <= count and count > 0.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    >>> low, high = wilson(50, 100)[1:3]
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)
    """
    if not 0 <= successes <= count or count == 0:
        raise UsageError(f"{successes} of {count} images is not a share: at least one image is needed")
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # rounding must not leave the share outside its own interval, nor the interval outside [0, 1]
    return Proportion(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), count)


@torch.no_grad()
def logits_of(network: nn.Module, images: Images, batch_size: int) -> Tensor:
    """Return the network's outputs for all images, (N, K); raises InvalidModelError where one is not finite.

    The argmax of a row with a NaN is a class, so such a network would seem to score.
    """
    logits = torch.cat([network(batch) for batch in images.split(batch_size)])
    bad = int((~logits.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise InvalidModelError(f"the network's output is not finite for {bad} of {len(images)} images")
    return logits


def measure_accuracy(
    network: nn.Module, images: Images, labels: Labels, threat: ThreatModel, attack: LabelAttack, seed: int
) -> Accuracy:
    """Return natural and adversarial accuracy on the given images.

    An image counts as robust when the network names its class on the clean image and on every image the attack
    met; a "broken" verdict is given by a plain forward pass on a legal image.
    """
    logits = logits_of(network, images, attack.margin.batch_size)
    correct = margin(logits, labels) > 0
    robust, passes = correct.clone(), 0
    for stage, (make, pgd) in enumerate(
        [(cross_entropy_objective, attack.cross_entropy), (margin_objective, attack.margin)]
    ):
        survivors = robust.nonzero().flatten()
        if len(survivors) == 0 or threat.eps == 0:
            break
        generator = keyed_generator(seed, _PURPOSE, stage)
        objective = make(network, labels[survivors])
        found = minimise(objective, images[survivors], threat, pgd, generator)
        verdict = margin(logits_of(network, found.images, pgd.batch_size), labels[survivors]) > 0
        robust[survivors] = verdict
        passes += found.passes
    count = len(images)
    natural, adversarial = (wilson(int(right.sum()), count) for right in (correct, robust))
    share = float(labels.bincount().max()) / count
    return Accuracy(natural, adversarial, robust, passes, logits.shape[1], share)


def _hardness(pgd: PGD) -> str:
    return f"{pgd.steps}x{pgd.restarts}" if pgd.restarts > 1 else str(pgd.steps)
