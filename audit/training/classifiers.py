"""Train classifiers, standard or adversarially."""

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.label_attack import cross_entropy_objective
from audit.adversary.pgd import PGD, minimise, without_early_stopping
from audit.adversary.threat import ThreatModel
from audit.errors import UnknownNameError, UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.training.augmentation import draw_shifts
from audit.training.checkpoints import Checkpoint
from audit.training.mutual_information import PRECISIONS, EpochProgress
from audit.types import Images, Labels, Objective, ObjectiveValue

METHODS = ("adversarial", "trades", "noise")
"""The methods of robust training."""


@dataclass(frozen=True)
class StepSchedule:
    """SGD with momentum and a learning rate that is multiplied by `factor` every `every` epochs.

    Source: He et al. 2016; Zhu, Zhang & Evans 2020 use momentum 0.9 and factor 0.1 every 50 of 150 epochs.
    """

    every: int = 50
    factor: float = 0.1
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"schedule every {self.every!r} must be at least 1 epoch")
        if not 0 < self.factor <= 1:
            raise UsageError(f"schedule factor {self.factor!r} must be above 0 and at most 1")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"schedule momentum {self.momentum!r} must be at least 0 and below 1")


@dataclass(frozen=True)
class ClassifierTraining:
    """Settings of `train_classifier`: AdamW with a one-cycle learning rate, or SGD if `steps` gives a step schedule.

    With a `threat`, training is robust by `method`: "adversarial" takes the loss of images that PGD perturbed; "trades"
    adds to the loss of the clean images `beta` times the largest KL divergence from their predictions that PGD finds;
    "noise" takes the loss of images moved to random points of the ball. Without `flip`, all images of a batch share
    one shift of up to `shift` pixels; with it, each image has its own shift and is flipped with probability 1/2. `bf16`
    runs the network in mixed precision; loss and weights stay in float32.

    Source: Madry et al. 2018 for adversarial training: PGD perturbs every batch; Zhang et al. 2019, "Theoretically
    Principled Trade-off between Robustness and Accuracy", for TRADES and its `beta`.
    """

    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    shift: int = 1
    threat: ThreatModel | None = None
    pgd: PGD = field(default_factory=lambda: PGD(steps=7, relative_step=0.3))
    seed: int = 0
    flip: bool = False
    steps: StepSchedule | None = None
    precision: Literal["float32", "bf16"] = "float32"
    method: Literal["adversarial", "trades", "noise"] = "adversarial"
    beta: float = 6.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS)
        if self.method not in METHODS:
            raise UnknownNameError("training method", self.method, METHODS)
        if not 0 <= self.beta < inf:
            raise UsageError(f"beta {self.beta!r} of TRADES must be at least 0 and finite")

    def identity(self) -> dict[str, Any]:
        """Return the settings as plain values, with the name of the norm; `beta` of TRADES alone.

        Adversarial training has no `method` here: it keeps the identity that it had when it was the only one.
        """
        settings = asdict(self) | {"norm": self.threat.norm if self.threat else ""}
        unused = {"adversarial": ("method", "beta"), "noise": ("beta",)}.get(self.method, ())
        return {name: value for name, value in settings.items() if name not in unused}


def train_classifier(
    network: nn.Module,
    images: Images,
    labels: Labels,
    training: ClassifierTraining,
    progress: EpochProgress = lambda _epoch, _loss: None,
    checkpoint_path: Path | None = None,
) -> None:
    """Train a network in place on images (N, C, H, W) in [0, 1] and leave it in eval mode.

    `progress` receives the epoch and its mean loss. With a checkpoint path, the state is written after every epoch; a
    resumed run gives the weights of an uninterrupted one, bit for bit on the CPU, if the network itself draws no random
    numbers. Raises UsageError for a checkpoint of another run.
    """
    generator = keyed_generator(training.seed, Purpose.CLASSIFIER_TRAINING)
    batches = max(1, len(images) // training.batch_size)
    optimiser, schedule = _optimiser(network, training, batches)
    checkpoint = Checkpoint(
        checkpoint_path,
        {"training": training.identity(), "images": list(images.shape), "sums": _checksums(images, labels)},
        {"network": network, "optimiser": optimiser, "schedule": schedule},
        {"draws": generator},
    )
    for epoch in range(checkpoint.restore(), training.epochs):
        order = torch.randperm(len(images), generator=generator).tensor_split(batches)
        total = 0.0
        for batch in order:
            augmented = _augment(images[batch], training, generator)
            loss = _loss(network, augmented, labels[batch], training, generator)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        checkpoint.save(epoch + 1)
        progress(epoch, total / len(images))
    network.eval()


def _optimiser(
    network: nn.Module, training: ClassifierTraining, batches: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimiser and its learning rate schedule; both step once a batch."""
    rate, decay, steps = training.learning_rate, training.weight_decay, training.steps
    if steps is None:
        adam = torch.optim.AdamW(network.parameters(), rate, weight_decay=decay)
        return adam, torch.optim.lr_scheduler.OneCycleLR(adam, rate, training.epochs * batches)
    sgd = torch.optim.SGD(network.parameters(), rate, steps.momentum, weight_decay=decay)
    return sgd, torch.optim.lr_scheduler.StepLR(sgd, steps.every * batches, steps.factor)


def _checksums(images: Images, labels: Labels) -> list[float]:
    """Return sums that identify images and labels, rounded because the order of summation depends on threads."""
    return [round(float(images.sum(dtype=torch.float64)), 3), float(labels.sum())]


def _loss(
    network: nn.Module, images: Images, labels: Labels, training: ClassifierTraining, generator: torch.Generator
) -> Tensor:
    threat = training.threat
    if threat is None:
        moved = images
    elif training.method == "noise":
        moved = threat.random_start(images, generator)
    else:
        moved = _attacked(network, images, labels, training, generator)
    network.train()
    with _autocast(images, training):
        if threat is None or training.method != "trades":
            return F.cross_entropy(network(moved), labels)
        # one pass of both halves: the batch statistics are those of clean and moved images together
        clean, other = network(torch.cat([images, moved])).chunk(2)
        return F.cross_entropy(clean, labels) + training.beta * _divergence(clean, other).mean()


def _attacked(
    network: nn.Module, images: Images, labels: Labels, training: ClassifierTraining, generator: torch.Generator
) -> Images:
    """Return images (N, C, H, W) moved by PGD to a large cross-entropy or, of TRADES, a large divergence."""
    network.eval()  # the attack must not update the batch statistics
    if training.method == "trades":
        objective = _divergence_objective(network, images)
    else:
        objective = without_early_stopping(cross_entropy_objective(network, labels))

    def in_precision(batch: Images, index: Tensor) -> ObjectiveValue:
        with _autocast(batch, training):  # searches leave that of the caller
            return objective(batch, index)

    assert training.threat is not None
    return minimise(in_precision, images, training.threat, training.pgd, generator).images


def _divergence_objective(network: nn.Module, clean: Images) -> Objective:
    """Return the objective that moves predictions away from those of the clean images (N, C, H, W)."""
    with torch.no_grad():
        predicted = network(clean)

    def objective(images: Images, index: Tensor) -> ObjectiveValue:
        value = -_divergence(predicted[index], network(images))
        return ObjectiveValue(value, torch.zeros_like(value, dtype=torch.bool))

    return objective


def _divergence(clean: Tensor, other: Tensor) -> Tensor:
    """Return the KL divergence (N,) in nats of the predictions of logits `other` (N, K) from those of `clean`."""
    from_clean, to_other = F.log_softmax(clean, 1), F.log_softmax(other, 1)
    return (from_clean.exp() * (from_clean - to_other)).sum(1)


def _autocast(images: Images, training: ClassifierTraining) -> AbstractContextManager[Any]:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=training.precision == "bf16")


def _augment(images: Images, training: ClassifierTraining, generator: torch.Generator) -> Images:
    if training.flip:
        return draw_shifts(images, training.shift, generator, flip=True).apply(images)
    return _shift_batch(images, training.shift, generator)


def _shift_batch(images: Images, max_shift: int, generator: torch.Generator) -> Images:
    if max_shift == 0:
        return images
    down, right = (int(s) for s in torch.randint(-max_shift, max_shift + 1, (2,), generator=generator))
    padded = F.pad(images, (max_shift,) * 4)
    height, width = images.shape[-2:]
    top, left = max_shift + down, max_shift + right
    return padded[..., top : top + height, left : left + width]
