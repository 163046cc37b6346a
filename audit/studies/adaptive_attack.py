"""An adaptive attack on conditioned scores: the image-wise union of several attacks, and transfer attacks.

The union contains the audit tier, losses on rescaled scores, attacks on single scores, images made against a
substitute, and every other attack at the radius. A single attack is accepted where the union breaks hardly more images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.attack_checks import UPPER_BOUND, Check, failed
from audit.adversary.comparison_checks import check_transfer
from audit.adversary.gradient_checks import quick_checks
from audit.adversary.label_attack import LOSSES, LabelAttack, Stage, margin
from audit.adversary.pgd import PGD, minimise, without_early_stopping
from audit.adversary.robustness import Robustness, TargetModel, compare_attacks, evaluate_robustness
from audit.adversary.single_attacks import STAGES
from audit.adversary.staged.outcome import logits_of
from audit.adversary.threat import ThreatModel
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels, Objective, ObjectiveValue

_BATCH = 256
_OTHER_SCORES = 3  # number of the highest-scoring other hypotheses whose scores are raised one at a time
_SINGLE_SCORE_PGD = PGD(20, 0.15)
_RESCALED_ATTACK = LabelAttack((Stage("ce", PGD(40, 0.1, restarts=2)), Stage("margin", PGD(20, 0.15))))
_MAX_EXCESS = 0.01  # largest fraction that the union may break beyond an accepted single attack


class TransferImages(NamedTuple):
    """Images (N, C, H, W) made against a substitute, its adversarial accuracy on them, and its failed checks."""

    attack: str
    threat: ThreatModel
    images: Images
    left: float
    failed: str


class OtherAttacks(NamedTuple):
    """Other attacks at the same radius: masks (M,) of robust images, and transfer images (M, C, H, W)."""

    masks: Sequence[Tensor] = ()
    images: Sequence[Images] = ()


class AdaptiveResult(NamedTuple):
    """The union at one radius: robust mask (M,), audit tier with all checks, and accuracy after every step."""

    threat: ThreatModel
    robust: Tensor
    tier: Robustness
    passes: int
    steps: str

    @property
    def verdict(self) -> str:
        """The kind of the union's accuracy: measured, or an upper bound with the failed checks."""
        failures = describe_failed_checks(self.tier.checks)
        return f"{UPPER_BOUND}: {failures}" if failures else "measured"


class StandardisedScores(nn.Module):
    """A network whose scores are divided by their standard deviation over classes, so that softmax does not saturate.

    The divisor is positive, so the predicted class is unchanged.

    Source: Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks", section 4: a loss invariant to scale and offset of the scores.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Images) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W), each row with standard deviation 1."""
        scores: Tensor = self.network(images)
        return scores / scores.std(1, keepdim=True, correction=0).clamp_min(1e-12)


def score_objective(network: nn.Module, labels: Labels, hypotheses: Labels, sign: float) -> Objective:
    """Return the objective of one hypothesis score per image: lowered with sign 1, raised with sign -1.

    With the Jensen-Shannon objective the difference of two scores may be flat where a single score is not. `labels`
    and `hypotheses` are (N,).
    """

    def objective(images: Images, index: Tensor) -> ObjectiveValue:
        scores = network(images)
        value = sign * scores.gather(1, hypotheses[index][:, None]).squeeze(1)
        return ObjectiveValue(value, ~(margin(scores.detach(), labels[index]) > 0))

    return objective


def craft_transfer_images(substitute: TargetModel, threat: ThreatModel, name: str, seed: int) -> TransferImages:
    """Return images made against a substitute: those of highest loss in the ball, not the first misclassified ones.

    `name` is "fgsm" or "pgd" on the cross-entropy, or "cw" on the margin, the loss of Carlini & Wagner. The search
    covers the whole ball, because minimum-norm images lie on the decision boundary of the substitute and do not
    transfer.
    """
    loss, pgd = ("margin", PGD(40, 0.1)) if name == "cw" else ("ce", STAGES[name].pgd)
    objective = without_early_stopping(LOSSES[loss](substitute.network, substitute.labels))
    images = minimise(
        objective, substitute.images, threat, pgd, keyed_generator(seed, Purpose.TRANSFER_CRAFTING)
    ).images
    left = fraction(correct_mask(substitute.network, images, substitute.labels))
    all_checks = quick_checks(substitute.network, substitute.images, substitute.labels, threat, seed)
    return TransferImages(name, threat, images, left, describe_failed_checks(all_checks))


def adaptive_attack(
    target: TargetModel, threat: ThreatModel, attack: LabelAttack, others: OtherAttacks, seed: int
) -> AdaptiveResult:
    """Return the image-wise union of the audit tier, rescaled scores, single scores, transfer images and other attacks.

    Every search runs on the images that are still robust. All checks run except those of the accuracy curve; the check
    `transfer_attack` needs transfer images.
    """
    tier = evaluate_robustness(target, threat, attack, seed)
    robust, passes = tier.accuracy.robust.clone(), tier.accuracy.passes
    steps = [f"tier {fraction(robust):.3f}"]
    passes += _attack_rescaled_scores(target, robust, threat, seed)
    steps.append(f"rescaled scores {fraction(robust):.3f}")
    passes += _attack_single_scores(target, robust, threat, seed)
    steps.append(f"single scores {fraction(robust):.3f}")
    correct_on_transfer = torch.ones_like(robust)
    for images in others.images:
        correct_on_transfer &= correct_mask(target.network, images, target.labels)
    transfer_checks = (check_transfer(robust, robust & correct_on_transfer),) if others.images else ()
    for mask in (correct_on_transfer, *others.masks):
        robust &= mask
    steps.append(f"transfer and others {fraction(robust):.3f}")
    all_checks = (*tier.checks, *compare_attacks(target, threat, attack, seed), *transfer_checks)
    return AdaptiveResult(threat, robust, tier._replace(checks=all_checks), passes, ", ".join(steps))


def describe_failed_checks(all_checks: Sequence[Check], level: str = "trust") -> str:
    """Return a description of the failed checks of a level, '' without any."""
    return "; ".join(f"check {each.name!r} failed" + _format_figure(each.figure) for each in failed(all_checks, level))


def excess_broken(robust: Tensor, union: Tensor) -> float:
    """Return the fraction of common images that a single attack (N,) leaves robust and the union (M,) breaks."""
    common = min(len(robust), len(union))
    return int((robust[:common] & ~union[:common]).sum()) / common


def judge_single_attack(excess: float, images: int) -> tuple[bool, str]:
    """Return whether a single attack is accepted given the excess of the union, and a verdict.

    The limit is 1 %, or one image where that is more.
    """
    held = excess <= max(_MAX_EXCESS, 1 / images)
    return held, f"{'holds' if held else 'too weak'}: the adaptive attack breaks {excess:.1%} more"


def correct_mask(network: nn.Module, images: Images, labels: Labels) -> Tensor:
    """Return which images (N, C, H, W) a network classifies correctly: (N,) bool."""
    return margin(logits_of(network, images, _BATCH), labels) > 0


def fraction(mask: Tensor) -> float:
    """Return the fraction of an (N,) mask that is true."""
    return int(mask.sum()) / len(mask)


def _attack_rescaled_scores(target: TargetModel, robust: Tensor, threat: ThreatModel, seed: int) -> int:
    """Attack the standardised scores, clear broken images in `robust` (M,), and return the number of passes."""
    index = robust.nonzero().flatten()
    if len(index) == 0:
        return 0
    found = measure_accuracy(
        StandardisedScores(target.network), target.images[index], target.labels[index], threat, _RESCALED_ATTACK, seed
    )
    robust[index] = correct_mask(target.network, found.outcome.images, target.labels[index])
    return found.passes


def _attack_single_scores(target: TargetModel, robust: Tensor, threat: ThreatModel, seed: int) -> int:
    """Lower the true score, then raise the highest others one by one; clear broken images and return the passes."""
    passes = 0
    for number in range(1 + _OTHER_SCORES):
        index = robust.nonzero().flatten()
        if len(index) == 0:
            break
        clean, labels = target.images[index], target.labels[index]
        scores = logits_of(target.network, clean, _BATCH).scatter(1, labels[:, None], -torch.inf)
        ranked = scores.argsort(1, descending=True)[:, min(max(number - 1, 0), scores.shape[1] - 2)]
        hypotheses, sign = (labels, 1.0) if number == 0 else (ranked, -1.0)
        objective = score_objective(target.network, labels, hypotheses, sign)
        found = minimise(
            objective, clean, threat, _SINGLE_SCORE_PGD, keyed_generator(seed, Purpose.ADAPTIVE_SCORES, number)
        )
        passes += found.passes
        robust[index] = correct_mask(target.network, found.images, labels)
    return passes


def _format_figure(figure: float | None) -> str:
    return "" if figure is None else f" ({figure:.3g})"
