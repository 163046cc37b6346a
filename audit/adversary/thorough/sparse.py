"""Descents in l1 that choose by themselves how many pixels they change, from starts on different sides of the image."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from audit.adversary.pgd import PGD, SearchResult, merged, restricted, without_early_stopping
from audit.adversary.thorough.boundary import boundary_walk, noisy_start, unsearched
from audit.adversary.thorough.stepwise import StepwiseSearch
from audit.adversary.threat import L1, per_image
from audit.types import Images, Objective, ObjectiveValue

_BALLS = ((3.0, 0.3), (2.0, 0.3))  # radii in multiples of eps, and shares of the steps
_WALK, _POLISH = 20, 30  # steps of the walk before, and of the descent on the margin after
_SPARSE_START = 4  # every fourth run
_DENSEST = 0.2  # share of the pixels that the first step changes, from the clean image
_SPARSER, _SETTLED = 1.5, 0.95
_SHORTEST = 0.1  # of the ball's radius
_ROUNDING = 1e-5  # of the pixel range


def sparse_search(
    objective: Callable[[str], Objective], clean: Images, threat: L1, pgd: PGD, generator: torch.Generator
) -> SearchResult:
    """Minimise the negative cross-entropy, then the margin, over l1 balls around clean images (N, C, H, W).

    Each of `pgd.restarts` runs spends `pgd.steps` steps on the first in balls of 3, 2 and 1 times the radius, and 30 on
    the second. Three runs of four start where a walk from a noisy image reaches the decision boundary, the others at
    few random pixels. `objective` returns the objective of a loss, `ce` or `margin`.
    """
    best = unsearched(clean)
    for restart in range(pgd.restarts):
        noisy = noisy_start(clean, threat, generator)
        few = clean + torch.randn(clean.shape, generator=generator, dtype=torch.float32).to(clean)
        left = (~best.done).nonzero().flatten()
        if len(left) == 0:
            break
        run = _Run(_of_subset(objective, left), clean[left], threat, pgd)
        if (restart + 1) % _SPARSE_START:
            run.walk(noisy[left])
        else:
            run.images = few[left]  # the projection onto the ball leaves few pixels of it
        run.descend()
        best = merged(best, run.best, left, restart * (pgd.steps + _WALK + _POLISH))
    return best


def _of_subset(objective: Callable[[str], Objective], subset: Tensor) -> Callable[[str], Objective]:
    return lambda loss: restricted(objective(loss), subset)


class _Run:
    """One run: the images that the next search starts from, and the best ones in the ball."""

    def __init__(self, objective: Callable[[str], Objective], clean: Images, threat: L1, pgd: PGD) -> None:
        self.objective, self.clean, self.threat, self.pgd = objective, clean, threat, pgd
        self.images, self.steps = clean, 0
        self.best = unsearched(clean)

    def walk(self, start: Images) -> None:
        """Move from noisy starts (N, C, H, W) to the boundary, as near to the clean images as a walk gets."""
        settings = replace(self.pgd, steps=_WALK)
        found = boundary_walk(self.objective("margin"), self.clean, start, self.threat, settings)
        self._take(found, torch.arange(len(start), device=start.device), _WALK)

    def descend(self) -> None:
        """Descend through the balls on the cross-entropy, then in the last one on the margin."""
        spent = 0
        for radii, share in _BALLS:
            self._descend("ce", int(share * self.pgd.steps), radii)
            spent += int(share * self.pgd.steps)
        self._descend("ce", self.pgd.steps - spent, 1.0)
        self._descend("margin", _POLISH, 1.0)

    def _descend(self, loss: str, steps: int, radii: float) -> None:
        left = (~self.best.done).nonzero().flatten()
        if len(left) == 0 or steps == 0:
            return
        objective, ball = restricted(self.objective(loss), left), replace(self.threat, eps=radii * self.threat.eps)
        objective = objective if radii == 1 else without_early_stopping(objective)
        settings = replace(self.pgd, steps=steps)
        self._take(sparse_descent(objective, self.clean[left], self.images[left], ball, settings), left, steps)

    def _take(self, found: SearchResult, index: Tensor, steps: int) -> None:
        """Continue from the images found for indices (A,); those in the ball are the best ones of the run so far."""
        self.images = self.images.index_copy(0, index, found.images)
        self.best.images[index], self.best.value[index], self.best.done[index] = found[:3]
        self.best.step[index] = torch.where(found.step < 0, found.step, found.step + self.steps)
        self.steps += steps
        passes, forwards = self.best.passes + found.passes, self.best.forwards + found.forwards
        self.best = self.best._replace(passes=passes, forwards=forwards)


def sparse_descent(objective: Objective, clean: Images, start: Images, threat: L1, pgd: PGD) -> SearchResult:
    """Minimise an objective in `pgd.steps` steps over l1 balls around clean images (N, C, H, W), from one start.

    A step changes the pixels of largest gradient, at first a fifth of all, then two thirds of those in which the best
    image differs from the clean one. While their number falls, steps are as long as the radius, and start at the best
    image; otherwise they become shorter.

    Source: Croce & Hein 2021, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers", section 3.
    """
    descent = _Descent(objective, clean, start, threat)
    passes, forwards = descent.run(pgd)
    return SearchResult(descent.best, descent.value, descent.done, descent.step, passes, forwards)


class _Descent(StepwiseSearch):
    """State of a descent: current and best images, the gradient at the best ones, lengths of steps, pixels changed."""

    def __init__(self, objective: Objective, clean: Images, start: Images, threat: L1) -> None:
        self.objective, self.clean, self.threat = objective, clean, threat
        self.images = threat.project(start, clean)
        self.gradient = torch.zeros_like(clean)
        self.best, self.value, self.done, self.step = unsearched(self.images)[:4]
        changed, size = self._changed(self.images, clean), clean[0].numel()
        self.count = torch.where(changed > 0, changed / _SPARSER, _DENSEST * size).clamp_min(1)
        self.changed = torch.where(changed > 0, changed, float(size))
        self.length = torch.full_like(self.value, threat.eps)

    def _advance(self, step: int, index: Tensor) -> Tensor:
        """Evaluate the images of indices (A,) and take one step."""
        (images, found, gradient), clean = self._evaluated(index), self.clean[index]
        better = self._observe(step, images, index, found)
        self.gradient[index[better]] = gradient[better]
        if step > 0:
            restarted = self._adapt(index)
            images = torch.where(per_image(restarted, images), self.best[index], images)
            gradient = torch.where(per_image(restarted, images), self.gradient[index], gradient)
        direction = self._largest(gradient, images, self.count[index])
        self.images[index] = self.threat.project(images - per_image(self.length[index], images) * direction, clean)
        return index

    def _observe(self, step: int, images: Images, index: Tensor, found: ObjectiveValue) -> Tensor:
        """Keep images that are better than the best so far, and return which are, (A,)."""
        better = found.done | (found.value < self.value[index])
        where = index[better]
        self.best[where], self.value[where], self.step[where] = images[better], found.value[better], step
        self.done[where] = found.done[better]
        return better

    def _adapt(self, index: Tensor) -> Tensor:
        """Adapt lengths and numbers of pixels for indices (A,), and return which continue at the best image, (A,)."""
        changed = self._changed(self.best[index], self.clean[index])
        fewer = changed < _SETTLED * self.changed[index]
        exhausted = ~fewer & (self.length[index] <= _SHORTEST * self.threat.eps)
        shorter = (self.length[index] / _SPARSER).clamp_min(_SHORTEST * self.threat.eps)
        self.length[index] = torch.where(fewer | exhausted, self.threat.eps, shorter)
        # equal steps on the same pixels, and the projection, may return to the same image for ever
        sparser = torch.where(exhausted, self.count[index], changed) / _SPARSER
        count = torch.where(exhausted | (changed != self.changed[index]), sparser, self.count[index])
        self.changed[index], self.count[index] = changed, count.clamp_min(1)
        return fewer | exhausted

    def _largest(self, gradient: Tensor, images: Images, count: Tensor) -> Tensor:
        """Return the signs of the `count` (A,) largest entries whose pixels can move, divided by their number."""
        low, high = self.threat.pixel_range
        blocked = ((gradient > 0) & (images <= low)) | ((gradient < 0) & (images >= high))
        movable = gradient.masked_fill(blocked, 0.0).flatten(1)
        sizes = movable.abs().sort(1, descending=True).values
        smallest = sizes.gather(1, (count.long() - 1).clamp(0, movable.shape[1] - 1)[:, None])
        signs = movable.sign().masked_fill(movable.abs() < smallest, 0.0)
        return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)

    def _changed(self, images: Images, clean: Images) -> Tensor:
        """Return the number of changed pixels of each image, (N,), without those that only rounding moved."""
        low, high = self.threat.pixel_range
        return ((images - clean).abs() > _ROUNDING * (high - low)).flatten(1).sum(1).to(clean)
