"""Calibration: the truth passes, a wrong estimator fails, and every row says whose it is and what of."""

from dataclasses import dataclass, replace
from math import log

import pytest

from audit.calibration import calibrate as calibration
from audit.calibration.calibrate import PLANS, applicable, calibrate, settings_key
from audit.information.critic_descent import WorstCaseSearch
from audit.information.critic_training import CriticTraining
from audit.information.estimator import NOTHING_KNOWN, MIEstimate
from audit.information.labels import LabelInformation, LabelLevel
from audit.information.mine import Mine
from audit.information.registry import ESTIMATORS
from audit.information.released.estimator import Reference
from audit.information.sandwich import Sandwich

QUICK = {
    "sandwich": Sandwich(),
    "mine": Mine(CriticTraining(steps=10, every=5), WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1)),
    "label-level": LabelLevel(),
    "label-information": LabelInformation(),
    "ref-local": Reference(width=8, steps=2, search_steps=1, every=1),
    "ref-mean": Reference(False, width=8, steps=2, search_steps=1, every=1),
}
SAMPLES = {"sandwich": 500, "label-level": 1000, "label-information": 1000}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    for name, estimator in QUICK.items():
        plan = PLANS[type(estimator)]
        monkeypatch.setitem(calibration.PLANS, type(estimator), replace(plan, samples=SAMPLES.get(name, 100)))


@dataclass(frozen=True)
class Boastful(Sandwich):
    """Half a nat too much, everywhere."""

    too_much: float = 0.5

    def _read(self, features, scale, seed) -> MIEstimate:
        found = super()._read(features, scale, seed)
        return replace(found, nats=found.nats + self.too_much)


@dataclass(frozen=True)
class Blind(LabelLevel):
    """A search that finds nothing."""

    def vulnerability(self, subject, threat, seed, known=NOTHING_KNOWN):
        found = super().vulnerability(subject, threat, seed, known)
        return found._replace(worst=found.normal)


@pytest.mark.parametrize("name", ["sandwich", "label-level", "label-information"])
def test_a_right_estimator_passes_on_the_brief_list(name):
    rows = calibrate(QUICK[name], brief=True)
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    assert all(row.normal_tolerance is not None for row in rows)
    assert any(row.worst_tolerance is not None and row.worst_nats is not None for row in rows)
    assert {row.estimator for row in rows} == {name}
    assert {row.samples for row in rows} == {SAMPLES[name]}


def test_an_estimator_that_says_too_much_fails_everywhere():
    assert not any(row.passed for row in calibrate(Boastful(steps=2, start_steps=1), brief=True))
    assert not any(row.passed for row in calibrate(Boastful(steps=2, start_steps=1, too_much=-0.3), brief=True))


def test_an_estimator_whose_search_finds_nothing_fails_where_the_worst_case_is_known():
    rows = calibrate(Blind(), brief=True)
    (sign,) = [row for row in rows if row.channel == "sign of a Gaussian mixture"]
    assert sign.normal_nats == sign.worst_nats == pytest.approx(log(2), abs=1e-3)
    assert not sign.passed or sign.true_normal_nats - sign.true_worst_nats < sign.worst_tolerance
    wide = [
        row for row in calibrate(Blind()) if row.true_worst_nats and row.true_normal_nats - row.true_worst_nats > 0.1
    ]
    assert wide
    assert not any(row.passed for row in wide)


@pytest.mark.parametrize("name", ["mine", "ref-local", "ref-mean"])
def test_rows_of_trained_critics_carry_their_name_and_verdict(name):
    rows = calibrate(QUICK[name], brief=True)
    assert {row.estimator for row in rows} == {QUICK[name].name}
    judged = [row for row in rows if row.normal_tolerance is not None]
    assert bool(judged) == (name == "mine")  # an estimator for replication claims nothing
    assert all(row.worst_tolerance is None for row in rows)
    assert all((row.worst_nats is None) == (row.parameters == "eps 0") for row in rows)


def test_channels_beyond_the_claim_get_no_verdict(monkeypatch):
    monkeypatch.setitem(calibration.PLANS, Sandwich, replace(PLANS[Sandwich], most_nats=0.4, most_dimensions=1))
    for row in calibrate(Sandwich(steps=1, start_steps=1), brief=True):
        assert (row.normal_tolerance is None) == (row.true_normal_nats > 0.4 or "bits" in row.channel)


def test_each_estimator_is_held_against_what_it_estimates():
    level, information = applicable(LabelLevel()), applicable(LabelInformation())
    assert {channel.tells for channel in information} == {"label"}
    assert all(channel.classes for channel in level)
    assert {channel.tells for channel in [*applicable(Sandwich()), *applicable(Mine())]} == {"image"}
    assert all("projection" in channel.name for channel in applicable(Reference()))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_brief_list_is_one_row_a_channel_and_never_empty(name):
    brief, whole = applicable(ESTIMATORS[name], brief=True), applicable(ESTIMATORS[name])
    names = [channel.name for channel in brief]
    assert 1 <= len(names) == len(set(names)) <= 7
    assert len(brief) < len(whole)
    assert all(channel.eps > 0 for channel in brief if channel.worst_nats is not None)
    assert any(channel.eps > 0 for channel in brief)


def test_every_estimator_has_a_plan():
    assert all(type(estimator) in PLANS for estimator in ESTIMATORS.values())


def test_the_channel_decides_the_noise_of_the_sandwich_and_nothing_else_changes():
    quick = Sandwich(steps=1, start_steps=1)
    assert calibrate(quick, brief=True) == calibrate(replace(quick, noise=3.0), brief=True)


def test_who_watches_is_told_each_channel():
    seen = []
    rows = calibrate(LabelLevel(targets=2, kept=1, steps=1), brief=True, watch=lambda *told: seen.append(told))
    assert [number for _, number in seen] == list(range(len(rows)))
    assert [name for name, _ in seen] == [f"{row.channel}, {row.parameters}" for row in rows]


def test_a_key_names_the_settings():
    assert settings_key(Sandwich()) == settings_key(Sandwich())
    assert settings_key(Sandwich()).startswith("sandwich-")
    keys = [settings_key(each) for each in ESTIMATORS.values()]
    keys += [settings_key(Sandwich(noise=0.4)), settings_key(Sandwich(quantisers=(2,))), settings_key(QUICK["mine"])]
    keys += [settings_key(replace(LabelInformation(), probes=replace(LabelInformation().probes, folds=4)))]
    assert len(set(keys)) == len(keys)
    assert settings_key(Sandwich(quantisers=(2, 8))) == settings_key(Sandwich(quantisers=(2, 8)))


def test_channels_that_cannot_be_stratified_are_averaged_over_samples():
    (channel,) = [each for each in applicable(Sandwich()) if each.normal_nats == 1.0 and each.name == "5-d Gaussian"]
    plan = PLANS[Sandwich]
    row = calibration._row(Sandwich(), channel, plan)
    alone = [calibration._found(Sandwich(), channel, plan.samples, seed).normal for seed in range(4)]
    assert row.normal_nats == pytest.approx(sum(each.nats for each in alone) / 4)
    assert len({each.nats for each in alone}) == 4
    assert 0.4 < row.normal_nats_se / alone[0].stderr < 0.6
