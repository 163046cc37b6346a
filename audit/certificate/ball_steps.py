"""Gauss-Newton steps inside an l2 or l1 ball and the pixel range, with the ball as trust region.

The least change d that closes the linearised residual may leave the ball. With p the perturbation so far, the steps

    d(t) = -t p + least change that closes the residual left after -t p

interpolate between the least change (t = 0) and the least perturbation (t = 1), which are the solutions for increasing
multipliers of the ball's constraint. The first one inside the ball is taken; the last is projected onto it. In l1 the
lengths of changes are weighted by the pixels' perturbations, which approaches the least l1 norm.

Source: Conn, Gould & Toint 2000, "Trust-Region Methods", chapter 7; Daubechies et al. 2010, "Iteratively reweighted
least squares minimization for sparse recovery".
"""

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.certificate.gauss_newton import BoxProblem, LinearisedGroups, box_step
from audit.types import Images

_SHARES = (0.0, 0.3, 1.0)  # t
_LEAST_WEIGHTS = (0.03, 0.003)  # in pixel units, of pixels without a perturbation, in each reweighting of l1


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
    whitened = (linear.whitening @ residual[:, :, None])[:, :, 0]
    left = whitened + (linear.jacobian.double() @ back[:, :, None])[:, :, 0] if share else whitened
    found = torch.zeros_like(perturbation)
    for least in (None,) if norm == "l2" else _LEAST_WEIGHTS:
        root = torch.ones_like(perturbation)
        if least is not None:
            weight = (perturbation + back + found).abs() + least
            root = (weight / weight.mean(1, keepdim=True)).sqrt()
        parts = (linear.jacobian * root[:, None], left, low / root, high / root, linear.damping)
        found = root * box_step(BoxProblem(*(part.to(linear.jacobian) for part in parts))).double()
    return (back + found).view_as(moved)
