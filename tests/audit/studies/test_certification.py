"""Certification of a model: the cost that is announced, and the progress of the search."""

import re

import pytest

from audit.adversary.memory.counting import counted_by
from audit.adversary.threat import Linf
from audit.commands import certify
from audit.run.loading import RunOptions
from audit.run.upkeep import pass_meter
from audit.studies.certification import CertificationRequest, certify_model
from reports.cli import main

MODEL = "bundled:digits-vgg-robust"


@pytest.mark.parametrize("layer", ["logits", "penultimate"])
def test_a_search_tells_its_passes_first_and_then_how_many_are_left(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_meter, "_EVERY", 0)
    heard: list[object] = []
    passes: list[float] = []
    request = CertificationRequest(
        model=MODEL, dataset="digits", layers=(layer,), threats=(Linf(0.3),), images=24, hubs=1
    )
    with counted_by(passes.append):
        certify_model(
            request,
            RunOptions(device="cpu"),
            lambda layer, threat, stage, _collided: heard.append((layer, threat, stage)),
            lambda *cost: heard.append(cost),
        )
    announced, seconds = heard[0]
    assert seconds > 0
    assert sum(passes) / 10 < announced < 30 * sum(passes)
    assert all(each[:2] == (layer, Linf(0.3)) for each in heard[1:])
    shown = [re.search(r"left, ([\d,]+) of about ([\d,]+) passes", stage) for _, _, stage in heard[1:]]
    done = [int(found[1].replace(",", "")) for found in shown if found]
    assert done == sorted(done)
    assert len(done) > 10
    assert done[-1] > 0.5 * sum(passes)


@pytest.mark.parametrize("said", [True, False])
def test_the_command_announces_what_takes_long(
    said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(certify, "_LONG", 0.0 if said else 1e9)
    asked = ("--dataset", "digits", "--images", "24", "--head-images", "0", "--eps", "0.1", "--hubs", "1")
    assert main(["certify", MODEL, *asked]) == 0
    pattern = r"^Note: this takes about [\d,]+ passes of single images, about [\d.]+ (s|min|h)$"
    assert bool(re.search(pattern, capsys.readouterr().err, re.MULTILINE)) is said
