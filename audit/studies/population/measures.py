"""What is measured of every network: predictors from its layers and gradients, and outcomes by attacks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS, cross_entropy_objective, margin
from audit.adversary.passes import input_gradient
from audit.adversary.pgd import PGD, minimise
from audit.adversary.staged.outcome import Accuracy
from audit.adversary.threat import L2, Linf, ThreatModel
from audit.config.settings import AuditSettings
from audit.information.estimator import ESTIMATORS, Estimator
from audit.random_keys import Purpose, keyed_generator
from audit.representation.layers import Representation
from audit.run.layer_audit import LayerAudit
from audit.studies.population.plan import StudySet
from audit.training.heads import HeadTraining, LayerClassifier, train_adversarial_head, train_linear_head
from audit.types import Images, Labels, ObjectiveValue

_ATTACK = TIERS["smoke"]
_HEADS = HeadTraining(epochs=5)
_BATCH = 256


@dataclass(frozen=True, eq=False)
class StudyData:
    """Training images (M, C, H, W) and held-out images (N, C, H, W) with their labels, and the data set's settings."""

    chosen: StudySet
    images: Images
    labels: Labels
    held_out: Images
    held_out_labels: Labels
    classes: int
    sha256: str

    @property
    def threat(self) -> Linf:
        """The audited ball."""
        return Linf(self.chosen.eps)

    @property
    def informative(self) -> tuple[Images, Labels]:
        """The held-out images that measure information, with their labels."""
        count = self.chosen.information
        return self.held_out[:count], self.held_out_labels[:count]

    def transferred(self, labels: Labels) -> Labels:
        """Return the new labels (N,): 1 for the classes that the data set's settings name."""
        return torch.isin(labels, torch.tensor(self.chosen.transfer)).long()


def measure_outcomes(network: nn.Module, data: StudyData) -> dict[str, float]:
    """Return natural accuracy and every outcome of a frozen network in eval mode, as shares of images."""
    eps, images, labels = data.chosen.eps, data.held_out, data.held_out_labels
    balls: dict[str, ThreatModel] = {
        "adversarial": Linf(eps),
        "adversarial_half": Linf(eps / 2),
        "adversarial_twice": Linf(min(1.0, 2 * eps)),
        "adversarial_l2": L2(data.chosen.l2),
    }
    found = {name: _accuracy(network, images, labels, threat) for name, threat in balls.items()}
    natural, adversarial = found["adversarial"].natural.value, found["adversarial"].adversarial.value
    accuracies = {name: each.adversarial.value for name, each in found.items()}
    return {"natural": natural, "gap": natural - adversarial} | accuracies | _head_outcomes(network, data)


def _head_outcomes(network: nn.Module, data: StudyData) -> dict[str, float]:
    layer, count, threat = Representation(network, "penultimate"), data.chosen.heads, data.threat
    images, labels = data.images[:count], data.labels[:count]
    standard = train_linear_head(layer, images, labels, data.classes, _HEADS)
    heads: dict[str, tuple[LayerClassifier, Labels]] = {
        "slf": (standard, data.held_out_labels),
        "alf": (train_adversarial_head(standard, images, labels, threat, _HEADS), data.held_out_labels),
        "transfer": (
            train_linear_head(layer, images, data.transferred(labels), 2, _HEADS),
            data.transferred(data.held_out_labels),
        ),
    }
    found = {name: _accuracy(head, data.held_out, of, threat) for name, (head, of) in heads.items()}
    natural = {f"{name}_natural": each.natural.value for name, each in found.items()}
    return {name: each.adversarial.value for name, each in found.items()} | natural


def measure_predictors(network: nn.Module, data: StudyData, search: Mapping[str, Any]) -> dict[str, float]:
    """Return every predictor but those that the recipe states, of a frozen network in eval mode; nats and ratios."""
    images, labels = data.informative
    values = information(network, data, "logits", "sandwich", search) | information(
        network, data, "penultimate", "sandwich", search
    )
    values |= information(network, data, "logits", "label-level", search)
    ratio, gradient = margin_ratio(network, images, labels), gradient_norm(network, images, labels)
    moved = displacement(network, images, data.threat, search["displacement_steps"])
    return values | {"margin_ratio": ratio, "gradient_norm": gradient, "displacement": moved}


def information(
    network: nn.Module, data: StudyData, layer: str, name: str, search: Mapping[str, Any]
) -> dict[str, float]:
    """Return normal- and worst-case information and RV in nats of one estimator at one layer, as columns."""
    estimator: Estimator = replace(ESTIMATORS[name], **_tuples(search.get(name.replace("-", "_"), {})))
    images, labels = data.informative
    audit = LayerAudit(network, images, labels, layer, AuditSettings(estimator, seeds=(0,)))
    (found,) = audit.searched(data.threat)
    column = name.replace("-", "_") + ("" if name == "label-level" else f"_{layer}")
    return {f"normal_{column}": found.normal.nats, f"worst_{column}": found.worst.nats, f"rv_{column}": found.nats}


def margin_ratio(network: nn.Module, images: Images, labels: Labels) -> float:
    """Return the mean of logit margin over the l1 norm of its gradient: to first order the l-inf distance to an error.

    Source: Hein & Andriushchenko 2017, section 2, with a local gradient in place of the Lipschitz constant.
    """
    leaf = images.detach().clone().requires_grad_()
    margins = margin(network(leaf), labels)
    norms = input_gradient(margins.sum(), leaf).flatten(1).norm(1, dim=1)
    return float((margins.detach() / norms.clamp_min(1e-12)).mean())


def gradient_norm(network: nn.Module, images: Images, labels: Labels) -> float:
    """Return the mean l1 norm of the gradient of each image's cross-entropy with respect to its pixels.

    Source: Ross & Doshi-Velez 2018; Simon-Gabriel et al. 2019, in the norm dual to l-inf.
    """
    leaf = images.detach().clone().requires_grad_()
    value = cross_entropy_objective(network, labels)(leaf, torch.arange(len(leaf))).value
    return float(input_gradient(value.sum(), leaf).flatten(1).norm(1, dim=1).mean())


def displacement(network: nn.Module, images: Images, threat: ThreatModel, steps: int) -> float:
    """Return how far PGD moves penultimate features inside the ball, in root mean squares of their spread.

    The mean over images (N, C, H, W) of the Euclidean distance from the features of the clean image, no labels used.
    """
    layer = Representation(network, "penultimate")
    with torch.no_grad():
        clean = layer(images)
    spread = (clean - clean.mean(0)).square().sum(1).mean().sqrt().clamp_min(1e-12)

    def objective(batch: Images, index: Tensor) -> ObjectiveValue:
        value = -(layer(batch) - clean[index]).square().sum(1)
        return ObjectiveValue(value, torch.zeros_like(index, dtype=torch.bool))

    generator = keyed_generator(0, Purpose.FEATURE_DISPLACEMENT)
    found = minimise(objective, images, threat, PGD(steps, 0.25, batch_size=_BATCH), generator)
    return float((-found.value).clamp_min(0).sqrt().mean() / spread)


def _accuracy(network: nn.Module, images: Images, labels: Labels, threat: ThreatModel) -> Accuracy:
    return measure_accuracy(network, images, labels, threat, _ATTACK, seed=0)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
