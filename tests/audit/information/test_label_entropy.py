"""Entropy of predicted classes: closed forms, target selection, and rejected inputs."""

from itertools import permutations
from math import log

import pytest
import torch

from audit.adversary.threat import Linf
from audit.calibration.catalogue import all_channels
from audit.errors import InvalidModelError, MismatchError, UsageError
from audit.information.estimator import EstimatorInputs
from audit.information.label_entropy import LabelEntropy, targeted_objective
from audit.theory import binary_entropy
from audit.types import Encoded

ESTIMATOR = LabelEntropy(steps=8)


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


def inputs_of(encoder, images):
    return EstimatorInputs(encoder, images, torch.zeros(len(images), dtype=torch.long))


def signs(shift, mean=1.0):
    wanted = f"mean {mean:g}, spread 1, shift {shift:g}"
    (channel,) = [c for c in all_channels() if c.name == "sign of a Gaussian mixture" and c.parameters == wanted]
    return channel


@pytest.mark.parametrize(("shift", "mean"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (0.5, 0.0)])
def test_sign_channel_matches_its_closed_form(shift, mean):
    channel = signs(shift, mean)
    found = LabelEntropy().vulnerability(
        EstimatorInputs(channel.noisy_encoder(0), *channel.sample(2000, 0)), Linf(channel.eps), 0
    )
    assert found.normal.nats == pytest.approx(log(2), abs=1e-3)
    assert found.worst.nats == pytest.approx(channel.worst_nats, abs=2e-3)


def test_value_is_the_entropy_of_the_predicted_classes():
    images, encoder = pixels(), network(three_classes)
    found = ESTIMATOR.vulnerability(inputs_of(encoder, images), Linf(0.1), 0)
    for case, seen in ((found.normal, images), (found.worst, found.adversarial)):
        shares = three_classes(seen.flatten(1)).argmax(1).bincount(minlength=3) / len(images)
        assert case.nats == pytest.approx(-sum(float(p) * log(p) for p in shares if p > 0), abs=1e-6)
        assert case.ceiling == log(3)


def test_worst_case_is_near_the_minimum_over_all_perturbations():
    images, eps = pixels(400), 0.1
    first = images.flatten(1)[:, 0]
    assert three_classes(torch.tensor([[0.33], [0.32], [0.67], [0.68]])).argmax(1).tolist() == [1, 0, 1, 2]
    can = torch.stack([first < 0.325 + eps, (first > 0.325 - eps) & (first < 0.675 + eps), first > 0.675 - eps], 1)

    def preferring(order):
        # entropy is concave: at its least every image gives the first answer of one order that it can give
        shares = torch.tensor(order)[can[:, order].int().argmax(1)].bincount(minlength=3) / len(images)
        return -sum(float(p) * log(p) for p in shares if p > 0)

    least = min(map(preferring, map(list, permutations(range(3)))))
    found = LabelEntropy(steps=20, relative_step=0.3).vulnerability(
        inputs_of(network(three_classes), images), Linf(eps), 0
    )
    assert least - 1e-6 <= found.worst.nats <= least + 0.01 < found.normal.nats - 0.1


def test_images_that_miss_the_target_are_reset_to_clean():
    # attacked towards class 2, half of the images of class 0 would end in class 1
    first = torch.cat(
        [torch.full((30,), 0.28), torch.full((30,), 0.1), torch.full((20,), 0.6), torch.full((120,), 0.9)]
    )
    images = first[:, None, None, None].repeat(1, 1, 2, 2)
    found = LabelEntropy(steps=10).vulnerability(inputs_of(network(three_classes), images), Linf(0.1), 0)
    assert found.worst.nats == pytest.approx(binary_entropy(60 / 200), abs=1e-5)


def test_constant_classifier_has_zero_entropy():
    constant = network(lambda values: torch.tensor([0.0, 3.0, 1.0]) + 0 * values.sum(1, keepdim=True))
    found = ESTIMATOR.vulnerability(inputs_of(constant, pixels()), Linf(0.1), 0)
    assert (found.normal.nats, found.worst.nats, found.nats) == (0, 0, 0)
    assert found.adversarial.equal(pixels())


def test_predictions_out_of_reach_are_unchanged():
    def side(values):
        score = 1e3 * (values[:, 0] > 0.5).float() - 500 + 0.01 * values[:, 0]
        return torch.stack([score, -score], 1)

    images = torch.cat([0.2 * pixels(60), 1 - 0.2 * pixels(60)])
    found = ESTIMATOR.vulnerability(inputs_of(network(side), images), Linf(0.1), 0)
    assert found.normal == found.worst
    assert found.adversarial.equal(images)


def test_targets_are_chosen_by_a_trial():
    # no other image reaches the most likely class 0, every image reaches class 1
    def logits(values):
        first = values[:, :1]
        zero = torch.where(first < 0.55, 5.0, -500.0) + 0.01 * first
        return torch.cat(
            [zero - 9 * (first - values[:, 1:2].detach()).relu() * 0, 60 * (first - 0.45) + 5, -9 * first], 1
        )

    images = pixels(200) * 0.3 + 0.3
    whole = LabelEntropy(targets=3, kept=3, steps=10).vulnerability(inputs_of(network(logits), images), Linf(0.2), 0)
    one = LabelEntropy(targets=3, kept=1, steps=10).vulnerability(inputs_of(network(logits), images), Linf(0.2), 0)
    assert one.worst.nats == pytest.approx(whole.worst.nats, abs=1e-6)
    assert one.passes < whole.passes


def test_kept_may_exceed_the_number_of_classes():
    given = inputs_of(network(three_classes), pixels())
    all_of_them = LabelEntropy(targets=3, kept=3, steps=4).vulnerability(given, Linf(0.1), 0)
    assert LabelEntropy(targets=3, kept=9, steps=4).vulnerability(given, Linf(0.1), 0).worst == all_of_them.worst
    assert LabelEntropy(targets=99, kept=99, steps=4).vulnerability(given, Linf(0.1), 0).worst == all_of_them.worst


def test_rejects_a_layer_that_does_not_determine_the_logits():
    with pytest.raises(MismatchError, match="label-level needs a layer that determines the network's logits"):
        ESTIMATOR.normal(inputs_of(without_log_probs, pixels()), 0)
    with pytest.raises(MismatchError, match="such as logits"):
        ESTIMATOR.vulnerability(inputs_of(without_log_probs, pixels()), Linf(0.1), 0)


def test_targeted_objective_is_the_margin_to_the_target():
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, -1.0, 3.0]])
    images = torch.zeros(2, 1, 1, 1)
    found = targeted_objective(lambda _images: Encoded(logits, logits.log_softmax(1)), 2)(images, torch.arange(2))
    assert found.value.tolist() == pytest.approx([2.0, -3.0])
    assert found.done.tolist() == [False, True]


def test_rejects_a_network_without_gradient():
    detached = network(lambda values: three_classes(values.detach()))
    with pytest.raises(InvalidModelError, match="no gradient to its input"):
        ESTIMATOR.vulnerability(EstimatorInputs(detached, pixels(), torch.arange(120) % 3), Linf(0.1), 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"targets": 0}, "label-level targets 0 must be at least 1"),
        ({"kept": 0}, "label-level kept 0 must be at least 1"),
        ({"steps": 0}, "label-level steps 0 must be at least 1"),
    ],
)
def test_rejects_illegal_settings(setting, message):
    with pytest.raises(UsageError, match=message):
        LabelEntropy(**setting)
