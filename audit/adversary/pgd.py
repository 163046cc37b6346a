"""Projected gradient descent on pixels, the search loop of all attacks and worst cases.

Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section 2.1.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.passes import Batches, input_gradient
from audit.adversary.threat import ThreatModel
from audit.errors import UsageError
from audit.types import Images, Objective, ObjectiveValue

CLEAN_STEP = -1
"""The step at which the clean image is met."""

_SIZES_PER_OCTAVE = 16  # batch sizes from one power of two to the next


@dataclass(frozen=True)
class PGD:
    """Settings of projected gradient descent: `restarts` runs of `steps` steps of length `relative_step` * eps.

    The first run starts at a random point of the ball, or at the clean image; further runs always start at random.
    `batch_size` limits memory and does not affect the result. Raises UsageError for a setting that is not legal.
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


class SearchResult(NamedTuple):
    """The best iterates (N, C, H, W), with value, `done` flag and step (N,) of each, and the cost of the search.

    `step` counts through all restarts; 0 is the first start, -1 the clean image. `passes` counts forward+backward
    passes of single images, `forwards` the forward passes without a backward pass.
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
) -> SearchResult:
    """Minimise an objective over the ball around each clean image (N, C, H, W) and return the best iterates.

    Iterates are legal, and never worse than the clean image. The search stops early for images that the objective
    marks as done. Random starts are drawn for all images, so that the result does not depend on the batch size.
    `start` is an optional warm start, which replaces the first starting point. Raises InvalidModelError if the gradient
    is missing or not finite.

    Source: Madry et al. 2018, section 2.1.
    """
    search = _Descent(objective, clean, threat, pgd)
    if len(clean) == 0:
        return search.result()
    first = start if start is not None else threat.random_start(clean, generator) if pgd.random_start else clean
    if first is not clean:
        search.evaluate_clean()
    for restart in range(pgd.restarts):
        if search.best.done.all():
            break
        search.descend(first if restart == 0 else threat.random_start(clean, generator), restart * (pgd.steps + 1))
    return search.result()


class _Descent:
    """State of a search: the best iterates so far, and the passes spent.

    Copying an image takes a good part of the time of a small network's pass. So the best iterate is copied only when
    the next one is worse: until then it is `pending` and stays in the buffer that the step was taken from.
    """

    def __init__(self, objective: Objective, clean: Images, threat: ThreatModel, pgd: PGD) -> None:
        self.objective, self.clean, self.threat, self.pgd = objective, clean, threat, pgd
        worst = clean.new_full((len(clean),), torch.inf)
        self.best = ObjectiveValue(worst, clean.new_zeros(len(clean), dtype=torch.bool))
        self.images = clean.clone()
        self.pending = torch.zeros_like(self.best.done)
        self.step = torch.full_like(self.best.done, CLEAN_STEP, dtype=torch.long)
        self.batches = Batches(pgd.batch_size)
        self.passes = self.forwards = 0

    def result(self) -> SearchResult:
        """Return the best iterates and the cost."""
        return SearchResult(self.images, *self.best, self.step, self.passes, self.forwards)

    @torch.no_grad()
    def evaluate_clean(self) -> None:
        """Evaluate the objective at the clean images, which are the first best iterates."""

        def evaluate(images: Images, index: Tensor) -> Tensor:
            found = self.objective(images, index)
            # NaN must not compare as better than a number
            self.best.value[index] = found.value.nan_to_num(torch.inf, torch.inf, -torch.inf)
            self.best.done[index] = found.done
            return index

        self.batches.run(evaluate, self.clean, torch.arange(len(self.clean), device=self.clean.device))
        self.forwards += len(self.clean)

    def descend(self, origin: Images, before: int) -> None:
        """Take all steps from the starting points `origin`; `before` is the number of steps of earlier restarts."""
        active = (~self.best.done).nonzero().flatten()
        current, bounds = origin[active], self.threat.step_bounds(self.clean[active])
        last = torch.empty_like(current)
        for step in range(self.pgd.steps):
            self.batches.run(partial(self._step, before + step), current, last, active, *bounds)
            current, last = last, current
            self.passes += len(active)
            done = self.best.done[active]
            if (kept := _batch_length(len(done) - int(done.sum()))) == 0:
                return
            if kept < len(active):
                _compact(done, kept, active, current, last, *bounds)
                active, current, last = active[:kept], current[:kept], last[:kept]
                bounds = tuple(bound[:kept] for bound in bounds)
        self._finish(current, last, active, before + self.pgd.steps)

    def _step(self, step: int, images: Images, buffer: Images, index: Tensor, *bounds: Tensor) -> Tensor:
        """Evaluate images, and overwrite the buffer, which holds the iterates before them, with those after them."""
        leaf = images.detach().requires_grad_()
        found = self.objective(leaf, index)
        gradient = input_gradient(found.value.sum(), leaf)
        self._update_best(step, images, buffer, index, ObjectiveValue(found.value.detach(), found.done))
        self.threat.step_into(buffer, images, (gradient, self.pgd.relative_step * self.threat.eps), *bounds)
        return index

    @torch.no_grad()
    def _finish(self, current: Images, last: Images, active: Tensor, step: int) -> None:
        """Evaluate the last iterates, and copy the best iterates that are still pending."""

        def evaluate(images: Images, buffer: Images, index: Tensor) -> Tensor:
            self._update_best(step, images, buffer, index, self.objective(images, index))
            return index

        self.batches.run(evaluate, current, last, active)
        self.forwards += len(active)
        waiting = self.pending[active]
        self.images[active[waiting]] = current[waiting]
        self.pending[active] = False

    def _update_best(self, step: int, images: Images, last: Images, index: Tensor, found: ObjectiveValue) -> None:
        """Update the best iterates from images (A, C, H, W); `last` (A, C, H, W) are the iterates before them."""
        again = self.pending[index] & (self.step[index] == step)  # a step repeated after running out of memory
        open_, waiting = ~self.best.done[index], self.pending[index] & ~again
        better = open_ & (found.done | (found.value < self.best.value[index]))
        # compute indices once: on a GPU, every boolean mask used as an index synchronises with the device
        passed, lost = (waiting & ~better).nonzero().flatten(), (better & found.done).nonzero().flatten()
        self.images[index[passed]] = last[passed]
        self.images[index[lost]] = images[lost]
        self.pending[index] = again | (better & ~found.done)
        self.best.value[index] = torch.where(better, found.value, self.best.value[index])
        self.best.done[index] = torch.where(better, found.done, self.best.done[index])
        self.step[index] = torch.where(better, step, self.step[index])


def _compact(done: Tensor, kept: int, *tensors: Tensor) -> None:
    """Move entries that are not done into the first `kept` places, over entries that are done."""
    open_ = (~done[kept:]).nonzero().flatten() + kept
    places = done[:kept].nonzero().flatten()[: len(open_)]
    for tensor in tensors:
        tensor[places] = tensor[open_]


def _batch_length(left: int) -> int:
    """Return `left` rounded up, by at most a sixteenth, to one of few batch sizes.

    Kernels are compiled for each size: the first pass of a small network with a new size takes as long as two.
    """
    grain = max(1, (1 << left.bit_length()) // (2 * _SIZES_PER_OCTAVE))
    return -(-left // grain) * grain
