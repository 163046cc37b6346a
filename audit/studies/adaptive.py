"""An attack that adapts to conditioned scores, its union with all others image by image, and images that transfer.

The union is of the audit tier, of losses on rescaled scores, of single scores, of images made against a substitute,
and of whatever else was tried at the radius. A single attack is believed where the union breaks hardly more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary import attack_checks as checks
from audit.adversary.accuracy import logits_of, measure_accuracy
from audit.adversary.attack_checks import UPPER_BOUND, Check, failed
from audit.adversary.gradient_checks import quick_checks
from audit.adversary.label_attack import LOSSES, LabelAttack, Stage, margin, never_done
from audit.adversary.pgd import PGD, minimise
from audit.adversary.robustness import SEARCHES, Robustness, Target, attacked, compared
from audit.adversary.threat import ThreatModel
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Judged, Labels, Objective

_BATCH = 256
_OTHERS = 3  # how many of the likeliest other hypotheses are raised by themselves
_SINGLE_SCORE = PGD(20, 0.15)
_RESCALED = LabelAttack((Stage("ce", PGD(40, 0.1, restarts=2)), Stage("margin", PGD(20, 0.15))))
_EXCESS = 0.01  # what the union may break beyond a single attack that is believed


class Crafted(NamedTuple):
    """Images (N, C, H, W) made against a substitute: how much of them it still gets right, which checks it failed."""

    attack: str
    threat: ThreatModel
    images: Images
    left: float
    failed: str


class Nearby(NamedTuple):
    """What is known at a radius already: masks (M,) of other attacks, and images (M, C, H, W) of a substitute."""

    masks: Sequence[Tensor] = ()
    images: Sequence[Images] = ()


class Adaptive(NamedTuple):
    """The union at one radius: which images (M,) are left, the audit tier with all checks, and who broke what."""

    threat: ThreatModel
    robust: Tensor
    tier: Robustness
    passes: int
    steps: str

    @property
    def verdict(self) -> str:
        """Return what may be called the union's number: measured, or an upper bound and which checks say so."""
        said = failed_checks(self.tier.checks)
        return f"{UPPER_BOUND}: {said}" if said else "measured"


class Spread(nn.Module):
    """A network whose scores are divided by their spread over the classes: scores far apart saturate a softmax.

    The answer is the network's own, because the divisor is positive.

    Source: Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks", section 4: a loss that does not change with the scores' scale and offset.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Images) -> Tensor:
        """Return the scores (N, K) of images (N, C, H, W), of deviation one in each row."""
        scores: Tensor = self.network(images)
        return scores / scores.std(1, keepdim=True, correction=0).clamp_min(1e-12)


def score_objective(network: nn.Module, labels: Labels, hypotheses: Labels, sign: float) -> Objective:
    """Return the objective that moves the score of one hypothesis an image alone: down with sign 1, up with -1.

    Where true and other pairs are scored apart, as by the Jensen-Shannon objective, the difference of two scores may
    be flat where one of them is not. `labels` and `hypotheses` are (N,).
    """

    def objective(images: Images, index: Tensor) -> Judged:
        scores = network(images)
        value = sign * scores.gather(1, hypotheses[index][:, None]).squeeze(1)
        return Judged(value, ~(margin(scores.detach(), labels[index]) > 0))

    return objective


def craft(substitute: Target, threat: ThreatModel, name: str, seed: int) -> Crafted:
    """Return images made against a substitute: the highest loss in the ball, not the first error.

    `name` is fgsm or pgd on the cross-entropy, or cw: the margin, the loss of Carlini & Wagner, in the whole ball,
    because images of smallest norm end on the substitute's own boundary and transfer to nobody.
    """
    loss, pgd = ("margin", PGD(40, 0.1)) if name == "cw" else ("ce", SEARCHES[name].pgd)
    objective = never_done(LOSSES[loss](substitute.network, substitute.labels))
    images = minimise(
        objective, substitute.images, threat, pgd, keyed_generator(seed, Purpose.TRANSFER_CRAFTING)
    ).images
    left = share(right(substitute.network, images, substitute.labels))
    made = quick_checks(substitute.network, substitute.images, substitute.labels, threat, seed)
    return Crafted(name, threat, images, left, failed_checks(made))


def adaptive(subject: Target, threat: ThreatModel, attack: LabelAttack, nearby: Nearby, seed: int) -> Adaptive:
    """Return what no attack breaks: tier, rescaled and single scores, transferred images, and the masks given, in turn.

    The searches run on what is still standing. All checks are made but 18; 16 with the transferred images.
    """
    tier = attacked(subject, threat, attack, seed)
    robust, passes = tier.accuracy.robust.clone(), tier.accuracy.passes
    told = [f"tier {share(robust):.3f}"]
    passes += _rescaled(subject, robust, threat, seed)
    told.append(f"rescaled scores {share(robust):.3f}")
    passes += _single_scores(subject, robust, threat, seed)
    told.append(f"single scores {share(robust):.3f}")
    moved = torch.ones_like(robust)
    for images in nearby.images:
        moved &= right(subject.network, images, subject.labels)
    crossed = (checks.transfer_breaks_nothing(robust, robust & moved),) if nearby.images else ()
    for mask in (moved, *nearby.masks):
        robust &= mask
    told.append(f"transfer and others {share(robust):.3f}")
    made = (*tier.checks, *compared(subject, threat, attack, seed), *crossed)
    return Adaptive(threat, robust, tier._replace(checks=made), passes, ", ".join(told))


def failed_checks(made: Sequence[Check], level: str = "trust") -> str:
    """Return the checks of a level that failed, in words; empty where none did."""
    return "; ".join(f"check {each.number}, {each.name}" + _figure(each.figure) for each in failed(made, level))


def excess(robust: Tensor, union: Tensor) -> float:
    """Return which share the union (M,) breaks that a single attack (N,) leaves, of the images both saw."""
    common = min(len(robust), len(union))
    return int((robust[:common] & ~union[:common]).sum()) / common


def believed(share_more: float, images: int) -> tuple[bool, str]:
    """Return whether a single attack is believed where the union breaks so much more, and the words.

    At most 1 % more; where that is less than one image, one image.
    """
    held = share_more <= max(_EXCESS, 1 / images)
    return held, f"{'holds' if held else 'too weak'}: the adaptive attack breaks {share_more:.1%} more"


def right(network: nn.Module, images: Images, labels: Labels) -> Tensor:
    """Return which images (N, C, H, W) a network names rightly: (N,) bool."""
    return margin(logits_of(network, images, _BATCH), labels) > 0


def share(mask: Tensor) -> float:
    """Return the share of an (N,) mask that is true."""
    return int(mask.sum()) / len(mask)


def _rescaled(subject: Target, robust: Tensor, threat: ThreatModel, seed: int) -> int:
    """Attack the scores divided by their spread, mark in `robust` (M,) what breaks, and return the passes."""
    index = robust.nonzero().flatten()
    if len(index) == 0:
        return 0
    found = measure_accuracy(Spread(subject.network), subject.images[index], subject.labels[index], threat, _RESCALED,
                             seed)  # fmt: skip
    robust[index] = right(subject.network, found.siege.images, subject.labels[index])
    return found.passes


def _single_scores(subject: Target, robust: Tensor, threat: ThreatModel, seed: int) -> int:
    """Lower the true score, and raise the likeliest others one by one; mark what breaks and return the passes."""
    passes = 0
    for number in range(1 + _OTHERS):
        index = robust.nonzero().flatten()
        if len(index) == 0:
            break
        clean, labels = subject.images[index], subject.labels[index]
        scores = logits_of(subject.network, clean, _BATCH).scatter(1, labels[:, None], -torch.inf)
        others = scores.argsort(1, descending=True)[:, min(max(number - 1, 0), scores.shape[1] - 2)]
        hypotheses, sign = (labels, 1.0) if number == 0 else (others, -1.0)
        objective = score_objective(subject.network, labels, hypotheses, sign)
        found = minimise(
            objective, clean, threat, _SINGLE_SCORE, keyed_generator(seed, Purpose.ADAPTIVE_SCORES, number)
        )
        passes += found.passes
        robust[index] = right(subject.network, found.images, labels)
    return passes


def _figure(figure: float | None) -> str:
    return "" if figure is None else f" ({figure:.3g})"
