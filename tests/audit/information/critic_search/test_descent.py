"""Worst cases known in closed form, legal steps, stopping rules, and rejected networks."""

from dataclasses import replace
from itertools import pairwise
from math import hypot, log

import pytest
import torch
from torch import nn

from audit.adversary.threat import L1, L2, Linf
from audit.errors import InvalidModelError, UsageError
from audit.information import critic_training
from audit.information.bounds import BOUNDS
from audit.information.critic_search import descent, opponents
from audit.information.critic_search.descent import estimate_vulnerability
from audit.information.critic_search.merging import Adversary
from audit.information.critic_search.opponents import shuffled_batches
from audit.information.encoding import split_images
from audit.information.estimator import MIEstimate, WarmStart
from audit.information.settings import CriticTraining, WorstCaseSearch
from audit.representation.layers import Representation
from audit.types import Encoded

UNIT = 0.04  # of the mean pixel, which lies in [.3, .7]
LIGHT = CriticTraining(steps=200, patience=60)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def entropy(p):
    return 0.0 if p in (0, 1) else -p * log(p) - (1 - p) * log(1 - p)


def painted(values, seed=0, size=8):
    """Noise images with the mean pixel .5 + values."""
    noise = 0.05 * torch.randn(len(values), size * size, generator=seeded(seed))
    return (0.5 + values[:, None] + noise - noise.mean(1, keepdim=True)).view(-1, 1, size, size)


def mixture(count=1000, mu=1.0, s=1.0):
    """Mixture of two Gaussians at +-mu with deviation s along the mean pixel, in units."""
    draws = seeded(1)
    side = torch.randint(0, 2, (count,), generator=draws) * 2.0 - 1
    return painted(UNIT * (mu * side + s * torch.randn(count, generator=draws)))


def sign_network(steepness, head=True):
    """g = tanh(steepness * (mean pixel - 1/2)), with the logits of its sign if there is a head."""

    def encoder(images):
        lead = steepness * (images.flatten(1).mean(1) - 0.5)
        log_probs = torch.stack([lead, -lead], 1).log_softmax(1) if head else images.new_empty(len(images), 0)
        return Encoded(lead.tanh()[:, None], log_probs)

    return encoder


def searched(encoder, images, threat, training=LIGHT, seed=0, **search):
    adversary = Adversary(threat, WorstCaseSearch(**{"rounds": 40, "every": 10, "repeats": 1, **search}))
    return estimate_vulnerability(encoder, split_images(images, seed), training, adversary, seed)


def normal_cdf(x):
    return float(torch.special.ndtr(torch.tensor(x)))


def mixture_truth(e):
    return entropy((normal_cdf(1 - e) + normal_cdf(-1 - e)) / 2)


@pytest.mark.parametrize("e", [1.0, 2.0])
def test_gaussian_mixture(e):
    """I = ln 2, I_worst = H2(p_min): .5745 at e = 1, .2788 at e = 2.

    Measured, two seeds, default training: at 1,000 images (300 held out) .54 and .65 at e = 1, .22 and .31 at e = 2;
    at 2,000 images .62 and .64, .30 and .31; standard error .03 to .05. The network is steep but continuous: images
    near its edge carry slightly more than their sign, so the normal case is .57 to .87.
    """
    images = mixture()
    found = searched(sign_network(500.0), images, Linf(e * UNIT))
    assert found.normal.nats == pytest.approx(log(2), abs=0.15)
    assert found.worst.nats == pytest.approx(mixture_truth(e), abs=3 * found.worst.stderr + 0.03)
    assert found.nats > (0.0 if e == 1 else 0.25)
    # floor: the share of held-out images that no perturbation moves to the other side
    means = split_images(images, 0).test.flatten(1).mean(1) - 0.5
    stuck = min(float((means > e * UNIT).double().mean()), float((means < -e * UNIT).double().mean()))
    assert found.worst.parts["labels"] >= entropy(stuck) - 1e-6


def test_gaussian_mixture_without_log_probs():
    # the minimum is .2788; without log-probabilities there is no entropy floor, and the critic may underestimate
    found = searched(sign_network(500.0, head=False), mixture(), Linf(2 * UNIT), seed=1)
    assert found.worst.nats > mixture_truth(2.0) - 3 * found.worst.stderr - 0.03


@pytest.mark.parametrize(("threat", "reach"), [(L2(8 * UNIT), 1.0), (L1(64 * UNIT), 1.0)])
def test_gaussian_mixture_in_other_norms(threat, reach):
    # the mean of 64 pixels moves by eps / 8 under l2 and by eps / 64 under l1
    found = searched(sign_network(500.0), mixture(700), threat, relative_step=0.2)
    truth = entropy((normal_cdf(1 - reach) + normal_cdf(-1 - reach)) / 2)
    assert found.worst.nats > truth - 3 * found.worst.stderr - 0.03
    assert found.worst.nats < log(2) - 0.03


NOT_MERGED = pytest.mark.xfail(
    strict=True, reason="moved to one class, the two points keep their distance in the feature"
)


@pytest.mark.parametrize(
    ("e", "head", "truth"),
    [
        (0.4, True, log(2)),
        (0.4, False, log(2)),
        (1.1, False, 0.0),
        # measured .68 at 1.1, .77 at 1.25, .52 at 1.5: both points move in the same direction and never meet
        pytest.param(1.1, True, 0.0, marks=NOT_MERGED),
    ],
)
def test_two_points_are_merged_or_not(e, head, truth):
    """Means .42 and .58: RV is 0 if eps is less than half their distance, else ln 2."""
    side = torch.randint(0, 2, (300,), generator=seeded(2)) * 2.0 - 1
    found = searched(sign_network(100.0, head), painted(2 * UNIT * side), Linf(2 * e * UNIT))
    assert found.normal.nats == pytest.approx(log(2), abs=0.05)
    assert found.worst.nats == pytest.approx(truth, abs=0.05)


def test_constant_representation_is_not_vulnerable():
    def encoder(images):
        return Encoded(0 * images.flatten(1)[:, :2] + 3, images.new_empty(len(images), 0))

    found = searched(encoder, mixture(200), Linf(0.1), rounds=3, collapse_steps=3)
    assert abs(found.normal.nats) < 1e-3
    assert abs(found.nats) < 1e-3


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))

    def forward(self, images):
        return 5 * self.layers(images)


@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.6), L1(3.0)])
@pytest.mark.parametrize("bound", sorted(BOUNDS))
def test_every_iterate_is_legal(threat, bound):
    images = torch.rand(60, 1, 8, 8, generator=seeded()).round(decimals=1)  # many pixels at 0 and 1
    splits = split_images(images, 0)
    seen, made = [], []
    represented = Representation(SmallNet().requires_grad_(False), "logits").encode

    def encoder(batch):
        seen.append(batch.detach().clone())
        made.append(len(batch) * (1.0 if batch.requires_grad else 0.5))
        return represented(batch)

    training = CriticTraining(bound=bound, steps=10, batch_size=16)
    adversary = Adversary(threat, WorstCaseSearch(collapse_steps=3, rounds=6, critic_steps=1, relative_step=0.9))
    found = estimate_vulnerability(encoder, splits, training, adversary, 0)
    everything = torch.cat(seen)
    assert 0 <= float(everything.min()) <= float(everything.max()) <= 1
    nearest = torch.stack([threat.distance(everything, clean.expand_as(everything)) for clean in images]).amin(0)
    assert float(nearest.max()) <= threat.eps + 1e-6
    assert float(nearest.max()) > 0.9 * threat.eps  # the search uses the whole ball
    assert float(threat.distance(found.adversarial, splits.test).max()) <= threat.eps + 1e-6
    assert found.passes == sum(made)


def test_batches_are_complete_and_hold_at_least_two_images():
    for count in range(2, 60):
        for size in (2, 3, 4, 7, 64):
            batches = shuffled_batches(torch.zeros(count, 1), size, seeded())
            assert sorted(torch.cat(batches).tolist()) == list(range(count))
            assert all(2 <= len(batch) <= size + size // 2 for batch in batches)


def test_odd_number_of_images_in_batches_of_two():
    training = CriticTraining(bound="donsker-varadhan", batch_size=2, steps=5)
    images = mixture(55)
    assert split_images(images, 0).validation.shape[0] == 11
    found = searched(sign_network(100.0), images, Linf(0.02), training, rounds=2, collapse_steps=1)
    assert found.worst.validated <= found.normal.validated


def test_worst_case_does_not_increase_with_eps():
    encoder, images = sign_network(500.0), mixture(400)
    found = [searched(encoder, images, Linf(e * UNIT)) for e in (0.0, 1.0, 3.0)]
    for near, far in pairwise(found):
        assert far.worst.nats <= near.worst.nats + 2 * hypot(near.worst.stderr, far.worst.stderr)
    assert found[0].nats == 0
    assert found[-1].nats > 0.5


@pytest.mark.parametrize("head", [True, False])
def test_rejects_a_layer_without_gradient(head):
    def encoder(images):
        features = images.detach().flatten(1)[:, :2]
        return Encoded(features, features.log_softmax(1) if head else features[:, :0])

    with pytest.raises(InvalidModelError, match="gives no gradient to its input"):
        searched(encoder, mixture(60), Linf(0.1), CriticTraining(steps=1))


def test_rejects_a_gradient_that_is_not_finite():
    def encoder(images):
        features = (images.flatten(1) - images.flatten(1)).square().sum(1, keepdim=True).sqrt()  # 0, slope NaN
        return Encoded(features, images.new_empty(len(images), 0))

    with pytest.raises(InvalidModelError, match="the gradient to the input is not finite for 30 of 30 images"):
        searched(encoder, mixture(60), Linf(0.1), CriticTraining(steps=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "search rounds 0 must be at least 1"),
        ({"critic_steps": 0}, "search critic_steps 0 must be at least 1"),
        ({"collapse_steps": -1}, "search collapse_steps -1 must be at least 1"),
        ({"mixing_steps": 0}, "search mixing_steps 0 must be at least 1"),
        ({"memory": 0}, "search memory 0 must be at least 1"),
        ({"gain": -0.1}, "search gain -0.1 must be at least 0"),
        ({"relative_step": 0.0}, r"search relative_step 0.0 is outside \(0, 2\]"),
        ({"relative_step": 2.1}, r"search relative_step 2.1 is outside"),
        ({"relative_step": float("nan")}, "search relative_step nan is outside"),
    ],
)
def test_rejects_illegal_settings(change, message):
    with pytest.raises(UsageError, match=message):
        WorstCaseSearch(**change)


def test_search_stops_when_no_more_than_the_tolerance_is_left():
    images = torch.rand(80, 1, 2, 2, generator=seeded(3))

    def encoder(batch):  # without log-probabilities, only the critic estimates
        return Encoded(4 * batch.flatten(1), batch.flatten(1)[:, :0])

    def passes(**settings):
        search = WorstCaseSearch(collapse_steps=2, mixing_steps=3, rounds=8, every=2, critic_steps=1, **settings)
        adversary, training = Adversary(Linf(0.05), search), replace(LIGHT, steps=30)
        return estimate_vulnerability(encoder, split_images(images, 0), training, adversary, 0).passes / 80

    # merging steps and rounds; forward passes count as half: clean and merged images, the start of mixing and of the
    # game, each new critic, the result of each cycle
    encoded = 0.5 * 0.5  # the training half, for the mean of the features
    assert passes(tolerance=100.0) == 2 + 0.5 * 2 + encoded  # the value is already below the tolerance
    cycles = 2  # of two rounds and one critic each: the second one tells that doubling brings little
    assert passes(tolerance=0.0, gain=100.0) == 2 + 3 + 2 * cycles + 0.5 * (4 + cycles + cycles) + encoded


@pytest.mark.parametrize(
    ("values", "rounds", "flagged"),
    [
        ((2.0, 1.0, 0.99), 4, False),  # the second cycle brought little
        ((2.0, 1.0, 0.5, 0.48), 8, False),
        ((2.0, 1.0, 0.5, 0.1), 8, True),
        ((2.0, 1.0, 0.5, 0.01), 8, False),  # nothing is left
        ((2.0, 1.0, 1.5), 4, False),
    ],
)
def test_search_ends_when_twice_the_rounds_bring_little(monkeypatch, values, rounds, flagged):
    left, played = iter(values), []
    play = opponents.CriticGame.play

    def estimated(search, images):
        return MIEstimate(value := next(left), 0.01, len(images.test), 3.0, value)

    def counted(game, start, number):
        played.append(number)
        return play(game, start, number)

    monkeypatch.setattr(descent._WorstCase, "estimate", estimated)
    monkeypatch.setattr(opponents.CriticGame, "play", counted)
    normal = MIEstimate(3.0, 0.01, 18, 3.0, 3.0)
    search = WorstCaseSearch(collapse_steps=1, mixing_steps=1, rounds=8, every=1, critic_steps=1)
    images, training = split_images(mixture(60), 0), replace(LIGHT, steps=10)
    adversary = Adversary(Linf(0.02), search)
    found = estimate_vulnerability(sign_network(100.0), images, training, adversary, 0, WarmStart(normal))
    assert sum(played) == rounds
    assert found.worst.validated == min(values)
    assert any(each.startswith("search_not_converged") for each in found.worst.flags) == flagged


def test_critics_of_the_search_take_turns_and_give_no_reported_value(monkeypatch):
    numbers, left = [], iter((9.0, 9.0, 9.0, 9.0, 3.0, 2.0, 2.0, 0.1, 1.0, 1.0))
    fit = critic_training.fit_division

    def planted(images, encoded, training, seed, number):
        critic, estimate = fit(images, encoded, training, seed, number)
        numbers.append(number)
        return critic, replace(estimate, validated=next(left))

    monkeypatch.setattr(opponents, "fit_division", planted)
    monkeypatch.setattr(critic_training, "fit_division", planted)
    search = WorstCaseSearch(collapse_steps=1, rounds=6, every=2, critic_steps=1, repeats=2, tolerance=0.2)
    images, training = split_images(mixture(60), 0), replace(LIGHT, steps=10)
    found = estimate_vulnerability(sign_network(100.0), images, training, Adversary(Linf(0.02), search), 0)
    # clean and merged images, and the results of two cycles, each after one critic; the second finds nothing left
    assert numbers == [0, 1, 0, 1, 2, 0, 1, 3, 0, 1]
    assert found.worst.validated == 1.0
    assert found.worst.images == len(images.test)
