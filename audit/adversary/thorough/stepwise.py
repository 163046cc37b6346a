"""Searches that move every image by steps until it is done, whatever a step is."""

from abc import ABC, abstractmethod
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.passes import Batches, input_gradient
from audit.adversary.pgd import PGD
from audit.types import Images, Objective, ObjectiveValue


class Evaluated(NamedTuple):
    """Images (A, C, H, W), their objective and its gradient (A, C, H, W)."""

    images: Images
    found: ObjectiveValue
    gradient: Tensor


class StepwiseSearch(ABC):
    """State of a search: the objective, clean and current images (N, C, H, W), and which images are done, (N,)."""

    objective: Objective
    clean: Images
    images: Images
    done: Tensor

    def run(self, pgd: PGD) -> tuple[int, int]:
        """Take at most `pgd.steps` steps, evaluate the last images, and return the passes and forward passes spent."""
        batches, passes = Batches(pgd.batch_size), 0
        for step in range(pgd.steps):
            left = self._left()
            if len(left) == 0:
                return passes, 0
            batches.run(partial(self._advance, step), left)
            passes += len(left)
        left = self._left()
        if len(left):
            batches.run(partial(self._finish, pgd.steps), left)
        return passes, len(left)

    @abstractmethod
    def _advance(self, step: int, index: Tensor) -> Tensor:
        """Evaluate the images of indices (A,), take one step, and return the indices."""

    @abstractmethod
    def _observe(self, step: int, images: Images, index: Tensor, found: ObjectiveValue) -> Tensor:
        """Keep what is worth keeping of evaluated images, and return a mask (A,) that steps depend on."""

    def _left(self) -> Tensor:
        return (~self.done).nonzero().flatten()

    def _evaluated(self, index: Tensor) -> Evaluated:
        leaf = self.images[index].requires_grad_()
        found = self.objective(leaf, index)
        gradient = input_gradient(found.value.sum(), leaf)
        return Evaluated(leaf.detach(), ObjectiveValue(found.value.detach(), found.done), gradient)

    @torch.no_grad()
    def _finish(self, step: int, index: Tensor) -> Tensor:
        images = self.images[index]
        self._observe(step, images, index, self.objective(images, index))
        return index
