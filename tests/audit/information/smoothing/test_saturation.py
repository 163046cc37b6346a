"""Flags of estimates that the number of images limits, and the number of images that would do."""

import re
from math import exp, log

import pytest
import torch

from audit.information.estimator import EstimatorInputs
from audit.information.sandwich import Sandwich
from audit.information.smoothing.saturation import ceiling_flags, images_needed, pair_flags
from audit.types import Encoded


def pair_of(log_odds, count):
    """The plug-in pair of n images whose terms are all equal: own weight 1, the sum of the others (n - 1) e^-u."""
    others = (count - 1) * exp(-log_odds)
    return -log((1 + others) / count), -log(others / (count - 1))


def number(text):
    return int(re.search(r"about ([\d,]+) images", text).group(1).replace(",", ""))


@pytest.mark.parametrize(
    ("apart", "code"),
    [
        (0.1, None),
        (0.19, None),
        (0.21, "few_images"),
        (0.3, "few_images"),
        (0.49, "few_images"),
        (0.51, "saturated"),
        (45406.9, "saturated"),
    ],
)
def test_the_flag_of_a_pair(apart, code):
    assert [flag.partition(":")[0] for flag in pair_flags(2.0, 2.0 + apart, 300)] == ([code] if code else [])


@pytest.mark.parametrize("log_odds", [6.0, 8.0, 12.0])
@pytest.mark.parametrize("count", [64, 300])
def test_the_number_of_images_brings_the_pair_to_half_a_nat(log_odds, count):
    (flag,) = pair_flags(*pair_of(log_odds, count), count)
    lower, upper = pair_of(log_odds, number(flag))
    assert upper - lower == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("count", [64, 300, 2000])
@pytest.mark.parametrize("missing", [0.02, 0.05, 0.09])
def test_the_flag_of_a_worst_case_at_its_ceiling(count, missing):
    (flag,) = ceiling_flags(log(count) - missing, log(count))
    log_odds = log((count - 1) / (exp(missing) - 1))
    lower, upper = pair_of(log_odds, number(flag))
    assert upper - lower == pytest.approx(0.5, abs=0.03)


def test_a_worst_case_under_its_ceiling_is_not_flagged():
    assert ceiling_flags(log(300) - 0.11, log(300)) == []
    assert ceiling_flags(2.0, float("inf")) == []


def test_beyond_a_billion_images_no_number_is_given():
    assert images_needed(40.0, 0.5) == "it would take over a billion images"
    (flag,) = ceiling_flags(log(300), log(300))
    assert flag.endswith("it would take over a billion images")


@pytest.mark.parametrize(("noise", "wanted"), [(0.02, True), (None, False)])
@pytest.mark.parametrize("dimensions", [5, 300])
def test_a_fixed_noise_saturates_where_a_fitted_one_does_not(dimensions, noise, wanted):
    features = torch.randn(200, dimensions, generator=torch.Generator().manual_seed(0))
    given = EstimatorInputs(None, features, features[:, 0], Encoded(features, features[:, :0]))
    found = Sandwich(noise=noise).normal(given, 0)
    assert [flag.startswith("saturated: ") for flag in found.flags] == [True] * wanted
