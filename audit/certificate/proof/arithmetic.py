"""Numbers with a bound on their error: what a network computes in real arithmetic, enclosed.

Two kinds go through the same network: `Exact`, a value as the unevaluated sum of two float64 numbers with a bound on
what is missing, and `Slope`, derivatives along several directions, which constants do not move. In twenty layers a
bound on rounding grows by fifteen orders of magnitude, so float64 alone would not do. The bounds hold whatever order a
sum is computed in, so long as each product and each sum is rounded correctly: true of matrix products on the CPU, not
of Winograd's or Fourier's convolutions, which are not used for float64 there.

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

_UNIT = 2.0**-53  # the rounding unit of float64
_PARTS = 5  # how many pieces values and weights are cut into
_COARSE = 4  # the same for slopes, of which a few digits are enough
_UP = 1 + 1e-9  # what bounds are enlarged by, for the rounding of their own computation
_DIGITS = 1e-90  # what 120 digits leave out, and more
_SMALLEST, _LARGEST = 1e-100, 1e100  # magnitudes at which no product of pieces under- or overflows


class Constant(NamedTuple):
    """A tensor of real numbers: `high` + `low`, up to `error`, elementwise."""

    high: Tensor
    low: Tensor
    error: Tensor

    @classmethod
    def of(cls, numbers: Tensor, function: Callable[[Fraction], Fraction] = lambda value: value) -> "Constant":
        """Return a function of a tensor's entries, each taken as the real number it is."""
        values = [function(Fraction(value)) for value in numbers.detach().double().flatten().tolist()]
        return cls.real(values, numbers.shape)

    @classmethod
    def real(cls, values: list[Fraction], shape: torch.Size) -> "Constant":
        """Return real numbers in a tensor of some shape."""
        high = [float(value) for value in values]
        low = [float(value - Fraction(top)) for value, top in zip(values, high, strict=True)]
        parts = (torch.tensor(part, dtype=torch.float64).view(shape) for part in (high, low))
        first, second = parts
        if not _legal(first):
            raise InvalidModelError(f"a constant of the network is outside [{_SMALLEST:g}, {_LARGEST:g}] and not 0")
        return cls(first, second, 4 * _UNIT * second.abs() + _DIGITS * (first != 0))

    def magnitude(self) -> Tensor:
        """Return a bound on the absolute values."""
        return (self.high.abs() + self.low.abs() + self.error) * _UP


def inverse_root(value: Fraction) -> Fraction:
    """Return 1 / sqrt(value) to 120 digits."""
    with localcontext() as context:
        context.prec = 120
        return Fraction(1 / (Decimal(value.numerator) / Decimal(value.denominator)).sqrt())


class Exact(NamedTuple):
    """Real numbers within `error` of `high` + `low`, elementwise, shapes (N, ...)."""

    high: Tensor
    low: Tensor
    error: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Exact":
        """Return float64 values as the real numbers that they are."""
        return cls(values, torch.zeros_like(values), torch.zeros_like(values))

    @property
    def shape(self) -> torch.Size:
        """The shape of the numbers."""
        return self.high.shape

    def magnitude(self) -> Tensor:
        """Return a bound on the absolute values."""
        return (self.high.abs() + self.low.abs() + self.error) * _UP

    def shaped(self, change: Callable[[Tensor], Tensor]) -> "Exact":
        """Return the numbers rearranged: any change that computes nothing."""
        return Exact(*(change(part) for part in self))

    def negated(self) -> "Exact":
        """Return the numbers with the other sign."""
        return Exact(-self.high, -self.low, self.error)

    def padded(self, sides: list[int], value: float) -> "Exact":
        """Return the numbers with a margin of one exact value around."""
        return Exact(functional.pad(self.high, sides, value=value), *(functional.pad(p, sides) for p in self[1:]))

    def masked(self, mask: Tensor) -> "Exact":
        """Return the numbers where a mask (N, ...) is true, and zero elsewhere."""
        return self.shaped(lambda part: torch.where(mask, part, torch.zeros_like(part)))

    def shift(self, constant: Constant) -> "Exact":
        """Return the numbers with constants added, broadcast."""
        return self.add(Exact(*(torch.broadcast_to(part, self.high.shape) for part in constant)))

    def add(self, other: "Exact") -> "Exact":
        """Return the sums."""
        top, left = _two_sum(self.high, other.high)
        rest = self.low + other.low
        missing = 4 * _UNIT * (left.abs() + self.low.abs() + other.low.abs())
        return _exact(top, left + rest, (self.error + other.error + missing) * _UP)

    def scale(self, constant: Constant) -> "Exact":
        """Return the products with constants, broadcast."""
        top, left = _two_product(self.high, constant.high)
        first, second = self.high * constant.low, self.low * constant.high
        missing = 8 * _UNIT * (left.abs() + first.abs() + second.abs()) + (self.low * constant.low).abs()
        inherited = self.error * constant.magnitude() + (self.high.abs() + self.low.abs()) * constant.error
        return _exact(top, left + (first + second), (missing + inherited) * _UP)

    def linear(self, apply: Apply, weight: Tensor, fan_in: int, count: int = _PARTS) -> "Exact":
        """Return a linear map of the numbers, each output a sum of at most `fan_in` products with the weight's entries.

        Values and weights are cut into `count` pieces, so short that every sum of products of two is exact in float64.
        """
        bits = (53 - ceil(log2(max(fan_in, 2)))) // 2
        values, size, values_lost = _pieces(self.high, self.low, bits, count)
        weights, weight_size, weights_lost = _pieces(weight, torch.zeros_like(weight), bits, count)
        high = apply(values[0], weights[0])
        low, total = torch.zeros_like(high), high.abs()
        skipped = values_lost * weight_size + size * weights_lost
        for i, value in enumerate(values):
            for j, piece in enumerate(weights):
                if i + j >= count:
                    skipped += size * weight_size * 2.0 ** (-bits * (i + j))
                elif i + j and bool(piece.any()):
                    term = apply(value, piece)
                    high, left = _two_sum(high, term)
                    low, total = low + left, total + term.abs()
        # only products of two numbers that are not zero can have lost anything
        products = apply((self.high != 0).to(high), (weight != 0).to(high))
        # each addition to `low` rounds, by at most the unit of what it can have grown to
        rounding = (2 * _PARTS**2 * _UNIT) ** 2 * total
        return _exact(high, low, (apply(self.error, weight.abs()) + rounding + products * skipped) * _UP)


class Slope(NamedTuple):
    """Directional derivatives (K, ...) of numbers (1, ...), one a direction, with errors of their own."""

    parts: Exact

    @property
    def shape(self) -> torch.Size:
        """The shape of the numbers."""
        return self.parts.shape

    def norm(self) -> Tensor:
        """Return a bound on the length of the vector of K at every place, (1, ...)."""
        return self.parts.magnitude().norm(dim=0, keepdim=True) * _UP

    def shaped(self, change: Callable[[Tensor], Tensor]) -> "Slope":
        """Return the numbers rearranged: any change that computes nothing."""
        return Slope(self.parts.shaped(change))

    def negated(self) -> "Slope":
        """Return the numbers with the other sign."""
        return Slope(self.parts.negated())

    def padded(self, sides: list[int], _: float) -> "Slope":
        """Return the numbers with a margin around that has no slope, whatever its value."""
        return Slope(self.parts.padded(sides, 0.0))

    def masked(self, mask: Tensor) -> "Slope":
        """Return the numbers where a mask (1, ...) is true, and zero elsewhere."""
        return Slope(self.parts.masked(mask))

    def shift(self, _: Constant) -> "Slope":
        """Return the same: constants have no slope."""
        return self

    def add(self, other: "Slope") -> "Slope":
        """Return the sums."""
        return Slope(self.parts.add(other.parts))

    def scale(self, constant: Constant) -> "Slope":
        """Return the products with constants, broadcast."""
        return Slope(self.parts.scale(constant))

    def linear(self, apply: Apply, weight: Tensor, fan_in: int) -> "Slope":
        """Return a linear map of the numbers, each output a sum of at most `fan_in` products with weights."""
        return Slope(self.parts.linear(apply, weight, fan_in, _COARSE))


def laid_together(parts: Sequence[Exact] | Sequence[Slope], axis: int) -> Exact | Slope:
    """Return numbers of one kind concatenated along an axis."""
    exact = [part.parts if isinstance(part, Slope) else part for part in parts]
    together = Exact(*(torch.cat(each, axis) for each in zip(*exact, strict=True)))
    return Slope(together) if isinstance(parts[0], Slope) else together


def _exact(high: Tensor, low: Tensor, error: Tensor) -> Exact:
    top, rest = _two_sum(high, low)
    if not _legal(top):
        raise InvalidModelError(
            f"a value leaves the range of exact arithmetic: legal are 0 and magnitudes {_SMALLEST:g} to {_LARGEST:g}"
        )
    return Exact(top, rest, error)


def _legal(values: Tensor) -> bool:
    size = values.abs()
    return bool((((size >= _SMALLEST) | (size == 0)) & (size <= _LARGEST)).all())


def _two_sum(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded sum and exactly what it misses. Source: Knuth 1969, section 4.2.2."""
    total = first + second
    part = total - first
    return total, (first - (total - part)) + (second - part)


def _two_product(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded product and exactly what it misses. Source: Dekker 1971, section 5."""
    product = first * second
    (a, b), (c, d) = _halves(first), _halves(second)
    return product, b * d - (((product - a * c) - b * c) - a * d)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    large = values * (2.0**27 + 1)
    top = large - (large - values)
    return top, values - top


def _pieces(high: Tensor, low: Tensor, bits: int, count: int) -> tuple[list[Tensor], float, float]:
    """Return pieces that sum to high + low, their size, and a bound on what they leave out.

    With 2^E the size, piece k is a multiple of 2^(E - bits (k + 1)) of at most 2^(E - bits k).
    """
    largest = float(high.abs().max()) if high.numel() else 0.0
    if largest == 0:
        return [high], 1.0, float(low.abs().max()) if low.numel() else 0.0
    exponent = frexp(largest)[1]
    pieces, rest, lost = [], high, 0.0
    for k in range(count):
        if k == 2:  # what is left of `high` is about as long as `low` now
            rest, missed = _two_sum(rest, low)
            lost = float(missed.abs().max())
        anchor = 1.5 * 2.0 ** (52 + exponent - bits * (k + 1))
        piece = (rest + anchor) - anchor
        pieces.append(piece)
        rest = rest - piece
        if k >= 2 and not bool(rest.any()):
            break
    return pieces, 2.0**exponent, (lost + float(rest.abs().max())) * _UP
