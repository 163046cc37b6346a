"""One damped Gauss-Newton step in a box or a ball: the least change of pixels that closes a feature residual.

With residual r and Jacobian J, the step minimises |d|^2 / 2 + |J d + r|^2 / (2 lambda) over low <= d <= high. The dual
has one variable per feature, however many pixels there are: d = clip(J^T u, low, high) where J d + lambda u + r = 0.
Pixels strictly inside their bounds are the free variables of the active set.

In l2 and l1 that change may leave the ball. With p the perturbation so far, the steps

    d(t) = -t p + least change that closes the residual left after -t p

interpolate between the least change (t = 0) and the least perturbation (t = 1), which are the solutions for increasing
multipliers of the ball's constraint. The first one inside the ball is taken; the last is projected onto it. In l1 the
lengths of changes are weighted by the pixels' perturbations, which approaches the least l1 norm.

Source: Conn, Gould & Toint 2000, "Trust-Region Methods", chapter 7; Daubechies et al. 2010, "Iteratively reweighted
least squares minimization for sparse recovery".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.types import Images

_BISECTIONS = 8
_CONTINUATION = 0.01  # factor of the damping from one round to the next
_PIXEL_BLOCK = 4096  # pixels processed at once in float64
_ROUNDING_UNITS = 16  # relative diagonal shift, in units of machine precision
_MIN_SINGULAR_VALUE = 1e-7  # relative to the largest: float32 cannot resolve smaller ones
_SHARES = (0.0, 0.3, 1.0)  # t
_LEAST_WEIGHTS = (0.03, 0.003)  # in pixel units, of pixels without a perturbation, in each reweighting of l1
_DUAL_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # dual gradient norm relative to the residual


class BoxProblem(NamedTuple):
    """Jacobians (B, D, P), residuals (B, D), bounds of the step low <= 0 <= high (B, P), damping lambda (B,)."""

    jacobian: Tensor
    residual: Tensor
    low: Tensor
    high: Tensor
    damping: Tensor

    def select(self, rows: Tensor) -> "BoxProblem":
        """Return some of the problems, by index."""
        return self if len(rows) == len(self.damping) else BoxProblem(*(part[rows] for part in self))


class LinearisedGroups(NamedTuple):
    """G groups of M images each, with the D features of a group linearised at the current images.

    `jacobian` (G, D, M * P) is the Jacobian of the whitened features, in float32; `low` and `high` (G, M, C, H, W)
    bound the images; `damping` is (G,).

    `whitening` (G, D, D) maps features to coordinates with equal sensitivity to the pixels. Logits whose sum hardly
    depends on the image have one direction a million times stiffer than the others: without whitening, a step that
    closes the residual there is never accepted, and no two images collide to the last digit.
    """

    jacobian: Tensor
    whitening: Tensor
    low: Tensor
    high: Tensor
    damping: Tensor

    @classmethod
    def of(cls, jacobian: Tensor, low: Tensor, high: Tensor, damping: Tensor) -> "LinearisedGroups":
        """Whiten the features by their Jacobian (G, D, M * P)."""
        # float64 in blocks of pixels: a whole Jacobian in float64 may exceed the memory
        blocks = jacobian.split(_PIXEL_BLOCK, dim=2)
        gram = torch.stack([block.double() @ block.double().mT for block in blocks]).sum(0)
        eigenvalues, directions = torch.linalg.eigh(gram)
        eigenvalues = eigenvalues.maximum(_MIN_SINGULAR_VALUE**2 * eigenvalues[:, -1:]).clamp_min(1e-30)
        whitening = directions.mT / eigenvalues.sqrt()[:, :, None]
        # float32 suffices: each step reduces the residual to about 1e-7 of itself, and the next starts from there
        whitened = torch.cat([(whitening @ block.double()).to(jacobian) for block in blocks], dim=2)
        return cls(whitened, whitening, low, high, damping)

    def select(self, rows: Tensor) -> "LinearisedGroups":
        """Return the groups with these indices."""
        return self if len(rows) == len(self.damping) else LinearisedGroups(*(part[rows] for part in self))

    def pixel_distance(self, residual: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return the length (G,) of the unconstrained pixel change that closes residuals (G, D) of some groups."""
        return _matvec(self.whitening[rows], residual[rows]).norm(dim=1)

    def stiffness(self) -> Tensor:
        """Return the length (G,) of the pixel change for one feature unit along the stiffest direction."""
        return self.whitening.norm(dim=2).amax(1)

    def step(self, moved: Tensor, residual: Tensor) -> Tensor:
        """Return the constrained step of images (G, M, C, H, W) for residuals (G, D), in float64."""
        low, high = (self.low - moved).flatten(1), (self.high - moved).flatten(1)
        whitened = _matvec(self.whitening, residual)
        problem = BoxProblem(*(part.to(self.jacobian) for part in (self.jacobian, whitened, low, high, self.damping)))
        return box_step(problem).view_as(moved).double()


def box_step(problem: BoxProblem, rounds: int = 8) -> Tensor:
    """Return feasible steps (B, P), optimal where `rounds` Newton steps on the dual suffice.

    Source: Hintermüller, Ito & Kunisch 2003, "The primal-dual active set strategy as a semismooth Newton method".
    """
    start = torch.zeros_like(problem.residual), torch.zeros_like(problem.low)  # u and J^T u
    multipliers, unclipped = _newton_step(problem, *start)
    solved = _is_solved(problem, multipliers, unclipped)  # close to the solution no bound is active
    step = unclipped.clamp(problem.low, problem.high)
    waiting = (~solved).nonzero().flatten()
    if len(waiting) == 0:
        return step
    part, multipliers, unclipped = problem.select(waiting), start[0][waiting], start[1][waiting]
    scale = part.jacobian.square().sum(2).mean(1)
    for done in range(rounds):
        # continuation from strong to weak damping: a cold start at the final damping fails in a tight box
        damping = torch.maximum(part.damping, scale * _CONTINUATION**done)
        multipliers, unclipped = _newton_step(part._replace(damping=damping), multipliers, unclipped)
        step[waiting] = unclipped.clamp(part.low, part.high)
        open_rows = ((damping > part.damping) | ~_is_solved(part, multipliers, unclipped)).nonzero().flatten()
        if len(open_rows) == 0:
            break
        if len(open_rows) < len(waiting):  # what is solved takes no further step
            waiting, part, scale = waiting[open_rows], part.select(open_rows), scale[open_rows]
            multipliers, unclipped = multipliers[open_rows], unclipped[open_rows]
    return step


def _is_solved(problem: BoxProblem, multipliers: Tensor, unclipped: Tensor) -> Tensor:
    gradient = _dual_gradient(problem, multipliers, unclipped)
    return gradient.norm(dim=1) <= _DUAL_TOLERANCE[gradient.dtype] * problem.residual.norm(dim=1)


def _dual_gradient(problem: BoxProblem, multipliers: Tensor, unclipped: Tensor) -> Tensor:
    """Return J d + lambda u + r (B, D) at d = clip(J^T u, low, high)."""
    step = unclipped.clamp(problem.low, problem.high)
    return _matvec(problem.jacobian, step) + problem.damping[:, None] * multipliers + problem.residual


def _newton_step(problem: BoxProblem, multipliers: Tensor, unclipped: Tensor) -> tuple[Tensor, Tensor]:
    """Return u and J^T u after one semismooth Newton step with line search."""
    gradient = _dual_gradient(problem, multipliers, unclipped)
    free = (unclipped > problem.low) & (unclipped < problem.high)
    gram = (problem.jacobian * free[:, None]) @ problem.jacobian.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # covers rounding in a rank-deficient matrix: it affects the convergence, not the solution
    least = _ROUNDING_UNITS * torch.finfo(gram.dtype).eps * diagonal.amax(1)
    diagonal.add_(problem.damping.maximum(least)[:, None])
    change = -torch.linalg.solve(gram, gradient)
    unclipped_change = _matvec(problem.jacobian.mT, change)
    length = _line_search(problem, (multipliers, unclipped), (change, unclipped_change))
    return multipliers + length * change, unclipped + length * unclipped_change


def _line_search(problem: BoxProblem, at: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor]) -> Tensor:
    """Return step lengths (B, 1) of at most 1 that minimise the convex dual along a direction, by bisection."""
    short, long = torch.zeros_like(problem.damping), torch.ones_like(problem.damping)
    constant = ((problem.residual + problem.damping[:, None] * at[0]) * along[0]).sum(1)
    growth = problem.damping * along[0].square().sum(1)
    length = long
    for _ in range(_BISECTIONS):
        step = (at[1] + length[:, None] * along[1]).clamp(problem.low, problem.high)
        decreasing = constant + length * growth + (step * along[1]).sum(1) <= 0
        short, long = torch.where(decreasing, length, short), torch.where(decreasing, long, length)
        if bool((short == 1).all()):
            break
        length = (short + long) / 2
    return short[:, None]


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    # as a row times the transposed matrix: ten times as fast as a batch of matrices times columns
    return (vector[:, None] @ matrix.mT)[:, 0]


def step_in_ball(
    linear: LinearisedGroups, moved: Images, residual: Tensor, clean: Images, threat: ThreatModel
) -> Tensor:
    """Return the steps of images (G, M, C, H, W) for residuals (G, D), in float64; clean images as `moved`."""
    target, waiting = moved.clone(), torch.arange(len(moved), device=moved.device)
    for share in _SHARES:
        part = linear.select(waiting)
        step = _step(part, moved[waiting], residual[waiting], (clean[waiting], share, threat.norm))
        target[waiting] = moved[waiting] + step
        outside = threat.distance(target[waiting].flatten(0, 1), clean[waiting].flatten(0, 1)) > threat.eps
        waiting = waiting[outside.view(len(waiting), -1).any(1)]
        if len(waiting) == 0:
            break
    inside = threat.project(target.flatten(0, 1), clean.flatten(0, 1)).view_as(target)
    return inside - moved


def _step(linear: LinearisedGroups, moved: Images, residual: Tensor, towards: tuple[Images, float, str]) -> Tensor:
    """Return the step d(t) of images (G, M, C, H, W); `towards` is the clean images, t and the norm."""
    clean, share, norm = towards
    perturbation = (moved - clean).flatten(1)
    back = -share * perturbation
    low, high = (linear.low - moved).flatten(1) - back, (linear.high - moved).flatten(1) - back
    whitened = _matvec(linear.whitening, residual)
    left = whitened + _matvec(linear.jacobian.double(), back) if share else whitened
    found = torch.zeros_like(perturbation)
    for least in (None,) if norm == "l2" else _LEAST_WEIGHTS:
        root = torch.ones_like(perturbation)
        if least is not None:
            weight = (perturbation + back + found).abs() + least
            root = (weight / weight.mean(1, keepdim=True)).sqrt()
        parts = (linear.jacobian * root[:, None], left, low / root, high / root, linear.damping)
        found = root * box_step(BoxProblem(*(part.to(linear.jacobian) for part in parts))).double()
    return (back + found).view_as(moved)
