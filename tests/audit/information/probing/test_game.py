"""Search of label information: known infima, the best of its starts, convergence, and mutants that it must beat."""

from dataclasses import replace

import pytest
import torch

from audit.adversary.threat import Linf
from audit.calibration.label_channels import label_channels
from audit.information.estimator import CARRIED, CLEAN, EstimatorInputs, WarmStart
from audit.information.label_information import LabelInformation
from audit.information.probing.positions import Mixture, Position
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.information.probing.starts import MIXED, PUSHED
from audit.types import Encoded

QUICK = LabelInformation(ProbeTraining(folds=3, steps=60), PanelSettings(trees=30), rounds=9)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def channel(name, part=""):
    (found,) = [each for each in label_channels() if each.name == name and part in each.parameters]
    return found


def searched(subject, estimator=QUICK, count=600, seed=0, **start):
    inputs = EstimatorInputs(subject.noiseless_encoder(), *subject.sample(count, seed))
    return estimator.vulnerability(inputs, Linf(subject.eps), seed, WarmStart(**start))


def test_images_that_can_all_meet_tell_nothing():
    for multiple in ("1.5 x", "4 x"):
        found = searched(channel("labels by the mean of 16 pixels", multiple))
        assert found.normal.nats > 0.5
        assert found.worst.nats < 0.03


def test_images_are_legal_and_the_cost_is_counted():
    subject = channel("labels by the mean of 16 pixels", "2 x")
    calls = []

    def counting(images):
        calls.append((len(images), images.requires_grad))
        return subject.noiseless_encoder()(images)

    images, labels = subject.sample(200, 0)
    found = QUICK.vulnerability(EstimatorInputs(counting, images, labels), Linf(subject.eps), 0)
    assert float((found.adversarial - images).abs().max()) <= subject.eps + 1e-6
    moves = sum(count for count, gradient in calls if gradient)
    forwards = sum(count for count, gradient in calls if not gradient)
    # the reported readings of both cases and the encoding of the clean images are not part of the search
    assert found.passes == moves + 0.5 * (forwards - 3 * 200)


def test_a_start_that_is_better_than_anything_else_is_kept():
    subject = channel("labels by the mean of 16 pixels", "4 x")
    images, _ = subject.sample(900, 0)
    grey = torch.full_like(images, 0.5).clamp(images - subject.eps, images + subject.eps)
    found = searched(subject, count=900, images=grey)
    assert found.origin == CARRIED
    assert found.worst.nats == 0
    assert found.passes == 0.5 * 900  # its encoding


def test_clean_images_are_the_worst_case_if_nothing_moves_the_features():
    images = torch.rand(150, 1, 2, 2, generator=seeded())
    labels = (images.flatten(1)[:, 0] > 0.5).long()

    def flat(batch):
        # piecewise constant, with a gradient of zero
        return Encoded((batch.flatten(1) > 0.5).float() + 0 * batch.flatten(1), batch.new_empty(len(batch), 0))

    found = QUICK.vulnerability(EstimatorInputs(flat, images, labels), Linf(1e-4), 0)
    assert found.worst.nats == pytest.approx(found.normal.nats, abs=0.03)
    assert found.origin in (CLEAN, MIXED, PUSHED)


def test_a_search_cut_short_says_that_it_has_not_converged():
    subject = channel("labels by the mean of 16 pixels", "2 x")
    short = searched(subject, replace(QUICK, rounds=1, steps=1, relative_step=0.1))
    assert any(flag.startswith("search_not_converged") for flag in short.worst.flags)
    assert not searched(subject).worst.flags


def test_history_is_the_least_value_by_passes():
    found = searched(channel("labels by the mean of 16 pixels", "0.5 x")).worst
    passes, nats = zip(*found.history, strict=True)
    assert list(passes) == sorted(passes)
    assert list(nats) == sorted(nats, reverse=True)
    assert found.validated == nats[-1]


def test_seed_decides_and_nothing_global_changes():
    subject = channel("labels by the mean of 16 pixels", "0.5 x")
    before = torch.random.get_rng_state()
    first, again = searched(subject, count=150), searched(subject, count=150)
    assert first.adversarial.equal(again.adversarial)
    assert first.worst == again.worst
    assert torch.random.get_rng_state().equal(before)


def test_a_mixture_takes_each_image_from_one_of_its_positions():
    def position(value):
        encoded = Encoded(torch.full((50, 2), value), torch.empty(50, 0))
        return Position(torch.full((50, 1, 1, 1), value), encoded, None, CLEAN)

    positions = [position(value) for value in (0.0, 1.0, 2.0)]
    mixture = Mixture.draw(positions, seeded())
    images = mixture.images()
    assert images.flatten().equal(mixture.encoded().features[:, 0])
    assert images.unique().tolist() == [0.0, 1.0, 2.0]
    assert positions[0].images.eq(0).all()
