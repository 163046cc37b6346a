"""Clean and adversarial accuracy of a classifier, measured by a label attack, with confidence intervals."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.fused import fused_copy
from audit.adversary.label_attack import (
    LOSSES,
    LabelAttack,
    Stage,
    margin,
    targeted_margin_objective,
)
from audit.adversary.passes import (
    DRAWS,
    Batches,
    MajorityVote,
    MeanOfDraws,
    frozen_parameters,
    outputs_of,
    outside_inference_mode,
    seeded_noise,
)
from audit.adversary.pgd import CLEAN_STEP, SearchResult, without_early_stopping
from audit.adversary.threat import ThreatModel
from audit.errors import InvalidModelError
from audit.proportion import Proportion, wilson
from audit.random_keys import Purpose, keyed_generator
from audit.types import (
    Images,
    Labels,
    Objective,
    as_images,
    as_labels,
    empty_pixels,
    image_slices,
    standard_torch_state,
)

_AT_ONCE = 128 << 20  # bytes of images that are attacked as one set: 10,000 of 32 pixels, or 222 of 224
_TOLERANCE = 1e-6  # by how much rounding may take an adversarial image out of its ball


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


@standard_torch_state()
def measure_accuracy(
    network: nn.Module,
    images: Images,
    labels: Labels,
    threat: ThreatModel,
    attack: LabelAttack,
    seed: int,
) -> Accuracy:
    """Measure clean and adversarial accuracy on images (N, C, H, W) with labels (N,).

    An image is robust if the network classifies it correctly, and every legal image that the attack returns for it. A
    returned image is evaluated by a plain forward pass of the network itself. Raises InvalidModelError if an output
    or a gradient is not finite.
    """

    def measure(some: Images, true: Labels) -> Accuracy:
        return _run(_StagedAttack(network, some, true, threat, attack, seed))

    return _in_parts(measure, as_images(images), as_labels(labels))


@standard_torch_state()
def measure_randomised(
    network: nn.Module,
    images: Images,
    labels: Labels,
    threat: ThreatModel,
    attack: LabelAttack,
    seed: int,
) -> Accuracy:
    """Measure the accuracies of a randomised network, by the majority vote of 20 draws an image.

    Searches follow the gradient of the mean over 20 draws and do not stop early. The result is no point estimate: the
    vote is drawn again for every image tried. Random numbers of the network are keyed by the seed.

    Source: Athalye et al. 2018, "Synthesizing Robust Adversarial Examples" (expectation over transformation).
    """
    # no fused copy: it would draw numbers of its own to be verified
    attack = replace(attack, fast=False)

    def measure(some: Images, true: Labels) -> Accuracy:
        staged = _StagedAttack(MajorityVote(network), some, true, threat, attack, seed)
        staged.searched, staged.randomised = MeanOfDraws(network), True
        return _run(staged)

    with seeded_noise(images.device, seed):
        found = _in_parts(measure, as_images(images), as_labels(labels))
    return found._replace(passes=DRAWS * found.passes, forwards=DRAWS * found.forwards)


def _in_parts(measure: Callable[[Images, Labels], Accuracy], images: Images, labels: Labels) -> Accuracy:
    """Return the accuracies on all images; large sets are attacked part by part, each as a set of its own."""
    if images.numel() * images.element_size() <= _AT_ONCE:
        return measure(images, labels)
    found, moved = list[Accuracy](), empty_pixels(images.shape, images)
    for part in image_slices(images):
        one = measure(images[part], labels[part])
        moved[part] = one.outcome.images
        found.append(one._replace(outcome=one.outcome._replace(images=moved[:0])))
    outcome = AttackOutcome(*(torch.cat(each) for each in zip(*(one.outcome for one in found), strict=True)))
    return Accuracy(
        natural=wilson(int(outcome.correct.sum()), len(labels)),
        adversarial=wilson(int(outcome.robust.sum()), len(labels)),
        robust=outcome.robust,
        passes=sum(one.passes for one in found),
        num_classes=found[0].num_classes,
        largest_share=float(labels.bincount().max()) / len(labels),
        forwards=sum(one.forwards for one in found),
        outcome=outcome._replace(images=moved),
        names=found[0].names,
    )


def _run(staged: "_StagedAttack") -> Accuracy:
    attack, labels = staged.attack, staged.labels
    if staged.threat.eps > 0:
        with frozen_parameters(staged.network):
            for number, stage in enumerate(attack.stages):
                staged.search(number, stage)
            staged.add_noise()
            staged.run_external(attack.gradient_free_name(staged.threat.norm))
            for stage in attack.thorough_in(staged.threat.norm):
                staged.search(staged.names.index(stage.name), stage)
            staged.run_external(*attack.borrowed)
    outcome, count = staged.outcome, len(labels)
    return Accuracy(
        natural=wilson(int(outcome.correct.sum()), count),
        adversarial=wilson(int(outcome.robust.sum()), count),
        robust=outcome.robust,
        passes=staged.passes,
        num_classes=staged.num_classes,
        largest_share=float(labels.bincount().max()) / count,
        forwards=staged.forwards,
        outcome=outcome,
        names=staged.names,
    )


class _StagedAttack:
    """The stages of an attack on one set of images, each on the survivors of the ones before."""

    def __init__(
        self, network: nn.Module, images: Images, labels: Labels, threat: ThreatModel, attack: LabelAttack, seed: int
    ) -> None:
        network, images, labels = outside_inference_mode(network), as_images(images), as_labels(labels)
        self.network, self.images, self.labels = network, images, labels
        self.threat, self.attack, self.seed = threat.within(images), attack, seed
        logits = logits_of(network, images, attack.batch_size)
        margins, self.num_classes = margin(logits, labels), logits.shape[1]
        unbroken = torch.full_like(labels, CLEAN_STEP)
        correct = margins > 0
        self.outcome = AttackOutcome(
            correct, correct.clone(), unbroken, unbroken.clone(), margins.clone(), images.clone()
        )
        # other classes in order of their logits, (N, K - 1)
        self.other_classes = logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
        self.names = attack.names_in(threat.norm)
        self.searched = fused_copy(network, images) if attack.fast else network
        self.randomised = False
        self.passes, self.forwards = 0, len(images)

    @property
    def survivors(self) -> Tensor:
        """The indices (A,) of the images that are still classified correctly."""
        return self.outcome.robust.nonzero().flatten()

    def search(self, number: int, stage: Stage) -> None:
        """Run one gradient-based stage on the survivors."""
        for rank in range(min(max(stage.targets, 1), self.num_classes - 1)):
            unconfirmed = self._search(number, stage, rank, self.survivors, self.searched)
            # search the network itself for images that only the fused copy misclassifies
            if self.searched is not self.network and not self.randomised:
                self._search(number, stage, rank, unconfirmed, self.network)

    def _search(self, number: int, stage: Stage, rank: int, index: Tensor, network: nn.Module) -> Tensor:
        """Search for images of indices (A,), and return the indices of those broken on the searched network alone."""
        if len(index) == 0:
            return index

        def objective_of(loss: str) -> Objective:
            if loss == "targeted":
                objective = targeted_margin_objective(network, self.labels[index], self.other_classes[index, rank])
            else:
                objective = LOSSES[loss](network, self.labels[index])
            return without_early_stopping(objective) if self.randomised else objective

        generator = keyed_generator(self.seed, Purpose.LABEL_ATTACK, number, rank)
        found = stage.search(objective_of, self.images[index], self.threat, generator)
        self.passes, self.forwards = self.passes + found.passes, self.forwards + found.forwards
        broken = self._evaluate(index, found.images, number, found)
        return index[found.done & ~broken]

    def add_noise(self) -> None:
        """Evaluate random vertices of the ball around the survivors."""
        generator = keyed_generator(self.seed, Purpose.CANDIDATE_NOISE)
        for _ in range(self.attack.noise):
            # drawn for all images, so that the draws do not depend on the survivors
            directions = torch.randn(self.images.shape, generator=generator).to(self.images)
            index = self.survivors
            if len(index) == 0:
                return
            clean = self.images[index]
            vertices = self.threat.step(clean, directions[index], clean, self.threat.eps)
            self._evaluate(index, vertices, len(self.attack.stages))

    def run_external(self, *chosen: str) -> None:
        """Run the gradient-free attack or those of other packages, by name, on the survivors."""
        gradient_free = self.attack.gradient_free_name(self.threat.norm)
        for number, name in enumerate(self.names):
            index = self.survivors
            if name not in chosen or len(index) == 0:
                continue
            from audit.adversary.external import external_attack, gradient_free_attack

            attack = (
                gradient_free_attack(self.threat, self.attack.queries)
                if name == gradient_free
                else external_attack(name)
            )
            # the mean over draws for randomised networks: votes are piecewise constant
            network = self.searched if self.randomised else self.network
            found = attack(network, self.images[index], self.labels[index], self.threat, self.seed)
            self.passes, self.forwards = self.passes + found.backwards, self.forwards + found.forwards - found.backwards
            self._evaluate(index, found.images, number)

    def _evaluate(self, index: Tensor, candidates: Images, number: int, found: SearchResult | None = None) -> Tensor:
        """Update the outcome from candidates (A, C, H, W) of stage `number`, and return which are adversarial, (A,)."""
        legal = self.threat.distance(candidates, self.images[index]) <= self.threat.eps + _TOLERANCE
        low, high = self.threat.pixel_range
        legal &= ((candidates >= low) & (candidates <= high)).flatten(1).all(1)
        margins = margin(logits_of(self.network, candidates, self.attack.batch_size), self.labels[index])
        self.forwards += len(index)
        margins = torch.where(legal, margins, torch.inf)
        smaller, broken, outcome = margins < self.outcome.margin[index], ~(margins > 0), self.outcome
        outcome.margin[index[smaller]], outcome.images[index[smaller]] = margins[smaller], candidates[smaller]
        outcome.robust[index[broken]] = False
        outcome.stage[index[broken]] = number
        outcome.step[index[broken]] = found.step[broken] if found else 0
        return broken
