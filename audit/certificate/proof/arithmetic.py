"""Rigorous arithmetic: real numbers enclosed by float64 values with error bounds.

`Enclosure` represents a number as the unevaluated sum of two float64 numbers with a bound on the remainder;
`Derivatives` are directional derivatives, which constants do not change. Both go through the same network. In twenty
layers a bound on rounding grows by fifteen orders of magnitude, so plain float64 would not suffice. The bounds hold for
any order of summation, provided that every product and sum is rounded correctly: true for matrix products on the CPU,
but not for Winograd or Fourier convolutions, which PyTorch does not use for float64 on the CPU.

Source: Ozaki, Ogita, Oishi & Rump 2012, "Error-free transformations of matrix multiplication".
"""

from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil, frexp, log2
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from audit.errors import InvalidModelError

Apply = Callable[[Tensor, Tensor], Tensor]
"""A linear map of a value (N, ...) with a weight, such as a convolution, without bias."""

_UNIT = 2.0**-53  # unit roundoff of float64
_SLICES = 5  # number of slices that values and weights are split into
_DERIVATIVE_SLICES = 4  # the same for derivatives, where fewer digits suffice
_UP = 1 + 1e-9  # enlarges bounds to cover the rounding of their own computation
_TRUNCATION = 1e-90  # more than a representation with 120 digits omits
_SMALLEST, _LARGEST = 1e-100, 1e100  # magnitudes for which no product of slices under- or overflows


class Constant(NamedTuple):
    """A constant tensor of real numbers within `error` of `high` + `low`, elementwise."""

    high: Tensor
    low: Tensor
    error: Tensor

    @classmethod
    def of(cls, numbers: Tensor, function: Callable[[Fraction], Fraction] = lambda value: value) -> "Constant":
        """Return a function of a tensor's entries, each taken as an exact real number."""
        values = [function(Fraction(value)) for value in numbers.detach().double().flatten().tolist()]
        return cls.of_fractions(values, numbers.shape)

    @classmethod
    def of_fractions(cls, values: list[Fraction], shape: torch.Size) -> "Constant":
        """Return rational numbers as a tensor of a shape.

        Raises InvalidModelError for magnitudes at which the arithmetic may under- or overflow.
        """
        high = [float(value) for value in values]
        low = [float(value - Fraction(top)) for value, top in zip(values, high, strict=True)]
        parts = (torch.tensor(part, dtype=torch.float64).view(shape) for part in (high, low))
        first, second = parts
        if not _in_range(first):
            raise InvalidModelError(
                f"a constant of the network is neither 0 nor of a magnitude in [{_SMALLEST:g}, {_LARGEST:g}]"
            )
        return cls(first, second, 4 * _UNIT * second.abs() + _TRUNCATION * (first != 0))

    def magnitude(self) -> Tensor:
        """Return a bound on the absolute values."""
        return (self.high.abs() + self.low.abs() + self.error) * _UP


def inverse_square_root(value: Fraction) -> Fraction:
    """Return 1 / sqrt(value) to 120 digits."""
    with localcontext() as context:
        context.prec = 120
        return Fraction(1 / (Decimal(value.numerator) / Decimal(value.denominator)).sqrt())


class Enclosure(NamedTuple):
    """Real numbers within `error` of `high` + `low`, elementwise, shapes (N, ...)."""

    high: Tensor
    low: Tensor
    error: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Enclosure":
        """Return float64 values as exact real numbers."""
        return cls(values, torch.zeros_like(values), torch.zeros_like(values))

    @property
    def shape(self) -> torch.Size:
        """The shape of the numbers."""
        return self.high.shape

    def magnitude(self) -> Tensor:
        """Return a bound on the absolute values."""
        return (self.high.abs() + self.low.abs() + self.error) * _UP

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> "Enclosure":
        """Return the numbers after a change of shape or order, which involves no arithmetic."""
        return Enclosure(*(change(part) for part in self))

    def negate(self) -> "Enclosure":
        """Return the negated numbers."""
        return Enclosure(-self.high, -self.low, self.error)

    def pad(self, sides: list[int], value: float) -> "Enclosure":
        """Return the numbers padded with an exact value."""
        return Enclosure(functional.pad(self.high, sides, value=value), *(functional.pad(p, sides) for p in self[1:]))

    def where(self, mask: Tensor) -> "Enclosure":
        """Return the numbers where a mask (N, ...) is true, and zero elsewhere."""
        return self.rearrange(lambda part: torch.where(mask, part, torch.zeros_like(part)))

    def shift(self, constant: Constant) -> "Enclosure":
        """Return the numbers with constants added, broadcast."""
        return self.add(Enclosure(*(torch.broadcast_to(part, self.high.shape) for part in constant)))

    def add(self, other: "Enclosure") -> "Enclosure":
        """Return the sums."""
        top, remainder = _two_sum(self.high, other.high)
        rest = self.low + other.low
        missing = 4 * _UNIT * (remainder.abs() + self.low.abs() + other.low.abs())
        return _normalised(top, remainder + rest, (self.error + other.error + missing) * _UP)

    def scale(self, constant: Constant) -> "Enclosure":
        """Return the products with constants, broadcast."""
        top, remainder = _two_product(self.high, constant.high)
        first, second = self.high * constant.low, self.low * constant.high
        missing = 8 * _UNIT * (remainder.abs() + first.abs() + second.abs()) + (self.low * constant.low).abs()
        inherited = self.error * constant.magnitude() + (self.high.abs() + self.low.abs()) * constant.error
        return _normalised(top, remainder + (first + second), (missing + inherited) * _UP)

    def concatenate(self, others: Sequence["Enclosure"], axis: int) -> "Enclosure":
        """Return these numbers and others along an axis."""
        return Enclosure(*(torch.cat(parts, axis) for parts in zip(self, *others, strict=True)))

    def linear(self, apply: Apply, weight: Tensor, fan_in: int, count: int = _SLICES) -> "Enclosure":
        """Return a linear map of the numbers; each output is a sum of at most `fan_in` products with weights.

        Values and weights are split into `count` slices, short enough that every sum of products of two slices is
        exact in float64.
        """
        bits = (53 - ceil(log2(max(fan_in, 2)))) // 2
        values, size, values_lost = _slices(self.high, self.low, bits, count)
        weights, weight_size, weights_lost = _slices(weight, torch.zeros_like(weight), bits, count)
        high = apply(values[0], weights[0])
        low, total = torch.zeros_like(high), high.abs()
        skipped = values_lost * weight_size + size * weights_lost
        for i, value in enumerate(values):
            for j, weight_slice in enumerate(weights):
                if i + j >= count:
                    skipped += size * weight_size * 2.0 ** (-bits * (i + j))
                elif i + j and bool(weight_slice.any()):
                    term = apply(value, weight_slice)
                    high, remainder = _two_sum(high, term)
                    low, total = low + remainder, total + term.abs()
        # only products of two nonzero numbers contribute an error
        products = apply((self.high != 0).to(high), (weight != 0).to(high))
        # each addition to `low` is rounded by at most one unit of its largest possible value
        rounding = (2 * _SLICES**2 * _UNIT) ** 2 * total
        return _normalised(high, low, (apply(self.error, weight.abs()) + rounding + products * skipped) * _UP)


class Derivatives(NamedTuple):
    """Enclosed derivatives (K, ...) of numbers (1, ...) along K directions."""

    parts: Enclosure

    @property
    def shape(self) -> torch.Size:
        """The shape of the numbers."""
        return self.parts.shape

    def norm(self) -> Tensor:
        """Return a bound (1, ...) on the Euclidean norm of the K derivatives of each number."""
        return self.parts.magnitude().norm(dim=0, keepdim=True) * _UP

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> "Derivatives":
        """Return the numbers after a change of shape or order, which involves no arithmetic."""
        return Derivatives(self.parts.rearrange(change))

    def negate(self) -> "Derivatives":
        """Return the negated numbers."""
        return Derivatives(self.parts.negate())

    def pad(self, sides: list[int], _: float) -> "Derivatives":
        """Return the derivatives of padded numbers: the padding is constant, so its derivatives are zero."""
        return Derivatives(self.parts.pad(sides, 0.0))

    def where(self, mask: Tensor) -> "Derivatives":
        """Return the numbers where a mask (1, ...) is true, and zero elsewhere."""
        return Derivatives(self.parts.where(mask))

    def shift(self, _: Constant) -> "Derivatives":
        """Return the derivatives unchanged: the derivative of a constant is zero."""
        return self

    def add(self, other: "Derivatives") -> "Derivatives":
        """Return the sums."""
        return Derivatives(self.parts.add(other.parts))

    def scale(self, constant: Constant) -> "Derivatives":
        """Return the products with constants, broadcast."""
        return Derivatives(self.parts.scale(constant))

    def concatenate(self, others: Sequence["Derivatives"], axis: int) -> "Derivatives":
        """Return these numbers and others along an axis."""
        return Derivatives(self.parts.concatenate([other.parts for other in others], axis))

    def linear(self, apply: Apply, weight: Tensor, fan_in: int) -> "Derivatives":
        """Return a linear map of the numbers, each output a sum of at most `fan_in` products with weights."""
        return Derivatives(self.parts.linear(apply, weight, fan_in, _DERIVATIVE_SLICES))


def _normalised(high: Tensor, low: Tensor, error: Tensor) -> Enclosure:
    top, rest = _two_sum(high, low)
    if not _in_range(top):
        raise InvalidModelError(
            f"a value leaves the range of rigorous arithmetic: legal are 0 and magnitudes {_SMALLEST:g} to {_LARGEST:g}"
        )
    return Enclosure(top, rest, error)


def _in_range(values: Tensor) -> bool:
    size = values.abs()
    return bool((((size >= _SMALLEST) | (size == 0)) & (size <= _LARGEST)).all())


def _two_sum(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded sum and its exact rounding error. Source: Knuth 1969, section 4.2.2."""
    total = first + second
    part = total - first
    return total, (first - (total - part)) + (second - part)


def _two_product(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded product and its exact rounding error. Source: Dekker 1971, section 5."""
    product = first * second
    (a, b), (c, d) = _halves(first), _halves(second)
    return product, b * d - (((product - a * c) - b * c) - a * d)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    large = values * (2.0**27 + 1)
    top = large - (large - values)
    return top, values - top


def _slices(high: Tensor, low: Tensor, bits: int, count: int) -> tuple[list[Tensor], float, float]:
    """Return slices that sum to high + low, a bound on their magnitude, and a bound on the omitted remainder.

    With 2^E the magnitude, slice k is a multiple of 2^(E - bits (k + 1)) and at most 2^(E - bits k).
    """
    largest = float(high.abs().max()) if high.numel() else 0.0
    if largest == 0:
        return [high], 1.0, float(low.abs().max()) if low.numel() else 0.0
    exponent = frexp(largest)[1]
    slices, rest, lost = [], high, 0.0
    for k in range(count):
        if k == 2:  # the remainder of `high` is now about as small as `low`
            rest, missed = _two_sum(rest, low)
            lost = float(missed.abs().max())
        anchor = 1.5 * 2.0 ** (52 + exponent - bits * (k + 1))
        part = (rest + anchor) - anchor
        slices.append(part)
        rest = rest - part
        if k >= 2 and not bool(rest.any()):
            break
    return slices, 2.0**exponent, (lost + float(rest.abs().max())) * _UP
