"""Enclosures contain the exact rational result, and are tight."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from audit.certificate.proof.arithmetic import (
    Constant,
    Derivatives,
    Enclosure,
    inverse_square_root,
)
from audit.errors import InvalidModelError
from audit.random_keys import keyed_generator


def drawn(*shape, key=0, spread=0):
    """Return numbers of both signs, over `spread` orders of magnitude."""
    generator = keyed_generator(key)
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return numbers * 10.0 ** -(spread * torch.rand(*shape, generator=generator, dtype=torch.float64))


def fractions(tensor):
    return [Fraction(value) for value in tensor.flatten().tolist()]


def errors(value, truth):
    """Return the errors as fractions of their bounds, after asserting that none exceeds its bound."""
    parts = zip(fractions(value.high), fractions(value.low), fractions(value.error), truth, strict=True)
    shares = []
    for high, low, bound, true in parts:
        off = abs(high + low - true)
        assert off <= bound
        shares.append(float(off / bound) if bound else 0.0)
    return shares


def product(matrix, vector):
    return [sum((w * v for w, v in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


@pytest.mark.parametrize("spread", [0, 6, 12])
@pytest.mark.parametrize("fan_in", [1, 7, 200])
def test_a_linear_map_is_enclosed(fan_in, spread):
    values, weight = drawn(1, fan_in, spread=spread), drawn(5, fan_in, key=1, spread=spread).float().double()
    found = Enclosure.of(values).linear(F.linear, weight, fan_in)
    truth = product([fractions(row) for row in weight], fractions(values))
    errors(found, truth)
    # far below the rounding of float64, relative to the largest terms
    size = fan_in * float(values.abs().max() * weight.abs().max())
    assert float(found.error.max()) < 1e-28 * size


def test_a_chain_of_maps_is_enclosed_where_float64_is_not():
    """Twelve maps with cancellation."""
    value, truth = Enclosure.of(drawn(1, 12)), fractions(drawn(1, 12))
    plain = drawn(1, 12)
    for layer in range(12):
        weight, bias = drawn(12, 12, key=2 * layer + 1).float().double(), drawn(12, key=2 * layer + 2)
        value = value.linear(F.linear, weight, 12).shift(Constant.of(bias[None]))
        rows = [fractions(row) for row in weight]
        truth = [a + b for a, b in zip(product(rows, truth), fractions(bias), strict=True)]
        plain = F.linear(plain, weight, bias)
    assert max(errors(value, truth)) < 1
    off = max(abs(float(Fraction(p) - t)) for p, t in zip(plain.flatten().tolist(), truth, strict=True))
    assert off > 1e3 * float(value.error.max()) > 0


def test_scales_of_batch_norm_against_decimal_arithmetic():
    variance, weight = drawn(8, key=1).abs(), drawn(8, key=2)
    scales = [
        w * inverse_square_root(v + Fraction(1e-5)) for w, v in zip(fractions(weight), fractions(variance), strict=True)
    ]
    with localcontext() as context:
        context.prec = 150
        for scale, w, v in zip(scales, fractions(weight), fractions(variance), strict=True):
            square = w * w / (v + Fraction(1e-5))
            assert abs(scale * scale - square) < abs(square) * Fraction(1, 10**100)
        assert Decimal(1) / 3 != Decimal("0.3")
    value = drawn(1, 8, key=3)
    found = Enclosure.of(value).scale(Constant.of_fractions(scales, torch.Size((1, 8))))
    errors(found, [a * b for a, b in zip(fractions(value), scales, strict=True)])
    twice = found.scale(Constant.of_fractions(scales, torch.Size((1, 8))))
    errors(twice, [a * b * b for a, b in zip(fractions(value), scales, strict=True)])
    assert float((twice.error / twice.high.abs()).max()) < 1e-28


def test_sums_differences_and_rearrangements():
    one, two = drawn(1, 30, spread=10), drawn(1, 30, key=1, spread=3)
    total = Enclosure.of(one).add(Enclosure.of(two)).add(Enclosure.of(one).negate())
    errors(total, fractions(two))
    assert torch.equal(total.high + total.low, two)
    folded = total.rearrange(lambda part: part.view(1, 5, 6)).where(drawn(1, 5, 6, key=2) > 0)
    assert folded.shape == (1, 5, 6)
    wide = Enclosure.of(one.view(1, 1, 5, 6)).pad([1, 0, 0, 0], -2.0)
    assert wide.high[0, 0, 0, 0] == -2
    assert wide.error.max() == 0
    both = total.concatenate([total], 1)
    assert both.shape == (1, 60)


def test_derivatives_change_under_maps_and_not_under_constants():
    columns, weight = drawn(4, 9), drawn(6, 9, key=1)
    slope = Derivatives(Enclosure.of(columns)).linear(F.linear, weight, 9)
    assert slope.shift(Constant.of(drawn(1, 6))) is slope
    assert torch.allclose(slope.norm(), (columns @ weight.T).norm(dim=0, keepdim=True), rtol=1e-7)
    assert bool((slope.norm() >= (columns @ weight.T).norm(dim=0, keepdim=True)).all())
    assert slope.pad([2, 0], 7.0).parts.high[:, :2].abs().max() == 0
    assert isinstance(slope.concatenate([slope], 1), Derivatives)


@pytest.mark.parametrize("value", [1e-150, 1e150, float("inf"), float("nan")])
def test_numbers_out_of_range_are_refused(value):
    numbers = torch.tensor([[value]], dtype=torch.float64)
    with pytest.raises(InvalidModelError, match="leaves the range of rigorous arithmetic"):
        Enclosure.of(numbers).add(Enclosure.of(torch.zeros(1, 1, dtype=torch.float64)))
    if value == value and abs(value) != float("inf"):
        with pytest.raises(InvalidModelError, match="a constant of the network is neither 0 nor"):
            Constant.of(numbers)
