"""Calibration: correct estimators pass, wrong ones fail, and rows identify estimator and channel."""

from dataclasses import dataclass, replace
from math import log

import pytest

from audit.calibration import calibrate as calibration
from audit.calibration.calibrate import (
    TELLING_CHANNELS,
    applicable_channels,
    calibrate,
    calibrate_channel,
    calibration_key,
    settings_key,
)
from audit.calibration.catalogue import all_channels
from audit.calibration.plans import PLANS, plan_of
from audit.errors import UsageError
from audit.information.estimator import COLD_START, ESTIMATORS, MIEstimate
from audit.information.label_entropy import LabelEntropy
from audit.information.label_information import LabelInformation
from audit.information.mine import Mine
from audit.information.released.estimator import Reference
from audit.information.sandwich import Sandwich
from audit.information.settings import CriticTraining, WorstCaseSearch

QUICK = {
    "sandwich": Sandwich(),
    "mine": Mine(CriticTraining(steps=10, every=5), WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1)),
    "label-level": LabelEntropy(),
    "label-information": LabelInformation(),
    "ref-local": Reference(width=8, steps=2, search_steps=1, every=1),
    "ref-mean": Reference(False, width=8, steps=2, search_steps=1, every=1),
}
SAMPLES = {"sandwich": 1000, "label-level": 2000, "label-information": 2000}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    for name, plan in list(PLANS.items()):
        monkeypatch.setitem(PLANS, name, replace(plan, samples=SAMPLES.get(name, 200)))


@dataclass(frozen=True)
class Biased(Sandwich):
    """Adds a constant bias."""

    bias: float = 0.5

    def _estimate(self, features, scale, seed) -> MIEstimate:
        found = super()._estimate(features, scale, seed)
        return replace(found, nats=found.nats + self.bias)


@dataclass(frozen=True)
class WithoutSearch(LabelEntropy):
    """Reports the normal case as the worst case."""

    def vulnerability(self, inputs, threat, seed, warm_start=COLD_START):
        found = super().vulnerability(inputs, threat, seed, warm_start)
        return found._replace(worst=found.normal)


@pytest.mark.parametrize("name", ["sandwich", "label-level", "label-information"])
def test_correct_estimators_pass_on_the_brief_channels(name):
    rows = calibrate(QUICK[name], extent="brief")
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    assert all(row.normal_tolerance is not None for row in rows)
    assert any(row.worst_tolerance is not None and row.worst_nats is not None for row in rows)
    assert {row.estimator for row in rows} == {name}
    assert {row.samples for row in rows} <= {SAMPLES[name] // 2, 500}  # one channel has its own number


def test_a_biased_estimator_fails_on_every_channel():
    assert not any(row.passed for row in calibrate(Biased(steps=2, start_steps=1), extent="brief"))
    assert not any(row.passed for row in calibrate(Biased(steps=2, start_steps=1, bias=-0.3), extent="brief"))


def test_an_estimator_without_a_search_fails_on_known_worst_cases():
    rows = calibrate(WithoutSearch(), extent="brief")
    (sign,) = [row for row in rows if row.channel == "sign of a Gaussian mixture"]
    assert sign.normal_nats == sign.worst_nats == pytest.approx(log(2), abs=1e-3)
    assert not sign.passed or sign.true_normal_nats - sign.true_worst_nats < sign.worst_tolerance
    vulnerable = [
        row
        for row in calibrate(WithoutSearch())
        if row.true_worst_nats and row.true_normal_nats - row.true_worst_nats > 0.1
    ]
    assert vulnerable
    assert not any(row.passed for row in vulnerable)


@pytest.mark.parametrize("name", ["mine", "ref-local", "ref-mean"])
def test_rows_of_trained_critics_carry_their_name_and_verdict(name):
    rows = calibrate(QUICK[name], extent="brief")
    assert {row.estimator for row in rows} == {QUICK[name].name}
    judged = [row for row in rows if row.normal_tolerance is not None]
    assert bool(judged) == (name == "mine")  # the released estimators have no tolerance
    assert all(row.worst_tolerance is None for row in rows)
    assert all((row.worst_nats is None) == (row.parameters == "eps 0") for row in rows)


def test_channels_beyond_the_limits_get_no_verdict(monkeypatch):
    monkeypatch.setitem(PLANS, "sandwich", replace(PLANS["sandwich"], max_nats=0.4, max_dimensions=1))
    for row in calibrate(Sandwich(steps=1, start_steps=1), extent="brief"):
        assert (row.normal_tolerance is None) == (row.true_normal_nats > 0.4 or "bits" in row.channel)


def test_channels_match_the_quantity_of_each_estimator():
    level, information = applicable_channels(LabelEntropy()), applicable_channels(LabelInformation())
    assert {channel.target for channel in information} == {"label"}
    assert all(channel.classes for channel in level)
    assert {channel.target for channel in applicable_channels(Mine())} == {"image"}
    assert {channel.target for channel in applicable_channels(Sandwich())} == {"image", "smoothed image"}
    assert all("projection" in channel.name for channel in applicable_channels(Reference()))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_brief_channels_are_distinct_and_exist_for_every_estimator(name):
    brief, whole = applicable_channels(ESTIMATORS[name], "brief"), applicable_channels(ESTIMATORS[name], "full")
    names = [channel.name for channel in brief]
    assert 1 <= len(names) == len(set(names)) <= 7
    assert len(brief) < len(whole)
    assert all(channel.eps > 0 for channel in brief if channel.worst_nats is not None)
    assert any(channel.eps > 0 for channel in brief)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_default_channels_are_few_and_hold_the_brief_ones(name):
    estimator = ESTIMATORS[name]
    brief, default, whole = (
        {channel.title for channel in applicable_channels(estimator, extent)} for extent in ("brief", "default", "full")
    )
    assert brief < default < whole
    assert len(default) <= 25
    titles = [channel.title for channel in all_channels()]
    assert len(titles) == len(set(titles))
    assert set(titles) > TELLING_CHANNELS


def test_a_search_without_steps_fails_on_default_channels():
    """Of the same estimator: a search that hardly moves, and one that merges everything for nothing."""

    @dataclass(frozen=True)
    class Collapsed(LabelEntropy):
        def vulnerability(self, inputs, threat, seed, warm_start=COLD_START):
            found = super().vulnerability(inputs, threat, seed, warm_start)
            return found._replace(worst=replace(found.worst, nats=0.0))

    for wrong in (LabelEntropy(targets=1, kept=1, steps=1, relative_step=0.01), Collapsed(targets=1, kept=1, steps=1)):
        rows = calibrate(wrong)
        judged = [row for row in rows if row.worst_nats is not None]
        assert any(not row.passed for row in judged), wrong
        assert {row.channel for row in rows} >= {"constant", "3 noiseless bits"}


def test_keys_of_kept_rows_depend_on_channels_and_limits(monkeypatch):
    keys = [calibration_key(LabelEntropy(), extent) for extent in ("brief", "default", "full")]
    assert len(set(keys)) == 3
    assert calibration_key(LabelEntropy(), "brief") == keys[0]
    plan = PLANS["label-level"]
    for changed in (replace(plan, samples=7), replace(plan, worst_tolerance=0.5)):
        monkeypatch.setitem(PLANS, "label-level", changed)
        keys.append(calibration_key(LabelEntropy(), "brief"))
    monkeypatch.setitem(PLANS, "label-level", plan)
    keys.append(calibration_key(LabelEntropy(steps=2), "brief"))
    assert len(set(keys)) == 6


def test_every_estimator_has_a_plan():
    assert set(PLANS) == set(ESTIMATORS)
    assert all(plan_of(estimator) is PLANS[name] for name, estimator in ESTIMATORS.items())


def test_a_plan_is_found_by_name_and_then_by_type():
    assert plan_of(QUICK["mine"]) is plan_of(Mine(CriticTraining(bound="nwj"))) is PLANS["mine"]
    assert plan_of(Biased()) is PLANS["sandwich"]


def test_an_estimator_without_a_plan_is_refused(monkeypatch):
    monkeypatch.delitem(PLANS, "mine")
    with pytest.raises(
        UsageError, match="estimator 'mine-infonce' has no calibration plan; plans exist for sandwich, "
    ):
        calibrate(Mine(), extent="brief")


def test_the_channel_sets_the_noise_of_the_sandwich():
    quick = Sandwich(steps=1, start_steps=1)
    assert calibrate(quick, extent="brief") == calibrate(replace(quick, noise=3.0), extent="brief")


def test_progress_receives_each_channel():
    seen = []
    rows = calibrate(LabelEntropy(targets=2, kept=1, steps=1), extent="brief", progress=lambda *step: seen.append(step))
    assert [number for _, number in seen] == list(range(len(rows)))
    assert [name for name, _ in seen] == [f"{row.channel}, {row.parameters}" for row in rows]


def test_keys_identify_settings():
    assert settings_key(Sandwich()) == settings_key(Sandwich())
    assert settings_key(Sandwich()).startswith("sandwich-")
    keys = [settings_key(each) for each in ESTIMATORS.values()]
    keys += [settings_key(Sandwich(noise=0.4)), settings_key(Sandwich(quantisers=(4,))), settings_key(QUICK["mine"])]
    keys += [settings_key(replace(LabelInformation(), probes=replace(LabelInformation().probes, folds=4)))]
    assert len(set(keys)) == len(keys)
    assert settings_key(Sandwich(quantisers=(2, 8))) == settings_key(Sandwich(quantisers=(2, 8)))


def test_channels_without_stratification_are_averaged_over_samples():
    (channel,) = [
        each for each in applicable_channels(Sandwich()) if each.normal_nats == 1.0 and each.name == "5-d Gaussian"
    ]
    plan = PLANS["sandwich"]
    row = calibrate_channel(Sandwich(), channel, "default")
    alone = [calibration._estimate(Sandwich(), channel, plan.samples, seed).normal for seed in range(4)]
    assert row.normal_nats == pytest.approx(sum(each.nats for each in alone) / 4)
    assert len({each.nats for each in alone}) == 4
    assert 0.4 < row.normal_nats_se / alone[0].stderr < 0.6
