"""Projected gradient descent on pixels, the search loop of all attacks and worst cases.

Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section 2.1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.memory.compaction import batch_length, compact
from audit.adversary.passes import Batches, input_gradient
from audit.adversary.threat import L1, ThreatModel, start_at_any_distance
from audit.errors import UsageError
from audit.types import Images, Objective, ObjectiveValue, as_images, standard_torch_state

CLEAN_STEP = -1
"""The step at which the clean image is met."""


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

    def step_length(self, step: int, eps: float) -> float:  # noqa: ARG002
        """Return the length of a step, counted through all restarts, in a ball of radius eps."""
        return self.relative_step * eps


@dataclass(frozen=True)
class FallingPGD(PGD):
    """Projected gradient descent with steps that fall geometrically from `relative_step` to `last_step`, times eps.

    On images that equal steps leave at a small margin, 24 falling ones find what hundreds of equal ones do not. Raises
    UsageError for a last step that is not above zero, or longer than the first one.

    Source: Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness", section 3 (APGD, whose steps fall by
    what they find).
    """

    last_step: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.last_step <= self.relative_step:
            raise UsageError(f"last_step {self.last_step!r} is outside (0, relative_step {self.relative_step!r}]")

    def step_length(self, step: int, eps: float) -> float:
        """Return the length of a step, counted through all restarts, in a ball of radius eps."""
        number = step % (self.steps + 1)  # each run ends with one evaluation
        return eps * self.relative_step * (self.last_step / self.relative_step) ** (number / max(1, self.steps - 1))


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


@standard_torch_state()
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
    clean, start = as_images(clean), None if start is None else as_images(start)
    search = _Descent(objective, clean, threat := threat.within(clean), pgd)
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
            if (kept := batch_length(len(done) - int(done.sum()))) == 0:
                return
            if kept < len(active):
                compact(done, kept, active, current, last, *bounds)
                active, current, last = active[:kept], current[:kept], last[:kept]
                bounds = tuple(bound[:kept] for bound in bounds)
        self._finish(current, last, active, before + self.pgd.steps)

    def _step(self, step: int, images: Images, buffer: Images, index: Tensor, *bounds: Tensor) -> Tensor:
        """Evaluate images, and overwrite the buffer, which holds the iterates before them, with those after them."""
        leaf = images.detach().requires_grad_()
        found = self.objective(leaf, index)
        gradient = input_gradient(found.value.sum(), leaf)
        self._update_best(step, images, buffer, index, ObjectiveValue(found.value.detach(), found.done))
        self.threat.step_into(buffer, images, (gradient, self.pgd.step_length(step, self.threat.eps)), *bounds)
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


def without_early_stopping(objective: Objective) -> Objective:
    """Return the objective with no image ever done: a search finds the lowest value in the ball, not a first error."""

    def unstopped(images: Images, index: Tensor) -> ObjectiveValue:
        value = objective(images, index).value
        return ObjectiveValue(value, torch.zeros(len(images), dtype=torch.bool, device=images.device))

    return unstopped


Balls = tuple[tuple[float, float], ...]
"""Radii in multiples of eps, with the share of the steps spent in each ball; the rest is spent in the ball itself."""

_WIDER_BALLS: Balls = ((6.0, 0.3), (2.5, 0.3))
_FEWEST_STEPS = 10  # shorter searches stay in the ball itself


@standard_torch_state()
def shrinking_ball_search(
    objective: Objective, clean: Images, threat: ThreatModel, pgd: PGD, generator: torch.Generator
) -> SearchResult:
    """Minimise an objective as `pgd.minimise` does; in l1, first in wider balls, within the same number of steps.

    The best l1 perturbations change few pixels, which the gradient at the clean image does not single out: a descent
    inside the ball keeps the pixels it starts with.

    Source: Croce & Hein 2021, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers", section 3.4
    (the radii, and the sparse starts, are ours).
    """
    clean, threat = as_images(clean), threat.within(clean)
    if not isinstance(threat, L1) or pgd.steps < _FEWEST_STEPS or len(clean) == 0:
        return minimise(objective, clean, threat, pgd, generator)
    start = threat.sparse_start if pgd.random_start else None
    return restarted_search(objective, (clean, threat, _WIDER_BALLS), pgd, generator, start or (lambda same, _: same))


_Start = Callable[[Images, torch.Generator], Images]
_Place = tuple[Images, ThreatModel, Balls]


def restarted_search(
    objective: Objective, place: _Place, pgd: PGD, generator: torch.Generator, first: _Start
) -> SearchResult:
    """Search through balls from one start by `first` and from further random ones, and return the best iterates."""
    clean, threat, balls = place
    again = threat.sparse_start if isinstance(threat, L1) else partial(start_at_any_distance, threat)
    best = _descend_through_balls(objective, place, pgd, first(clean, generator))
    for restart in range(1, pgd.restarts):
        start, left = again(clean, generator), (~best.done).nonzero().flatten()
        if len(left) == 0:
            break
        there = clean[left], threat, balls
        found = _descend_through_balls(restricted(objective, left), there, pgd, start[left])
        best = merged(best, found, left, restart * (pgd.steps + 1))
    return best


def _descend_through_balls(objective: Objective, place: _Place, pgd: PGD, start: Images) -> SearchResult:
    """Search in ever smaller balls, each from the end of the one before, and return the best iterates of the last."""
    clean, threat, balls = place
    unused, spent, passes, forwards = torch.Generator(), 0, 0, 0
    for radii, share in balls:
        wider, steps = replace(threat, eps=radii * threat.eps), int(share * pgd.steps)
        part = replace(pgd, steps=steps, random_start=False, restarts=1)
        found = minimise(without_early_stopping(objective), clean, wider, part, unused, wider.project(start, clean))
        start, spent = found.images, spent + steps
        passes, forwards = passes + found.passes, forwards + found.forwards
    part = replace(pgd, steps=pgd.steps - spent, random_start=False, restarts=1)
    found = minimise(objective, clean, threat, part, unused, threat.project(start, clean))
    step = torch.where(found.step < 0, found.step, found.step + spent)
    return found._replace(step=step, passes=passes + found.passes, forwards=forwards + found.forwards)


def restricted(objective: Objective, subset: Tensor) -> Objective:
    """Return the objective of the images of indices `subset` (A,), numbered from 0."""
    return lambda images, index: objective(images, subset[index])


def merged(best: SearchResult, again: SearchResult, left: Tensor, before: int) -> SearchResult:
    """Update the best iterates with the better ones of a restart on the images of indices `left` (A,)."""
    better = again.done | (again.value < best.value[left])
    where = left[better]
    for kept, found in ((best.images, again.images), (best.value, again.value), (best.done, again.done)):
        kept[where] = found[better]
    best.step[where] = torch.where(again.step < 0, again.step, again.step + before)[better]
    return best._replace(passes=best.passes + again.passes, forwards=best.forwards + again.forwards)
