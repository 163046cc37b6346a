"""Accuracies of an encoder's layer: those of the best linear heads found, trained on other images than they classify.

`slf` (standard linear fine-tuning) is a logistic regression on clean features, `alf` (adversarial linear fine-tuning)
is trained on images that PGD moves inside the threat model. The encoder stays frozen.

Source: the protocol of robust self-supervised learning, such as Zhang et al. 2022, "Decoupled Adversarial Contrastive
Learning for Self-supervised Adversarial Robustness"; Madry et al. 2018 for adversarial training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.attack_checks import Check
from audit.adversary.label_attack import LabelAttack
from audit.adversary.robustness import Robustness, TargetModel, evaluate_robustness
from audit.adversary.staged.outcome import Accuracy, AttackOutcome
from audit.adversary.threat import ThreatModel
from audit.information.floors import largest_share
from audit.proportion import Proportion, wilson
from audit.representation.headless import OUTPUT
from audit.representation.layers import Representation
from audit.run.encoders.plan import Fold, HeadPlan
from audit.training.heads import HeadTraining, LayerClassifier, train_adversarial_head, train_linear_head
from audit.types import Images, Labels, selected_pixels

STANDARD, ADVERSARIAL = "slf", "alf"
_BATCHES, _LARGEST_BATCH = 10, 50  # at least so many updates an epoch, however few the images


class HeadAccuracy(NamedTuple):
    """Clean and adversarial accuracy of one kind of head."""

    name: str
    natural: Proportion
    adversarial: Proportion


class EncoderAccuracy(NamedTuple):
    """Accuracies of the best heads found on a layer, and which heads these are; how they were trained.

    `robustness` is that of the head with the highest adversarial accuracy, but for the natural accuracy, which is the
    highest of all heads; None, with the `reason`, if no head can be measured. `passes` are those of training.
    """

    robustness: Robustness | None
    natural_head: str
    adversarial_head: str
    heads: tuple[HeadAccuracy, ...]
    trained_on: str
    passes: int
    reason: str

    def details(self) -> dict[str, Any]:
        """Return what a record states beside the accuracies, as JSON data."""
        if self.robustness is None:
            return {"reason": self.reason}
        each = {h.name: {"natural": h.natural.value, "adversarial": h.adversarial.value} for h in self.heads}
        return {"trained_on": self.trained_on, "accuracies": each}


class AuditedImages(NamedTuple):
    """Images (N, C, H, W) with labels (N,), the number of classes, and how heads are trained for them."""

    images: Images
    labels: Labels
    classes: int
    plan: HeadPlan


def measure_encoder(
    layer: Representation, audited: AuditedImages, threat: ThreatModel, attack: LabelAttack, seed: int
) -> EncoderAccuracy:
    """Train heads on a layer of an encoder and attack them, each on the images that it was not trained on.

    At eps 0 only the standard head is trained. Raises what `evaluate_robustness` raises.
    """
    plan = audited.plan
    if not plan.folds:
        return EncoderAccuracy(None, "", "", (), "", 0, plan.reason)
    smallest = min(len(fold.labels) for fold in plan.folds)
    training = HeadTraining(batch_size=max(4, min(_LARGEST_BATCH, smallest // _BATCHES)), seed=seed)
    found: dict[str, list[Robustness]] = {}
    for fold in plan.folds:
        index = fold.measured.to(audited.images.device)
        data = (selected_pixels(audited.images, index), audited.labels[index])
        for name, head in _trained(_features_of(layer), fold, audited.classes, threat, training).items():
            found.setdefault(name, []).append(evaluate_robustness(TargetModel(head, *data), threat, attack, seed))
    order = torch.cat([fold.measured for fold in plan.folds]).to(audited.images.device)
    measured = {name: _merged(parts, order, audited.labels) for name, parts in found.items()}
    passes = sum(_training_passes(len(fold.labels), training, adversarial=threat.eps > 0) for fold in plan.folds)
    return _best(measured, plan.trained_on, passes)


def _features_of(layer: Representation) -> nn.Module:
    """Return the layer as a module; the whole network where it is its output, so that a faster copy can be searched."""
    whole = layer.spec.path == OUTPUT and layer.spec.index is None and layer.reduce == "flatten"
    return nn.Sequential(layer.model, nn.Flatten()).eval() if whole else layer


def _trained(
    layer: nn.Module, fold: Fold, classes: int, threat: ThreatModel, training: HeadTraining
) -> dict[str, LayerClassifier]:
    data = (fold.images, fold.labels)
    standard = train_linear_head(layer, *data, classes, training)
    if threat.eps == 0:
        return {STANDARD: standard}
    return {STANDARD: standard, ADVERSARIAL: train_adversarial_head(standard, *data, threat, training)}


def _training_passes(images: int, training: HeadTraining, *, adversarial: bool) -> int:
    return images // 2 + (images * training.epochs * (training.pgd.steps + 1) if adversarial else 0)


def _best(measured: dict[str, Robustness], trained_on: str, passes: int) -> EncoderAccuracy:
    """Return the best heads; the standard one of several that are equally good."""
    natural = max(measured, key=lambda name: measured[name].accuracy.natural.value)
    robust = max(measured, key=lambda name: measured[name].accuracy.adversarial.value)
    chosen = measured[robust]
    spent = sum(each.accuracy.passes for each in measured.values())
    accuracy = chosen.accuracy._replace(natural=measured[natural].accuracy.natural, passes=spent)
    heads = tuple(
        HeadAccuracy(name, each.accuracy.natural, each.accuracy.adversarial) for name, each in measured.items()
    )
    return EncoderAccuracy(chosen._replace(accuracy=accuracy), natural, robust, heads, trained_on, passes, "")


def _merged(parts: Sequence[Robustness], order: Tensor, labels: Labels) -> Robustness:
    """Return the robustness on all images, of labels (N,), from that on parts of them, of the indices `order` (N,)."""
    if len(parts) == 1:
        return parts[0]
    outcomes = [part.accuracy.outcome for part in parts]
    outcome = AttackOutcome(*(_in_order(torch.cat(values), order) for values in zip(*outcomes, strict=True)))
    first, count = parts[0].accuracy, len(order)
    accuracy = Accuracy(
        natural=wilson(int(outcome.correct.sum()), count),
        adversarial=wilson(int(outcome.robust.sum()), count),
        robust=outcome.robust,
        passes=sum(part.accuracy.passes for part in parts),
        num_classes=first.num_classes,
        largest_share=largest_share(labels),
        forwards=sum(part.accuracy.forwards for part in parts),
        outcome=outcome,
        names=first.names,
    )
    return Robustness(accuracy, _worst_checks([part.checks for part in parts]))


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    found = torch.empty_like(values)
    found[order] = values
    return found


def _worst_checks(parts: Sequence[tuple[Check, ...]]) -> tuple[Check, ...]:
    """Return each check once: of the first part that fails it, else of the first part."""
    by_id: dict[str, Check] = {}
    for check in (check for part in parts for check in part):
        known = by_id.setdefault(check.id, check)
        if check.passed is False and known.passed is not False:
            by_id[check.id] = check
    return tuple(by_id.values())
