"""The sentence that opens a model's section: certified, estimated, contradicted, untrusted and failed."""

from dataclasses import replace

import pytest

from reports.page.html import render_report
from reports.page.verdicts import verdict

START = "Under ℓ∞ 8/255, no head on these logits"
KEPT = "its own answers keep 0.050 [0.035, 0.070] under attack (measured), 0.980 without attack."


@pytest.fixture
def record(zoo):
    kept = {"adversarial_accuracy": 0.05, "adversarial_accuracy_low": 0.035, "adversarial_accuracy_high": 0.07}
    return replace(zoo[0], estimator="label-information", quantity="I(Y; g(X))", layer="logits", eps=8 / 255,
                   fano_accuracy_bound=0.42, natural_accuracy=0.98, **kept)  # fmt: skip


def test_a_certified_bound_comes_before_an_estimated_one(record):
    certified = replace(record, certified_bound=0.17, certified_tier="bit-identical at float32")
    said = f"{START} can exceed 0.170 (certified, bit-identical at float32, 500 images); "
    assert verdict([record, certified]) == said + KEPT


def test_a_ledger_of_images_says_what_the_network_provably_keeps(record):
    proved = replace(record, proved_share=0.31, not_broken_share=0.495)
    said = "; between 0.310 and 0.495 of the images stay right, proved (500 images); "
    assert said + KEPT in verdict([record, proved])
    decided = verdict([replace(record, proved_share=0.0, not_broken_share=0.0)])
    assert "; 0.000 of the images stay right, proved (500 images); " in decided
    assert "proved" not in verdict([record])
    deep = replace(record, layer="features.3", proved_share=0.1, not_broken_share=0.2)
    assert verdict([record, deep]).startswith("Under ℓ∞ 8/255, no head on the layer features.3")


def test_an_estimated_bound_is_named_as_one(record):
    said = f"{START} should exceed 0.420 (estimated bound, exact Fano, label-information); "
    assert verdict([record]) == said + KEPT
    assert "no head on the layer features.3 should exceed" in verdict([replace(record, layer="features.3")])


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("contradicted: fano_accuracy_bound 0.42 is under 0.6", "the estimate is contradicted by a measurement"),
        ("untrusted_search: slope", "the worst-case search failed a trust check"),
        ("gated: finite failed", "the network failed a sanity check"),
        ("saturated: at 6.2 nats", "the estimate is saturated"),
    ],
)
def test_a_bound_in_doubt_is_not_told(record, flag, why):
    said = verdict([replace(record, flags=(flag,))])
    none = "no bound on heads on these logits can be relied on"
    assert said == f"Under ℓ∞ 8/255, {none}: {why} (label-information); {KEPT}"
    sound = replace(record, cell_id="other", estimator="mine", quantity="I(X; g(X))", fano_accuracy_bound=0.5)
    assert "should exceed 0.500 (estimated bound, exact Fano, mine)" in verdict([replace(record, flags=(flag,)), sound])


def test_smoothed_information_and_a_bound_of_one_limit_no_head(record):
    none = "heads on these logits are not limited by what was estimated"
    assert none in verdict([replace(record, estimator="sandwich", quantity="I(X; g(X) + noise)")])
    assert none in verdict([replace(record, fano_accuracy_bound=1.0)])
    assert none in verdict([replace(record, fano_accuracy_bound=None)])


def test_a_bound_that_is_not_stated_for_want_of_images_is_not_called_no_limit(record):
    few = replace(record, fano_accuracy_bound=None, flags=("too_few_images: 10 images a class",))
    said = "no bound on heads on these logits is stated: too few images a class (label-information); "
    assert verdict([few]) == f"Under ℓ∞ 8/255, {said}{KEPT}"
    page = render_report([few])
    assert "There are too few images a class to state a bound on the accuracy of heads" in page
    assert "limits no head, so this table" not in page


def test_an_attack_that_failed_a_check_gives_an_upper_bound(record):
    untrusted = replace(record, flags=("untrusted: failed unbounded attack",))
    assert "under attack (an upper bound: the attack failed a trust check)" in verdict([untrusted])


def test_of_several_settings_the_certified_one_leads_then_the_output_then_the_largest_radius(record):
    deep = replace(record, layer="features.3", eps=0.5)
    small = replace(record, eps=1 / 255)
    assert verdict([deep, small, record]).startswith("Under ℓ∞ 8/255, no head on these logits")
    certified = replace(deep, certified_bound=0.3)
    assert verdict([certified, record]).startswith("Under ℓ∞ 0.5, no head on the layer features.3")


def test_a_failed_audit_has_no_verdict(record):
    failed = replace(record, status="failed", reason="the weights hold NaN")
    assert verdict([failed]) == "No verdict: the audit failed (the weights hold NaN)."
    assert verdict([failed, record]).endswith(KEPT)


def test_every_section_opens_with_its_verdict(mixed_zoo):
    text = render_report(mixed_zoo)
    assert text.count('<p class="verdict">') == 12
    assert "No verdict: the audit failed (the weights hold NaN)." in text
