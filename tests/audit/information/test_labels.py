"""Vulnerability of answers and of labels: closed forms, limits, and what both refuse."""

from dataclasses import replace
from itertools import permutations
from math import log

import pytest
import torch

from audit.adversary.threat import Linf
from audit.calibration.channels import channels
from audit.calibration.closed_forms import two_points
from audit.errors import InvalidModelError, MismatchError, UsageError
from audit.information.estimator import Subject
from audit.information.floors import label_entropy
from audit.information.labels import LabelInformation, LabelLevel, targeted_objective
from audit.information.probes import ProbeTraining
from audit.theory import binary_entropy
from audit.types import Encoded

LEVEL = LabelLevel(steps=8)
LABELS = LabelInformation(steps=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(count=120, size=2):
    return torch.rand(count, 1, size, size, generator=seeded())


def answering(logits_of, features_of=None):
    def encoder(images):
        logits = logits_of(images.flatten(1))
        return Encoded(logits if features_of is None else features_of(images), logits.log_softmax(1))

    return encoder


def headless(images):
    return Encoded(images.flatten(1), images.new_empty(len(images), 0))


def three(values):
    """Three answers, by which of three regions of the first pixel an image is in."""
    first = values[:, :1]
    return 20 * torch.cat([0.3 - first, 0.15 - (first - 0.5).abs(), first - 0.7], 1)


def unlabelled(encoder, images):
    return Subject(encoder, images, torch.zeros(len(images), dtype=torch.long))


def signs(shift, mean=1.0):
    wanted = f"mean {mean:g}, spread 1, shift {shift:g}"
    (channel,) = [c for c in channels() if c.name == "sign of a Gaussian mixture" and c.parameters == wanted]
    return channel


@pytest.mark.parametrize(("shift", "mean"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (0.5, 0.0)])
def test_the_sign_channel_gives_its_closed_form(shift, mean):
    channel = signs(shift, mean)
    found = LabelLevel().vulnerability(Subject(channel.noisy(0), *channel.sample(2000, 0)), Linf(channel.eps), 0)
    assert found.normal.nats == pytest.approx(log(2), abs=1e-3)
    assert found.worst.nats == pytest.approx(channel.worst_nats, abs=2e-3)


def test_the_value_is_the_entropy_of_the_answers_and_the_worst_is_of_the_moved_ones():
    images, encoder = pixels(), answering(three)
    found = LEVEL.vulnerability(unlabelled(encoder, images), Linf(0.1), 0)
    for case, seen in ((found.normal, images), (found.worst, found.moved)):
        shares = three(seen.flatten(1)).argmax(1).bincount(minlength=3) / len(images)
        assert case.nats == pytest.approx(-sum(float(p) * log(p) for p in shares if p > 0), abs=1e-6)
        assert case.ceiling == log(3)


def test_the_worst_case_is_near_the_least_entropy_that_any_moves_leave():
    images, eps = pixels(400), 0.1
    first = images.flatten(1)[:, 0]
    assert three(torch.tensor([[0.33], [0.32], [0.67], [0.68]])).argmax(1).tolist() == [1, 0, 1, 2]
    can = torch.stack([first < 0.325 + eps, (first > 0.325 - eps) & (first < 0.675 + eps), first > 0.675 - eps], 1)

    def preferring(order):
        # entropy is concave: at its least every image gives the first answer of one order that it can give
        shares = torch.tensor(order)[can[:, order].int().argmax(1)].bincount(minlength=3) / len(images)
        return -sum(float(p) * log(p) for p in shares if p > 0)

    least = min(map(preferring, map(list, permutations(range(3)))))
    found = LabelLevel(steps=20, relative_step=0.3).vulnerability(unlabelled(answering(three), images), Linf(eps), 0)
    assert least - 1e-6 <= found.worst.nats <= least + 0.01 < found.normal.nats - 0.1


def test_an_image_that_cannot_give_the_wanted_answer_stays_where_it_was():
    # aimed at answer 2, half of those that answer 0 would be driven over the border into 1
    first = torch.cat(
        [torch.full((30,), 0.28), torch.full((30,), 0.1), torch.full((20,), 0.6), torch.full((120,), 0.9)]
    )
    images = first[:, None, None, None].repeat(1, 1, 2, 2)
    found = LabelLevel(steps=10).vulnerability(unlabelled(answering(three), images), Linf(0.1), 0)
    assert found.worst.nats == pytest.approx(binary_entropy(60 / 200), abs=1e-5)


def test_a_constant_classifier_tells_nothing():
    constant = answering(lambda values: torch.tensor([0.0, 3.0, 1.0]) + 0 * values.sum(1, keepdim=True))
    found = LEVEL.vulnerability(unlabelled(constant, pixels()), Linf(0.1), 0)
    assert (found.normal.nats, found.worst.nats, found.nats) == (0, 0, 0)
    assert found.moved.equal(pixels())


def test_a_classifier_out_of_reach_keeps_its_answers():
    def side(values):
        told = 1e3 * (values[:, 0] > 0.5).float() - 500 + 0.01 * values[:, 0]
        return torch.stack([told, -told], 1)

    images = torch.cat([0.2 * pixels(60), 1 - 0.2 * pixels(60)])
    found = LEVEL.vulnerability(unlabelled(answering(side), images), Linf(0.1), 0)
    assert found.normal == found.worst
    assert found.moved.equal(images)


def test_few_targets_are_chosen_by_reach():
    # the likeliest answer 0 cannot be reached from elsewhere, answer 1 by every image
    def logits(values):
        first = values[:, :1]
        zero = torch.where(first < 0.55, 5.0, -500.0) + 0.01 * first
        return torch.cat(
            [zero - 9 * (first - values[:, 1:2].detach()).relu() * 0, 60 * (first - 0.45) + 5, -9 * first], 1
        )

    images = pixels(200) * 0.3 + 0.3
    whole = LabelLevel(targets=3, kept=3, steps=10).vulnerability(unlabelled(answering(logits), images), Linf(0.2), 0)
    one = LabelLevel(targets=3, kept=1, steps=10).vulnerability(unlabelled(answering(logits), images), Linf(0.2), 0)
    assert one.worst.nats == pytest.approx(whole.worst.nats, abs=1e-6)
    assert one.passes < whole.passes


def test_keeping_more_targets_than_there_are_keeps_all():
    given = unlabelled(answering(three), pixels())
    all_of_them = LabelLevel(targets=3, kept=3, steps=4).vulnerability(given, Linf(0.1), 0)
    assert LabelLevel(targets=3, kept=9, steps=4).vulnerability(given, Linf(0.1), 0).worst == all_of_them.worst
    assert LabelLevel(targets=99, kept=99, steps=4).vulnerability(given, Linf(0.1), 0).worst == all_of_them.worst


@pytest.mark.parametrize(
    ("estimator", "wrong", "said"),
    [
        (LabelLevel, {"targets": 0}, "label-level targets 0 must be at least 1"),
        (LabelLevel, {"kept": 0}, "label-level kept 0 must be at least 1"),
        (LabelLevel, {"steps": 0}, "steps 0 of a search must be at least 1"),
        (LabelInformation, {"batch_size": 0}, "batch_size 0 of a search must be at least 1"),
        (LabelInformation, {"relative_step": 0.0}, r"relative_step 0.0 is outside \(0, 2\]"),
    ],
)
def test_settings_out_of_range(estimator, wrong, said):
    with pytest.raises(UsageError, match=said):
        estimator(**wrong)


def test_a_layer_without_the_whole_answer_has_no_label_level():
    with pytest.raises(MismatchError, match="label-level needs a layer that carries the network's whole answer"):
        LEVEL.normal(unlabelled(headless, pixels()), 0)
    with pytest.raises(MismatchError, match="such as logits"):
        LEVEL.vulnerability(unlabelled(headless, pixels()), Linf(0.1), 0)


@pytest.mark.parametrize("estimator", [LEVEL, LABELS])
def test_a_network_without_gradient_is_refused(estimator):
    cut = answering(lambda values: three(values.detach()))
    with pytest.raises(InvalidModelError, match="no gradient to its input"):
        estimator.vulnerability(Subject(cut, pixels(), torch.arange(120) % 3), Linf(0.1), 0)


def test_the_targeted_objective_is_the_lead_of_the_likeliest_other_answer():
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, -1.0, 3.0]])
    images = torch.zeros(2, 1, 1, 1)
    judged = targeted_objective(lambda _images: Encoded(logits, logits.log_softmax(1)), 2)(images, torch.arange(2))
    assert judged.value.tolist() == pytest.approx([2.0, -3.0])
    assert judged.done.tolist() == [False, True]


@pytest.mark.parametrize(("sigma", "shift"), [(0.5, 0.5), (1.0, 0.25)])
def test_labelled_gaussians_give_their_closed_form(sigma, shift):
    (channel,) = [c for c in channels() if c.tells == "label" and c.parameters == f"sigma {sigma:g}, shift {shift:g}"]
    found = LabelInformation().vulnerability(Subject(channel.noisy(0), *channel.sample(1500, 0)), Linf(channel.eps), 0)
    truth = two_points(sigma, shift)
    assert found.normal.nats == pytest.approx(truth.normal, abs=0.03)
    assert found.worst.nats == pytest.approx(truth.worst, abs=0.04)
    assert found.normal.parts["linear"] <= found.normal.nats
    assert found.normal.ceiling == pytest.approx(log(2))


def test_label_information_is_at_most_the_entropy_of_the_labels():
    images = pixels(200)
    labels = (images.flatten(1)[:, 0] > 0.8).long()
    plain = LABELS.normal(
        Subject(lambda x: Encoded(100 * headless(x).features, headless(x).answers), images, labels), 0
    )
    assert 0.8 * label_entropy(labels) < plain.nats <= plain.ceiling == label_entropy(labels)


def test_features_that_say_nothing_of_the_label_give_nothing():
    images = pixels(300)
    for labels in (torch.randint(0, 3, (300,), generator=seeded(3)), torch.zeros(300, dtype=torch.long)):
        found = LABELS.vulnerability(Subject(headless, images, labels), Linf(0.05), 0)
        assert found.normal.nats <= 2 * found.normal.stderr
        assert found.worst.nats <= found.normal.nats
    assert found.nats == 0  # one class


def test_a_network_that_reads_no_label_is_worse_off_under_attack():
    images = pixels(300)
    labels = (images.flatten(1)[:, 0] > 0.5).long()
    weak, strong = (LABELS.vulnerability(Subject(headless, images, labels), Linf(eps), 0) for eps in (0.02, 0.2))
    assert weak.normal == strong.normal
    assert strong.worst.nats < weak.worst.nats < weak.normal.nats


def test_the_own_answer_is_attacked_where_there_is_one():
    images = pixels(200)
    labels = (images.flatten(1)[:, 0] > 0.5).long()
    quick = replace(LABELS, steps=3, probes=ProbeTraining(folds=2, hidden=4, steps=20))
    own = answering(lambda values: torch.stack([0.5 - values[:, 0], values[:, 0] - 0.5], 1))
    with_head = quick.vulnerability(Subject(own, images, labels), Linf(0.1), 0)
    without = quick.vulnerability(Subject(headless, images, labels), Linf(0.1), 0)
    assert with_head.passes - without.passes == 2 * (3 + 0.5) * 200  # two more attacks, each with its reading
