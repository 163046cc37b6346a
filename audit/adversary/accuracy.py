"""Natural and adversarial accuracy of a classifier, measured, with intervals."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.batching import Batches
from audit.adversary.fused import faster
from audit.adversary.label_attack import (
    LOSSES,
    LabelAttack,
    Stage,
    margin,
    never_done,
    search,
    targeted_margin_objective,
)
from audit.adversary.pgd import NEVER, Found
from audit.adversary.stochastic import DRAWS, Majority, MeanOfDraws, own_randomness
from audit.adversary.threat import ThreatModel
from audit.errors import InvalidModelError
from audit.proportion import Proportion, wilson
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels

_ROUNDING = 1e-6  # by how much a broken image may leave its ball


class Siege(NamedTuple):
    """What became of each image (N,): right at all, still right, by which stage (-1: none) and at which step it was
    lost, the smallest margin that the network itself confirmed, and the images (N, C, H, W) that have it."""

    correct: Tensor
    robust: Tensor
    stage: Tensor
    step: Tensor
    margin: Tensor
    images: Images


class Accuracy(NamedTuple):
    """What the label attack measured: natural, adversarial, which images stayed right (N,), the passes spent,
    and of what the images are: how many classes, and the share of the largest.

    `passes` counts forward+backward passes of single images, `forwards` those without a backward one. `names` are
    the stages that `siege` counts by.
    """

    natural: Proportion
    adversarial: Proportion
    robust: Tensor
    passes: int
    num_classes: int
    largest_share: float
    forwards: int
    siege: Siege
    names: tuple[str, ...]


@torch.no_grad()
def logits_of(network: nn.Module, images: Images, batch_size: int) -> Tensor:
    """Return the network's outputs for all images, (N, K); raises InvalidModelError where one is not finite.

    The argmax of a row with a NaN is a class, so such a network would seem to score.
    """
    logits = Batches(batch_size).run(network, images)
    bad = int((~logits.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise InvalidModelError(f"the network's output is not finite for {bad} of {len(images)} images")
    return logits


def measure_accuracy(
    network: nn.Module,
    images: Images,
    labels: Labels,
    threat: ThreatModel,
    attack: LabelAttack,
    seed: int,
) -> Accuracy:
    """Return natural and adversarial accuracy on the given images.

    An image counts as robust when the network names its class on the clean image and on every image that a stage
    ended with; a "broken" verdict is given by a plain forward pass of the network itself on a legal image.
    """
    return _measured(_Assault(network, images, labels, threat, attack, seed))


def measure_randomised(
    network: nn.Module,
    images: Images,
    labels: Labels,
    threat: ThreatModel,
    attack: LabelAttack,
    seed: int,
) -> Accuracy:
    """Return what `measure_accuracy` does, of a network that draws at random, by the majority of 20 draws an image.

    Searches follow the gradient of the mean over as many, and go on where they seem to have won. No point estimate: a
    verdict is drawn again for every image tried. The noise is keyed by the seed.
    """
    with own_randomness(images.device, seed):
        # rounding is no matter beside the draws, and a folded copy would draw by itself
        assault = _Assault(Majority(network), images, labels, threat, replace(attack, fast=False), seed)
        assault.searched, assault.randomised = MeanOfDraws(network), True
        found = _measured(assault)
    return found._replace(passes=DRAWS * found.passes, forwards=DRAWS * found.forwards)


def _measured(assault: "_Assault") -> Accuracy:
    attack, labels = assault.attack, assault.labels
    if assault.threat.eps > 0:
        for number, stage in enumerate(attack.stages):
            assault.search(number, stage)
        assault.noise()
        assault.borrowed()
    siege, count = assault.siege, len(labels)
    natural, adversarial = (wilson(int(right.sum()), count) for right in (siege.correct, siege.robust))
    share = float(labels.bincount().max()) / count
    return Accuracy(natural, adversarial, siege.robust, assault.passes, assault.num_classes, share, assault.forwards,
                    siege, assault.names)  # fmt: skip


class _Assault:
    """The stages of one attack on one set of images, and what is still standing."""

    def __init__(
        self, network: nn.Module, images: Images, labels: Labels, threat: ThreatModel, attack: LabelAttack, seed: int
    ) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.threat, self.attack, self.seed = threat, attack, seed
        logits = logits_of(network, images, attack.batch_size)
        margins, self.num_classes = margin(logits, labels), logits.shape[1]
        nobody = torch.full_like(labels, NEVER)
        right = margins > 0
        self.siege = Siege(right, right.clone(), nobody, nobody.clone(), margins.clone(), images.clone())
        # the likeliest other classes first; a network of two classes has one
        self.others = logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
        self.names = attack.names_in(threat.norm)
        self.searched = faster(network, images) if attack.fast else network
        self.randomised = False
        self.passes, self.forwards = 0, len(images)

    @property
    def standing(self) -> Tensor:
        """The indices (A,) of the images that are still right."""
        return self.siege.robust.nonzero().flatten()

    def search(self, number: int, stage: Stage) -> None:
        """Run one stage on what is standing."""
        for rank in range(min(max(stage.targets, 1), self.num_classes - 1)):
            self._searched(number, stage, rank, self.standing, self.searched)
            # where the copy was mistaken about a broken image, the network itself is searched
            if self.searched is not self.network and not self.randomised:
                self._searched(number, stage, rank, self._mistaken, self.network)

    def _searched(self, number: int, stage: Stage, rank: int, index: Tensor, network: nn.Module) -> None:
        self._mistaken = index[:0]
        if len(index) == 0:
            return
        labels = self.labels[index]
        if stage.loss == "targeted":
            objective = targeted_margin_objective(network, labels, self.others[index, rank])
        else:
            objective = LOSSES[stage.loss](network, labels)
        objective = never_done(objective) if self.randomised else objective
        generator = keyed_generator(self.seed, Purpose.LABEL_ATTACK, number, rank)
        found = search(objective, self.images[index], self.threat, stage.pgd, generator)
        self.passes, self.forwards = self.passes + found.passes, self.forwards + found.forwards
        lost = self._confirm(index, found.images, number, found)
        self._mistaken = index[found.done & ~lost]

    def noise(self) -> None:
        """Try random corners of the ball."""
        generator = keyed_generator(self.seed, Purpose.CANDIDATE_NOISE)
        for _ in range(self.attack.noise):
            # drawn for all images, so that the draws do not depend on who is standing
            directions = torch.randn(self.images.shape, generator=generator).to(self.images)
            index = self.standing
            if len(index) == 0:
                return
            clean = self.images[index]
            corners = self.threat.step(clean, directions[index], clean, self.threat.eps)
            self._confirm(index, corners, len(self.attack.stages))

    def borrowed(self) -> None:
        """Let the attack of outputs only try its luck, then those of other packages."""
        asking = self.attack.asking_in(self.threat.norm)
        for number, name in enumerate(self.names):
            known = name == asking or name in self.attack.borrowed
            index = self.standing
            if not known or len(index) == 0:
                continue
            from audit.adversary.external import blind_attack, borrowed_attack

            attack = blind_attack(self.threat, self.attack.queries) if name == asking else borrowed_attack(name)
            # a randomised network is asked for the mean of its draws: votes jump
            network = self.searched if self.randomised else self.network
            found = attack(network, self.images[index], self.labels[index], self.threat, self.seed)
            self.passes, self.forwards = self.passes + found.backwards, self.forwards + found.forwards - found.backwards
            self._confirm(index, found.images, number)

    def _confirm(self, index: Tensor, candidates: Images, number: int, found: Found | None = None) -> Tensor:
        """Note which of the images (A,) their candidates lose, by the network itself, and return it (A,)."""
        legal = self.threat.distance(candidates, self.images[index]) <= self.threat.eps + _ROUNDING
        low, high = self.threat.pixel_range
        legal &= ((candidates >= low) & (candidates <= high)).flatten(1).all(1)
        margins = margin(logits_of(self.network, candidates, self.attack.batch_size), self.labels[index])
        self.forwards += len(index)
        margins = torch.where(legal, margins, torch.inf)
        smaller, lost, siege = margins < self.siege.margin[index], ~(margins > 0), self.siege
        siege.margin[index[smaller]], siege.images[index[smaller]] = margins[smaller], candidates[smaller]
        siege.robust[index[lost]] = False
        siege.stage[index[lost]] = number
        siege.step[index[lost]] = found.step[lost] if found else 0
        return lost
