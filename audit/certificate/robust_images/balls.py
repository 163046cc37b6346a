"""The least value of a linear function over the legal images around a clean image."""

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.types import Images

_BISECTIONS = 12  # of the multiplier of the l2 constraint: every multiplier gives a valid bound


def box(clean: Images, threat: ThreatModel) -> tuple[Images, Images]:
    """Return the least and the largest legal value of every pixel of `clean` (N, C, H, W)."""
    low, high = threat.pixel_range
    return (clean - threat.eps).clamp_min(low), (clean + threat.eps).clamp_max(high)


def least_change(slopes: Tensor, down: Tensor, up: Tensor, threat: ThreatModel) -> Tensor:
    """Return lower bounds (M,) of <slopes, d> over the legal changes d of the pixels, all (M, P).

    The pixel range allows changes from `down` <= 0 to `up` >= 0.

    Exact in l-inf and l1 inside the pixel range; in l2 by weak duality, at least the dual norm and exact up to the
    search of one multiplier. Differentiable in `slopes`.

    Source: Zhang et al. 2018, "Efficient Neural Network Robustness Certification with General Activation Functions"
    (CROWN), equation 7, for the dual norms.
    """
    if threat.norm == "linf":
        return torch.linalg.vecdot(slopes, up) + torch.linalg.vecdot(slopes.clamp_min(0), down - up)
    if threat.norm == "l1":
        return _least_in_l1(slopes, down, up, threat.eps)
    return _least_in_l2(slopes, down, up, threat.eps)


def _least_in_l1(slopes: Tensor, down: Tensor, up: Tensor, eps: float) -> Tensor:
    """Spend the radius on the pixels of largest slope first, each up to the end of its range."""
    room = torch.where(slopes > 0, -down, up)
    size, order = slopes.abs().sort(dim=1, descending=True)
    room = room.gather(1, order)
    before = room.cumsum(1) - room
    return -(size * torch.minimum(room, (eps - before).clamp_min(0))).sum(1)


def _least_in_l2(slopes: Tensor, down: Tensor, up: Tensor, eps: float) -> Tensor:
    """Return the value of the dual, min over the box of <a, d> + m (|d|^2 - eps^2) / 2, at a good multiplier m."""
    length = slopes.norm(dim=1)
    with torch.no_grad():
        large = (length / eps).clamp_min(1e-30)[:, None] if eps > 0 else torch.ones_like(length)[:, None]
        short, long = large * 1e-6, large.clone()
        for _ in range(_BISECTIONS):
            middle = (short * long).sqrt()
            outside = (-slopes / middle).clamp(down, up).square().sum(1, keepdim=True) > eps * eps
            short, long = torch.where(outside, middle, short), torch.where(outside, long, middle)
        step = (-slopes / long).clamp(down, up)
    dual = (slopes * step).sum(1) + long[:, 0] * (step.square().sum(1) - eps * eps) / 2
    return torch.maximum(dual, -eps * length)
