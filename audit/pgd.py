"""Projected gradient descent on the pixels: the one search loop of the project.

Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section 2.1.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from audit.errors import UsageError
from audit.gradients import input_gradient
from audit.memory import Batches
from audit.threat import ThreatModel
from audit.types import Images, Judged, Objective

NEVER = -1
_IDLE = 1 / 32  # the largest share of images that are done and still passed through


@dataclass(frozen=True)
class PGD:
    """How hard to search: steps of `relative_step` x eps, from the clean image or a random start, several times.

    `batch_size` bounds memory and decides nothing else.
    """

    steps: int = 10
    relative_step: float = 0.25
    random_start: bool = True
    restarts: int = 1
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} of a search must be at least 1")
        if not 0 < self.relative_step <= 2:
            raise UsageError(f"relative_step {self.relative_step!r} is outside (0, 2]: it is a multiple of eps")


class Found(NamedTuple):
    """The best images met (N, C, H, W), their values, done marks and the step they were met at (N,), and the cost.

    `step` counts through all restarts; 0 is the first start, -1 the clean image. `passes` counts forward+backward
    passes of single images, `forwards` the forward passes without a backward one.
    """

    images: Images
    value: Tensor
    done: Tensor
    step: Tensor
    passes: int
    forwards: int


def minimise(
    objective: Objective,
    clean: Images,
    threat: ThreatModel,
    pgd: PGD,
    generator: torch.Generator,
    start: Images | None = None,
) -> Found:
    """Return, per image, the best iterate of projected descent: legal, and never worse than the clean image.

    Images that the objective calls done are left alone, and dropped once they are more than a few. Starts are drawn
    for the whole set before any is dropped, so the result does not depend on the batch size. `start` takes the place
    of the first one, such as what a search in a smaller ball found. Raises InvalidModelError where the objective
    gives no gradient, or one that is not finite: a search that follows it would find nothing and say so to nobody.
    """
    search = _Search(objective, clean, threat, pgd)
    if len(clean) == 0:
        return search.found()
    first = start if start is not None else threat.random_start(clean, generator) if pgd.random_start else clean
    if first is not clean:
        search.judge(clean)
    for restart in range(pgd.restarts):
        if search.best.done.all():
            break
        search.descend(first if restart == 0 else threat.random_start(clean, generator), restart * (pgd.steps + 1))
    return search.found()


class _Search:
    """The best iterates so far, and what they cost."""

    def __init__(self, objective: Objective, clean: Images, threat: ThreatModel, pgd: PGD) -> None:
        self.objective, self.clean, self.threat, self.pgd = objective, clean, threat, pgd
        self.best = Judged(clean.new_full((len(clean),), torch.inf), clean.new_zeros(len(clean), dtype=torch.bool))
        self.images = clean.clone()
        self.step = torch.full_like(self.best.done, NEVER, dtype=torch.long)
        self.batches = Batches(pgd.batch_size)
        self.passes = self.forwards = 0

    def found(self) -> Found:
        """Return what was found."""
        return Found(self.images, *self.best, self.step, self.passes, self.forwards)

    @torch.no_grad()
    def judge(self, images: Images, step: int = NEVER, index: Tensor | None = None) -> None:
        """Note what images (A, C, H, W) are worth, with no gradient asked for; `index` (A,) says which they are."""
        if index is None:
            index = torch.arange(len(images), device=images.device)

        def one(batch: Images, chosen: Tensor) -> Tensor:
            judged = self.objective(batch, chosen)
            self._keep(chosen, batch, judged, step)
            return judged.value

        self.batches.run(one, images, index)
        self.forwards += len(images)

    def descend(self, origin: Images, before: int) -> None:
        """Take the images that are not done from where they start to the last step."""
        active = (~self.best.done).nonzero().flatten()
        current, walls = origin[active], tuple(wall[active] for wall in self.threat.walls(self.clean))
        for step in range(self.pgd.steps):
            self.batches.run(partial(self._step_, before + step), current, active, *walls)
            self.passes += len(active)
            done = self.best.done[active]
            # packing reads and writes three images for each that stays, so a few that are done may ride along
            if int(done.sum()) > _IDLE * len(done):
                active, current = active[~done], current[~done]
                walls = tuple(wall[~done] for wall in walls)
                if len(active) == 0:
                    return
        self.judge(current, before + self.pgd.steps, active)

    def _step_(self, step: int, images: Images, index: Tensor, *walls: Tensor) -> Tensor:
        """Judge images and move them in place."""
        leaf = images.detach().requires_grad_()
        judged = self.objective(leaf, index)
        gradient = input_gradient(judged.value.sum(), leaf)
        self._keep(index, images, Judged(judged.value.detach(), judged.done), step)
        self.threat.step_(images, gradient, self.pgd.relative_step * self.threat.eps, *walls)
        return judged.value.detach()

    def _keep(self, index: Tensor, images: Images, judged: Judged, step: int) -> None:
        """Write the images that are done, or better than the best so far, into the best ones."""
        open_ = ~self.best.done[index]
        better = open_ & (judged.done | (judged.value < self.best.value[index]))
        where = index[better]
        self.images[where] = images[better]
        self.best.value[where] = judged.value[better]
        self.best.done[where] = judged.done[better]
        self.step[where] = step
