"""Heads trained on a frozen layer: the best that anybody achieved, beside what no head can exceed.

Source: Zhu, Zhang & Evans 2020, section 5.2, for standard and adversarially trained linear heads on a frozen
representation.
"""

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.attacks import cross_entropy_objective, never_done
from audit.errors import UsageError
from audit.pgd import PGD, minimise
from audit.probes import ProbeTraining, fit_hidden, fit_linear
from audit.threat import ThreatModel
from audit.types import Images, Labels, keyed_generator

HeadName = Literal["slf", "mlp", "alf"]
HEADS: tuple[HeadName, ...] = ("slf", "mlp", "alf")
"""Standard linear, one hidden layer, adversarially trained linear."""

_ORDER, _STARTS = range(91, 93)


@dataclass(frozen=True)
class HeadTraining:
    """How heads are trained: probes on the features, and for `alf` AdamW on images that PGD moved against it."""

    probe: ProbeTraining = field(default_factory=ProbeTraining)
    epochs: int = 10
    batch_size: int = 50
    learning_rate: float = 5e-2
    pgd: PGD = field(default_factory=lambda: PGD(steps=5, relative_step=0.4))
    seed: int = 0


class OnLayer(nn.Module):
    """A head on a frozen layer, as one classifier: images (N, C, H, W) to logits (N, K)."""

    def __init__(self, layer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, images: Images) -> Tensor:
        """Return the logits (N, K) that the head gives the layer's features."""
        logits: Tensor = self.head(self.layer(images))
        return logits


def train_standard(
    layer: nn.Module, images: Images, labels: Labels, classes: int, training: HeadTraining
) -> dict[HeadName, OnLayer]:
    """Return the standard linear head and the one with a hidden layer, on features of images (M, C, H, W) as they are.

    Raises UsageError where there are no images.
    """
    if len(images) == 0:
        raise UsageError("0 images train no head: at least 1 is needed")
    features = _features(layer, images, training.batch_size)
    return {
        "slf": OnLayer(layer, fit_linear(features, labels, classes, training.probe)).eval(),
        "mlp": OnLayer(layer, fit_hidden(features, labels, classes, training.probe)).eval(),
    }


def train_adversarial(
    start: OnLayer, images: Images, labels: Labels, threat: ThreatModel, training: HeadTraining
) -> OnLayer:
    """Return a linear head trained on images that PGD moved against it inside a threat model, from a standard one.

    The layer stays as it is: only the head learns. Source: Madry et al. 2018.
    """
    head = copy.deepcopy(start.head).requires_grad_(True)
    learner = OnLayer(start.layer, head).eval()
    optimiser = torch.optim.AdamW(head.parameters(), training.learning_rate, weight_decay=1e-4)
    order, starts = keyed_generator(training.seed, _ORDER), keyed_generator(training.seed, _STARTS)
    batches = max(1, len(images) // training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, training.learning_rate, training.epochs * batches)
    for _ in range(training.epochs):
        for chosen in torch.randperm(len(images), generator=order).to(images.device).tensor_split(batches):
            hardest = never_done(cross_entropy_objective(learner, labels[chosen]))
            moved = minimise(hardest, images[chosen], threat, training.pgd, starts).images
            with torch.no_grad():
                seen = start.layer(moved)
            optimiser.zero_grad()
            F.cross_entropy(head(seen), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
    head.requires_grad_(False)
    return learner


@torch.no_grad()
def _features(layer: nn.Module, images: Images, batch_size: int) -> Tensor:
    return torch.cat([layer(batch) for batch in images.split(batch_size)])
