"""Ten channels between vectors with exactly known mutual information, for comparing estimators."""

from collections.abc import Callable
from math import e, exp, lgamma, log, pi, sqrt

import torch
from torch import Tensor

from audit.random_keys import keyed_generator

Pairs = tuple[Tensor, Tensor]


def gaussian(count: int, generator: torch.Generator, dimension: int, nats: float) -> Pairs:
    """Return x ~ N(0, I) and z = x + Gaussian noise with I(x; z) = `nats`."""
    x = torch.randn(count, dimension, generator=generator)
    noise = torch.randn(count, dimension, generator=generator)
    return x, x + noise / sqrt(exp(2 * nats / dimension) - 1)


def half_cube(count: int, generator: torch.Generator) -> Pairs:
    """Return a two-dimensional Gaussian pair of 1 nat, both sides transformed by the invertible v -> v |v|^(1/2)."""
    x, z = gaussian(count, generator, 2, 1.0)
    return x * x.abs().sqrt(), z * z.abs().sqrt()


def spiral(count: int, generator: torch.Generator) -> Pairs:
    """Return a two-dimensional Gaussian pair of 1 nat, x rotated by an angle equal to its norm (invertible)."""
    x, z = gaussian(count, generator, 2, 1.0)
    angle = x.norm(dim=1)
    turned = torch.stack(
        [x[:, 0] * angle.cos() - x[:, 1] * angle.sin(), x[:, 0] * angle.sin() + x[:, 1] * angle.cos()], 1
    )
    return turned, z


def swiss_roll(count: int, generator: torch.Generator) -> Pairs:
    """Return a one-dimensional Gaussian pair of 1 nat, x mapped injectively to a planar spiral."""
    x, z = gaussian(count, generator, 1, 1.0)
    turn = 1.5 * pi * (1 + 2 * torch.special.ndtr(x))
    return torch.cat([turn * turn.cos(), turn * turn.sin()], 1) / 21, z


def student(count: int, generator: torch.Generator, degrees: int) -> Pairs:
    """Return a 2 + 2-dimensional Gaussian pair of 0.5 nats divided by a common chi variable (heavy tails)."""
    x, z = gaussian(count, generator, 2, 0.5)
    squares = torch.randn(count, degrees, generator=generator).square().sum(1, keepdim=True)
    scale = (degrees / squares).sqrt()
    return x * scale, z * scale


def student_nats(degrees: int) -> float:
    """Return the MI of the Student pair: the Gaussian MI plus the contribution of the shared scale.

    Source: Arellano-Valle, Contreras-Reyes & Genton 2013, for dimensions 2 and 2.
    """

    def entropy(dimension: int) -> float:
        half = (degrees + dimension) / 2
        shape = lgamma(degrees / 2) + dimension / 2 * log(degrees * pi) - lgamma(half)
        high, low = torch.special.digamma(torch.tensor([half, degrees / 2], dtype=torch.float64)).tolist()
        return shape + half * (high - low)

    return 0.5 + 2 * entropy(2) - entropy(4)


def uniform(count: int, generator: torch.Generator) -> Pairs:
    """Return x ~ U[0, 1] and z = x + U[-a, a] for a = 1/4: a - ln 2a nats."""
    x = torch.rand(count, 1, generator=generator)
    return x, x + 0.5 * (torch.rand(count, 1, generator=generator) - 0.5)


def labels(count: int, generator: torch.Generator) -> Pairs:
    """Return one of four labels (one-hot) and a point near the corner of a square that belongs to it."""
    drawn = torch.randint(0, 2, (count, 2), generator=generator)
    corner = drawn * 2.0 - 1
    return torch.eye(4)[2 * drawn[:, 0] + drawn[:, 1]], corner + 0.5 * torch.randn(count, 2, generator=generator)


def two_points_nats(noise: float = 0.5) -> float:
    """Return I(x; z) for x = +-1 and z = x + noise N(0, 1): h(z) - h(z given x), on a fine grid."""
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    bells = [(-((grid - point) ** 2) / (2 * noise**2)).exp() for point in (-1, 1)]
    density = sum(bells) / (2 * noise * sqrt(2 * pi))
    entropy = -torch.trapezoid(torch.special.xlogy(density, density), grid)
    return float(entropy) - log(2 * pi * e * noise**2) / 2


Sampler = Callable[[int, torch.Generator], Pairs]

CHANNELS: dict[str, tuple[float, Sampler]] = {
    "gaussian-1": (1.0, lambda count, generator: gaussian(count, generator, 1, 1.0)),
    "gaussian-1-strong": (2.0, lambda count, generator: gaussian(count, generator, 1, 2.0)),
    "gaussian-5": (1.0, lambda count, generator: gaussian(count, generator, 5, 1.0)),
    "gaussian-20": (1.0, lambda count, generator: gaussian(count, generator, 20, 1.0)),
    "half-cube": (1.0, half_cube),
    "spiral": (1.0, spiral),
    "swiss-roll": (1.0, swiss_roll),
    "student-t-5": (student_nats(5), lambda count, generator: student(count, generator, 5)),
    "uniform-noise": (log(2) + 0.25, uniform),
    "label-mixture": (2 * two_points_nats(), labels),
}
"""Exact MI in nats and the sampler of pairs (N, D), (N, E), by name."""


def draw(name: str, count: int, seed: int) -> tuple[float, Tensor, Tensor]:
    """Return the exact MI of a channel in nats and samples (N, D), (N, E)."""
    truth, sampler = CHANNELS[name]
    x, z = sampler(count, keyed_generator(seed, list(CHANNELS).index(name)))
    return truth, x, z
