"""Measured heads against a certificate: a weak attack, or a certificate that is wrong."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.label_attack import margin
from audit.adversary.memory.limit import allowed
from audit.certificate.collisions import Collisions
from audit.certificate.results import Certificate
from audit.flags import FlagCode, flag
from audit.types import Images, Labels

_BATCH = 128


class MeasuredHead(NamedTuple):
    """A classifier (layer and head), its adversarial accuracy, the passes of the attack, and the images it found."""

    network: nn.Module
    accuracy: float
    passes: int
    images: Images


@torch.no_grad()
def contradictions(
    certificate: Certificate, heads: Mapping[str, MeasuredHead], sample: tuple[Images, Labels], attack: str
) -> list[str]:
    """Return flags for heads above the bound: under the attack (a weak attack) or on the witnesses (a false bound).

    `sample` is the clean images (N, C, H, W) and labels (N,); `attack` is the name of the attack.
    """
    bound, flags = certificate.bound, list[str]()
    for name, head in heads.items():
        if head.accuracy > bound.certified:
            found = f"{name} has adversarial accuracy {head.accuracy:.3f} under {attack}"
            flags.append(flag(FlagCode.WEAK_ATTACK, f"{found}, above the certified upper bound {bound.certified:.3f}"))
        correct = correct_on_witnesses(head.network, certificate.collisions, sample)
        if correct > bound.kept:
            found = f"{name} classifies {correct} images correctly on all collision witnesses"
            flags.append(flag(FlagCode.CONTRADICTED, f"{found}, above the certified upper bound {bound.kept}"))
    return flags


@torch.no_grad()
def correct_on_witnesses(network: nn.Module, collisions: Collisions, sample: tuple[Images, Labels]) -> int:
    """Return how many of the N images a classifier gets right, both clean and wherever the collisions moved them.

    `sample` is the clean images (N, C, H, W) and labels (N,).
    """
    clean, labels = sample
    correct = _is_correct(network, clean, labels)
    if len(collisions.members):
        moved = collisions.moved.to(clean.dtype)
        correct[collisions.members[~_is_correct(network, moved, labels[collisions.members])]] = False
    return int(correct.sum())


def _is_correct(network: nn.Module, images: Images, labels: Labels) -> Tensor:
    return margin(torch.cat([network(batch) for batch in images.split(allowed(_BATCH))]), labels) > 0
