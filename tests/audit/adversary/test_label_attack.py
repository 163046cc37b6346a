import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audit.adversary.label_attack import cross_entropy_objective, margin, margin_objective
from audit.adversary.pgd import PGD, minimise, shrinking_ball_search
from audit.adversary.threat import L1, L2, Linf
from audit.random_keys import keyed_generator
from audit.types import ObjectiveValue
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import load_model


def test_margins_of_known_logits():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0, 1, 0])).tolist() == [1, -2, 0]


def test_the_margin_is_positive_exactly_where_the_class_is_the_single_largest():
    logits = torch.randint(0, 4, (500, 4), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(500) % 4
    largest = logits == logits.amax(1, keepdim=True)
    alone = largest[torch.arange(500), labels] & (largest.sum(1) == 1)
    assert torch.equal(margin(logits, labels) > 0, alone)


@pytest.mark.parametrize("make", [cross_entropy_objective, margin_objective])
@pytest.mark.parametrize(
    ("logits", "done"),
    [([2.0, 1.0], False), ([1.0, 2.0], True), ([1.0, 1.0], True), ([torch.nan, 1.0], True), ([1.0, torch.inf], True)],
)
def test_misclassified_images_are_done(make, logits, done):
    network = nn.Flatten()
    judged = make(network, torch.tensor([0]))(torch.tensor(logits).view(1, 1, 1, 2), torch.tensor([0]))
    assert judged.done.tolist() == [done]


def test_objectives_look_up_labels_by_index():
    images = torch.rand(4, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    index = torch.tensor([3, 1])
    logits = images[index].flatten(1)
    found = margin_objective(nn.Flatten(), labels)(images[index], index)
    torch.testing.assert_close(found.value, margin(logits, labels[index]))
    found = cross_entropy_objective(nn.Flatten(), labels)(images[index], index)
    torch.testing.assert_close(found.value, -F.cross_entropy(logits, labels[index], reduction="none"))


def test_the_margin_keeps_a_gradient_where_cross_entropy_saturates():
    images = torch.tensor([[300.0, 0.0]]).view(1, 1, 1, 2)
    gradients = []
    for make in (cross_entropy_objective, margin_objective):
        leaf = images.clone().requires_grad_()
        value = make(nn.Flatten(), torch.tensor([0]))(leaf, torch.tensor([0])).value
        gradients.append(float(torch.autograd.grad(value.sum(), leaf)[0].abs().max()))
    assert gradients == [0, 1]


def waves(images, index):
    """An objective with many local minima, different for each image."""
    value = torch.sin(9 * images.flatten(1) + index[:, None]).sum(1)
    return ObjectiveValue(value, value.detach() < -16)


IMAGES = torch.rand(30, 1, 8, 8, generator=keyed_generator(1))


@pytest.mark.parametrize(
    ("threat", "pgd"),
    [(Linf(0.1), PGD(20)), (L2(0.5), PGD(20, restarts=2)), (L1(1.0), PGD(9)), (L1(1.0), PGD(1, 1.0, False))],
)
def test_other_norms_and_short_searches_equal_minimise(threat, pgd):
    ours, plain = (run(waves, IMAGES, threat, pgd, keyed_generator(2)) for run in (shrinking_ball_search, minimise))
    assert torch.equal(ours.images, plain.images)
    assert ours.passes == plain.passes


@pytest.mark.parametrize("random_start", [False, True])
def test_l1_results_are_legal_no_worse_than_clean_and_independent_of_the_batch_size(random_start):
    threat, everyone = L1(2.0), torch.arange(30)
    runs = []
    for batch_size in (1, 7, 64):
        pgd = PGD(20, 0.15, random_start, restarts=3, batch_size=batch_size)
        runs.append(shrinking_ball_search(waves, IMAGES, threat, pgd, keyed_generator(3)))
    first = runs[0]
    assert all(torch.equal(first.done, run.done) and torch.equal(first.step, run.step) for run in runs)
    torch.testing.assert_close(runs[2].images, first.images, atol=1e-5, rtol=0)
    assert (threat.distance(first.images, IMAGES) <= 2 + 1e-6).all()
    assert 0 <= float(first.images.min()) <= float(first.images.max()) <= 1
    assert (first.value <= waves(IMAGES, everyone).value).all()
    torch.testing.assert_close(waves(first.images, everyone).value, first.value)
    assert 0 < int(first.done.sum()) < 30
    assert first.passes <= 30 * 20 * 3
    assert int(first.step.max()) > 21  # restarts find further images
    assert int(first.step.max()) <= 3 * 21


def test_wider_balls_break_more_small_images():
    found = load_images("digits", ImageRequest(count=40))
    objective = margin_objective(load_model("bundled:digits-vgg-robust").network, found.labels)
    pgd = PGD(20, 0.15, restarts=2)
    ours, plain = (
        run(objective, found.images, L1(1.0), pgd, keyed_generator(0)) for run in (shrinking_ball_search, minimise)
    )
    assert int(ours.done.sum()) >= int(plain.done.sum()) + 2
    assert len(shrinking_ball_search(objective, found.images[:0], L1(1.0), pgd, keyed_generator(0)).done) == 0
