"""Lines below and above an activation function on an interval.

Source: Zhang et al. 2018, "Efficient Neural Network Robustness Certification with General Activation Functions"
(CROWN), section 3.2, for ReLU, sigmoid and tanh.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_BISECTIONS = 40

Curve = Callable[[Tensor], Tensor]


class Lines(NamedTuple):
    """Lines `lower_slope` u + `lower_offset` <= f(u) <= `upper_slope` u + `upper_offset`, elementwise (N, ...).

    Where `free` is true, every lower slope in [0, 1] is legal, at the same offset.
    """

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor
    free: Tensor


def relu_lines(low: Tensor, high: Tensor) -> Lines:
    """Return the lines of max(u, 0) on intervals [low, high]; of all lower slopes, that of least area."""
    free = (low < 0) & (high > 0)
    width = torch.where(free, high - low, torch.ones_like(low))
    chord = torch.where(free, high / width, (high > 0).to(low))
    lower = torch.where(free, (high > -low).to(low), chord)
    offset = torch.where(free, -low * high / width, torch.zeros_like(low))
    return Lines(lower, torch.zeros_like(low), chord, offset, free)


def tanh_lines(low: Tensor, high: Tensor) -> Lines:
    """Return the lines of tanh on intervals [low, high]."""
    return _s_lines(torch.tanh, lambda u: 1 - torch.tanh(u).square(), torch.tanh, (low, high))


def sigmoid_lines(low: Tensor, high: Tensor) -> Lines:
    """Return the lines of the logistic function on intervals [low, high]."""

    def slope(u: Tensor) -> Tensor:
        return torch.sigmoid(u) * torch.sigmoid(-u)

    return _s_lines(torch.sigmoid, slope, lambda u: -torch.sigmoid(-u), (low, high))


def _s_lines(curve: Curve, slope: Curve, turned: Curve, interval: tuple[Tensor, Tensor]) -> Lines:
    """Return the lines of a curve that is convex below zero and concave above; `turned` is u -> -curve(-u)."""
    low, high = interval
    below = _line_below(curve, slope, low, high)
    above = _line_below(turned, slope, -high, -low)
    return Lines(below[0], below[1], above[0], -above[1], torch.zeros_like(low, dtype=torch.bool))


def _line_below(curve: Curve, slope: Curve, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and offset of a line below the curve: a tangent in its convex part, or the chord."""
    left, right = low.clamp_max(0), torch.zeros_like(low)
    end = curve(high)
    # the tangent at `left` stays below the end of the curve, or no tangent in the interval does
    for _ in range(_BISECTIONS):
        middle = (left + right) / 2
        legal = curve(middle) + slope(middle) * (high - middle) <= end
        left, right = torch.where(legal, middle, left), torch.where(legal, right, middle)
    touching = torch.where(high <= 0, (low + high) / 2, torch.minimum(left, (low + left) / 2))
    tangent = slope(touching)
    at = curve(touching)
    is_tangent = (high <= 0) | ((low < 0) & (at + tangent * (high - touching) <= end))
    wide = high - low > 1e-6
    # a short interval has no chord that can be computed: the least slope of the two ends is safe by the mean value
    chord = torch.where(wide, (end - curve(low)) / torch.where(wide, high - low, torch.ones_like(low)), 0.0)
    chord = torch.where(wide, chord, torch.minimum(slope(low), slope(high)))
    chosen = torch.where(is_tangent, tangent, chord)
    return chosen, torch.where(is_tangent, at - tangent * touching, curve(low) - chord * low)
