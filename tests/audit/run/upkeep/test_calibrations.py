"""Calibrations of several estimators: the same rows in one process and in several, even where one dies."""

import os
from dataclasses import dataclass, replace

import pytest

from audit.calibration.calibrate import applicable_channels
from audit.calibration.plans import PLANS
from audit.errors import EnvironmentFault
from audit.information.label_entropy import LabelEntropy
from audit.information.sandwich import Sandwich
from audit.run.upkeep.calibrations import calibrate_all

QUICK = [LabelEntropy(targets=2, kept=1, steps=1), Sandwich(steps=1, start_steps=1)]


@dataclass(frozen=True)
class Deadly(LabelEntropy):
    """Ends its process."""

    def vulnerability(self, *_args, **_options):
        os._exit(9)


def test_rows_do_not_depend_on_the_number_of_processes():
    shown: dict[int, list[tuple[str, int]]] = {1: [], 2: []}
    found = {}
    for processes, steps in shown.items():
        found[processes] = dict(calibrate_all(QUICK, "brief", processes, lambda *step, steps=steps: steps.append(step)))
    assert found[1] == found[2]
    assert [len(found[1][number]) for number in (0, 1)] == [len(applicable_channels(each, "brief")) for each in QUICK]
    assert [row.estimator for number in (0, 1) for row in found[1][number]] == [
        each.name for each in QUICK for _ in applicable_channels(each, "brief")
    ]
    total = sum(map(len, found[1].values()))
    assert [done for _, done in shown[1]] == list(range(total))
    assert [done for _, done in shown[2]] == list(range(1, total + 1))
    assert {name.split(",")[0] for name, _ in shown[1]} == {name.split(",")[0] for name, _ in shown[2]}


def test_a_process_that_dies_is_a_fault_of_the_environment():
    with pytest.raises(EnvironmentFault, match=r"a process of the calibration ended without a result, .* use --jobs 1"):
        list(calibrate_all([Deadly()], "brief", 2, lambda *_: None))


def test_an_estimator_without_channels_has_no_rows(monkeypatch):
    monkeypatch.setitem(PLANS, "sandwich", replace(PLANS["sandwich"], applies=lambda _: False))
    for processes in (1, 2):
        assert list(calibrate_all([Sandwich()], "brief", processes, lambda *_: None)) == [(0, [])]
