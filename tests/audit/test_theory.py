import subprocess
import sys
from math import inf, log, nan, nextafter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.errors import UsageError
from audit.theory import (
    adversarial_accuracy_bound,
    adversarial_risk_bound,
    binary_divergence,
    binary_entropy,
    fano_accuracy_bound,
    information_floor,
    vulnerability_range,
)


@pytest.mark.parametrize(
    ("nats", "wanted"), [(0.0, 0.301), (0.5, 0.518), (1.0, 0.735), (1.08, 0.770), (1.5, 0.952), (2.0, 1.0)]
)
def test_reference_values_of_theorem_3_4_at_ten_classes(nats, wanted):
    assert adversarial_accuracy_bound(nats, 10) == pytest.approx(wanted, abs=6e-4)
    assert adversarial_risk_bound(nats, 10) == pytest.approx(1 - wanted, abs=6e-4)


@given(nats=st.floats(-50, 50), step=st.floats(0, 5), classes=st.integers(2, 1000))
def test_bound_is_clipped_and_rises_with_information(nats, step, classes):
    ceiling = adversarial_accuracy_bound(nats, classes)
    assert 1 / classes <= ceiling <= 1
    assert adversarial_accuracy_bound(nats + step, classes) >= ceiling
    assert adversarial_accuracy_bound(nats, classes + 1) <= ceiling
    assert ceiling + adversarial_risk_bound(nats, classes) == pytest.approx(1)


def test_two_classes_are_never_bounded():
    assert adversarial_accuracy_bound(0.0, 2) == 1.0


@pytest.mark.parametrize("function", [adversarial_accuracy_bound, adversarial_risk_bound])
def test_rejects_illegal_inputs(function):
    with pytest.raises(UsageError, match="num_classes 1 must be at least 2"):
        function(1.0, 1)
    with pytest.raises(UsageError, match="worst_case_nats is nan: it must be a number"):
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
def test_floor_is_zero_at_or_below_chance(accuracy, share):
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
    assert adversarial_accuracy_bound(floor, classes) >= min(accuracy, 1.0) - 1e-9


@pytest.mark.parametrize(("accuracy", "share"), [(95, 0.1), (-0.1, 0.1), (0.5, 0.0), (0.5, 1.1), (float("nan"), 0.1)])
def test_floor_rejects_illegal_shares(accuracy, share):
    with pytest.raises(UsageError, match=r"must be in \[0, 1\] and largest_share .* in \(0, 1\]"):
        information_floor(accuracy, share)


@pytest.mark.parametrize(("p", "q"), [(0.3, 1.0), (0.3, 0.0)])
def test_divergence_is_infinite_without_absolute_continuity(p, q):
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
    assert fano_accuracy_bound(nats, 1 / classes) == pytest.approx(wanted, abs=5e-4)


SHARES = st.floats(1e-6, 1)


@given(nats=st.floats(0, 20), step=st.floats(0, 5), share=SHARES)
def test_exact_fano_rises_with_information_and_undoes_the_floor(nats, step, share):
    ceiling = fano_accuracy_bound(nats, share)
    assert share <= ceiling <= 1
    assert fano_accuracy_bound(nats + step, share) >= ceiling
    assert information_floor(ceiling, share) <= nats
    if ceiling < 1:
        assert information_floor(nextafter(ceiling, 1), share) >= nats - 1e-12


@given(nats=st.floats(0, 5), share=SHARES, more=SHARES)
def test_exact_fano_rises_with_the_largest_share(nats, share, more):
    low, high = sorted((share, more))
    assert fano_accuracy_bound(nats, low) <= fano_accuracy_bound(nats, high) + 1e-12


@given(nats=st.floats(0, 5), classes=st.integers(2, 1000))
def test_exact_fano_is_never_above_theorem_3_4(nats, classes):
    assert fano_accuracy_bound(nats, 1 / classes) <= adversarial_accuracy_bound(nats, classes) + 1e-12


@given(share=SHARES)
def test_exact_fano_at_its_ends(share):
    assert fano_accuracy_bound(0.0, share) == pytest.approx(share, rel=1e-12)
    assert fano_accuracy_bound(0.0, 1.0) == fano_accuracy_bound(inf, share) == fano_accuracy_bound(1e300, share) == 1
    assert fano_accuracy_bound(-log(share) * (1 + 1e-12), share) == 1
    assert fano_accuracy_bound(-log(share) * 0.99, share) < 1 or share == 1


@pytest.mark.parametrize(("nats", "share"), [(-0.1, 0.1), (nan, 0.1), (1.0, 0.0), (1.0, 1.1), (1.0, nan)])
def test_exact_fano_rejects_illegal_inputs(nats, share):
    with pytest.raises(UsageError, match=r"must be at least 0 and largest_share .* must be in \(0, 1\]"):
        fano_accuracy_bound(nats, share)


@given(p=st.floats(0, 1))
def test_binary_entropy_is_ln_2_minus_the_divergence_from_one_half(p):
    assert binary_entropy(p) == pytest.approx(log(2) - binary_divergence(p, 0.5), abs=1e-12)
    assert binary_entropy(p) == pytest.approx(binary_entropy(1 - p), abs=1e-12)


@pytest.mark.parametrize("p", [-0.1, 1.1, nan])
def test_entropy_rejects_values_outside_0_1(p):
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
def test_gap_must_be_in_0_1(gap):
    with pytest.raises(UsageError, match=r"adversarial_gap .* must be between 0 and 1"):
        vulnerability_range(gap)


def test_theory_does_without_torch_and_numpy():
    code = "import sys, audit.theory; sys.exit(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
