"""Adversarial robustness of a classifier: accuracies under attack, checks of the attack, and accuracy against eps."""

from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary import comparison_checks as comparison
from audit.adversary.accuracy import measure_accuracy, measure_randomised
from audit.adversary.attack_checks import Check, randomised, trustworthy
from audit.adversary.gradient_checks import first_correct, grey_covering_eps, is_randomised, quick_checks
from audit.adversary.label_attack import TIERS, LabelAttack, Stage, margin, margin_objective
from audit.adversary.memory.batch_size import fitting_batches
from audit.adversary.memory.stages import needed, stage
from audit.adversary.passes import (
    MajorityVote,
    MeanOfDraws,
    frozen_parameters,
    outputs_of,
    outside_inference_mode,
    seeded_noise,
)
from audit.adversary.pgd import PGD, minimise
from audit.adversary.staged.outcome import Accuracy, logits_of
from audit.adversary.threat import ThreatModel, threat_model
from audit.proportion import Proportion, wilson
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels, as_images, as_labels, standard_torch_state

EPS_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
_RECHECKED = 100  # images broken without a gradient for which gradient-based searches are repeated
_HALVINGS = 4


class Robustness(NamedTuple):
    """Accuracies under an attack, and the checks of the attack."""

    accuracy: Accuracy
    checks: tuple[Check, ...]

    @property
    def trustworthy(self) -> bool:
        """Whether no check of level "trust" failed; if one did, the adversarial accuracy is an upper bound only."""
        return trustworthy(self.checks)


@dataclass(frozen=True)
class TargetModel:
    """A network with the labelled images it is attacked on: images (N, C, H, W), labels (N,).

    Images and labels may be given as tensors, NumPy arrays or lists. `randomised` marks a network known to have random
    outputs. Raises MismatchError for images and labels that are no arrays of numbers.
    """

    network: nn.Module
    images: Images
    labels: Labels
    randomised: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", outside_inference_mode(self.network))
        device = next((each.device for each in self.network.parameters()), None)
        for name, convert in (("images", as_images), ("labels", as_labels)):
            given = getattr(self, name)
            # tensors must be where the network is; arrays and lists are nowhere
            object.__setattr__(self, name, convert(given) if isinstance(given, Tensor) else convert(given).to(device))

    def subset(self, index: Tensor) -> "TargetModel":
        """Return the target with some of the images, by their indices (M,)."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    @standard_torch_state()
    def detect_randomness(self, seed: int) -> "TargetModel":
        """Return the target with `randomised` measured on its first images."""
        return replace(self, randomised=is_randomised(self.network, self.images, seed))

    @property
    def searched(self) -> nn.Module:
        """The network whose gradient searches follow: the mean over draws if it is randomised."""
        return MeanOfDraws(self.network) if self.randomised else self.network

    @property
    def evaluated(self) -> nn.Module:
        """The network that gives the predicted class: the majority vote of draws if it is randomised."""
        return MajorityVote(self.network) if self.randomised else self.network


@standard_torch_state()
def evaluate_robustness(target: TargetModel, threat: ThreatModel, attack: LabelAttack, seed: int) -> Robustness:
    """Measure clean and adversarial accuracy of a network, and check whether the attack can be trusted.

    `target` holds a network in eval mode, images (N, C, H, W) in [0, 1] with N > 0 and labels (N,); `threat.eps` is in
    pixel units, and `seed` keys every random number. Returned are accuracies with 95 % Wilson intervals, the outcome of
    every image (N,), and the checks of gradients and outputs, with `random_noise` and `gradient_free_attack` if the
    attack has such stages; no check is made at eps 0. A network that fails the check `determinism` is attacked through
    its mean output and evaluated by the majority vote of 20 draws.

    Raises InvalidModelError if an output or gradient of the network is not finite, or if the attack finds no gradient;
    EnvironmentFault if an attack of another package is not installed.

    Source: Carlini et al. 2019, "On Evaluating Adversarial Robustness".
    """
    with fitting_batches(target.network, target.images):
        return _evaluated(target, threat, attack, seed)


def _evaluated(target: TargetModel, threat: ThreatModel, attack: LabelAttack, seed: int) -> Robustness:
    data = (target.network, target.images, target.labels)
    if threat.eps == 0:
        return Robustness(measure_accuracy(*data, threat, attack, seed), ())
    threat = threat.within(target.images)
    with stage("checks of the attack"), frozen_parameters(target.network):
        quick = quick_checks(*data, threat, seed)
    target = replace(target, randomised=randomised(quick))
    with stage("attack"):
        accuracy = measure_target(target, threat, attack, seed)
        needed(accuracy.passes + accuracy.forwards)
    checking = stage("checks of the attack")
    with checking, frozen_parameters(target.network), seeded_noise(target.images.device, seed):
        mean = TargetModel(target.searched, target.images, target.labels)
        return Robustness(accuracy, (*quick, *_masking_checks(mean, threat, accuracy, attack, seed)))


def measure_target(target: TargetModel, threat: ThreatModel, attack: LabelAttack, seed: int) -> Accuracy:
    """Return the accuracies of a target under an attack, by the majority vote if it is randomised."""
    measure = measure_randomised if target.randomised else measure_accuracy
    with fitting_batches(target.searched, target.images):  # the mean over draws holds the activations of all draws
        return measure(target.network, target.images, target.labels, threat, attack, seed)


def _masking_checks(
    target: TargetModel, threat: ThreatModel, accuracy: Accuracy, attack: LabelAttack, seed: int
) -> list[Check]:
    """Check for images that only attacks without a gradient break, even after ten more gradient-based searches."""
    found, outcome, gradient_free = [], accuracy.outcome, attack.gradient_free_name(threat.norm)
    for number, name in enumerate(accuracy.names):
        if name not in (f"noise-{attack.noise}", gradient_free):
            continue
        before = outcome.robust | (outcome.stage >= number)
        after = before & ~(outcome.stage == number)
        newly_broken = (before & ~after).nonzero().flatten()[:_RECHECKED]
        after[_broken_by_gradient(target, threat, newly_broken, seed)] = True
        if name == gradient_free and threat.norm != "linf":
            left = newly_broken[~after[newly_broken]]
            after[_broken_from_halfway(target.subset(left), outcome.images[left], threat, left, seed)] = True
        if name == gradient_free:
            found.append(comparison.check_gradient_free(before, after, attack.queries))
        else:
            found.append(comparison.check_noise(before, after))
    return found


def _broken_by_gradient(target: TargetModel, threat: ThreatModel, index: Tensor, seed: int) -> Tensor:
    """Return which of some images (A,) stronger gradient-based searches break, too: these are not masked."""
    if len(index) == 0:
        return index
    few, search = target.subset(index), PGD(40, 0.1, restarts=5)
    robust = [_robust(few, threat, seed, stage) for stage in (Stage("margin", search), Stage("ce", search))]
    return index[~(robust[0] & robust[1])]


def _broken_from_halfway(few: TargetModel, broken: Images, threat: ThreatModel, index: Tensor, seed: int) -> Tensor:
    """Return which of some images (A,) a descent breaks, too, from halfway to their gradient-free adversarial images.

    Finite differences over long distances find adversarial images behind local minima of the margin, where no gradient
    is masked. The descent starts halfway, or nearer to the clean image until the label is still correct.
    """
    if len(index) == 0:
        return index
    start, share = few.images, torch.full_like(few.labels, 0.5, dtype=torch.float32)
    for _ in range(_HALVINGS):
        start = few.images + share.view(-1, 1, 1, 1) * (broken - few.images)
        adversarial = ~(margin(logits_of(few.network, start, _RECHECKED), few.labels) > 0)
        share = torch.where(adversarial, share / 2, share)
    search, generator = PGD(40, 0.05), keyed_generator(seed, Purpose.HALVING_SEARCH)
    objective = margin_objective(few.network, few.labels)
    found = minimise(objective, few.images, threat, search, generator, threat.project(start, few.images))
    return index[found.done & (found.step > 0)]  # a start that is already adversarial is no evidence


@standard_torch_state()
def compare_attacks(target: TargetModel, threat: ThreatModel, attack: LabelAttack, seed: int) -> tuple[Check, ...]:
    """Compare the attack with weaker and stronger ones, on the first 100 images that are classified correctly.

    Randomised networks are treated as in `evaluate_robustness`. No check is made if no image is classified correctly,
    or if eps is 0.

    Source: Carlini et al. 2019, "On Evaluating Adversarial Robustness".
    """
    with seeded_noise(target.images.device, seed):
        target = target.detect_randomness(seed)
        few = target.subset(first_correct(target.evaluated, target.images, target.labels))
        return _comparison_checks(few, threat, attack, seed) if len(few.images) and threat.eps > 0 else ()


def _comparison_checks(few: TargetModel, threat: ThreatModel, attack: LabelAttack, seed: int) -> tuple[Check, ...]:
    robust = partial(_robust, few, threat, seed)
    clean = margin(logits_of(few.searched, few.images, attack.batch_size), few.labels)
    short, long = PGD(20, 0.15), PGD(40, 0.15)
    cross_entropy, margins = robust(Stage("ce", short)), robust(Stage("margin", short))
    # rescaled to a median margin of one: large logits saturate the cross-entropy
    scaled = replace(few, network=_ScaledLogits(few.network, 1 / float(clean.abs().median())))
    rescaled = _robust(scaled, threat, seed, Stage("ce", short))
    whole = measure_target(few, threat, attack, seed).robust
    return (
        comparison.check_single_step(robust(Stage("ce", PGD(1, 1.0, random_start=False))), whole),
        comparison.check_losses(cross_entropy, margins),
        comparison.check_rescaled_logits(cross_entropy, rescaled),
        comparison.check_more_steps(margins, robust(Stage("margin", long))),
        _convergence_check(few, threat, seed, long, float(clean.std(correction=0)) or 1.0),
        comparison.check_more_restarts(whole, whole & robust(Stage("margin", PGD(20, 0.15, restarts=5)))),
    )


def _robust(target: TargetModel, threat: ThreatModel, seed: int, stage: Stage) -> Tensor:
    return measure_target(target, threat, LabelAttack((stage,)), seed).robust


class _ScaledLogits(nn.Module):
    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor
        self.eval()

    def forward(self, images: Images) -> Tensor:
        return self.factor * outputs_of(self.network, images)


def _convergence_check(target: TargetModel, threat: ThreatModel, seed: int, pgd: PGD, spread: float) -> Check:
    """Check the convergence of the margin, in standard deviations of the clean margins, over the last ten steps."""
    shorter = PGD(pgd.steps - 10, pgd.relative_step, pgd.random_start)
    found = []
    for search in (shorter, pgd):
        objective = margin_objective(target.searched, target.labels)
        generator = keyed_generator(seed, Purpose.CONVERGENCE_CHECK)  # the same start
        found.append(minimise(objective, target.images, threat, search, generator))
    surviving = ~found[1].done
    earlier, final = (-each.value[surviving] / spread for each in found)
    return comparison.check_loss_convergence(earlier, final)


class EpsPoint(NamedTuple):
    """The adversarial accuracy at one radius, with its Wilson interval."""

    eps: float
    accuracy: Proportion


class EpsCurve(NamedTuple):
    """Adversarial accuracy against eps: one point for each radius, in ascending order, with the checks and the cost.

    `smallest` (N,) is the smallest radius that broke each image, inf if none did.
    """

    points: tuple[EpsPoint, ...]
    smallest: Tensor
    checks: tuple[Check, ...]
    passes: int
    forwards: int


@standard_torch_state()
def measure_eps_curve(
    target: TargetModel, threat: ThreatModel, seed: int, multiples: tuple[float, ...] = EPS_MULTIPLES
) -> EpsCurve:
    """Measure adversarial accuracy at multiples of the threat model's radius, each by the attack tier "smoke".

    Radii are limited to the one that covers a grey image. An image broken in a small ball counts as broken in every
    larger one; the checks compare the results of the separate attacks.
    """
    attack, target = TIERS["smoke"], target.detect_randomness(seed)
    largest = grey_covering_eps(threat, target.images)
    radii = sorted({min(multiple * threat.eps, largest) for multiple in multiples})
    smallest = torch.full(target.labels.shape, inf, device=target.labels.device)
    counts: dict[float, int] = {}
    points, passes, forwards = [], 0, 0
    for eps in radii:
        found = measure_target(target, threat_model(threat.norm, eps), attack, seed)
        counts[eps] = int(found.robust.sum())
        passes, forwards = passes + found.passes, forwards + found.forwards
        smallest[~found.outcome.correct] = 0.0
        smallest[~found.robust] = smallest[~found.robust].clamp_max(eps)
        points.append(EpsPoint(eps, wilson(int((smallest > eps).sum()), len(smallest))))
    return EpsCurve(tuple(points), smallest, comparison.check_eps_curve(counts, largest), passes, forwards)
