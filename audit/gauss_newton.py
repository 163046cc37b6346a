"""One Gauss-Newton step inside a box: the smallest legal change of pixels that brings features where they should be.

With r the distance still to go and J the Jacobian, the step minimises |d|^2 / 2 + |J d + r|^2 / 2 lambda over
low <= d <= high. Its dual has one variable per feature, however many pixels there are: d = clip(J^T u, low, high)
where J d + lambda u + r = 0, and the pixels strictly inside their bounds are the active set's free ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BISECTIONS = 20


class Problem(NamedTuple):
    """Jacobians (B, D, P), residuals (B, D), bounds of the step low <= 0 <= high (B, P), damping lambda (B,)."""

    jacobian: Tensor
    residual: Tensor
    low: Tensor
    high: Tensor
    damping: Tensor


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
    return slope.norm(dim=1) <= 1e-9 * problem.residual.norm(dim=1)


def _slope(problem: Problem, multipliers: Tensor, pushed: Tensor) -> Tensor:
    step = pushed.clamp(problem.low, problem.high)
    return _times(problem.jacobian, step) + problem.damping[:, None] * multipliers + problem.residual


def _round(problem: Problem, multipliers: Tensor, pushed: Tensor) -> tuple[Tensor, Tensor]:
    slope = _slope(problem, multipliers, pushed)
    free = (pushed > problem.low) & (pushed < problem.high)
    gram = (problem.jacobian * free[:, None]) @ problem.jacobian.mT
    gram.diagonal(dim1=1, dim2=2).add_(problem.damping[:, None])
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
