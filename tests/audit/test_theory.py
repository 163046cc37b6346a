import subprocess
import sys
from math import inf, log, nan, nextafter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.errors import UsageError
from audit.theory import (
    binary_divergence,
    binary_entropy,
    information_floor,
    max_accuracy,
    max_adversarial_accuracy,
    max_top_m_accuracy,
    min_adversarial_risk,
    vulnerability_range,
)


@pytest.mark.parametrize(
    ("nats", "wanted"), [(0.0, 0.301), (0.5, 0.518), (1.0, 0.735), (1.08, 0.770), (1.5, 0.952), (2.0, 1.0)]
)
def test_reference_values_of_theorem_3_4_at_ten_classes(nats, wanted):
    assert max_adversarial_accuracy(nats, 10) == pytest.approx(wanted, abs=6e-4)
    assert min_adversarial_risk(nats, 10) == pytest.approx(1 - wanted, abs=6e-4)


@given(nats=st.floats(-50, 50), step=st.floats(0, 5), classes=st.integers(2, 1000))
def test_the_ceiling_is_clipped_and_rises_with_information(nats, step, classes):
    ceiling = max_adversarial_accuracy(nats, classes)
    assert 1 / classes <= ceiling <= 1
    assert max_adversarial_accuracy(nats + step, classes) >= ceiling
    assert max_adversarial_accuracy(nats, classes + 1) <= ceiling
    assert ceiling + min_adversarial_risk(nats, classes) == pytest.approx(1)


def test_two_classes_are_never_bounded():
    assert max_adversarial_accuracy(0.0, 2) == 1.0


@pytest.mark.parametrize("function", [max_adversarial_accuracy, min_adversarial_risk])
def test_illegal_inputs_are_refused(function):
    with pytest.raises(UsageError, match="num_classes 1 must be at least 2"):
        function(1.0, 1)
    with pytest.raises(UsageError, match="not a number"):
        function(float("nan"), 10)


@given(p=st.floats(0, 1), q=st.floats(0.01, 0.99))
def test_divergence_is_positive_and_zero_only_at_equality(p, q):
    assert binary_divergence(p, q) >= -1e-12
    assert binary_divergence(q, q) == pytest.approx(0, abs=1e-12)
    assert binary_divergence(p, q) == pytest.approx(binary_divergence(1 - p, 1 - q), abs=1e-9)


@pytest.mark.parametrize(("accuracy", "wanted"), [(0.8633, 1.603), (0.95, 1.994), (1.0, log(10))])
def test_reference_values_of_the_floor(accuracy, wanted):
    assert information_floor(accuracy, 0.1) == pytest.approx(wanted, abs=5e-4)


@pytest.mark.parametrize(("accuracy", "share"), [(0.1, 0.1), (0.0, 0.1), (0.3, 0.5), (1.0, 1.0)])
def test_nothing_is_proved_at_or_below_chance(accuracy, share):
    assert information_floor(accuracy, share) == 0


@given(accuracy=st.floats(0, 1), step=st.floats(0, 1), share=st.floats(0.01, 1))
def test_the_floor_rises_with_accuracy_and_stays_below_the_label_entropy(accuracy, step, share):
    floor = information_floor(accuracy, share)
    assert 0 <= floor <= -log(share) + 1e-12
    assert information_floor(min(1.0, accuracy + step), share) >= floor - 1e-12


@given(accuracy=st.floats(0.1, 1), classes=st.integers(3, 100))
def test_the_exact_floor_is_never_weaker_than_theorem_3_4(accuracy, classes):
    # were I equal to the floor, Theorem 3.4 would still allow that accuracy
    floor = information_floor(accuracy, 1 / classes)
    assert max_adversarial_accuracy(floor, classes) >= min(accuracy, 1.0) - 1e-9


@pytest.mark.parametrize(("accuracy", "share"), [(95, 0.1), (-0.1, 0.1), (0.5, 0.0), (0.5, 1.1), (float("nan"), 0.1)])
def test_shares_must_be_shares(accuracy, share):
    with pytest.raises(UsageError, match="must be shares between 0 and 1"):
        information_floor(accuracy, share)


@pytest.mark.parametrize(("p", "q"), [(0.3, 1.0), (0.3, 0.0)])
def test_divergence_from_a_coin_that_rules_it_out_is_infinite(p, q):
    assert binary_divergence(p, q) == inf
    assert binary_divergence(q, q) == 0


def test_divergence_keeps_its_digits_near_equality():
    assert binary_divergence(0.1 + 1e-9, 0.1) == pytest.approx(1e-18 / (2 * 0.1 * 0.9), rel=1e-6)
    assert binary_divergence(1.0, 5e-324) == pytest.approx(-log(5e-324))


@pytest.mark.parametrize(("p", "q"), [(-0.1, 0.5), (1.1, 0.5), (0.5, 2), (nan, 0.5), (0.5, nan)])
def test_probabilities_must_be_probabilities(p, q):
    with pytest.raises(UsageError, match="must be between 0 and 1"):
        binary_divergence(p, q)


@pytest.mark.parametrize(
    ("classes", "nats", "wanted"),
    [
        *((2, nats, wanted) for nats, wanted in [(0, 0.5), (0.1, 0.720), (0.25, 0.838), (0.5, 0.952)]),
        *((10, nats, wanted) for nats, wanted in [(0, 0.1), (0.5, 0.495), (1, 0.689), (1.08, 0.715)]),
        *((10, nats, wanted) for nats, wanted in [(1.5, 0.837), (2.0, 0.951)]),
        *((100, nats, wanted) for nats, wanted in [(0, 0.01), (1, 0.357), (2, 0.581)]),
    ],
)
def test_reference_values_of_exact_fano(classes, nats, wanted):
    assert max_accuracy(nats, 1 / classes) == pytest.approx(wanted, abs=5e-4)


SHARES = st.floats(1e-6, 1)


@given(nats=st.floats(0, 20), step=st.floats(0, 5), share=SHARES)
def test_exact_fano_rises_with_information_and_undoes_the_floor(nats, step, share):
    ceiling = max_accuracy(nats, share)
    assert share <= ceiling <= 1
    assert max_accuracy(nats + step, share) >= ceiling
    assert information_floor(ceiling, share) <= nats
    if ceiling < 1:
        assert information_floor(nextafter(ceiling, 1), share) >= nats - 1e-12


@given(nats=st.floats(0, 5), share=SHARES, more=SHARES)
def test_exact_fano_rises_with_the_largest_share(nats, share, more):
    low, high = sorted((share, more))
    assert max_accuracy(nats, low) <= max_accuracy(nats, high) + 1e-12


@given(nats=st.floats(0, 5), classes=st.integers(2, 1000))
def test_exact_fano_is_never_above_theorem_3_4(nats, classes):
    assert max_accuracy(nats, 1 / classes) <= max_adversarial_accuracy(nats, classes) + 1e-12


@given(share=SHARES)
def test_exact_fano_at_its_ends(share):
    assert max_accuracy(0.0, share) == pytest.approx(share, rel=1e-12)
    assert max_accuracy(0.0, 1.0) == max_accuracy(inf, share) == max_accuracy(1e300, share) == 1
    assert max_accuracy(-log(share) * (1 + 1e-12), share) == 1
    assert max_accuracy(-log(share) * 0.99, share) < 1 or share == 1


@pytest.mark.parametrize(("nats", "share"), [(-0.1, 0.1), (nan, 0.1), (1.0, 0.0), (1.0, 1.1), (1.0, nan)])
def test_exact_fano_refuses_what_is_neither_nats_nor_share(nats, share):
    with pytest.raises(UsageError, match="must be at least 0 and largest_share"):
        max_accuracy(nats, share)


UNEQUAL = (0.4, 0.05, 0.3, 0.25)


@given(nats=st.floats(0, 3), m=st.integers(1, 3))
def test_top_m_takes_the_largest_shares_and_rises_with_m(nats, m):
    ceiling = max_top_m_accuracy(nats, UNEQUAL, m)
    assert ceiling == max_accuracy(nats, (0.4, 0.7, 0.95)[m - 1])
    assert ceiling <= max_top_m_accuracy(nats, UNEQUAL, m + 1)
    assert max_top_m_accuracy(nats, UNEQUAL, 4) == 1


def test_top_m_of_an_exact_reader_of_half_the_label_is_met():
    # Z names which half of four equal classes: ln 2 nats, top-2 accuracy 1, top-1 accuracy 1/2
    assert max_top_m_accuracy(log(2), [0.25] * 4, 2) == 1
    assert 0.5 <= max_top_m_accuracy(log(2), [0.25] * 4, 1) < 1


def test_top_5_of_a_thousand_classes():
    ceiling = max_top_m_accuracy(2.0, [0.001] * 1000, 5)
    assert binary_divergence(ceiling, 0.005) == pytest.approx(2.0, abs=1e-9)
    assert max_top_m_accuracy(2.0, [0.001] * 1000, 1) < ceiling < 1


@pytest.mark.parametrize(
    ("shares", "m", "message"),
    [
        ([0.5, 0.6], 1, "shares must each be at least 0 and sum to 1; theirs is 1.1"),
        ([1.5, -0.5], 1, "shares must each be at least 0"),
        ([nan, 1.0], 1, "shares must each be at least 0"),
        ([], 1, "sum to 1; theirs is 0.0"),
        ([0.5, 0.5], 0, "m 0 must be between 1 and the number of classes, 2"),
        ([0.5, 0.5], 3, "m 3 must be between 1 and the number of classes, 2"),
    ],
)
def test_top_m_refuses_what_is_no_prior(shares, m, message):
    with pytest.raises(UsageError, match=message):
        max_top_m_accuracy(1.0, shares, m)


@given(p=st.floats(0, 1))
def test_entropy_of_a_coin_is_what_its_divergence_from_a_fair_one_leaves(p):
    assert binary_entropy(p) == pytest.approx(log(2) - binary_divergence(p, 0.5), abs=1e-12)
    assert binary_entropy(p) == pytest.approx(binary_entropy(1 - p), abs=1e-12)


@pytest.mark.parametrize("p", [-0.1, 1.1, nan])
def test_entropy_is_of_a_probability(p):
    with pytest.raises(UsageError, match="must be between 0 and 1"):
        binary_entropy(p)


@pytest.mark.parametrize(
    ("gap", "least", "largest"),
    [(0.0254, 0.0003, 0.0013), (0.1499, 0.0113, 0.0456), (0.34134, 0.0594, 0.2557), (0.6827, 0.2557, 0.6931)],
)
def test_reference_values_of_theorem_3_2(gap, least, largest):
    assert vulnerability_range(gap) == pytest.approx((least, largest), abs=1e-4)


@given(gap=st.floats(0, 1), step=st.floats(0, 1))
def test_the_range_of_vulnerability_is_the_formula_in_order_and_rises(gap, step):
    least, largest = vulnerability_range(gap)
    formula = (log(2) - binary_entropy(0.5 - gap / 2), log(2) - binary_entropy(max(0.5 - gap, 0)))
    assert (least, largest) == pytest.approx(formula, abs=1e-12)
    assert 0 <= least <= largest <= log(2)
    later = vulnerability_range(min(1.0, gap + step))
    assert later[0] >= least - 1e-15
    assert later[1] >= largest - 1e-15


def test_the_range_keeps_the_digits_of_a_small_gap():
    assert vulnerability_range(1e-9) == pytest.approx((0.5e-18, 2e-18), rel=1e-6)


@pytest.mark.parametrize("gap", [-0.1, 1.1, nan])
def test_the_gap_is_a_share(gap):
    with pytest.raises(UsageError, match=r"adversarial_gap .* must be between 0 and 1"):
        vulnerability_range(gap)


def test_theory_does_without_torch_and_numpy():
    code = "import sys, audit.theory; sys.exit(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
