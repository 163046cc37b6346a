"""Label information by a panel: closed forms, bounds, candidates of the worst case, and rejected inputs."""

from math import log

import pytest
import torch

from audit.adversary.threat import Linf
from audit.calibration.catalogue import all_channels
from audit.calibration.closed_forms import two_points
from audit.errors import InvalidModelError, UsageError
from audit.information.estimator import ATTACKED, EstimatorInputs, WarmStart
from audit.information.floors import empirical_entropy
from audit.information.label_information import LabelInformation
from audit.information.probing.learning_curve import learning_curves
from audit.information.probing.members import Readers
from audit.information.probing.panel import Panel
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.types import Encoded

ESTIMATOR = LabelInformation(rounds=4)
QUICK = LabelInformation(ProbeTraining(folds=3, steps=40), PanelSettings(trees=20), rounds=2, steps=5)
FAST = LabelInformation(
    ProbeTraining(folds=2, hidden=4, steps=10), PanelSettings(trees=5, boosts=2), rounds=1, steps=2, relative_step=1.0
)


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
    name, parameters = "labels of two Gaussians", f"sigma {sigma:g}, shift {shift:g}"
    (channel,) = [each for each in all_channels() if (each.name, each.parameters) == (name, parameters)]
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


def test_a_larger_ball_never_reports_more_than_a_smaller_one_within_it():
    images = pixels(200)
    labels = (images.flatten(1)[:, 0] > 0.5).long()
    inputs = EstimatorInputs(without_log_probs, images, labels)
    found = [QUICK.vulnerability(inputs, Linf(0.02), 0)]
    for eps in (0.03, 0.05, 0.08, 0.12):
        found.append(QUICK.vulnerability(inputs, Linf(eps), 0, WarmStart(images=found[-1].adversarial)))
    values = [each.worst.nats for each in found]
    assert values == sorted(values, reverse=True)


def test_images_of_the_attack_on_the_label_are_a_candidate():
    images = pixels(200)
    labels = (images.flatten(1)[:, 0] > 0.5).long()
    at_the_boundary = images.clone()
    at_the_boundary[:, :, 0, 0] = 0.5

    def first_pixel(batch):  # without a gradient that a search could follow
        return Encoded(
            (batch.flatten(1)[:, :1] > 0.5).float() + 0 * batch.flatten(1)[:, :1], batch.new_empty(len(batch), 0)
        )

    inputs = EstimatorInputs(first_pixel, images, labels)
    found = QUICK.vulnerability(inputs, Linf(0.6), 0, WarmStart(attacked=at_the_boundary))
    assert found.origin == ATTACKED
    assert found.worst.nats < 0.01 < 0.6 < found.normal.nats


def layers(seed):
    """Return the inputs of a layer of six features, and of a later one that is a function of it, of two."""
    images, draws = pixels(200), seeded(seed)
    labels = (images.flatten(1)[:, 0] + images.flatten(1)[:, 1] > 1).long()
    first, second = torch.randn(4, 6, generator=draws), torch.randn(6, 2, generator=draws)

    def features(batch):
        return (4 * (batch.flatten(1) - 0.5) @ first).tanh()

    def encoder(of):
        return lambda batch: Encoded(of(features(batch)), batch.new_empty(len(batch), 0))

    later = EstimatorInputs(encoder(lambda values: 3 * values @ second), images, labels)
    return EstimatorInputs(encoder(lambda values: values), images, labels, later={"second": later}), later


@pytest.mark.parametrize("seed", [0, 1])
def test_neither_information_nor_bounds_rise_from_a_layer_to_a_later_one(seed):
    given, later = layers(seed)
    here = FAST.vulnerability(given, Linf(0.1), 0)
    found = FAST.vulnerability(later, Linf(0.1), 0, WarmStart(earlier=here.adversarial))
    assert found.normal.nats <= here.normal.nats
    assert found.worst.nats <= here.worst.nats
    assert found.worst.upper <= here.worst.upper
    assert here.worst.nats >= FAST.read_worst(later, here.adversarial, 0).nats == here.worst.parts["at second"]


def test_bounds_rest_on_the_upper_end_of_the_interval():
    images = pixels(300)
    labels = (images.flatten(1)[:, 0] + 0.3 * torch.rand(300, generator=seeded(2)) > 0.65).long()
    found = QUICK.normal(EstimatorInputs(without_log_probs, images, labels), 0)
    panel = Panel(Readers(QUICK.panel, QUICK.probes), unit=images.flatten(1).std(0, correction=0))
    curves = learning_curves(panel, without_log_probs(images), labels, 0)
    tends = [found.parts[name] + max(0, (c - a) / 3, c - b) for name, ((_, a), (_, b), (_, c)) in curves.items()]
    assert found.upper == pytest.approx(max(found.nats, *tends) + 1.96 * found.stderr, abs=1e-4)
    assert found.nats + 1.96 * found.stderr <= found.upper + 1e-4 <= found.ceiling + 1e-4
    assert [count for count, _ in found.by_images] == [75, 150, 300]
    assert found.by_images[-1][1] == pytest.approx(max(points[-1][1] for points in curves.values()))
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high


def test_the_networks_own_output_is_read_on_classes_that_occur():
    images = pixels(200)
    labels = 3 * (images.flatten(1)[:, 0] > 0.5).long() + 2  # classes 2 and 5 of seven

    def own(values):
        scores = torch.full((len(values), 7), 9.0)  # other classes win, which says nothing of these two
        scores[:, 2], scores[:, 5] = 8 * (0.5 - values[:, 0]), 8 * (values[:, 0] - 0.5)
        return scores

    found = QUICK.normal(EstimatorInputs(network(own, lambda batch: torch.zeros(len(batch), 1)), images, labels), 0)
    assert found.parts["linear"] < 0.01
    assert found.nats == found.parts["own"] > 0.6


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


def sample_of(count, classes):
    labels = torch.arange(count) % classes
    return EstimatorInputs(
        lambda images: Encoded(images.flatten(1), images.new_empty(len(images), 0)),
        torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
        labels,
    )


@pytest.mark.parametrize(("count", "classes"), [(100, 100), (59, 30), (7, 4)])
def test_fewer_than_two_images_a_class_are_refused(count, classes):
    with pytest.raises(UsageError, match=f"{count} images of {classes} classes are fewer than 2 a class"):
        QUICK.normal(sample_of(count, classes), 0)


@pytest.mark.parametrize(("count", "classes", "flagged"), [(39, 2, True), (40, 2, False), (57, 3, True)])
def test_fewer_than_twenty_images_a_class_are_flagged_in_both_cases(count, classes, flagged):
    found = QUICK.vulnerability(sample_of(count, classes), Linf(0.1), 0)
    for case in (found.normal, found.worst):
        assert any(flag.startswith("too_few_images") for flag in case.flags) is flagged
        assert case.bounds_heads is not flagged
