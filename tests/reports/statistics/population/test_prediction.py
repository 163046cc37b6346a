"""What a predictor adds, reliability, and networks held back, against plain least squares and known cases."""

import numpy as np
import pytest
from scipy import stats

from reports.statistics.population.grouped import Blocks, Effort, ranks_inside
from reports.statistics.population.prediction import (
    Sample,
    error_difference,
    fit_curve,
    increment,
    judge_held_back,
    reliability,
)

EFFORT = Effort(shuffles=1, draws=300)
GROUPS = [f"g{i // 8}" for i in range(48)]
BLOCKS = Blocks(GROUPS, [f"f{i % 4}" for i in range(48)], [i % 8 // 4 for i in range(48)])


def sample(share=1.0, seed=0):
    """Return an outcome of which a rival knows one part, and the predictor another part by `share`."""
    draws = np.random.default_rng(seed)
    one, other, noise = draws.normal(size=(3, 48))
    rivals = {"weak": draws.normal(size=48), "strong": one + 0.2 * draws.normal(size=48)}
    return Sample(share * other + (1 - share) * one, rivals, one + share * other + 0.2 * noise, BLOCKS)


def adjusted(columns, outcome, freedom):
    """Return the adjusted R2 of centred columns by least squares."""
    fitted = columns @ np.linalg.lstsq(columns, outcome, rcond=None)[0]
    explained = 1 - ((outcome - fitted) ** 2).sum() / (outcome**2).sum()
    return 1 - (1 - explained) * freedom / (freedom - columns.shape[1])


@pytest.mark.parametrize("inside", [True, False])
def test_the_increment_is_that_of_least_squares(inside):
    given = sample()
    rank = (lambda v: ranks_inside(v, GROUPS)) if inside else (lambda v: stats.rankdata(v) - 24.5)
    freedom = 48 - (6 if inside else 1)
    found = increment(given, EFFORT, inside=inside)
    outcome, rival, predictor = rank(given.outcome), rank(given.rivals["strong"]), rank(given.predictor)
    alone = adjusted(rival[:, None], outcome, freedom)
    assert found.rival == "strong"
    assert found.alone == pytest.approx(alone)
    assert found.added == pytest.approx(adjusted(np.column_stack([rival, predictor]), outcome, freedom) - alone)
    assert found.low > 0
    assert found.low <= found.added <= found.high


def test_a_predictor_that_only_repeats_its_rival_adds_nothing():
    given = sample(share=0.0)
    given = given._replace(predictor=given.rivals["strong"])
    found = increment(given, EFFORT, inside=True)
    assert found.added < 0
    assert found.low < 0


def test_constant_rivals_are_never_the_best():
    given = sample()._replace(rivals={"radius": np.repeat(np.arange(6.0), 8), "other": sample().rivals["strong"]})
    assert increment(given, EFFORT, inside=True).rival == "other"


def test_reliability_compares_two_seeds_of_each_recipe():
    values = np.random.default_rng(5).normal(size=48)
    repeated = np.array([values[i - 4] if i % 8 >= 4 else values[i] for i in range(48)])
    assert reliability(repeated, BLOCKS) == (pytest.approx(1.0), 24)
    first = [i for i in range(48) if i % 8 < 4]
    groups = [GROUPS[i] for i in first]
    one, other = (ranks_inside(values[[i + at for i in first]], groups) for at in (0, 4))
    expected = one @ other / np.sqrt((one @ one) * (other @ other))
    assert reliability(values, BLOCKS)[0] == pytest.approx(expected)
    assert reliability(values, Blocks(GROUPS, [f"f{i}" for i in range(48)], [0] * 48)) == (None, 0)


def test_curves_are_monotone_and_their_intervals_hold_new_networks():
    draws = np.random.default_rng(6)
    x = draws.uniform(size=400)
    y = np.exp(-3 * x) + 0.05 * draws.normal(size=400)
    families = [f"f{i % 4}" for i in range(400)]
    curve = fit_curve(x[:200], y[:200], families[:200], 0.9)
    assert (np.diff(curve.heights) <= 1e-12).all()
    fallen = judge_held_back(curve, x[200:], y[200:])
    assert fallen.covered == pytest.approx(0.9, abs=0.07)
    assert fallen.error < 0.06
    assert fallen.rho == pytest.approx(stats.spearmanr(x[200:], y[200:]).statistic)
    assert fallen.networks == 200


def test_a_better_predictor_has_the_smaller_error():
    draws = np.random.default_rng(7)
    y = draws.uniform(size=60)
    good, poor = y + 0.01 * draws.normal(size=60), y + 0.5 * draws.normal(size=60)
    families = [f"f{i % 3}" for i in range(60)]
    curves = fit_curve(good, y, families, 0.9), fit_curve(poor, y, families, 0.9)
    assert curves[0].half_width < curves[1].half_width
    groups = [f"g{i % 10}" for i in range(60)]
    value, low, high = error_difference(curves, (good, poor), y, groups, EFFORT)
    expected = np.mean(np.abs(y - curves[0].at(good)) - np.abs(y - curves[1].at(poor)))
    assert value == pytest.approx(expected)
    assert low < value < high < 0
