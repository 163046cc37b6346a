"""Projected gradient descent on the pixels: the one search loop of the project.

Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section 2.1.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.batching import Batches
from audit.adversary.gradients import input_gradient
from audit.adversary.threat import ThreatModel
from audit.errors import UsageError
from audit.types import Images, Judged, Objective

NEVER = -1
_SIZES = 16  # batch sizes from one power of two to the next


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

    Images that the objective calls done are left alone, and dropped but for a few that fill a batch up. Starts are
    drawn for the whole set before any is dropped, so the result does not depend on the batch size. `start` takes the
    place of the first one, such as what a search in a smaller ball found. Raises InvalidModelError where the objective
    gives no gradient, or one that is not finite: a search that follows it would find nothing and say so to nobody.
    """
    search = _Search(objective, clean, threat, pgd)
    if len(clean) == 0:
        return search.found()
    first = start if start is not None else threat.random_start(clean, generator) if pgd.random_start else clean
    if first is not clean:
        search.judge_clean()
    for restart in range(pgd.restarts):
        if search.best.done.all():
            break
        search.descend(first if restart == 0 else threat.random_start(clean, generator), restart * (pgd.steps + 1))
    return search.found()


class _Search:
    """The best iterates so far, and what they cost.

    Copying an image costs a good part of a small network's pass. So an iterate that is the best is copied only when
    the next one turns out worse: until then it lies in the buffer that the step was taken from, and is `pending`.
    """

    def __init__(self, objective: Objective, clean: Images, threat: ThreatModel, pgd: PGD) -> None:
        self.objective, self.clean, self.threat, self.pgd = objective, clean, threat, pgd
        self.best = Judged(clean.new_full((len(clean),), torch.inf), clean.new_zeros(len(clean), dtype=torch.bool))
        self.images = clean.clone()
        self.pending = torch.zeros_like(self.best.done)
        self.step = torch.full_like(self.best.done, NEVER, dtype=torch.long)
        self.batches = Batches(pgd.batch_size)
        self.passes = self.forwards = 0

    def found(self) -> Found:
        """Return what was found."""
        return Found(self.images, *self.best, self.step, self.passes, self.forwards)

    @torch.no_grad()
    def judge_clean(self) -> None:
        """Note what the clean images are worth; they are what the best images are to begin with."""

        def one(images: Images, index: Tensor) -> Tensor:
            judged = self.objective(images, index)
            # what is not a number must not look better than what is
            self.best.value[index] = judged.value.nan_to_num(torch.inf, torch.inf, -torch.inf)
            self.best.done[index] = judged.done
            return index

        self.batches.run(one, self.clean, torch.arange(len(self.clean), device=self.clean.device))
        self.forwards += len(self.clean)

    def descend(self, origin: Images, before: int) -> None:
        """Take the images that are not done from where they start to the last step."""
        active = (~self.best.done).nonzero().flatten()
        current, walls = origin[active], self.threat.walls(self.clean[active])
        last = torch.empty_like(current)
        for step in range(self.pgd.steps):
            self.batches.run(partial(self._step, before + step), current, last, active, *walls)
            current, last = last, current
            self.passes += len(active)
            done = self.best.done[active]
            if (room := _room(len(done) - int(done.sum()))) == 0:
                return
            if room < len(active):
                _close_up(done, room, active, current, last, *walls)
                active, current, last = active[:room], current[:room], last[:room]
                walls = tuple(wall[:room] for wall in walls)
        self._end(current, last, active, before + self.pgd.steps)

    def _step(self, step: int, images: Images, buffer: Images, index: Tensor, *walls: Tensor) -> Tensor:
        """Judge images, and write where they go into the buffer, which holds where they came from."""
        leaf = images.detach().requires_grad_()
        judged = self.objective(leaf, index)
        gradient = input_gradient(judged.value.sum(), leaf)
        self._note(step, images, buffer, index, Judged(judged.value.detach(), judged.done))
        self.threat.step_into(buffer, images, (gradient, self.pgd.relative_step * self.threat.eps), *walls)
        return index

    @torch.no_grad()
    def _end(self, current: Images, last: Images, active: Tensor, step: int) -> None:
        """Judge where the last step led, and copy what is still pending."""

        def one(images: Images, buffer: Images, index: Tensor) -> Tensor:
            self._note(step, images, buffer, index, self.objective(images, index))
            return index

        self.batches.run(one, current, last, active)
        self.forwards += len(active)
        waiting = self.pending[active]
        self.images[active[waiting]] = current[waiting]
        self.pending[active] = False

    def _note(self, step: int, images: Images, last: Images, index: Tensor, judged: Judged) -> None:
        """Note which images (A, C, H, W) are the best so far; `last` (A, C, H, W) are those of the step before."""
        again = self.pending[index] & (self.step[index] == step)  # a step taken twice, for want of memory
        open_, waiting = ~self.best.done[index], self.pending[index] & ~again
        better = open_ & (judged.done | (judged.value < self.best.value[index]))
        # indices once, and no masks below: on a GPU each of those waits for the device
        passed, lost = (waiting & ~better).nonzero().flatten(), (better & judged.done).nonzero().flatten()
        self.images[index[passed]] = last[passed]
        self.images[index[lost]] = images[lost]
        self.pending[index] = again | (better & ~judged.done)
        self.best.value[index] = torch.where(better, judged.value, self.best.value[index])
        self.best.done[index] = torch.where(better, judged.done, self.best.done[index])
        self.step[index] = torch.where(better, step, self.step[index])


def _close_up(done: Tensor, room: int, *tensors: Tensor) -> None:
    """Move the entries that are not done from behind the first `room` to the places of done ones among these."""
    open_ = (~done[room:]).nonzero().flatten() + room
    places = done[:room].nonzero().flatten()[: len(open_)]
    for tensor in tensors:
        tensor[places] = tensor[open_]


def _room(left: int) -> int:
    """Return how many images to pass through where so many are not done: at least as many, at most a sixteenth more.

    Few sizes, because kernels are made anew for each: the first pass of a size takes a small network as long as two.
    """
    grain = max(1, (1 << left.bit_length()) // (2 * _SIZES))
    return -(-left // grain) * grain
