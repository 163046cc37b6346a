from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.errors import UsageError
from audit.theory import binary_divergence, information_floor, max_adversarial_accuracy, min_adversarial_risk


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
