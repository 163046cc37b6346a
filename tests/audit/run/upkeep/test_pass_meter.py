"""Progress of long work: passes done, passes expected, and the time left."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from audit.adversary.label_attack import TIERS, LabelAttack, Stage
from audit.adversary.memory.counting import count_passes
from audit.adversary.pgd import PGD
from audit.adversary.robustness import TargetModel, evaluate_robustness
from audit.adversary.threat import THREATS, Linf
from audit.commands.display import Display
from audit.config.settings import AuditSettings
from audit.information.sandwich import Sandwich
from audit.run.cell import Cell
from audit.run.cell_runner import CellRunner
from audit.run.layer_audit import LayerAudit
from audit.run.loading import RunOptions
from audit.run.upkeep import pass_meter
from audit.run.upkeep.pass_meter import PassMeter, StageMeter, expected_attack_passes, expected_passes
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import load_model


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(pass_meter, "time", found)
    monkeypatch.setattr("audit.commands.display.time", found)
    return found


def test_passes_are_reported_once_a_second_with_the_time_left(clock):
    seen = []
    meter = PassMeter(seen.append)
    with meter.counting(1000):
        meter.stage("attacking")
        for _ in range(20):
            clock.now += 0.25
            count_passes(10)
        meter.stage("estimating information")
    count_passes(7)
    assert seen == [
        "attacking",
        "attacking, about 24 s left, 40 of about 1,000 passes",
        "attacking, about 23 s left, 80 of about 1,000 passes",
        "attacking, about 22 s left, 120 of about 1,000 passes",
        "attacking, about 21 s left, 160 of about 1,000 passes",
        "attacking, about 20 s left, 200 of about 1,000 passes",
        "estimating information, about 20 s left, 200 of about 1,000 passes",
    ]


def test_more_passes_than_expected_leave_little_time(clock):
    seen = []
    with PassMeter(seen.append).counting(10):
        clock.now += 100
        count_passes(20000)
    assert seen == ["about 5 s left, 20,000 of about 21,000 passes"]


def test_stages_keep_their_number(clock):
    seen = []
    meter = StageMeter(lambda text, done: seen.append((text, done)))
    with meter.counting(100):
        meter("first", 0)
        meter("second", 1)
        clock.now += 2
        count_passes(50)
    assert seen == [("first", 0), ("second", 1), ("second, about 2 s left, 50 of about 100 passes", 1)]


def test_into_a_pipe_a_line_is_printed_every_half_minute(clock, capsys):
    with Display(4) as display:
        for second in range(100):
            clock.now += 1
            display.stage("net", f"attacking, second {second}")
        display.channel("transfer", 2)
        clock.now += 30
        display.channel("[transfer]", 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[0/4] net: attacking, second 9",
        "[0/4] net: attacking, second 39",
        "[0/4] net: attacking, second 69",
        "[0/4] net: attacking, second 99",
        "[2/4] [transfer], about 2 min left",
    ]


def test_the_live_line_keeps_count_and_time_left_on_a_narrow_terminal(clock, monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("audit.commands.display.Console", lambda **_settings: terminal)
    text = "estimating information, about 3 min left, 12,300 of about 50,000 passes"
    with Display(4) as display:
        display.stage("digits-vgg-robust", text)
        display._progress.refresh()
        clock.now += 60
        display.channel("digits-vgg-robust", 2)
        display._progress.refresh()
    lines = [part.strip() for part in re.split(r"\r|\n|\x1b\[\w+", shown.getvalue())]
    start = "0/4 digits-vgg-robust: estimating information, about 3 min left, 1"
    assert any(line.startswith(start) for line in lines)
    assert any(line.endswith("2/4 digits-vgg-robust, about 60 s left") for line in lines)
    assert not [line for line in lines if "-:--" in line]


def test_the_time_left_in_all_is_that_of_cells_that_were_not_known(clock, monkeypatch):
    shown = []
    with Display(5) as display:
        monkeypatch.setattr(display._progress, "update", lambda _task, description: shown.append(description))
        record = SimpleNamespace(model="m", layer="logits", eps=0.1, estimator="sandwich", valid=True, seconds=60.0)
        display.done(record, known=True)
        display.stage("m", "attacking")
        clock.now += 60
        display.done(record, known=False)
        display.stage("m", "attacking")
    assert shown == ["m: attacking", "about 3 min left in all; m: attacking"]  # 1 of 4 took a minute


def test_a_quiet_display_prints_nothing(clock, capsys):
    with Display(4, quiet=True) as display:
        clock.now += 100
        display.stage("net", "attacking")
    assert capsys.readouterr().err == ""


class Counted(nn.Module):
    """A small classifier that counts the images that it passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), 0

    def forward(self, images):
        self.seen += len(images)
        return self.body(images)


def test_the_passes_of_attacks_and_searches_are_counted():
    network, images = Counted().eval(), torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = network(images).argmax(1)
    attack = replace(TIERS["smoke"], fast=False, noise=5)
    estimator = Sandwich(steps=6, start_steps=4, annealing_steps=8)
    settings = replace(AuditSettings(estimator), attack=attack, seeds=(0, 1))
    meter, network.seen = PassMeter(lambda _text: None), 0
    with meter.counting(1):
        evaluate_robustness(TargetModel(network, images, labels), Linf(0.1), attack, 0)
        LayerAudit(network, images, labels, "logits", settings).under(Linf(0.1))
        counted = meter._done
    assert 0.9 * network.seen <= counted <= network.seen
    assert 0.4 * counted <= expected_passes(settings, 60) <= 2.5 * counted


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_takes_between_a_quarter_and_four_times_the_expected_passes(norm):
    model, digits = load_model("bundled:digits-vgg-robust"), load_images("digits", ImageRequest(100))
    target, threat = TargetModel(model.network, digits.images, digits.labels), THREATS[norm](0.2)
    meter = PassMeter(lambda _text: None)
    with meter.counting(1):
        evaluate_robustness(target, threat, TIERS["audit"], 0)
        counted = meter._done
    assert 0.25 * counted <= expected_attack_passes(TIERS["audit"], 100, norm) <= 4 * counted


def test_stronger_attacks_are_expected_to_take_longer():
    single = LabelAttack((Stage("ce", PGD(10)),))
    expected = [expected_attack_passes(attack, 1000) for attack in (single, TIERS["smoke"], TIERS["audit"])]
    assert expected == sorted(expected)
    assert expected_attack_passes(TIERS["audit"], 2000) > 1.9 * expected[-1] - 10000


def test_a_cell_reports_its_stages_with_passes(monkeypatch):
    monkeypatch.setattr(pass_meter, "_EVERY", 0.0)
    seen = []
    runner = CellRunner(RunOptions(), on_stage=lambda _cell, stage: seen.append(stage))
    attack = LabelAttack((Stage("ce", PGD(2)),))
    settings = replace(
        AuditSettings(Sandwich(steps=2, start_steps=2, quantisers=(2,), annealing_steps=2)), attack=attack, seeds=(0,)
    )
    cell = Cell("bundled:digits-vgg-standard", None, "digits", 60, "logits", Linf(0.1), settings)
    assert runner.compute(cell).valid
    assert seen[0] == "loading"
    assert [stage for stage in seen if "passes" not in stage][:1] == ["loading"]
    for stage in ("checking the network", "attacking", "estimating information"):
        assert any(re.fullmatch(rf"{stage}, about \d+ s left, [\d,]+ of about [\d,]+ passes", text) for text in seen)
