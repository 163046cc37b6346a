"""Train classification heads on a frozen layer.

`train_standard_heads` and `train_adversarial_head` are fast and serve as lower limits beside certified upper bounds.
`fit_head` follows the paper: a linear or MLP head, standard or robust, with or without early stopping.

Source: Zhu, Zhang & Evans 2020, section 5.2.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.label_attack import cross_entropy_objective
from audit.adversary.memory.limit import allowed
from audit.adversary.pgd import PGD, minimise, without_early_stopping
from audit.adversary.threat import ThreatModel
from audit.errors import UnknownNameError, UsageError
from audit.information.probing.probes import fit_hidden, fit_linear
from audit.information.probing.settings import ProbeTraining
from audit.random_keys import Purpose, keyed_generator
from audit.training.mutual_information import EpochProgress
from audit.types import Features, Images, Labels, image_slices, relieved

HeadName = Literal["slf", "mlp", "alf"]
"""Standard linear features, multilayer perceptron, adversarial linear features."""
HEAD_KINDS = ("linear", "mlp")


@dataclass(frozen=True)
class HeadTraining:
    """Settings of fast heads: probes on clean features, and for `alf` AdamW on adversarial images."""

    probe: ProbeTraining = field(default_factory=ProbeTraining)
    epochs: int = 10
    batch_size: int = 50
    learning_rate: float = 5e-2
    pgd: PGD = field(default_factory=lambda: PGD(steps=5, relative_step=0.4))
    seed: int = 0


@dataclass(frozen=True)
class HeadFitSettings:
    """Settings of `fit_head`: Adam at a constant rate, on images that PGD perturbs if there is a `threat`.

    `linear` is one layer; `mlp` is linear(D, `hidden`), dropout, batch norm, ReLU, linear(`hidden`, K). Early stopping
    measures adversarial accuracy with `pgd` every `every` epochs. Defaults are the paper's, except for `epochs`, which
    the paper does not state.
    """

    classes: int = 10
    kind: Literal["linear", "mlp"] = "linear"
    threat: ThreatModel | None = None
    pgd: PGD = field(default_factory=lambda: PGD(steps=7, relative_step=0.32, random_start=False))
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-4
    hidden: int = 200
    dropout: float = 0.1
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS:
            raise UnknownNameError("head", self.kind, HEAD_KINDS)
        if self.classes < 2:
            raise UsageError(f"head classes {self.classes!r} must be at least 2")
        for name in ("epochs", "hidden", "every"):
            if getattr(self, name) < 1:
                raise UsageError(f"head {name} {getattr(self, name)!r} must be at least 1")
        if self.batch_size < 2:
            raise UsageError(f"head batch_size {self.batch_size!r} must be at least 2: batch norm needs two images")
        if not 0 < self.learning_rate < inf:
            raise UsageError(f"head learning_rate {self.learning_rate!r} must be above 0 and finite")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"head dropout {self.dropout!r} is outside [0, 1)")


class ValidationSet(NamedTuple):
    """Images (N, C, H, W), labels (N,) and the threat model of the adversarial accuracy that stops training early."""

    images: Images
    labels: Labels
    threat: ThreatModel


class LayerClassifier(nn.Module):
    """A head on a frozen layer: images (N, C, H, W) to logits (N, K)."""

    def __init__(self, layer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, images: Images) -> Tensor:
        """Return the logits (N, K) of the head on the layer's features."""
        logits: Tensor = self.head(self.layer(images))
        return logits


class EarlyStopped(NamedTuple):
    """The classifier of the epoch with the highest adversarial accuracy on a validation set, and that accuracy."""

    network: LayerClassifier
    epoch: int
    adversarial_accuracy: float


class FittedHeads(NamedTuple):
    """The classifier after the last epoch, and the early-stopped one of each validation set."""

    last: LayerClassifier
    best: Mapping[str, EarlyStopped]


def train_standard_heads(
    layer: nn.Module, images: Images, labels: Labels, classes: int, training: HeadTraining
) -> dict[HeadName, LayerClassifier]:
    """Return a linear (`slf`) and an MLP head trained on the features of clean images (M, C, H, W).

    Raises UsageError if there are no images.
    """
    features = _features(layer, images, training.batch_size)
    return {
        "slf": LayerClassifier(layer, fit_linear(features, labels, classes, training.probe)).eval(),
        "mlp": LayerClassifier(layer, fit_hidden(features, labels, classes, training.probe)).eval(),
    }


def train_linear_head(
    layer: nn.Module, images: Images, labels: Labels, classes: int, training: HeadTraining
) -> LayerClassifier:
    """Return the linear head of `train_standard_heads` alone; raises UsageError if there are no images."""
    return LayerClassifier(
        layer, fit_linear(_features(layer, images, training.batch_size), labels, classes, training.probe)
    ).eval()


def train_adversarial_head(
    start: LayerClassifier, images: Images, labels: Labels, threat: ThreatModel, training: HeadTraining
) -> LayerClassifier:
    """Return a linear head, initialised from a standard one, trained on PGD examples inside a threat model.

    The layer stays frozen. Source: Madry et al. 2018.
    """
    head = copy.deepcopy(start.head).requires_grad_(True)
    classifier = LayerClassifier(start.layer, head).eval()
    optimiser = torch.optim.AdamW(head.parameters(), training.learning_rate, weight_decay=1e-4)
    order_generator = keyed_generator(training.seed, Purpose.HEAD_ORDER)
    start_generator = keyed_generator(training.seed, Purpose.HEAD_STARTS)
    batches = max(1, len(images) // training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, training.learning_rate, training.epochs * batches)
    passed = 0
    for _ in range(training.epochs):
        order = torch.randperm(len(images), generator=order_generator).to(images.device)
        for batch in order.tensor_split(batches):
            passed = relieved(passed + len(batch), images)
            loss = without_early_stopping(cross_entropy_objective(classifier, labels[batch]))
            adversarial = minimise(loss, images[batch], threat, training.pgd, start_generator).images
            with torch.no_grad():
                features = start.layer(adversarial)
            optimiser.zero_grad()
            F.cross_entropy(head(features), labels[batch]).backward()
            optimiser.step()
            schedule.step()
    head.requires_grad_(False)
    return classifier


@torch.no_grad()
def _features(layer: nn.Module, images: Images, batch_size: int) -> Tensor:
    if len(images) == 0:
        raise UsageError("a head cannot be trained on 0 images: at least 1 is needed")
    return torch.cat([layer(images[part]) for part in image_slices(images, allowed(batch_size))])


def make_head(features: int, settings: HeadFitSettings) -> nn.Module:
    """Return an untrained head for `features` features, with weights drawn from the seed alone."""
    generator = keyed_generator(settings.seed, Purpose.HEAD_WEIGHTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if settings.kind == "linear":
            return nn.Linear(features, settings.classes)
        middle = (_Dropout(settings.dropout, generator), nn.BatchNorm1d(settings.hidden), nn.ReLU())
        return nn.Sequential(
            nn.Linear(features, settings.hidden), *middle, nn.Linear(settings.hidden, settings.classes)
        )


def fit_head(
    layer: nn.Module,
    images: Images,
    labels: Labels,
    settings: HeadFitSettings,
    validation: Mapping[str, ValidationSet] | None = None,
    progress: EpochProgress = lambda _epoch, _loss: None,
) -> FittedHeads:
    """Train a head on a frozen layer with images (M, C, H, W) and labels (M,).

    With a threat model, PGD perturbs the images through head and layer, both in eval mode. Early stopping selects one
    head for each validation set; accuracy on a set that selected the head is biased upwards. `progress` receives the
    epoch and its mean loss. Raises UsageError for fewer than two images.

    Source: Zhu, Zhang & Evans 2020, section 5.2 (rows "E.S.").
    """
    if len(images) < 2:
        raise UsageError(f"a head cannot be trained on {len(images)} images: at least 2 are needed")
    trainer = _HeadTrainer(layer.eval(), images, labels, settings)
    best: dict[str, EarlyStopped] = {}
    for epoch in range(settings.epochs):
        progress(epoch, trainer.train_epoch(epoch))
        if (epoch + 1) % settings.every == 0 or epoch + 1 == settings.epochs:
            for name, validation_set in (validation or {}).items():
                accuracy = _adversarial_accuracy(trainer.network, validation_set, settings)
                if name not in best or accuracy > best[name].adversarial_accuracy:
                    best[name] = EarlyStopped(trainer.snapshot(), epoch, accuracy)
    return FittedHeads(trainer.snapshot(), best)


class _HeadTrainer:
    """A head in training, on precomputed clean features or on images that PGD perturbs in every batch."""

    def __init__(self, layer: nn.Module, images: Images, labels: Labels, settings: HeadFitSettings) -> None:
        self.images, self.labels, self.settings = images, labels, settings
        self.features = _features(layer, images, settings.batch_size)
        self.network = LayerClassifier(layer, make_head(self.features.shape[1], settings).to(images.device))
        self.optimiser = torch.optim.Adam(self.network.head.parameters(), settings.learning_rate)
        self.batches = max(1, len(images) // settings.batch_size)

    def train_epoch(self, epoch: int) -> float:
        """Train on every image once and return the mean loss; the head is in eval mode before and after."""
        seed, total = self.settings.seed, 0.0
        order = torch.randperm(len(self.images), generator=keyed_generator(seed, Purpose.HEAD_ORDER, epoch))
        generator = keyed_generator(seed, Purpose.HEAD_STARTS, epoch)
        for batch in order.to(self.images.device).tensor_split(self.batches):
            features = self._batch_features(batch, generator)
            self.network.head.train()
            loss = F.cross_entropy(self.network.head(features), self.labels[batch])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.network.head.eval()
            total += float(loss.detach()) * len(batch)
        return total / len(self.images)

    def snapshot(self) -> LayerClassifier:
        """Return the classifier with a frozen copy of the current head."""
        head = make_head(self.features.shape[1], self.settings).to(self.images.device)
        head.load_state_dict(self.network.head.state_dict())
        return LayerClassifier(self.network.layer, head.requires_grad_(False)).eval()

    def _batch_features(self, batch: Tensor, generator: torch.Generator) -> Features:
        if self.settings.threat is None:
            return self.features[batch]
        self.network.head.eval()
        loss = without_early_stopping(cross_entropy_objective(self.network, self.labels[batch]))
        adversarial = minimise(loss, self.images[batch], self.settings.threat, self.settings.pgd, generator).images
        with torch.no_grad():
            features: Features = self.network.layer(adversarial)
        return features


def _adversarial_accuracy(network: LayerClassifier, validation: ValidationSet, settings: HeadFitSettings) -> float:
    objective = cross_entropy_objective(network, validation.labels)
    generator = keyed_generator(settings.seed, Purpose.HEAD_VALIDATION)
    found = minimise(objective, validation.images, validation.threat, settings.pgd, generator)
    return 1 - float(found.done.float().mean())


class _Dropout(nn.Module):
    """Dropout with masks from a generator of its own; nn.Dropout draws them from the global one."""

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rate, self.generator = rate, generator

    def forward(self, features: Features) -> Features:
        if not (self.training and self.rate):
            return features
        kept = torch.rand(features.shape, generator=self.generator).to(features) >= self.rate
        return features * kept / (1 - self.rate)
