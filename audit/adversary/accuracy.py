"""Clean and adversarial accuracy of a classifier, measured by a label attack, with confidence intervals."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from audit.adversary.label_attack import LabelAttack
from audit.adversary.passes import DRAWS, MajorityVote, MeanOfDraws, seeded_noise
from audit.adversary.staged.outcome import Accuracy, AttackOutcome
from audit.adversary.threat import ThreatModel
from audit.proportion import wilson
from audit.types import Images, Labels, as_images, as_labels, empty_pixels, image_slices, standard_torch_state

_AT_ONCE = 128 << 20  # bytes of images that are attacked as one set: 10,000 of 32 pixels, or 222 of 224


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

    from audit.adversary.staged.attack import StagedAttack

    def measure(some: Images, true: Labels) -> Accuracy:
        return StagedAttack(network, some, true, threat, attack, seed).run()

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
    from audit.adversary.staged.attack import StagedAttack

    # no fused copy: it would draw numbers of its own to be verified
    attack = replace(attack, fast=False)

    def measure(some: Images, true: Labels) -> Accuracy:
        staged = StagedAttack(MajorityVote(network), some, true, threat, attack, seed)
        staged.searched, staged.randomised = MeanOfDraws(network), True
        return staged.run()

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
