"""Randomised networks: attacked through the mean over draws, and evaluated by the majority vote."""

import pytest
import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy, measure_randomised
from audit.adversary.label_attack import LabelAttack, Stage, margin, margin_objective
from audit.adversary.passes import DRAWS, MajorityVote, MeanOfDraws, seeded_noise
from audit.adversary.pgd import PGD, minimise, without_early_stopping
from audit.adversary.robustness import TargetModel, evaluate_robustness
from audit.adversary.threat import L2, Linf, threat_model
from audit.errors import InvalidModelError
from audit.random_keys import keyed_generator

SEARCH = PGD(8, 0.25, random_start=False)
ATTACK = LabelAttack((Stage("margin", SEARCH),), noise=2, queries=300)


class Plane(nn.Module):
    """Two classes separated by a plane, with random weights of standard deviation `noise` in every pass."""

    def __init__(self, noise=0.0, classes=2):
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.randn(100, classes, generator=keyed_generator(1)))
        self.passes = 0

    def forward(self, images):
        self.passes += len(images)
        weight = self.weight + self.noise * torch.randn_like(self.weight) if self.noise else self.weight
        return (images.flatten(1) - 0.5) @ weight


def data(count=40):
    """Images whose distance to the plane is 0.1 in l2."""
    weight = Plane().weight.detach()
    slope = (weight[:, 0] - weight[:, 1]) / (weight[:, 0] - weight[:, 1]).norm()
    images = torch.full((count, 100), 0.5) + 0.002 * torch.randn(count, 100, generator=keyed_generator(2))
    sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
    images += ((0.1 * sign) - (images - 0.5) @ slope)[:, None] * slope
    return images.view(count, 1, 10, 10), (sign < 0).long()


def test_the_mean_over_draws_breaks_more_than_single_draws():
    network, (images, labels) = Plane(noise=10.0), data()
    threat = L2(0.13)
    with seeded_noise(images.device, 0):
        objective = without_early_stopping(margin_objective(network, labels))
        single = minimise(objective, images, threat, SEARCH, keyed_generator(0)).images
    plain = Plane()
    robust = margin(plain(single), labels) > 0  # for the mean weights
    with seeded_noise(images.device, 0):
        objective = without_early_stopping(margin_objective(MeanOfDraws(network), labels))
        averaged = minimise(objective, images, threat, SEARCH, keyed_generator(0)).images
    left = margin(plain(averaged), labels) > 0
    assert int(left.sum()) < int(robust.sum()) - 5


def test_the_majority_vote_classifies_images_that_single_draws_do_not():
    network, (images, labels) = Plane(noise=6.0), data()
    found = measure_randomised(network, images, labels, L2(0.05), ATTACK, 0)
    assert found.natural.value == 1  # single draws misclassify some images
    with seeded_noise(images.device, 0):
        singles = torch.stack([margin(network(images), labels) > 0 for _ in range(20)])
    assert not singles.all()
    assert measure_randomised(network, images, labels, L2(0.3), ATTACK, 0).adversarial.value == 0


def test_votes_are_counted_and_nan_outputs_are_refused():
    votes = MajorityVote(Plane())(data()[0])
    assert set(votes.unique().tolist()) == {0.0, 20.0}
    images = data()[0]
    images[0] = torch.nan
    with pytest.raises(InvalidModelError, match="not finite for 1 of 40 images"):
        measure_randomised(Plane(), images, data()[1], L2(0.1), ATTACK, 0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("l2", 0.12), ("l1", 0.5)])
def test_results_depend_on_the_seed_only_and_the_process_is_unchanged(norm, eps):
    network, (images, labels) = Plane(noise=1.0), data(12)
    before = torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        network.passes = 0
        runs.append(evaluate_robustness(TargetModel(network, images, labels), threat_model(norm, eps), ATTACK, 0))
        torch.testing.assert_close(torch.random.get_rng_state(), before)
    assert runs[0].checks == runs[1].checks
    assert torch.equal(runs[0].accuracy.robust, runs[1].accuracy.robust)
    assert not runs[0].trustworthy
    assert runs[0].accuracy.passes % DRAWS == runs[0].accuracy.forwards % DRAWS == 0
    assert network.weight.grad is None


def test_a_deterministic_network_takes_no_additional_passes():
    network, (images, labels) = Plane(), data()
    target = TargetModel(network, images, labels)
    found = evaluate_robustness(target, Linf(0.008), ATTACK, 0)
    plain = measure_accuracy(network, images, labels, Linf(0.008), ATTACK, 0)
    assert torch.equal(found.accuracy.robust, plain.robust)
    assert torch.equal(found.accuracy.outcome.images, plain.outcome.images)
    assert (found.accuracy.passes, found.accuracy.forwards) == (plain.passes, plain.forwards)
    assert found.trustworthy
