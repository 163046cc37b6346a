"""Laws of searches: closed forms on linear objectives, never worse than clean, independent of the batch size."""

import pytest
import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import AUDIT
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import THREATS, Linf, threat_model
from audit.types import ObjectiveValue

NORMS = pytest.mark.parametrize("norm", sorted(THREATS))
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight):
    def objective(images, index):
        return ObjectiveValue((images * weight).flatten(1).sum(1), torch.zeros(len(images), dtype=torch.bool))

    return objective


@NORMS
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize(("random_start", "share"), [(False, 1e-4), (True, 0.05)])
def test_pgd_on_a_linear_objective_equals_the_closed_form(norm, shape, random_start, share):
    weight = torch.randn(shape, generator=seeded())
    clean = 0.4 + 0.2 * torch.rand(4, *shape, generator=seeded(1))  # far from the pixel range
    threat = threat_model(norm, 8 / 255 if norm == "linf" else 0.25)
    objective = linear(weight)
    found = minimise(objective, clean, threat, PGD(10, 0.25, random_start), seeded(2))
    gain = objective(clean, torch.arange(4)).value - found.value
    wanted = threat.eps * torch.linalg.vector_norm(weight.flatten(), DUAL[norm])
    torch.testing.assert_close(gain, wanted.expand(4), rtol=share, atol=0)


def test_pgd_with_the_pixel_range_active_equals_the_closed_form():
    weight = torch.randn(3, 8, 8, generator=seeded())
    clean = torch.rand(6, 3, 8, 8, generator=seeded(1)).round(decimals=1)  # many pixels at 0 and 1
    found = minimise(linear(weight), clean, Linf(0.2), PGD(10, 0.25), seeded(2))
    torch.testing.assert_close(found.images, (clean - 0.2 * weight.sign()).clamp(0, 1), atol=1e-6, rtol=0)


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))

    def forward(self, images):
        return self.layers(images)


def wavy(images, index):
    """An objective with many local minima, of a different phase for every image."""
    value = (torch.sin(20 * images.flatten(1) + index[:, None])).sum(1)
    return ObjectiveValue(value, value.detach() < -8)


@NORMS
def test_never_worse_than_clean_and_always_legal(norm):
    clean, threat = torch.rand(40, 1, 8, 8, generator=seeded()), threat_model(norm, 0.1)
    for pgd in (PGD(1, 2.0), PGD(7, 0.5, False), PGD(3, 1.0, restarts=3)):
        found = minimise(wavy, clean, threat, pgd, seeded(3))
        before = wavy(clean, torch.arange(40)).value
        assert (found.done | (found.value <= before)).all()
        assert (threat.distance(found.images, clean) <= 0.1 + 1e-6).all()
        assert found.images.min() >= 0
        assert found.images.max() <= 1
        # reported values are those of the returned images
        torch.testing.assert_close(wavy(found.images, torch.arange(40)).value, found.value)
        assert found.passes <= 40 * pgd.steps * pgd.restarts


@NORMS
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_results_are_independent_of_the_batch_size(norm, batch_size):
    threat = threat_model(norm, 0.01 if norm == "linf" else 0.1)
    clean = torch.rand(30, 1, 8, 8, generator=seeded())
    wanted = minimise(wavy, clean, threat, PGD(6, 0.4, restarts=2), seeded(3))
    found = minimise(wavy, clean, threat, PGD(6, 0.4, restarts=2, batch_size=batch_size), seeded(3))
    assert 0 < int(wanted.done.sum()) < 30
    assert torch.equal(found.done, wanted.done)
    assert found.passes == wanted.passes
    torch.testing.assert_close(found.images, wanted.images, atol=1e-5, rtol=0)


def test_images_dropped_early_do_not_change_the_others():
    clean = torch.rand(20, 1, 8, 8, generator=seeded())

    def judged(done):
        return lambda images, index: ObjectiveValue(wavy(images, index).value, done[index])

    nobody = torch.zeros(20, dtype=torch.bool)
    some = nobody.clone()
    some[::3] = True
    full = minimise(judged(nobody), clean, Linf(0.1), PGD(5, 0.4, restarts=2), seeded(3))
    dropped = minimise(judged(some), clean, Linf(0.1), PGD(5, 0.4, restarts=2), seeded(3))
    assert torch.equal(dropped.images[~some], full.images[~some])
    assert torch.equal(dropped.images[some], clean[some])
    assert dropped.passes == full.passes * 13 // 20


class LinearOracle(nn.Module):
    """Two classes separated by a plane, with a known distance from an image in every norm."""

    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=seeded()))
        self.bias = nn.Parameter(-(self.weight.detach() * 0.5).sum())

    def forward(self, images):
        score = (images * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([score, -score], 1)

    def distance(self, images, norm):
        dual = torch.linalg.vector_norm(self.weight.detach().flatten(), DUAL[norm])
        return self(images).detach()[:, 0].abs() / dual


@NORMS
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_attacks_reach_the_boundary_within_a_quarter_and_never_undercut_it(norm, shape):
    oracle = LinearOracle(shape)
    clean = 0.45 + 0.1 * torch.rand(12, *shape, generator=seeded(1))
    # move every image to the same distance from the plane, on its own side
    score = oracle(clean).detach()[:, 0]
    wanted = score.sign() * 0.02 * oracle.weight.detach().pow(2).sum().sqrt()
    shift = ((wanted - score) / oracle.weight.detach().pow(2).sum()).view(-1, 1, 1, 1)
    clean = clean + shift * oracle.weight.detach()
    labels = (score < 0).long()
    distance = oracle.distance(clean, norm)
    nearest, farthest = float(distance.min()), float(distance.max())
    reached = measure_accuracy(oracle, clean, labels, threat_model(norm, 1.25 * farthest), AUDIT, 0)
    assert reached.natural.value == 1
    assert reached.adversarial.value == 0
    robust = measure_accuracy(oracle, clean, labels, threat_model(norm, 0.99 * nearest), AUDIT, 0)
    assert robust.adversarial.value == 1


@NORMS
def test_measuring_changes_neither_gradients_nor_the_global_generator(norm):
    network, images = SmallNet(), torch.rand(10, 1, 8, 8, generator=seeded())
    labels = network(images).argmax(1)
    before = torch.random.get_rng_state()
    measure_accuracy(network, images, labels, threat_model(norm, 0.5), AUDIT, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


@NORMS
def test_adversarial_accuracy_never_rises_with_eps_and_starts_at_clean_accuracy(norm):
    network, images = SmallNet(), torch.rand(30, 1, 8, 8, generator=seeded())
    labels = network(images).argmax(1)
    labels[:6] = (labels[:6] + 1) % 3
    radii = [0.0, 0.01, 0.1, 1.0] if norm == "linf" else [0.0, 0.1, 1.0, 10.0]
    results = [measure_accuracy(network, images, labels, threat_model(norm, e), AUDIT, 0) for e in radii]
    assert results[0].adversarial == results[0].natural
    assert results[0].passes == 0
    values = [r.adversarial.value for r in results]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    # misclassified clean images are never robust
    assert not any(r.robust[:6].any() for r in results)
    assert all(r.natural.value == 0.8 for r in results)
