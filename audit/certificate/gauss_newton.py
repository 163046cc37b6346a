"""One Gauss-Newton step inside a box: the smallest legal change of pixels that brings features where they should be.

With r the distance still to go and J the Jacobian, the step minimises |d|^2 / 2 + |J d + r|^2 / 2 lambda over
low <= d <= high. Its dual has one variable per feature, however many pixels there are: d = clip(J^T u, low, high)
where J d + lambda u + r = 0, and the pixels strictly inside their bounds are the active set's free ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BISECTIONS = 8
_PIXELS = 4096
_ROUNDING = 16
_STIFFEST = 1e-7  # of the most pliant direction: below it, float32 tells no row of a Jacobian from nothing
_SOLVED = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the residual


class Problem(NamedTuple):
    """Jacobians (B, D, P), residuals (B, D), bounds of the step low <= 0 <= high (B, P), damping lambda (B,)."""

    jacobian: Tensor
    residual: Tensor
    low: Tensor
    high: Tensor
    damping: Tensor


class Linearised(NamedTuple):
    """Groups of M images, each with D features, as linear as they are where the Jacobian was taken.

    `jacobian` (G, D, M * P) is that of the whitened features, in float32; `low` and `high` (G, M, C, H, W) bound the
    images, `damping` is (G,).

    `white` (G, D, D) takes features to where all of them answer alike to the pixels. Logits that add up to nearly the
    same sum whatever the image have one direction a million times stiffer than the others: measured as they are, a
    step that closes the gap there would never pay, and no two images would meet to the last digit.
    """

    jacobian: Tensor
    white: Tensor
    low: Tensor
    high: Tensor
    damping: Tensor

    @classmethod
    def of(cls, jacobian: Tensor, low: Tensor, high: Tensor, damping: Tensor) -> "Linearised":
        """Return the groups with their features whitened, from the Jacobian (G, D, M * P) of the features."""
        # in float64 a part of the pixels at a time: one whole Jacobian may fill the memory
        parts = jacobian.split(_PIXELS, dim=2)
        gram = torch.stack([part.double() @ part.double().mT for part in parts]).sum(0)
        answer, directions = torch.linalg.eigh(gram)
        answer = answer.maximum(_STIFFEST**2 * answer[:, -1:]).clamp_min(1e-30)
        white = directions.mT / answer.sqrt()[:, :, None]
        # a step in float32 closes a gap to a ten-millionth of itself, and the next one starts from there
        whitened = torch.cat([(white @ part.double()).to(jacobian) for part in parts], dim=2)
        return cls(whitened, white, low, high, damping)

    def of_groups(self, rows: Tensor) -> "Linearised":
        """Return what is held of some groups."""
        return self if len(rows) == len(self.damping) else Linearised(*(part[rows] for part in self))

    def effort(self, apart: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return how far pixels would have to go to close the gaps (G, D) of some groups, could they go anywhere."""
        return _times(self.white[rows], apart[rows]).norm(dim=1)

    def stiffness(self) -> Tensor:
        """Return how far pixels would have to go (G,) for one unit along the stiffest direction."""
        return self.white.norm(dim=2).amax(1)

    def step(self, moved: Tensor, apart: Tensor) -> Tensor:
        """Return the step that images (G, M, C, H, W) should take to close gaps (G, D), in float64."""
        low, high = (self.low - moved).flatten(1), (self.high - moved).flatten(1)
        gap = _times(self.white, apart)
        problem = Problem(*(part.to(self.jacobian) for part in (self.jacobian, gap, low, high, self.damping)))
        return box_step(problem).view_as(moved).double()


def box_step(problem: Problem, rounds: int = 16) -> Tensor:
    """Return the steps (B, P): always legal, and the minimiser where `rounds` Newton steps on the dual suffice.

    Source: Hintermüller, Ito & Kunisch 2003, "The primal-dual active set strategy as a semismooth Newton method".
    """
    start = torch.zeros_like(problem.residual), torch.zeros_like(problem.low)  # u and J^T u
    multipliers, pushed = _round(problem, *start)
    if bool(_solved(problem, multipliers, pushed).all()):  # close to the end no pixel meets its bound
        return pushed.clamp(problem.low, problem.high)
    multipliers, pushed = start
    scale = problem.jacobian.square().sum(2).mean(1)
    for done in range(rounds):
        # from strong damping to weak: where the box leaves little room, a cold start at the end would not get there
        damping = torch.maximum(problem.damping, scale * 0.1**done)
        multipliers, pushed = _round(problem._replace(damping=damping), multipliers, pushed)
        if bool((damping == problem.damping).all()) and bool(_solved(problem, multipliers, pushed).all()):
            break
    return pushed.clamp(problem.low, problem.high)


def _solved(problem: Problem, multipliers: Tensor, pushed: Tensor) -> Tensor:
    slope = _slope(problem, multipliers, pushed)
    return slope.norm(dim=1) <= _SOLVED[slope.dtype] * problem.residual.norm(dim=1)


def _slope(problem: Problem, multipliers: Tensor, pushed: Tensor) -> Tensor:
    step = pushed.clamp(problem.low, problem.high)
    return _times(problem.jacobian, step) + problem.damping[:, None] * multipliers + problem.residual


def _round(problem: Problem, multipliers: Tensor, pushed: Tensor) -> tuple[Tensor, Tensor]:
    slope = _slope(problem, multipliers, pushed)
    free = (pushed > problem.low) & (pushed < problem.high)
    gram = (problem.jacobian * free[:, None]) @ problem.jacobian.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # what rounding may have left out of a matrix without full rank: it changes the way there, not where it leads
    least = _ROUNDING * torch.finfo(gram.dtype).eps * diagonal.amax(1)
    diagonal.add_(problem.damping.maximum(least)[:, None])
    change = -torch.linalg.solve(gram, slope)
    moved = _times(problem.jacobian.mT, change)
    length = _length(problem, (multipliers, pushed), (change, moved))
    return multipliers + length * change, pushed + length * moved


def _length(problem: Problem, at: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor]) -> Tensor:
    """Return how far to go (B, 1), at most all the way: to where the dual, convex along the way, stops falling."""
    short, long = torch.zeros_like(problem.damping), torch.ones_like(problem.damping)
    constant = ((problem.residual + problem.damping[:, None] * at[0]) * along[0]).sum(1)
    growth = problem.damping * along[0].square().sum(1)
    tried = long
    for _ in range(_BISECTIONS):
        step = (at[1] + tried[:, None] * along[1]).clamp(problem.low, problem.high)
        falling = constant + tried * growth + (step * along[1]).sum(1) <= 0
        short, long = torch.where(falling, tried, short), torch.where(falling, long, tried)
        if bool((short == 1).all()):
            break
        tried = (short + long) / 2
    return short[:, None]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]
