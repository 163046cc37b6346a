"""Flags of estimates that contradict measurements or each other, and of searches that are not trusted."""

import pytest

from audit.adversary.attack_checks import RANDOMISED, UPPER_BOUND
from audit.adversary.check_rules import RULES
from audit.information.consistency import (
    SeedMean,
    bound_flags,
    distrust_flags,
    estimate_flags,
    search_distrust_flags,
)
from audit.information.floors import InformationFloors

FLOORS = InformationFloors(2.0, 1.0)


@pytest.mark.parametrize(
    ("normal", "worst", "wanted"),
    [
        ((2.5, 0.1), (1.5, 0.1), []),
        ((1.81, 0.1), (0.81, 0.1), []),  # below a floor by less than two standard errors
        ((1.5, 0.1), (1.2, 0.1), ["contradicted: normal_nats 1.50 is below its measured floor 2.00 by 0.50 nats"]),
        ((2.5, 0.1), (0.5, 0.1), ["contradicted: worst_nats 0.50 is below its measured floor 1.00 by 0.50 nats"]),
        ((2.5, 0.1), (2.8, 0.1), []),
        ((2.5, 0.1), (3.0, 0.1), ["contradicted: worst_nats 3.00 is above normal_nats 2.50"]),
        ((3.9, 0.1), (1.5, 0.1), ["few_images: normal_nats 3.90 is at its ceiling ln(images) = 4.00"]),
        (
            (3.95, 0.1),
            (3.91, 0.1),
            [
                # terms equal to u: 4 - ln(1 + 53.6 e^-u) is 3.91 at u = 6.34, and ln(1 + e^u / (n - 1)) is 0.5 at 878
                "saturated: worst_nats 3.91 is within 0.1 of its ceiling ln(images) = 4.00: it would take about 880 "
                "images",
                "few_images: normal_nats 3.95 is at its ceiling ln(images) = 4.00",
            ],
        ),
        ((3.95, 0.1), (3.89, 0.1), ["few_images: normal_nats 3.95 is at its ceiling ln(images) = 4.00"]),
        (
            (0.5, 0.0),
            (-0.3, 0.1),
            [
                "contradicted: normal_nats 0.50 is below its measured floor 2.00 by 1.50 nats",
                "contradicted: worst_nats -0.30 is below its measured floor 1.00 by 1.30 nats",
                "negative: worst_nats -0.30 is below zero beyond its standard error",
            ],
        ),
    ],
)
def test_flags_of_estimates(normal, worst, wanted):
    assert estimate_flags(SeedMean(*normal), SeedMean(*worst), FLOORS, 4.0) == wanted


def test_flags_without_floors():
    low = SeedMean(0.1, 0.0)
    assert estimate_flags(low, low, None, 4.0) == []
    assert estimate_flags(SeedMean(-0.5, 0.1), SeedMean(-0.5, 0.1), None, 4.0) == [
        "negative: normal_nats -0.50 is below zero beyond its standard error",
        "negative: worst_nats -0.50 is below zero beyond its standard error",
    ]


def test_flags_of_bounds():
    assert bound_flags(0.5, 0.5) == []
    assert bound_flags(0.41, 0.95) == [
        "contradicted: the bound 0.410 is below the measured adversarial accuracy's 0.950"
    ]


def test_slack_allows_for_the_bias_of_small_samples():
    normal, worst = SeedMean(2.24, 0.01), SeedMean(2.2, 0.01)
    assert estimate_flags(normal, worst, InformationFloors(2.28, 1.0), 5.0) != []
    assert estimate_flags(normal, worst, InformationFloors(2.28, 1.0, slack=0.03), 5.0) == []
    assert estimate_flags(SeedMean(2.1, 0.01), worst, InformationFloors(2.28, 1.0, slack=0.03), 5.0) != []


@pytest.mark.parametrize(
    ("failing", "flags"),
    [
        ({}, []),
        ({"random_noise": "note"}, []),
        (
            {"unbounded_attack": "trust", "random_noise": "note"},
            [f"untrusted: the adversarial accuracy ({UPPER_BOUND}) failed unbounded attack"],
        ),
        (
            {"gradient_slope": "trust", "determinism": "trust"},
            [f"untrusted: the adversarial accuracy ({RANDOMISED}) failed slope, determinism"],
        ),
    ],
)
def test_flag_of_a_distrusted_attack_has_its_verdict(failing, flags):
    sound = RULES["gradient"].result(passed=True)
    failed = (RULES[rule]._replace(level=level).result(passed=False) for rule, level in failing.items())
    assert distrust_flags(iter([sound, *failed])) == flags


def test_flag_of_a_distrusted_search():
    failing = RULES["gradient_slope"]._replace(level="trust").result(passed=False)
    reason = "the worst-case search failed slope, so the worst-case information is an upper bound"
    assert search_distrust_flags([failing]) == [f"untrusted_search: {reason}"]
    assert search_distrust_flags([RULES["gradient"].result(passed=True)]) == []
