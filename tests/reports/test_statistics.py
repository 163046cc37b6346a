import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from reports.sentences import caption, describe, family_order, order_sentence
from reports.statistics import correlations, kendall, partial, pearson, spearman, within_groups
from reports.table import to_frame


@pytest.fixture
def pairs():
    random = np.random.default_rng(3)
    x = random.normal(size=20)
    return x, 0.7 * x + random.normal(size=20)


def test_pearson_agrees_with_scipy_interval_and_all(pairs):
    ours, theirs = pearson(*pairs), stats.pearsonr(*pairs)
    interval = theirs.confidence_interval(0.95)
    assert (ours.value, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


def test_spearman_value_p_and_bonett_wright_interval(pairs):
    ours, theirs = spearman(*pairs), stats.spearmanr(*pairs)
    assert ours.value == pytest.approx(theirs.statistic)
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.01)
    half = 1.959964 * math.sqrt((1 + ours.value**2 / 2) / 17)
    assert math.atanh(ours.high) - math.atanh(ours.value) == pytest.approx(half, rel=1e-5)
    assert math.atanh(ours.value) - math.atanh(ours.low) == pytest.approx(half, rel=1e-5)


def test_spearman_of_few_models_has_an_honest_p():
    # the t approximation says p = 0 here; 2 of 120 orders are as extreme
    result = spearman(np.arange(5.0), np.arange(5.0))
    assert result.p == pytest.approx(2 / 120, abs=0.005)


def test_kendall_is_exact_without_ties(pairs):
    ours = kendall(*pairs)
    assert ours.p == pytest.approx(stats.kendalltau(*pairs, method="exact").pvalue)
    tied = kendall(np.array([1.0, 1, 2, 3, 4, 5]), np.array([1.0, 2, 3, 4, 5, 5]))
    assert "ties" in tied.note


def test_partial_agrees_with_the_closed_form(pairs):
    x, y = pairs
    z = np.random.default_rng(5).normal(size=20) + x
    rxy, rxz, ryz = (stats.pearsonr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    exact = (rxy - rxz * ryz) / math.sqrt((1 - rxz**2) * (1 - ryz**2))
    ours = partial(x, y, z)
    assert ours.value == pytest.approx(exact)
    t = exact * math.sqrt(17 / (1 - exact**2))
    assert ours.p == pytest.approx(2 * stats.t.sf(abs(t), 17))


def test_groups_alone_make_a_large_correlation_and_the_within_one_is_not_fooled():
    random = np.random.default_rng(0)
    groups = [name for name in "abc" for _ in range(8)]
    centre = np.repeat([0.0, 5.0, 10.0], 8)
    x, y = centre + random.normal(size=24), centre + random.normal(size=24)
    assert pearson(x, y).value > 0.9
    inside = within_groups(x, y, groups)
    assert abs(inside.value) < 0.5
    assert inside.p > 0.05


def test_a_relation_inside_groups_is_found():
    random = np.random.default_rng(1)
    x = random.normal(size=16)
    y = x + 0.2 * random.normal(size=16) + np.repeat([0.0, -9.0], 8)
    inside = within_groups(x, y, ["a"] * 8 + ["b"] * 8)
    assert inside.value > 0.9
    assert inside.p < 0.01
    assert inside.low < inside.value < inside.high


def test_groups_of_one_are_left_out():
    x = np.arange(3.0)
    assert within_groups(x, x, ["a", "b", "c"]).note == "no training group holds two models"


@pytest.mark.parametrize(
    ("n", "interval", "p"), [(4, False, False), (5, False, True), (7, False, True), (8, True, True)]
)
def test_thresholds(n, interval, p):
    x = np.arange(float(n))
    y = x.copy()
    y[0] = 1.5
    for result in (spearman(x, y), pearson(x, y)):
        assert (result.low is not None) == interval
        assert (result.p is not None) == p
        assert bool(result.note) == (n < 8)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_models_have_no_correlation(zoo, n):
    results = correlations(to_frame(zoo[:n]))
    assert all(result.value is None and result.note for result in results)


def test_constant_and_missing_values_have_no_correlation():
    x = np.arange(6.0)
    assert pearson(x, np.ones(6)).note == "all models have the same value"
    assert spearman(x, np.full(6, np.nan)).note == "a value is missing"
    assert partial(x, x, np.ones(6)).value is None
    assert pearson(np.arange(9.0), np.arange(9.0)).low is None


def test_contradicted_and_failed_models_do_not_count(mixed_zoo):
    assert correlations(to_frame(mixed_zoo))[0].n == 10
    assert "10 models" in caption(to_frame(mixed_zoo))
    assert caption(to_frame(mixed_zoo)).endswith("; 1 contradicted model left out.")


def test_the_order_of_the_rows_does_not_matter(zoo):
    assert correlations(to_frame(zoo)) == correlations(to_frame(zoo[::-1]))


def test_captions(zoo):
    text = caption(to_frame(zoo))
    assert text.startswith("Spearman rho 0.85 [0.47, 0.97] over 12 models (estimate against measured)")
    assert "within training groups r -0.37" in text
    assert caption(to_frame(zoo[:1])) == "Too few models (1) for a correlation."
    assert "no interval under 8 models" in caption(to_frame(zoo[:6]))
    halves = [replace(record, layer="fc" if i < 8 else "input") for i, record in enumerate(zoo)]
    assert "digits, fc, ℓ∞ 0.2: Spearman rho" in caption(to_frame(halves))
    apart = [replace(record, layer=f"layer{i}") for i, record in enumerate(zoo)]
    assert caption(to_frame(apart)) == "No group of comparable models is large enough for a correlation."


def test_describe_says_why_there_is_nothing():
    assert describe(pearson(np.arange(2.0), np.arange(2.0))) == "Pearson r: too few models (2) for a correlation"


def test_family_order_has_three_comparisons_a_family(zoo):
    order = family_order(to_frame(zoo))
    assert len(order) == 12
    assert order["holds"].all()
    assert order_sentence(to_frame(zoo)).startswith("12 of 12 comparisons hold")


def test_a_comparison_that_fails_is_named(zoo):
    changed = [replace(zoo[0], rv=0.1), *zoo[1:]]
    assert int(family_order(to_frame(changed))["holds"].sum()) == 10
    assert "not: baseline-h-standard against baseline-h-quarter" in order_sentence(to_frame(changed))


def test_models_without_a_family_are_not_compared(zoo):
    strangers = [replace(record, family="unknown") for record in zoo]
    assert family_order(to_frame(strangers)).empty
    assert "no order to check" in order_sentence(to_frame(strangers))
