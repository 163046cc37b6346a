"""The images of an attack: the outcome of each so far, and which are left and within reach."""

from math import inf

import torch
from torch import Tensor, nn

from audit.adversary.fused import fused_copy
from audit.adversary.label_attack import LabelAttack, margin
from audit.adversary.passes import outside_inference_mode
from audit.adversary.pgd import CLEAN_STEP, SearchResult
from audit.adversary.staged.outcome import AttackOutcome, logits_of
from audit.adversary.staged.reach import Reach
from audit.adversary.threat import ThreatModel
from audit.types import Images, Labels, as_images, as_labels

_TOLERANCE = 1e-6  # by how much rounding may take an adversarial image out of its ball


class AttackedImages:
    """Images (N, C, H, W) with labels (N,) under an attack; `outcome` is updated candidate by candidate.

    Searches follow the gradients of `searched`, a fused copy of the network if there is one that agrees.
    """

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
        self.reach = Reach(margins.clone())

    @property
    def survivors(self) -> Tensor:
        """The indices (A,) of the images that are still classified correctly."""
        return self.outcome.robust.nonzero().flatten()

    def within(self, limit: float) -> Tensor:
        """Return the indices (A,) of the survivors within reach, or of all in norms without that rule."""
        if limit == inf or not self.attack.reaches_in(self.threat.norm):
            return self.survivors
        return (self.outcome.robust & self.reach.within(self.outcome.margin, limit)).nonzero().flatten()

    def evaluate(self, index: Tensor, candidates: Images, number: int, found: SearchResult | None = None) -> Tensor:
        """Update the outcome from candidates (A, C, H, W) of stage `number`, and return their margins (A,).

        A candidate that is not legal has an infinite margin.
        """
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
        return margins
