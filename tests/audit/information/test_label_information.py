"""Label information by probes: closed forms, bounds, attacks, and rejected inputs."""

from dataclasses import replace
from math import log

import pytest
import torch

from audit.adversary.threat import Linf
from audit.calibration.catalogue import all_channels
from audit.calibration.closed_forms import two_points
from audit.errors import InvalidModelError, UsageError
from audit.information.estimator import EstimatorInputs
from audit.information.floors import empirical_entropy
from audit.information.label_information import LabelInformation
from audit.information.probes import ProbeTraining
from audit.types import Encoded

ESTIMATOR = LabelInformation(steps=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(count=120, size=2):
    return torch.rand(count, 1, size, size, generator=seeded())


def network(logits_of, features_of=None):
    def encoder(images):
        logits = logits_of(images.flatten(1))
        return Encoded(logits if features_of is None else features_of(images), logits.log_softmax(1))

    return encoder


def without_log_probs(images):
    return Encoded(images.flatten(1), images.new_empty(len(images), 0))


def three_classes(values):
    """Three classes, one for each of three intervals of the first pixel."""
    first = values[:, :1]
    return 20 * torch.cat([0.3 - first, 0.15 - (first - 0.5).abs(), first - 0.7], 1)


@pytest.mark.parametrize(("sigma", "shift"), [(0.5, 0.5), (1.0, 0.25)])
def test_labelled_gaussians_match_their_closed_form(sigma, shift):
    (channel,) = [
        c for c in all_channels() if c.target == "label" and c.parameters == f"sigma {sigma:g}, shift {shift:g}"
    ]
    found = LabelInformation().vulnerability(
        EstimatorInputs(channel.noisy_encoder(0), *channel.sample(1500, 0)), Linf(channel.eps), 0
    )
    truth = two_points(sigma, shift)
    assert found.normal.nats == pytest.approx(truth.normal, abs=0.03)
    assert found.worst.nats == pytest.approx(truth.worst, abs=0.04)
    assert found.normal.parts["linear"] <= found.normal.nats
    assert found.normal.ceiling == pytest.approx(log(2))


def test_value_is_at_most_the_entropy_of_the_labels():
    images = pixels(200)
    labels = (images.flatten(1)[:, 0] > 0.8).long()
    plain = ESTIMATOR.normal(
        EstimatorInputs(
            lambda x: Encoded(100 * without_log_probs(x).features, without_log_probs(x).log_probs), images, labels
        ),
        0,
    )
    assert 0.8 * empirical_entropy(labels) < plain.nats <= plain.ceiling == empirical_entropy(labels)


def test_independent_features_carry_no_information():
    images = pixels(300)
    for labels in (torch.randint(0, 3, (300,), generator=seeded(3)), torch.zeros(300, dtype=torch.long)):
        found = ESTIMATOR.vulnerability(EstimatorInputs(without_log_probs, images, labels), Linf(0.05), 0)
        assert found.normal.nats <= 2 * found.normal.stderr
        assert found.worst.nats <= found.normal.nats
    assert found.nats == 0  # one class


def test_worst_case_decreases_with_eps():
    images = pixels(300)
    labels = (images.flatten(1)[:, 0] > 0.5).long()
    weak, strong = (
        ESTIMATOR.vulnerability(EstimatorInputs(without_log_probs, images, labels), Linf(eps), 0) for eps in (0.02, 0.2)
    )
    assert weak.normal == strong.normal
    assert strong.worst.nats < weak.worst.nats < weak.normal.nats


def test_log_probs_add_two_attacks():
    images = pixels(200)
    labels = (images.flatten(1)[:, 0] > 0.5).long()
    quick = replace(ESTIMATOR, steps=3, probes=ProbeTraining(folds=2, hidden=4, steps=20))
    own = network(lambda values: torch.stack([0.5 - values[:, 0], values[:, 0] - 0.5], 1))
    with_head = quick.vulnerability(EstimatorInputs(own, images, labels), Linf(0.1), 0)
    without = quick.vulnerability(EstimatorInputs(without_log_probs, images, labels), Linf(0.1), 0)
    assert with_head.passes - without.passes == 2 * (3 + 0.5) * 200  # two more attacks, each with its reading


def test_rejects_a_network_without_gradient():
    detached = network(lambda values: three_classes(values.detach()))
    with pytest.raises(InvalidModelError, match="no gradient to its input"):
        ESTIMATOR.vulnerability(EstimatorInputs(detached, pixels(), torch.arange(120) % 3), Linf(0.1), 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "label-information batch_size 0 must be at least 1"),
        ({"relative_step": 0.0}, r"label-information relative_step 0.0 is outside \(0, 2\]"),
    ],
)
def test_rejects_illegal_settings(setting, message):
    with pytest.raises(UsageError, match=message):
        LabelInformation(**setting)
