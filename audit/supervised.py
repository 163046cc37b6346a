"""Training of classifiers: standard, or adversarial against a threat model."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.attacks import cross_entropy_objective, never_done
from audit.pgd import PGD, minimise
from audit.threat import ThreatModel
from audit.types import Images, Labels, keyed_generator


@dataclass(frozen=True)
class ClassifierTraining:
    """How a classifier is trained: Adam with one-cycle learning rate; adversarial where a threat model is given.

    Source: Madry et al. 2018 for the adversarial part: every batch is replaced by PGD's answer to it.
    """

    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    shift: int = 1
    threat: ThreatModel | None = None
    pgd: PGD = field(default_factory=lambda: PGD(steps=7, relative_step=0.3))
    seed: int = 0


def train_classifier(
    network: nn.Module,
    images: Images,
    labels: Labels,
    training: ClassifierTraining,
    progress: Callable[[int, float], None] = lambda _epoch, _loss: None,
) -> None:
    """Train a network in place on images (N, C, H, W) in [0, 1] and leave it in eval mode.

    Augmentation shifts each batch by up to `shift` pixels. `progress` hears the epoch and its mean loss.
    """
    generator = keyed_generator(training.seed, 11)
    optimiser = torch.optim.AdamW(network.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    batches = max(1, len(images) // training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, training.learning_rate, training.epochs * batches)
    for epoch in range(training.epochs):
        order = torch.randperm(len(images), generator=generator).tensor_split(batches)
        total = 0.0
        for chosen in order:
            batch = _shifted(images[chosen], training.shift, generator)
            loss = _loss(network, batch, labels[chosen], training, generator)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        progress(epoch, total / len(images))
    network.eval()


def _loss(
    network: nn.Module, images: Images, labels: Labels, training: ClassifierTraining, generator: torch.Generator
) -> Tensor:
    if training.threat is not None:
        network.eval()  # the attack must not move the batch statistics
        objective = never_done(cross_entropy_objective(network, labels))
        images = minimise(objective, images, training.threat, training.pgd, generator).images
    network.train()
    return F.cross_entropy(network(images), labels)


def _shifted(images: Images, most: int, generator: torch.Generator) -> Images:
    if most == 0:
        return images
    down, right = (int(s) for s in torch.randint(-most, most + 1, (2,), generator=generator))
    padded = F.pad(images, (most, most, most, most))
    height, width = images.shape[-2:]
    return padded[..., most + down : most + down + height, most + right : most + right + width]
