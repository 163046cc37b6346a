"""How a classifier stands up to attacks, and whether these are to be believed: tiers, checks, ladders, transfer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary import attack_checks as checks
from audit.adversary.accuracy import Accuracy, logits_of, measure_accuracy, measure_randomised
from audit.adversary.attack_checks import Check
from audit.adversary.external import BORROWED
from audit.adversary.gradient_checks import draws, first_right, quick_checks, reaching_eps
from audit.adversary.label_attack import (
    TIERS,
    LabelAttack,
    Stage,
    cross_entropy_objective,
    margin,
    margin_objective,
    never_done,
)
from audit.adversary.minimum_norm import DDN, CarliniWagner, carlini_wagner, ddn
from audit.adversary.pgd import PGD, minimise
from audit.adversary.stochastic import Majority, MeanOfDraws, own_randomness
from audit.adversary.threat import ThreatModel, threat_model
from audit.errors import UnknownNameError, UsageError
from audit.proportion import Proportion, wilson
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels

LADDER = (0.25, 0.5, 1.0, 2.0, 4.0)
_SAMPLE = 100  # images that the attack is compared with itself on
_HALVINGS = 4


class Robustness(NamedTuple):
    """What an attack left standing, and the checks that say whether to believe it."""

    accuracy: Accuracy
    checks: tuple[Check, ...]

    @property
    def trustworthy(self) -> bool:
        """Whether no trust check failed; else the adversarial accuracy is an upper bound only."""
        return checks.trustworthy(self.checks)


@dataclass(frozen=True)
class Target:
    """A network, images (N, C, H, W) with their labels (N,), and whether the network is known to draw at random."""

    network: nn.Module
    images: Images
    labels: Labels
    draws: bool = False

    def part(self, index: Tensor) -> "Target":
        """Return some of the images, by their indices (M,)."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def looked_at(self, seed: int) -> "Target":
        """Return the same, after a look at whether the network draws at random."""
        return replace(self, draws=draws(self.network, self.images, seed))

    @property
    def led(self) -> nn.Module:
        """The network whose gradient searches follow: the mean of its draws where it draws."""
        return MeanOfDraws(self.network) if self.draws else self.network

    @property
    def judge(self) -> nn.Module:
        """The network that names classes: the majority of its draws where it draws."""
        return Majority(self.network) if self.draws else self.network


def attacked(subject: Target, threat: ThreatModel, attack: LabelAttack, seed: int) -> Robustness:
    """Return accuracies under an attack, with the checks that need little more than it met anyway.

    Those of the network's gradients and outputs (1 to 5, 7 and 8), and 14 and 15 where the attack tries noise or
    asks for outputs only. A network that fails check 8 is attacked through its mean and judged by the majority of its
    draws.
    """
    everything = (subject.network, subject.images, subject.labels)
    if threat.eps == 0:
        return Robustness(measure_accuracy(*everything, threat, attack, seed), ())
    quick = quick_checks(*everything, threat, seed)
    subject = replace(subject, draws=checks.randomised(quick))
    accuracy = _measured(subject, threat, attack, seed)
    with own_randomness(subject.images.device, seed):
        steady = Target(subject.led, subject.images, subject.labels)
        return Robustness(accuracy, (*quick, *_blind_checks(steady, threat, accuracy, attack, seed)))


def _measured(subject: Target, threat: ThreatModel, attack: LabelAttack, seed: int) -> Accuracy:
    measure = measure_randomised if subject.draws else measure_accuracy
    return measure(subject.network, subject.images, subject.labels, threat, attack, seed)


def _blind_checks(
    subject: Target, threat: ThreatModel, accuracy: Accuracy, attack: LabelAttack, seed: int
) -> list[Check]:
    """What attacks without a gradient broke that none finds, not even in ten more searches for these images."""
    found, siege, asking = [], accuracy.siege, attack.asking_in(threat.norm)
    for number, name in enumerate(accuracy.names):
        if name not in (f"noise-{attack.noise}", asking):
            continue
        before = siege.robust | (siege.stage >= number)
        after = before & ~(siege.stage == number)
        anew = (before & ~after).nonzero().flatten()[:_SAMPLE]
        after[_found_by_gradient(subject, threat, anew, seed)] = True
        if name == asking and threat.norm != "linf":
            left = anew[~after[anew]]
            after[_found_halfway(subject.part(left), siege.images[left], threat, left, seed)] = True
        if name == asking:
            found.append(checks.queries_gain_little(before, after, attack.queries))
        else:
            found.append(checks.noise_breaks_nothing(before, after))
    return found


def _found_by_gradient(subject: Target, threat: ThreatModel, index: Tensor, seed: int) -> Tensor:
    """Return which of a few images (A,) harder searches break too: these say that the attack was short, not misled."""
    if len(index) == 0:
        return index
    few, search = subject.part(index), PGD(40, 0.1, restarts=5)
    left = [_left(few, threat, seed, stage) for stage in (Stage("margin", search), Stage("ce", search))]
    return index[~(left[0] & left[1])]


def _found_halfway(few: Target, broken: Images, threat: ThreatModel, index: Tensor, seed: int) -> Tensor:
    """Return which of a few images (A,) a gradient finds too, once halfway to those of a wide-ranging search.

    The search by differences looks far beyond where a gradient does, and leaves hollows that a descent stays in. That
    masks nothing: from halfway, or from as far as the image is still right, an honest gradient leads on.
    """
    if len(index) == 0:
        return index
    start, share = few.images, torch.full_like(few.labels, 0.5, dtype=torch.float32)
    for _ in range(_HALVINGS):
        start = few.images + share.view(-1, 1, 1, 1) * (broken - few.images)
        lost = ~(margin(logits_of(few.network, start, _SAMPLE), few.labels) > 0)
        share = torch.where(lost, share / 2, share)
    search, generator = PGD(40, 0.05), keyed_generator(seed, Purpose.HALVING_SEARCH)
    objective = margin_objective(few.network, few.labels)
    found = minimise(objective, few.images, threat, search, generator, threat.project(start, few.images))
    return index[found.done & (found.step > 0)]  # a start that is lost already shows nothing


def compared(subject: Target, threat: ThreatModel, attack: LabelAttack, seed: int) -> tuple[Check, ...]:
    """Return checks 6 and 9 to 12: the attack beside weaker and stronger ones, on the first 100 images it gets right.

    A network that draws at random is searched through its mean and judged by the majority, as in `attacked`. Nothing
    applies where the network gets no image right, or eps is 0.
    """
    with own_randomness(subject.images.device, seed):
        known = subject.looked_at(seed)
        few = known.part(first_right(known.judge, known.images, known.labels))
        return _compared(few, threat, attack, seed) if len(few.images) and threat.eps > 0 else ()


def _compared(few: Target, threat: ThreatModel, attack: LabelAttack, seed: int) -> tuple[Check, ...]:
    left = partial(_left, few, threat, seed)
    clean = margin(logits_of(few.led, few.images, attack.batch_size), few.labels)
    once, settled = PGD(20, 0.15), PGD(40, 0.15)
    cross_entropy, margins = left(Stage("ce", once)), left(Stage("margin", once))
    # logits scaled so that the typical margin is one: where they are huge, cross-entropy has no gradient
    scaled = replace(few, network=_Scaled(few.network, 1 / float(clean.abs().median())))
    rescaled = _left(scaled, threat, seed, Stage("ce", once))
    whole = _measured(few, threat, attack, seed).robust
    return (
        checks.single_step_beaten(left(Stage("ce", PGD(1, 1.0, random_start=False))), whole),
        checks.losses_agree(cross_entropy, margins),
        checks.rescaling_gains_little(cross_entropy, rescaled),
        checks.steps_gain_little(margins, left(Stage("margin", settled))),
        _settling(few, threat, seed, settled, float(clean.std(correction=0)) or 1.0),
        checks.restarts_gain_little(whole, whole & left(Stage("margin", PGD(20, 0.15, restarts=5)))),
    )


def _left(subject: Target, threat: ThreatModel, seed: int, stage: Stage) -> Tensor:
    return _measured(subject, threat, LabelAttack((stage,)), seed).robust


class _Scaled(nn.Module):
    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor
        self.eval()

    def forward(self, images: Images) -> Tensor:
        return self.factor * self.network(images)


def _settling(subject: Target, threat: ThreatModel, seed: int, pgd: PGD, spread: float) -> Check:
    """Whether ten steps fewer would have found the same: of the margin, by the spread of margins on clean images."""
    fewer = PGD(pgd.steps - 10, pgd.relative_step, pgd.random_start)
    found = []
    for search in (fewer, pgd):
        objective = margin_objective(subject.led, subject.labels)
        generator = keyed_generator(seed, Purpose.CONVERGENCE_CHECK)  # the same start
        found.append(minimise(objective, subject.images, threat, search, generator))
    surviving = ~found[1].done
    earlier, final = (-each.value[surviving] / spread for each in found)
    return checks.loss_settled(earlier, final)


class Rung(NamedTuple):
    """One radius of a ladder: the accuracy under attack there, with its Wilson interval."""

    eps: float
    accuracy: Proportion


class Ladder(NamedTuple):
    """Accuracies by radius, the smallest radius that broke each image (N,), inf where none did, and check 18."""

    rungs: tuple[Rung, ...]
    smallest: Tensor
    checks: tuple[Check, ...]
    passes: int
    forwards: int


def climb(subject: Target, threat: ThreatModel, seed: int, multiples: tuple[float, ...] = LADDER) -> Ladder:
    """Return the accuracies at multiples of a threat model's radius, each measured on its own by the smoke tier.

    A radius beyond the one at which a ball holds a grey image is cut to it. An image broken in a small ball is broken
    in a larger one, so the rungs' accuracies count it; the check compares what each rung found by itself.
    """
    attack, subject = TIERS["smoke"], subject.looked_at(seed)
    most = reaching_eps(threat, subject.images)
    radii = sorted({min(multiple * threat.eps, most) for multiple in multiples})
    smallest = torch.full(subject.labels.shape, inf, device=subject.labels.device)
    counts: dict[float, int] = {}
    rungs, passes, forwards = [], 0, 0
    for eps in radii:
        ball = threat_model(threat.norm, eps)
        found = _measured(subject, ball, attack, seed)
        counts[eps] = int(found.robust.sum())
        passes, forwards = passes + found.passes, forwards + found.forwards
        smallest[~found.siege.correct] = 0.0
        smallest[~found.robust] = smallest[~found.robust].clamp_max(eps)
        rungs.append(Rung(eps, wilson(int((smallest > eps).sum()), len(smallest))))
    return Ladder(tuple(rungs), smallest, checks.never_rises(counts, most), passes, forwards)


def transferred(sources: Mapping[str, Target], threat: ThreatModel, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return, for each source and target, which images (N,) the target names rightly after an attack on the source.

    The attack takes the highest loss in the ball, not the first error: such images transfer better.
    """
    known = {name: subject.looked_at(seed) for name, subject in sources.items()}
    moved = {name: _hardest(subject, threat, seed) for name, subject in known.items()}
    return {
        source: {target: _right(other, images, seed) for target, other in known.items()}
        for source, images in moved.items()
    }


def _hardest(subject: Target, threat: ThreatModel, seed: int) -> Images:
    objective, pgd = never_done(cross_entropy_objective(subject.led, subject.labels)), PGD(20, 0.15)
    with own_randomness(subject.images.device, seed):
        return minimise(objective, subject.images, threat, pgd, keyed_generator(seed, Purpose.TRANSFER_ATTACK)).images


def _right(subject: Target, images: Images, seed: int) -> Tensor:
    with own_randomness(images.device, seed):
        return margin(logits_of(subject.judge, images, 256), subject.labels) > 0


class Alone(NamedTuple):
    """What one attack by itself left standing: a share with its interval, which images (N,), and what it cost."""

    name: str
    accuracy: Proportion
    robust: Tensor
    passes: int
    forwards: int


def alone(name: str, subject: Target, threat: ThreatModel, seed: int) -> Alone:
    """Return what one attack does by its name; `autoattack` is the standard one.

    Attacks of smallest norm break an image where the norm they reach is within eps. Raises UnknownNameError with the
    nearest legal names, UsageError for an attack that does not know the threat model's norm.
    """
    name = _SHORT.get(name, name)
    if name in NEAREST:
        return _nearest(name, subject, threat, seed)
    if name not in ATTACKS:
        raise UnknownNameError("attack", name, ATTACKS)
    attack = LabelAttack((SEARCHES[name],)) if name in SEARCHES else LabelAttack(borrowed=(name,))
    found = _measured(subject.looked_at(seed), threat, attack, seed)
    return Alone(name, found.adversarial, found.robust, found.passes, found.forwards)


def _nearest(name: str, subject: Target, threat: ThreatModel, seed: int) -> Alone:
    if threat.norm != "l2":
        raise UsageError(
            f"{name} looks for the smallest l2 change, and the threat model is {threat.norm}; use --norm l2"
        )
    with own_randomness(subject.images.device, seed):
        found = NEAREST[name](subject.network, subject.images, subject.labels)
    robust = ~found.broken(threat.eps)
    return Alone(name, wilson(int(robust.sum()), len(robust)), robust, found.passes, 0)


SEARCHES = {
    "fgsm": Stage("ce", PGD(1, 1.0, random_start=False)),
    "bim": Stage("ce", PGD(10, 0.1, random_start=False)),
    "pgd": Stage("ce", PGD(20, 0.15)),
    "margin": Stage("margin", PGD(20, 0.15)),
}
NEAREST = {"cw": partial(carlini_wagner, settings=CarliniWagner()), "ddn": partial(ddn, settings=DDN())}
ATTACKS = (*SEARCHES, *NEAREST, *BORROWED)
_SHORT = {"autoattack": "autoattack-standard"}
