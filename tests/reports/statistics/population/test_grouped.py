"""Rank correlations inside training groups, against plain numpy, enumeration and cases that are known."""

from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from reports.statistics.population.grouped import (
    Blocks,
    Effort,
    exchanged_p,
    holm,
    inside_groups,
    partial_inside,
    ranks_inside,
    weighted_covariances,
)

QUICK = Effort(shuffles=400, draws=200)


def blocks(groups, families=("a", "b", "c", "d"), seeds=(0,)):
    """Return the blocks of every group, family and seed."""
    cells = list(product(groups, families, seeds))
    return Blocks(*([cell[at] for cell in cells] for at in range(3)))


def test_one_group_is_spearman_and_kendall():
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=12), draws.normal(size=12)
    one = Blocks(["g"] * 12, [f"f{i % 6}" for i in range(12)], [i // 6 for i in range(12)])
    found = inside_groups(x, y, one, Effort(shuffles=4000, draws=50))
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.tau == pytest.approx(stats.kendalltau(x, y).statistic)
    assert found.p == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.05)
    assert found.tau_p == pytest.approx(stats.kendalltau(x, y).pvalue, abs=0.05)


def test_differences_between_groups_count_for_nothing():
    # rises from group to group, falls inside each
    which = blocks(["g0", "g1", "g2"])
    level = np.repeat([0.0, 10.0, 20.0], 4)
    inner = np.tile([0.0, 1.0, 2.0, 3.0], 3)
    assert stats.spearmanr(level + inner, level - inner).statistic > 0.7
    found = inside_groups(level + inner, level - inner, which, QUICK)
    assert (found.value, found.tau) == (pytest.approx(-1), pytest.approx(-1))
    assert found.p < 0.05
    assert inside_groups(level, level - inner, which, QUICK).value is None  # constant inside every group


def test_p_is_that_of_all_shuffles_inside_groups():
    which = blocks(["g0", "g1"], ("a", "b", "c"))
    x, y = np.array([1.0, 2, 3, 2, 3, 1]), np.array([1.0, 2, 3, 1, 3, 2])
    first, second = ranks_inside(x, which.groups), ranks_inside(y, which.groups)
    every = [
        first[list(one) + [3 + i for i in other]] @ second
        for one in permutations(range(3))
        for other in permutations(range(3))
    ]
    exact = np.mean(np.abs(every) >= abs(first @ second) - 1e-9)
    assert inside_groups(x, y, which, Effort(shuffles=8000, draws=10)).p == pytest.approx(exact, abs=0.02)


def test_families_that_differ_alike_in_every_group_are_one_piece_of_evidence():
    which = blocks([f"g{i}" for i in range(10)])
    family = np.tile([0.0, 1.0, 2.0, 3.0], 10)
    noise = 0.1 * np.random.default_rng(1).normal(size=(2, 40))
    found = inside_groups(family + noise[0], family + noise[1], which, QUICK)
    assert found.p < 0.01  # as if forty networks were independent
    assert found.families_p == pytest.approx(2 / 24)  # the order itself and its reverse, of all orders of four
    flat = inside_groups(noise[0], noise[1], which, QUICK)
    assert flat.families_p > 0.1


def test_exchanges_of_families_leave_out_cells_without_a_network():
    which = blocks(["g0", "g1"], ("a", "b", "c"))
    kept = [0, 1, 2, 3, 4]  # g1 lacks c
    part = Blocks(*([each[i] for i in kept] for each in (which.groups, which.families, which.seeds)))
    x = ranks_inside(np.array([1.0, 2, 3, 1, 2]), part.groups)
    assert exchanged_p(x, x, part) == pytest.approx(2 / 6, abs=0.2)
    assert exchanged_p(x[:2], x[:2], Blocks(["g", "g"], ["a", "b"], [0, 0])) is None


def test_a_weight_of_two_is_a_network_that_occurs_twice():
    draws = np.random.default_rng(2)
    columns, groups = draws.normal(size=(6, 2)), np.array([0, 0, 0, 1, 1, 1])
    weights = np.array([[2.0, 1, 0, 1, 1, 3]])
    indicator = np.eye(2)[groups]
    times = np.repeat(np.arange(6), weights[0].astype(int))
    expected = sum(np.cov(columns[times[groups[times] == g]].T, bias=True) * (groups[times] == g).sum() for g in (0, 1))
    assert np.allclose(weighted_covariances(columns, weights, indicator)[0], expected)


def test_a_partial_correlation_vanishes_where_the_control_explains_both():
    draws = np.random.default_rng(3)
    which = blocks([f"g{i}" for i in range(12)])
    control = draws.normal(size=48)
    x, y = control + 0.3 * draws.normal(size=48), control + 0.3 * draws.normal(size=48)
    assert inside_groups(x, y, which, QUICK).value > 0.7
    partial = partial_inside(x, y, [control], which, QUICK)
    first, second, third = (ranks_inside(each, which.groups) for each in (x, y, control))
    rest = [each - third * (each @ third) / (third @ third) for each in (first, second)]
    assert partial.value == pytest.approx(rest[0] @ rest[1] / np.sqrt((rest[0] @ rest[0]) * (rest[1] @ rest[1])))
    assert partial.p > 0.05
    assert partial_inside(x, control, [control], which, QUICK).value is None


def test_no_relation_is_rarely_significant():
    which, draws = blocks([f"g{i}" for i in range(4)]), np.random.default_rng(4)
    effort = Effort(shuffles=99, draws=1)
    ps = [inside_groups(*draws.normal(size=(2, 16)), which, effort).p for _ in range(200)]
    assert np.mean(np.array(ps) <= 0.05) < 0.1
    assert np.mean(ps) == pytest.approx(0.5, abs=0.08)


def test_holm_by_hand_and_without_missing_values():
    assert holm([0.01, 0.04, 0.03, None]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06), None]
    assert holm([0.5, 0.9]) == [pytest.approx(1.0), pytest.approx(1.0)]
    assert holm([]) == []
