"""Projected gradient descent on the pixels: the one search loop of the project.

Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section 2.1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from audit.errors import UsageError
from audit.gradients import input_gradient
from audit.threat import ThreatModel
from audit.types import Images, Judged, Objective


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
    """The best images met (N, C, H, W), their values and done marks (N,), and what the search cost.

    `passes` counts forward+backward passes of single images.
    """

    images: Images
    value: Tensor
    done: Tensor
    passes: int


def minimise(objective: Objective, clean: Images, threat: ThreatModel, pgd: PGD, generator: torch.Generator) -> Found:
    """Return, per image, the best iterate of projected descent: legal, and never worse than the clean image.

    Images that the objective calls done are dropped at once. Starts are drawn for the whole set before any is
    dropped, so the result does not depend on the batch size. Raises InvalidModelError where the objective gives
    no gradient, or one that is not finite: a search that follows it would find nothing and say so to nobody.
    """
    everything = torch.arange(len(clean), device=clean.device)
    start = _judge(objective, clean, everything, pgd.batch_size)
    best = Found(clean.clone(), start.value, start.done, 0)
    for restart in range(pgd.restarts):
        origin = threat.random_start(clean, generator) if pgd.random_start or restart else clean
        active = everything[~best.done]
        if len(active) == 0:
            break
        best = _descend(objective, clean, origin, threat, pgd, best)
    return best


def _descend(objective: Objective, clean: Images, origin: Images, threat: ThreatModel, pgd: PGD, best: Found) -> Found:
    passes = best.passes
    active = (~best.done).nonzero().flatten()
    current = origin[active]
    for step in range(pgd.steps + 1):
        last = step == pgd.steps
        judged, gradient = _value_and_gradient(objective, current, active, pgd.batch_size, not last)
        _keep(best, active, current, judged)
        if last:
            break
        passes += len(active)
        current = threat.step(current, gradient, clean[active], pgd.relative_step * threat.eps)
        open_ = ~judged.done
        if not open_.all():
            active, current = active[open_], current[open_]
            if len(active) == 0:
                break
    return best._replace(passes=passes)


def _keep(best: Found, index: Tensor, images: Images, judged: Judged) -> None:
    """Write the images that are done, or better than the best so far, into `best`."""
    better = (judged.done & ~best.done[index]) | (~best.done[index] & (judged.value < best.value[index]))
    where = index[better]
    best.images[where] = images[better]
    best.value[where] = judged.value[better]
    best.done[where] = judged.done[better]


@torch.no_grad()
def _judge(objective: Objective, images: Images, index: Tensor, batch_size: int) -> Judged:
    parts = [objective(x, i) for x, i in zip(images.split(batch_size), index.split(batch_size), strict=True)]
    return Judged(torch.cat([p.value for p in parts]), torch.cat([p.done for p in parts]))


def _value_and_gradient(
    objective: Objective, images: Images, index: Tensor, batch_size: int, needs_gradient: bool
) -> tuple[Judged, Tensor]:
    if not needs_gradient:
        return _judge(objective, images, index, batch_size), images
    parts: list[Judged] = []
    gradients: list[Tensor] = []
    for x, i in zip(images.split(batch_size), index.split(batch_size), strict=True):
        leaf = x.detach().requires_grad_()
        judged = objective(leaf, i)
        gradients.append(input_gradient(judged.value.sum(), leaf))
        parts.append(Judged(judged.value.detach(), judged.done.detach()))
    whole = Judged(torch.cat([p.value for p in parts]), torch.cat([p.done for p in parts]))
    return whole, torch.cat(gradients)
