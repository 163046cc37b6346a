"""Channels of label information: their infima, and lazy searches and readers that each fail on one of them."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import Linf
from audit.calibration.label_channels import label_channels
from audit.calibration.plans import PLANS
from audit.information.encoding import encode
from audit.information.estimator import EstimatorInputs
from audit.information.label_information import LabelInformation
from audit.information.probing import game
from audit.information.probing.members import Readers
from audit.information.probing.panel import Panel
from audit.information.probing.probes import fit_linear
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.types import ObjectiveValue

TOLERANCE = PLANS["label-information"].worst_tolerance
ESTIMATOR = LabelInformation()


@cache
def channel(name, part=""):
    (found,) = [each for each in label_channels() if each.name == name and part in each.parameters]
    return found


MEAN = ("labels by the mean of 16 pixels", "eps 2 x")
SMALL = ("labels by the mean of 16 pixels", "eps 1 x")
SIMPLEX = ("3 classes on a simplex", "")
COMB = ("labels by a comb", "")


def inputs_of(subject, count):
    return EstimatorInputs(subject.noiseless_encoder(), *subject.sample(count, 0))


def error(subject, estimator=ESTIMATOR, count=900):
    found = estimator.vulnerability(inputs_of(subject, count), Linf(subject.eps), 0)
    return found.worst.nats - subject.worst_nats


@pytest.mark.parametrize("subject", label_channels(), ids=lambda each: f"{each.name}, {each.parameters}")
def test_samples_are_images_with_the_stated_information(subject):
    images, labels = subject.sample(400, 0)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert len(labels) == 400
    found = Panel(Readers(PanelSettings(), ProbeTraining())).read(
        encode(subject.noiseless_encoder(), images, 256), labels, 0
    )
    assert found.nats == pytest.approx(subject.normal_nats, abs=0.13)
    assert 0 <= subject.worst_nats <= subject.normal_nats + 1e-9


def test_infima_of_the_mean_never_rise_with_the_radius():
    found = [each.worst_nats for each in label_channels() if each.name == MEAN[0]]
    assert found == sorted(found, reverse=True)
    assert found[-4:] == [pytest.approx(0.0, abs=1e-9)] * 4


@pytest.mark.parametrize("which", [MEAN, SMALL, SIMPLEX], ids=["mean", "small ball", "simplex"])
def test_the_game_finds_the_infimum(which):
    assert abs(error(channel(*which))) < TOLERANCE


def test_the_panel_reads_the_comb():
    assert abs(error(channel(*COMB), count=1500)) < TOLERANCE


def test_a_game_without_hinge_fails(monkeypatch):
    monkeypatch.setattr(game, "ProbeDescent", partial(game.ProbeDescent, hinge=False))
    assert error(channel(*SIMPLEX)) > TOLERANCE


def test_five_steps_fail(monkeypatch):
    monkeypatch.setattr(game.ProbeGame, "_play", lambda self, best, curve: best)
    assert error(channel(*SIMPLEX), replace(ESTIMATOR, steps=5)) > TOLERANCE


def test_one_probe_instead_of_an_ensemble_fails(monkeypatch):
    monkeypatch.setattr(game, "_JOINING", 1)
    monkeypatch.setattr(game, "KINDS", ("linear",))
    assert error(channel(*SMALL), replace(ESTIMATOR, memory=1)) > TOLERANCE


def test_a_reader_without_trees_fails(monkeypatch):
    monkeypatch.setattr(Panel, "__new__", partial(_without_trees, Panel.__new__))
    assert error(channel(*COMB)) < -TOLERANCE


def _without_trees(new, cls, readers, members=None, **settings):
    return new(cls, readers, ("linear", "hidden", "neighbours"), **settings)


def test_an_attack_on_two_probes_fails():
    """The best of two attacks, each as far past a linear probe as 20 steps go, the second probe fitted on the first."""
    subject = channel(*MEAN)
    inputs = inputs_of(subject, 900)
    images, readers = inputs.images, Readers(PanelSettings(), ProbeTraining())
    errors = []
    for number in range(2):
        probe = fit_linear(encode(inputs.encoder, images, 256).features, inputs.labels, 2, ProbeTraining())

        def likelihood(batch, index, probe=probe):
            value = -F.cross_entropy(probe(inputs.encoder(batch).features), inputs.labels[index], reduction="none")
            return ObjectiveValue(value, torch.zeros_like(value, dtype=torch.bool))

        generator = torch.Generator().manual_seed(number)
        images = minimise(likelihood, inputs.images, Linf(subject.eps), PGD(20, 0.2), generator).images
        read = Panel(readers).read(encode(inputs.encoder, images, 256), inputs.labels, 0)
        errors.append(read.nats - subject.worst_nats)
    assert min(errors) > TOLERANCE
