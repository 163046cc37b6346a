"""Costs of stages: each second and each pass belongs to the innermost stage alone."""

import pytest
import torch
from torch import nn

from audit.adversary.label_attack import LabelAttack, Stage
from audit.adversary.memory import stages
from audit.adversary.memory.counting import count_passes, counted_by
from audit.adversary.memory.stages import Profile, costs_since_last, measured, needed, stage
from audit.adversary.pgd import PGD
from audit.adversary.robustness import TargetModel, evaluate_robustness
from audit.adversary.threat import Linf


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 7.0

        def process_time(self):
            return self.now

    found = Clock()
    monkeypatch.setattr(stages, "time", found)
    return found


def test_seconds_and_passes_belong_to_the_innermost_stage(clock):
    profile = Profile()
    with profile.measured("other"):
        clock.now += 1
        with stage("attack"):
            clock.now += 2
            count_passes(10)
            with stage("checks"):
                clock.now += 4
                count_passes(3)
            clock.now += 8
            needed(9)
        with stage("attack"):
            clock.now += 16
        clock.now += 32
    clock.now += 64
    assert profile.to_dict() == {
        "other": {"seconds": 33, "passed": 0, "needed": None},
        "attack": {"seconds": 26, "passed": 10, "needed": 9},
        "checks": {"seconds": 4, "passed": 3, "needed": None},
    }


def test_results_that_were_there_need_no_passes():
    profile = Profile()
    with profile.measured("other"), stage("attack"):
        needed(500)  # read from a file: nothing passed
    assert profile.to_dict()["attack"]["needed"] is None


def test_costs_begin_again_with_every_record(clock):
    with measured("other"):
        clock.now += 1
        with stage("loading"):
            clock.now += 2
        first = costs_since_last()
        clock.now += 4
        second = costs_since_last()
    assert {name: cost["seconds"] for name, cost in first.items()} == {"other": 1, "loading": 2}
    assert {name: cost["seconds"] for name, cost in second.items()} == {"other": 4}
    assert costs_since_last() == {}


def test_a_meter_inside_does_not_hide_passes():
    profile, heard = Profile(), []
    with profile.measured("other"), counted_by(heard.append):
        count_passes(5)
    count_passes(100)
    assert heard == [5]
    assert profile.to_dict()["other"]["passed"] == 5


def test_the_passes_of_an_attack_are_all_counted():
    """Images counted in batches equal passes and forward passes that the attack states, Square included."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    images = torch.rand(60, 1, 4, 4)
    attack = LabelAttack((Stage("ce", PGD(5)), Stage("margin", PGD(5))), noise=3, queries=7, fast=False)
    with torch.no_grad():
        target = TargetModel(network, images, network(images).argmax(1))
    profile = Profile()
    with profile.measured("other"):
        evaluate_robustness(target, Linf(0.02), attack, 0)
    costs = profile.to_dict()
    assert costs["attack"]["passed"] == costs["attack"]["needed"] > 60 * 10
    assert costs["checks of the attack"]["passed"] > 0
