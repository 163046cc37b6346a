"""Coverage of the population limits, simulated with a known accuracy of the best head."""

from math import log, sqrt

import numpy as np
import pytest

from audit.certificate.population import held_out_limit, mcdiarmid_limit, sample_limit, self_bounding_limit
from audit.errors import UsageError

SIMULATIONS = 2000
LIMITS = [mcdiarmid_limit, self_bounding_limit, sample_limit]


def populations(generator, clusters, classes, concentration):
    """Return shares (S, T, K) of images at target t with class k: a head keeps one class per target."""
    shares = generator.dirichlet(np.full(clusters * classes, concentration), SIMULATIONS)
    return shares.reshape(SIMULATIONS, clusters, classes)


def draws(generator, shares, images):
    flat = shares.reshape(len(shares), -1)
    return generator.multinomial(images, flat / flat.sum(1, keepdims=True)).reshape(shares.shape)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("clusters", "classes", "concentration"), [(1, 10, 1.0), (20, 5, 0.3), (3, 2, 0.1)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_limits_from_one_sample_cover(limit, clusters, classes, concentration, confidence):
    generator = np.random.default_rng(clusters)
    shares = populations(generator, clusters, classes, concentration)
    best = shares.max(2).sum(1)
    kept = draws(generator, shares, 100).max(2).sum(1)
    limits = np.array([limit(int(z), 100, confidence) for z in range(101)])[kept]
    assert (best <= limits).mean() >= confidence


def test_the_sample_optimum_alone_does_not_cover():
    # one dominant class: the sample optimum is nearly unbiased, so it is below the truth in about half of the cases
    generator = np.random.default_rng(0)
    shares = np.tile([[[0.6, 0.4]]], (SIMULATIONS, 1, 1))
    kept = draws(generator, shares, 100).max(2).sum(1)
    assert (kept / 100 >= 0.6).mean() < 0.8


@pytest.mark.parametrize(("clusters", "classes", "concentration"), [(1, 10, 1.0), (1, 3, 0.2), (4, 5, 0.3)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_held_out_limit_covers(clusters, classes, concentration, confidence):
    """Half of the population reaches no hub and is kept by every head."""
    generator = np.random.default_rng(classes)
    reaching = populations(generator, clusters, classes, concentration) / 2
    shares = np.concatenate([reaching.reshape(SIMULATIONS, -1), np.full((SIMULATIONS, 1), 0.5)], 1)
    best = 0.5 + reaching.max(2).sum(1)
    counts = generator.multinomial(60, shares)
    kept = counts[:, -1] + counts[:, :-1].reshape(reaching.shape).max(2).sum(1)
    limits = np.array([held_out_limit(z, 60, confidence) for z in range(61)])[kept]
    assert (best <= limits).mean() >= confidence


def test_the_held_out_limit_is_tight():
    """With one dominant class the limit is the Clopper-Pearson limit, whose coverage is close to nominal."""
    generator = np.random.default_rng(1)
    counts = generator.multinomial(2000, [0.55, 0.25, 0.2], SIMULATIONS)
    limits = np.array([held_out_limit(z, 2000, 0.9) for z in range(2001)])[counts.max(1)]
    assert 0.89 - 0.02 <= (limits >= 0.55).mean() <= 0.91 + 0.02


def test_closed_values():
    spent = log(20)
    assert mcdiarmid_limit(100, 400) == pytest.approx(0.25 + sqrt(spent / 800))
    for kept in (0, 40, 400):
        mean = 1000 * self_bounding_limit(kept, 1000)
        assert mean - kept == pytest.approx(sqrt(2 * mean * spent))  # where the tail bound is exactly 5 %
    assert self_bounding_limit(0, 1000) == pytest.approx(2 * spent / 1000)
    assert sample_limit(40, 400) == self_bounding_limit(40, 400) < mcdiarmid_limit(40, 400)
    assert sample_limit(300, 400) == mcdiarmid_limit(300, 400) < self_bounding_limit(300, 400)
    assert held_out_limit(0, 50) == pytest.approx(1 - 0.05 ** (1 / 50))
    assert held_out_limit(50, 50) == mcdiarmid_limit(50, 50) == self_bounding_limit(50, 50) == 1


@pytest.mark.parametrize("limit", [*LIMITS, held_out_limit])
def test_limits_increase_with_kept_and_decrease_with_images(limit):
    values = [limit(kept, 50) for kept in range(51)]
    assert values == sorted(values)
    assert limit(20, 100) > limit(200, 1000) > 0.2
    assert limit(20, 100, 0.99) > limit(20, 100, 0.9)


@pytest.mark.parametrize("limit", [*LIMITS, held_out_limit])
@pytest.mark.parametrize(("kept", "images"), [(5, 4), (-1, 4), (0, 0)])
def test_illegal_counts_are_refused(limit, kept, images):
    with pytest.raises(UsageError, match="is illegal: legal are"):
        limit(kept, images)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_illegal_confidences_are_refused(confidence):
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        sample_limit(1, 2, confidence)
