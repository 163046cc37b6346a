import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from reports.statistics.correlation import Correlation
from reports.statistics.gap_statistics import correlations, families, kendall, partial, pearson, spearman, within_groups
from reports.statistics.reliability import disattenuated, intraclass, reliability
from reports.statistics.resampling import _weighted_rhos, spearman_by_family
from reports.statistics.sentences import caption, describe, family_order, order_sentence
from reports.tables.table import to_frame


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


def test_kendall_with_ties_has_the_p_of_every_order():
    x, y = np.array([1.0, 1, 2, 3, 4, 5]), np.array([1.0, 3, 2, 4, 5, 5])
    tied = kendall(x, y)
    observed = stats.kendalltau(x, y).statistic
    every = [abs(stats.kendalltau(x, y[list(order)]).statistic) for order in itertools.permutations(range(6))]
    assert tied.value == pytest.approx(observed)
    assert tied.p == np.mean(np.array(every) >= observed - 1e-12)
    assert tied.note == "permutation p: ties"


def test_kendall_of_many_models_with_ties(pairs):
    x, y = (np.round(v, 1) for v in pairs)
    assert len(set(x)) < 20
    assert kendall(x, y).p == pytest.approx(stats.kendalltau(x, y).pvalue, abs=0.01)
    many = kendall(np.arange(60.0), np.arange(60.0) // 2)
    assert many.note == "asymptotic p"


def test_reliability_is_the_published_intraclass_correlation():
    # Shrout & Fleiss (1979), Table 2: ICC(3, k) = .91 for six targets and four judges
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    assert intraclass(ratings) == pytest.approx(0.91, abs=0.005)
    assert intraclass(ratings + np.array([0, 5, -3, 9])) == pytest.approx(intraclass(ratings))


def test_disattenuation_undoes_planted_noise(suite):
    random = np.random.default_rng(0)
    truth = random.normal(size=400)
    noise = random.normal(size=(400, 5))
    records = [
        replace(
            suite(models=1, estimators=["sandwich"])[0],
            cell_id=f"c{i}",
            rv=float(truth[i] + noise[i].mean()),
            details={"per_seed": [{"seed": s, "rv": float(truth[i] + noise[i, s])} for s in range(5)]},
        )
        for i in range(400)
    ]
    frame = to_frame(records)
    trust = reliability(frame)
    assert trust.value == pytest.approx(1 / (1 + 1 / 5), abs=0.03)
    observed = pearson(frame["rv"].to_numpy(), truth).value
    assert observed < 0.93
    assert disattenuated(frame["rv"].to_numpy(), truth, trust).value == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("seeds", "given"), [(3, False), (4, False), (5, True)])
def test_no_reliability_under_five_seeds(suite, seeds, given):
    found = correlations(to_frame(suite(estimators=["mine-infonce"], seeds=seeds)))
    assert (found.reliability.value is not None) == (found.disattenuated.value is not None) == given
    if not given:
        assert found.reliability.note == found.disattenuated.note == f"{seeds} shared seeds, 5 are needed"


def test_only_shared_seeds_count(suite):
    records = suite(estimators=["mine-infonce"], seeds=5)
    shifted = [{**row, "seed": row["seed"] + 1} for row in records[0].details["per_seed"]]
    found = correlations(to_frame([replace(records[0], details={"per_seed": shifted}), *records[1:]]))
    assert found.reliability.note == "4 shared seeds, 5 are needed"


def test_seeds_that_differ_as_much_as_models_give_no_corrected_correlation():
    trust = Correlation("reliability", -0.2, None, None, None, 5)
    refused = disattenuated(np.arange(5.0), np.arange(5.0), trust)
    assert (refused.value, refused.note) == (None, "the seeds differ as much as the models")


def test_families_drawn_again_are_wider_where_kin_are_alike():
    random = np.random.default_rng(2)
    centre = np.repeat(random.normal(size=8), 6)
    x = centre + 0.05 * random.normal(size=48)
    y = centre + np.repeat(random.normal(size=8), 6) + 0.05 * random.normal(size=48)
    rho = spearman(x, y)
    apart = spearman_by_family(x, y, [str(i) for i in range(48)], rho)
    kin = spearman_by_family(x, y, [str(i // 6) for i in range(48)], rho)
    assert kin.value == apart.value == rho.value
    assert kin.low < rho.value < kin.high
    assert kin.high - kin.low > 1.5 * (apart.high - apart.low)
    assert spearman_by_family(x, y, [str(i // 6) for i in range(48)], rho) == kin


def test_a_bootstrap_draw_is_spearman_of_what_was_drawn(pairs):
    x, y = (np.round(v, 1) for v in pairs)
    counts = np.random.default_rng(4).integers(0, 3, size=20)
    drawn = np.repeat(np.arange(20), counts)
    ours = _weighted_rhos(x, y, counts[None].astype(float))[0]
    assert ours == pytest.approx(stats.spearmanr(x[drawn], y[drawn]).statistic)


def test_no_bootstrap_under_five_families_and_strangers_are_families_of_their_own(zoo):
    refused = correlations(to_frame(zoo)).by_family
    assert (refused.low, refused.note) == (None, "no bootstrap interval under 5 families, here 4")
    strangers = to_frame([replace(record, family="unknown") for record in zoo])
    assert len(set(families(strangers))) == 12
    assert correlations(strangers).by_family.note == "12 families"


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
    assert correlations(to_frame(mixed_zoo)).spearman.n == 10
    assert "10 models" in caption(to_frame(mixed_zoo))
    assert caption(to_frame(mixed_zoo)).endswith(" 1 contradicted model left out.")


def test_the_order_of_the_rows_does_not_matter(zoo):
    assert correlations(to_frame(zoo)) == correlations(to_frame(zoo[::-1]))


def test_captions(zoo):
    text = caption(to_frame(zoo))
    assert text.startswith("Spearman rho 0.85 [0.47, 0.97] over 12 models (estimate against measured)")
    assert ". Within training groups r -0.37 [-0.81, 0.34], permutation p 0.31. " in text
    assert ". Given natural accuracy, partial r 0.96 [0.86, 0.99]. " in text
    assert text.endswith("No reliability of RV: 3 shared seeds, 5 are needed.")
    assert caption(to_frame(zoo[:1])) == "Too few models (1) for a correlation."
    assert "no interval under 8 models" in caption(to_frame(zoo[:6]))
    halves = [replace(record, layer="fc" if i < 8 else "input") for i, record in enumerate(zoo)]
    assert "digits, fc, ℓ∞ 0.2: Spearman rho" in caption(to_frame(halves))
    apart = [replace(record, layer=f"layer{i}") for i, record in enumerate(zoo)]
    assert caption(to_frame(apart)) == "No group of comparable models is large enough for a correlation."


def test_captions_state_the_reliability_the_families_and_who_makes_no_claim(suite):
    text = caption(to_frame(suite(models=12, estimators=["mine-infonce"], seeds=5)))
    found = correlations(to_frame(suite(models=12, estimators=["mine-infonce"], seeds=5)))
    kin, trust = found.by_family, found.reliability
    assert f"; [{kin.low:.2f}, {kin.high:.2f}] over 6 families drawn again." in text
    assert f"Reliability of RV over 5 seeds {trust.value:.2f}; Pearson r {found.pearson.value:.2f}, " in text
    assert text.endswith(f"{found.disattenuated.value:.2f} without that noise.")
    assert "does not claim to rank" in caption(to_frame(suite(estimators=["ref-local"])))


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
