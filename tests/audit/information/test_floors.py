from math import log

import pytest
import torch

from audit.adversary.attack_checks import RANDOMISED, UPPER_BOUND, Check
from audit.information.floors import (
    Floors,
    Spread,
    bound_flags,
    distrust_flags,
    estimate_flags,
    floor,
    label_entropy,
    largest_share,
)
from audit.proportion import wilson
from audit.theory import information_floor


def test_label_entropy():
    assert label_entropy(torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])) == pytest.approx(1.75 * log(2))
    assert label_entropy(torch.arange(10).repeat(7)) == pytest.approx(log(10))
    assert label_entropy(torch.full((9,), 4)) == 0


def test_largest_share():
    assert largest_share(torch.tensor([3, 3, 3, 0])) == 0.75


def test_the_floor_is_the_larger_of_entropy_and_accuracy():
    balanced = torch.arange(10).repeat(10)
    right = torch.arange(100) < 95
    mostly = torch.where(right, balanced, (balanced + 1) % 10)
    for labels in (balanced, (balanced + 1) % 10):  # all right, all wrong: the answers tell as much
        assert floor(balanced, labels, 0.1, "answers") == pytest.approx(log(10))
    assert floor(mostly, balanced, 0.1, "answers") == pytest.approx(label_entropy(mostly))
    # answers of one kind tell nothing themselves
    constant = torch.zeros(100, dtype=torch.int64)
    assert floor(constant, balanced, 0.1, "answers") == 0
    # two answers, ln 2 at most, but right more often than the largest class allows a head that knows so little
    halves = torch.arange(100) % 2
    assert log(2) < floor(halves, halves, 0.1, "answers") == information_floor(wilson(100, 100).low, 0.1)


def test_without_the_answers_only_the_accuracy_speaks():
    balanced = torch.arange(10).repeat(100_000)
    right = torch.arange(1_000_000) < 863_300
    mostly = torch.where(right, balanced, (balanced + 1) % 10)
    # 86.33 % of very many images need 1.603 nats
    assert floor(mostly, balanced, 0.1, "labels") == pytest.approx(1.603, abs=3e-3)
    assert floor(mostly, balanced, 0.1, "answers") == pytest.approx(log(10), abs=1e-3)
    assert floor((balanced + 1) % 10, balanced, 0.1, "labels") == 0


def test_the_accuracy_enters_by_the_low_end_of_its_interval():
    labels = torch.zeros(100, dtype=torch.int64)
    answers = (torch.arange(100) >= 90).long()
    assert floor(answers, labels, 0.1, "labels") == information_floor(wilson(90, 100).low, 0.1)
    assert floor(answers, labels, 0.1, "labels") < information_floor(0.9, 0.1) - 0.2


FLOORS = Floors(2.0, 1.0)


@pytest.mark.parametrize(
    ("normal", "worst", "wanted"),
    [
        ((2.5, 0.1), (1.5, 0.1), []),
        ((1.81, 0.1), (0.81, 0.1), []),  # under a floor by less than two standard errors
        ((1.5, 0.1), (1.2, 0.1), ["contradicted: normal_nats 1.50 is under its measured floor 2.00 by 0.50 nats"]),
        ((2.5, 0.1), (0.5, 0.1), ["contradicted: worst_nats 0.50 is under its measured floor 1.00 by 0.50 nats"]),
        ((2.5, 0.1), (2.8, 0.1), []),
        ((2.5, 0.1), (3.0, 0.1), ["contradicted: worst_nats 3.00 is above normal_nats 2.50"]),
        ((3.9, 0.1), (1.5, 0.1), ["saturated: normal_nats 3.90 is at its ceiling ln(images) = 4.00"]),
        (
            (0.5, 0.0),
            (-0.3, 0.1),
            [
                "contradicted: normal_nats 0.50 is under its measured floor 2.00 by 1.50 nats",
                "contradicted: worst_nats -0.30 is under its measured floor 1.00 by 1.30 nats",
                "negative: worst_nats -0.30 is under zero beyond its error",
            ],
        ),
    ],
)
def test_flags_of_estimates(normal, worst, wanted):
    assert estimate_flags(Spread(*normal), Spread(*worst), FLOORS, 4.0) == wanted


def test_without_floors_only_the_numbers_themselves_speak():
    low = Spread(0.1, 0.0)
    assert estimate_flags(low, low, None, 4.0) == []
    assert estimate_flags(Spread(-0.5, 0.1), Spread(-0.5, 0.1), None, 4.0) == [
        "negative: normal_nats -0.50 is under zero beyond its error",
        "negative: worst_nats -0.50 is under zero beyond its error",
    ]


def test_flags_of_bounds():
    assert bound_flags(0.5, 0.5) == []
    assert bound_flags(0.41, 0.95) == [
        "contradicted: the bound 0.410 is under the measured adversarial accuracy's 0.950"
    ]


def test_a_small_sample_of_answers_may_fall_short_of_all_of_them():
    normal, worst = Spread(2.24, 0.01), Spread(2.2, 0.01)
    assert estimate_flags(normal, worst, Floors(2.28, 1.0), 5.0) != []
    assert estimate_flags(normal, worst, Floors(2.28, 1.0, slack=0.03), 5.0) == []
    assert estimate_flags(Spread(2.1, 0.01), worst, Floors(2.28, 1.0, slack=0.03), 5.0) != []


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ({}, []),
        ({14: "note"}, []),
        ({5: "trust", 14: "note"}, [f"untrusted: the adversarial accuracy ({UPPER_BOUND}) failed 5 c5"]),
        ({3: "trust", 8: "trust"}, [f"untrusted: the adversarial accuracy ({RANDOMISED}) failed 3 c3, 8 c8"]),
    ],
)
def test_a_distrusted_attack_is_worded_by_its_verdict(failing, told):
    sound = Check(1, "c1", "trust", True, None, "")
    failed = (Check(number, f"c{number}", level, False, None, "") for number, level in failing.items())
    assert distrust_flags(iter([sound, *failed])) == told
