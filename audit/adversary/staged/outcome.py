"""What an attack finds: the outcome of every image, accuracies, and logits that are checked to be finite."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.passes import Batches, outputs_of
from audit.errors import InvalidModelError
from audit.proportion import Proportion
from audit.types import Images


class AttackOutcome(NamedTuple):
    """Outcome of an attack for each image.

    `correct` and `robust` (N,) mark images classified correctly without and under the attack. `stage` and `step` (N,)
    say where an image was broken, -1 and -1 if it was not. `margin` (N,) is the smallest margin met, evaluated on the
    network itself, and `images` (N, C, H, W) are the images with that margin.
    """

    correct: Tensor
    robust: Tensor
    stage: Tensor
    step: Tensor
    margin: Tensor
    images: Images


class Accuracy(NamedTuple):
    """Clean (`natural`) and adversarial accuracy, with the outcome for each image and the cost of the attack.

    `robust` (N,) marks images still classified correctly. `passes` counts forward+backward passes of single images,
    `forwards` the forward passes without a backward pass. `largest_share` is the share of the most frequent class, and
    `names` are the stages that `outcome.stage` is an index of.
    """

    natural: Proportion
    adversarial: Proportion
    robust: Tensor
    passes: int
    num_classes: int
    largest_share: float
    forwards: int
    outcome: AttackOutcome
    names: tuple[str, ...]


@torch.no_grad()
def logits_of(network: nn.Module, images: Images, batch_size: int) -> Tensor:
    """Return the network's outputs (N, K) on images (N, C, H, W).

    Raises InvalidModelError if an output is not finite: the argmax of a row with a NaN is a class, so that such a
    network would seem to score.
    """
    logits = Batches(batch_size).run(partial(outputs_of, network), images)
    bad = int((~logits.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise InvalidModelError(f"the network's output is not finite for {bad} of {len(images)} images")
    return logits
