"""The stages of an attack on one set of images, each on the survivors of the ones before."""

from math import inf

import torch
from torch import Tensor, nn

from audit.adversary.external_adapter import ExternalAttack
from audit.adversary.label_attack import LOSSES, NearStage, Stage, targeted_margin_objective
from audit.adversary.passes import frozen_parameters
from audit.adversary.pgd import minimise, without_early_stopping
from audit.adversary.staged.images import AttackedImages
from audit.adversary.staged.outcome import Accuracy
from audit.proportion import wilson
from audit.random_keys import Purpose, keyed_generator
from audit.types import Objective

FEW_VERTICES, FEW_QUERIES = 10, 60  # of every survivor; where they break none, the rest is for images within reach
_REST = 0.25  # that reach


class StagedAttack(AttackedImages):
    """The stages of an attack on images (N, C, H, W) with labels (N,)."""

    def run(self) -> Accuracy:
        """Run all stages, and return the accuracies."""
        if self.threat.eps > 0:
            with frozen_parameters(self.network):
                self._run_stages()
        outcome, count = self.outcome, len(self.labels)
        return Accuracy(
            natural=wilson(int(outcome.correct.sum()), count),
            adversarial=wilson(int(outcome.robust.sum()), count),
            robust=outcome.robust,
            passes=self.passes,
            num_classes=self.num_classes,
            largest_share=float(self.labels.bincount().max()) / count,
            forwards=self.forwards,
            outcome=outcome,
            names=self.names,
        )

    def _run_stages(self) -> None:
        attack, norm = self.attack, self.threat.norm
        drawn, noise = 0, keyed_generator(self.seed, Purpose.CANDIDATE_NOISE)
        for number, stage in enumerate(attack.stages_in(norm)):
            if not drawn and isinstance(stage, NearStage) and stage.reach < inf:
                drawn = min(FEW_VERTICES, attack.noise)
                self._add_noise(drawn, inf, noise)
            self._search_all(number, stage)
        self._add_noise(attack.noise - drawn, _REST, noise)
        self._run_gradient_free()
        for stage in attack.thorough_in(norm):
            self._search_all(self.names.index(stage.name), stage)
        for name in attack.borrowed:
            from audit.adversary.external import external_attack

            self._run_external(external_attack(name), self.names.index(name), self.survivors)

    def _search_all(self, number: int, stage: Stage) -> None:
        """Run one gradient-based stage on the survivors within its reach."""
        limit = stage.reach if isinstance(stage, NearStage) else inf
        for rank in range(min(max(stage.targets, 1), self.num_classes - 1)):
            unconfirmed = self._search(number, stage, rank, self.within(limit), self.searched)
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
        clean = self.images[index]
        if isinstance(stage, NearStage):
            start = self.outcome.images[index] if stage.resume else None
            found = minimise(objective_of(stage.loss), clean, self.threat, stage.pgd, generator, start)
        else:
            found = stage.search(objective_of, clean, self.threat, generator)
        self.passes, self.forwards = self.passes + found.passes, self.forwards + found.forwards
        margins = self.evaluate(index, found.images, number, found)
        return index[found.done & (margins > 0)]

    def _add_noise(self, count: int, limit: float, generator: torch.Generator) -> None:
        """Evaluate random vertices of the ball around the survivors within reach, of all if noise broke any before."""
        number = len(self.attack.stages_in(self.threat.norm))
        limit = inf if (self.outcome.stage == number).any() else limit
        for _ in range(count):
            index = self.within(limit)
            if len(index) == 0:
                return
            # drawn for all images, so that the draws do not depend on the survivors
            directions = torch.randn(self.images.shape, generator=generator).to(self.images)
            clean = self.images[index]
            vertices = self.threat.step(clean, directions[index], clean, self.threat.eps)
            self.reach.compare(index, self.evaluate(index, vertices, number))

    def _run_gradient_free(self) -> None:
        """Run the gradient-free attack: few queries on every survivor, and all if these break any image."""
        queries, norm = self.attack.queries, self.threat.norm
        if not queries:
            return
        from audit.adversary.external import gradient_free_attack

        number, limit = self.names.index(self.attack.gradient_free_name(norm)), inf
        if self.attack.reaches_in(norm) and queries > FEW_QUERIES:
            self._run_external(gradient_free_attack(self.threat, FEW_QUERIES), number, self.survivors)
            limit = inf if (self.outcome.stage == number).any() else _REST
        self._run_external(gradient_free_attack(self.threat, queries), number, self.within(limit))

    def _run_external(self, attack: ExternalAttack, number: int, index: Tensor) -> None:
        """Run an attack that is no gradient-based stage of ours on images of indices (A,)."""
        if len(index) == 0:
            return
        # the mean over draws for randomised networks: votes are piecewise constant
        network = self.searched if self.randomised else self.network
        found = attack(network, self.images[index], self.labels[index], self.threat, self.seed)
        self.passes, self.forwards = self.passes + found.backwards, self.forwards + found.forwards - found.backwards
        self.evaluate(index, found.images, number)
