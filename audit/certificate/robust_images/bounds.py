"""Bounds of a network's values over balls of images: intervals forward, and lines backward where these help.

`Bounds` are the numbers that the rules of `certificate.proof.operations` are applied to.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from audit.certificate.proof.arithmetic import Apply, Constant
from audit.certificate.proof.operations import Convolution
from audit.certificate.robust_images.patches import LocalPull, convolution_pull, factor_pull, same_pull
from audit.certificate.robust_images.tape import Pull, Step, Tape

_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # unit roundoff
_TINY = 1e-300  # covers underflow of products
_SMALL = 1e-15  # of the largest product: below it powers may underflow
_POWER = 16  # of the norm that bounds the largest weight of a row from above


def outwards(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the interval enlarged by one float on either side: it covers one rounding of its ends."""
    infinity = torch.full_like(low, torch.inf)
    return torch.nextafter(low, -infinity), torch.nextafter(high, infinity)


def pulled_through(change: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Pull:
    """Return the transposed map of a linear `change` of values (M, *shape)."""

    def pull(rows: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = rows.new_zeros(len(rows), *shape).requires_grad_()
            (found,) = torch.autograd.grad(change(leaf), leaf, rows, create_graph=rows.requires_grad)
        return found

    return pull


class Bounds(NamedTuple):
    """Values (N, ...) of step `at` of a tape: at the clean image, and their range [low, high] over the ball.

    `spread` (1, ...) is the factor of each pixel where a value still depends on one pixel alone, else None.
    """

    tape: Tape
    at: int
    value: Tensor
    low: Tensor
    high: Tensor
    spread: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """The shape of the values."""
        return self.value.shape

    def _after(self, ends: tuple[Tensor, Tensor], value: Tensor, pull: Pull, local: LocalPull | None) -> "Bounds":
        at = self.tape.record(Step((self.at,), (pull,), value.shape[1:], 0.0, local))
        return Bounds(self.tape, at, value, *ends, None)

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> "Bounds":
        """Return the values after a change of shape or order."""
        pull = pulled_through(change, self.shape[1:])
        found = self._after((change(self.low), change(self.high)), change(self.value), pull, None)
        return found._replace(spread=None if self.spread is None else change(self.spread))

    def pad(self, sides: list[int], value: float) -> "Bounds":
        """Return the values padded with a constant."""
        value = max(value, -1e30)  # a padding below every value has to fit into float32
        ends = [functional.pad(part, sides, value=value) for part in (self.low, self.high, self.value)]
        pull = pulled_through(lambda part: functional.pad(part, sides), self.shape[1:])
        found = self._after((ends[0], ends[1]), ends[2], pull, None)
        return found._replace(spread=None if self.spread is None else functional.pad(self.spread, sides))

    def negate(self) -> "Bounds":
        """Return the negated values."""
        local = factor_pull(-torch.ones((), dtype=self.value.dtype, device=self.value.device))
        found = self._after((-self.high, -self.low), -self.value, torch.neg, local)
        return found._replace(spread=self.spread)

    def shift(self, constant: Constant) -> "Bounds":
        """Return the values with constants added, broadcast."""
        added = constant.high.to(self.value)
        error = constant.magnitude().to(self.value) * 2 * _UNIT[self.value.dtype]
        ends = outwards(*outwards(self.low + added - error, self.high + added + error))
        return self._after(ends, self.value + added, lambda rows: rows, same_pull)._replace(spread=self.spread)

    def add(self, other: "Bounds") -> "Bounds":
        """Return the sums."""
        at = self.tape.record(Step((self.at, other.at), (lambda rows: rows,) * 2, self.shape[1:], 0.0, same_pull))
        ends = outwards(self.low + other.low, self.high + other.high)
        return Bounds(self.tape, at, self.value + other.value, *ends, None)

    def scale(self, constant: Constant) -> "Bounds":
        """Return the products with constants, broadcast."""
        factor = constant.high.to(self.value)
        first, second = self.low * factor, self.high * factor
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        error = 4 * _UNIT[self.value.dtype] * torch.maximum(low.abs(), high.abs()) + _TINY
        found = self._after(
            (low - error, high + error), self.value * factor, lambda rows: rows * factor, factor_pull(factor)
        )
        return found._replace(spread=None if self.spread is None else self.spread * factor.abs())

    def linear(self, apply: Apply, weight: Tensor, fan_in: int) -> "Bounds":
        """Return a linear map of the values; each result is a sum of at most `fan_in` products with weights."""
        weight = weight.to(self.value)
        value = apply(self.value, weight)
        transposed, shape = getattr(apply, "transposed", None), self.shape[1:]
        if transposed is None:
            pull = pulled_through(lambda part: apply(part, weight), shape)
        else:

            def pull(rows: Tensor) -> Tensor:
                found: Tensor = transposed(rows, weight, shape)
                return found

        local = convolution_pull(apply, weight) if isinstance(apply, Convolution) else None
        step = Step((self.at,), (pull,), value.shape[1:], value.shape[1:].numel() * fan_in, local)
        return Bounds(self.tape, self.tape.record(step), value, *self._ends(apply, weight, fan_in), None)

    def _ends(self, apply: Apply, weight: Tensor, fan_in: int) -> tuple[Tensor, Tensor]:
        """Return the range of a linear map, enlarged by a bound on all rounding errors of its computation."""
        unit = (fan_in + 8) * _UNIT[self.value.dtype]
        middle, size = (self.low + self.high) / 2, weight.abs()
        # the middle is rounded, and so is every product and sum with it: each error is a share of |w| |value|
        radius = torch.maximum(self.high - middle, middle - self.low)
        reach = apply(radius * (1 + unit) + 2 * unit * (middle.abs() + radius), size) * (1 + unit) + _TINY
        centre = apply(middle, weight)
        low, high = outwards(centre - reach, centre + reach)
        if self.spread is None or self.tape.threat.norm == "linf":
            return low, high
        # the first linear map: the dual norm of its rows, where the ball is smaller than its box
        power = 2 if self.tape.threat.norm == "l2" else _POWER
        # relative to the largest product, so that no power under- or overflows
        peak = self.spread.abs().max().clamp_min(1e-30), size.max().clamp_min(1e-30)
        powers = apply((self.spread.abs() / peak[0]) ** power, (size / peak[1]) ** power).clamp_min(0)
        dual = (powers ** (1 / power) * (1 + 4 * unit) + _SMALL) * peak[0] * peak[1]
        centre, slack = apply(self.value, weight), 2 * unit * apply(self.value.abs(), size) + _TINY
        reach = self.tape.threat.eps * dual + slack
        return torch.maximum(low, centre - reach), torch.minimum(high, centre + reach)

    def concatenate(self, others: Sequence["Bounds"], axis: int) -> "Bounds":
        """Return these values and others along an axis."""
        parts = (self, *others)
        value = torch.cat([part.value for part in parts], axis)
        low, high = torch.cat([part.low for part in parts], axis), torch.cat([part.high for part in parts], axis)
        sizes = [part.shape[axis] for part in parts]
        pulls = [_slice_of(axis, sum(sizes[:k]), size) for k, size in enumerate(sizes)]
        at = self.tape.record(Step(tuple(part.at for part in parts), tuple(pulls), value.shape[1:], 0.0))
        return Bounds(self.tape, at, value, low, high, None)


def _slice_of(axis: int, start: int, size: int) -> Pull:
    return lambda rows: rows.narrow(axis, start, size)
