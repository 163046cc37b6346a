"""Walks along the decision boundary and sparse descents, against closed forms and where other searches fail."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import AUDIT, BoundaryStage, LabelAttack, margin_objective
from audit.adversary.pgd import PGD
from audit.adversary.thorough.boundary import boundary_walk, nearest_on_plane, noisy_start
from audit.adversary.thorough.sparse import sparse_descent
from audit.adversary.threat import L1, L2, threat_model
from audit.random_keys import keyed_generator
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import load_model


def box_distance(image, weights, bias, power):
    """The distance in the box [0, 1] from an image to the plane <weights, x> + bias = 0, below it, in plain NumPy."""
    w, x = -np.asarray(weights, np.float64).ravel(), np.asarray(image, np.float64).ravel()
    room, missing = np.where(w > 0, 1 - x, x), float(-w @ x + bias)
    if power == 1:
        order = np.argsort(-np.abs(w))
        gains = np.abs(w[order]) * room[order]
        whole = int((gains.cumsum() < missing).sum())
        return float(room[order][:whole].sum() + (missing - gains[:whole].sum()) / np.abs(w[order][whole]))
    low, high = 0.0, 1e9
    for _ in range(300):
        middle = (low + high) / 2
        short = (np.abs(w) * np.minimum(middle * np.abs(w), room)).sum() < missing
        low, high = (middle, high) if short else (low, middle)
    return float(np.linalg.norm(np.minimum(high * np.abs(w), room)))


class Linear(nn.Module):
    """Two classes; the margin of class 0 is <weights, x> + bias."""

    def __init__(self, weights, bias):
        super().__init__()
        self.weights, self.bias = weights, bias

    def forward(self, images):
        margin = (images * self.weights).flatten(1).sum(1) + self.bias
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def linear(seed, kind="normal"):
    generator = torch.Generator().manual_seed(seed)
    weights, images = torch.randn(1, 3, 6, 6, generator=generator), torch.rand(3, 3, 6, 6, generator=generator)
    if kind == "sparse":
        weights = weights * (torch.rand(weights.shape, generator=generator) < 0.2)
    if kind == "black":
        images = images * (images > 0.7)
    values = (images * weights).flatten(1).sum(1)
    return Linear(weights, 0.3 - float(values.min())), images


@pytest.mark.parametrize(("seed", "kind"), [(0, "normal"), (1, "sparse"), (2, "black")])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_nearest_points_on_planes(seed, kind, scale):
    network, images = linear(seed, kind)
    values, gradients = network(images)[:, 0] * scale, scale * network.weights.expand(images.shape)
    found = nearest_on_plane(images, values, gradients, (0.0, 1.0))
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.allclose(network(found)[:, 0], torch.zeros(3), atol=1e-4)
    right = [box_distance(image, network.weights, network.bias, 2) for image in images]
    assert (found - images).flatten(1).norm(dim=1).tolist() == pytest.approx(right, rel=1e-3)
    # the plane has two sides, and from beyond it the nearest point is on the way back
    back = nearest_on_plane(images, -values, -gradients, (0.0, 1.0))
    torch.testing.assert_close(back, found)


def test_planes_outside_the_box_and_missing_gradients():
    images = torch.full((3, 1, 2, 2), 0.25)
    gradients = torch.tensor([[1.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).view(3, 1, 2, 2)
    found = nearest_on_plane(images, torch.tensor([100.0, 1.0, 0.0]), gradients, (0.0, 1.0))
    ends = torch.tensor([[0.0, 1.0, 0.25, 0.0], [0.25] * 4, [0.25] * 4]).view(3, 1, 2, 2)
    assert torch.equal(found, ends)


@pytest.mark.parametrize(("seed", "kind"), [(0, "normal"), (1, "sparse"), (2, "black")])
def test_a_walk_reaches_a_linear_boundary_at_its_distance(seed, kind):
    network, images = linear(seed, kind)
    objective = margin_objective(network, torch.zeros(3, dtype=torch.int64))
    start = noisy_start(images, L2(1.0), keyed_generator(seed))
    found = boundary_walk(objective, images, start, L2(1e-9), PGD(100))
    right = [box_distance(image, network.weights, network.bias, 2) for image in images]
    assert found.value.tolist() == pytest.approx(right, rel=0.02)
    assert (network(found.images)[:, 0] <= 0).all()
    assert (found.passes, found.forwards) == (300, 3)
    assert not found.done.any()
    # it stops at the first adversarial image in the ball
    ball = L2(max(right) * 1.3)
    short = boundary_walk(objective, images, start, ball, PGD(100))
    assert short.done.all()
    assert (ball.distance(short.images, images) <= ball.eps).all()
    assert short.passes < 300


@pytest.mark.parametrize(("seed", "kind"), [(0, "normal"), (1, "sparse"), (2, "black"), (4, "black"), (8, "normal")])
def test_a_sparse_descent_reaches_a_linear_boundary_at_its_distance(seed, kind):
    network, images = linear(seed, kind)
    objective = margin_objective(network, torch.zeros(3, dtype=torch.int64))
    for image in images:
        right = box_distance(image, network.weights, network.bias, 1)
        outcomes = []
        for share in (0.98, 1.02):
            ball = L1(share * right)
            found = sparse_descent(objective, image[None], image[None], ball, PGD(60))
            assert float(ball.distance(found.images, image[None])) <= ball.eps + 1e-6
            outcomes.append(bool(found.done))
        assert outcomes == [False, True]


class Behind(nn.Module):
    """A margin that falls towards a decoy, and is negative in the ball only behind a ridge in another direction.

    Directions are patterns of length one; the margin along the first rises from 0.5 to 1 at 0.4, and is -0.1 at 0.9.
    """

    def __init__(self, clean, pattern, decoy):
        super().__init__()
        self.clean, self.pattern, self.decoy = clean, pattern, decoy

    def forward(self, images):
        moved = (images - self.clean).flatten(1)
        ahead, aside = moved @ self.pattern, moved @ self.decoy
        margin = 0.5 + 1.25 * ahead.relu() - 3.45 * (ahead - 0.4).relu() - 0.3 * aside
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def behind(norm, seed):
    generator = torch.Generator().manual_seed(seed)
    size, places = 24 * 24, torch.randperm(24 * 24, generator=generator)
    pattern, decoy = torch.zeros(size), torch.zeros(size)
    if norm == "l1":
        pattern[places[0]] = decoy[places[1]] = 1.0
        return Behind(torch.zeros(1, 1, 24, 24), pattern, decoy)
    for direction, chosen in ((pattern, places[:256]), (decoy, places[256:512])):
        direction[chosen] = (torch.randint(0, 2, (256,), generator=generator) * 2.0 - 1.0) / 16
    return Behind(torch.full((1, 1, 24, 24), 0.5), pattern, decoy)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_images_behind_a_ridge_are_found_by_no_other_stage(norm, seed, monkeypatch):
    network = behind(norm, seed)
    place = (network.clean.clone(), torch.zeros(1, dtype=torch.int64), threat_model(norm, 1.0))
    # the adversarial image that exists
    adversarial = place[0] + 0.95 * network.pattern.view(place[0].shape)
    assert adversarial.min() >= 0
    assert network(adversarial).argmax(1).item() == 1
    found = measure_accuracy(network, *place, AUDIT, 0)
    assert not found.robust.any()
    assert found.names[int(found.outcome.stage)].endswith("-boundary")
    assert float(place[2].distance(found.outcome.images, place[0])) <= 1 + 1e-6
    assert network(found.outcome.images).argmax(1).item() == 1
    before = AUDIT.thorough_in(norm)[:-1]
    monkeypatch.setattr(LabelAttack, "thorough_in", lambda *_: before)
    assert measure_accuracy(network, *place, AUDIT, 0).robust.all()


@pytest.mark.parametrize("threat", [L2(1.2), L1(3.0)])
def test_the_stage_does_not_depend_on_the_batch_size(threat):
    digits = load_images("digits", ImageRequest(count=12))
    # in float64: a convolution rounds differently in other batches, and a walk magnifies the difference
    network, images = deepcopy(load_model("bundled:digits-vgg-robust").network).double(), digits.images.double()
    objective = margin_objective(network, digits.labels)
    clean, runs = images.clone(), []
    for batch_size in (5, 12):
        stage = BoundaryStage("margin", PGD(10, restarts=2, batch_size=batch_size))
        runs.append(stage.search(lambda _: objective, images, threat, keyed_generator(1)))
    one, other = runs
    torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-6)
    assert torch.equal(one.done, other.done)
    assert one.passes == other.passes
    assert torch.equal(images, clean)
    assert (threat.distance(one.images, clean) <= threat.eps + 1e-6).all()
    assert (network(one.images).argmax(1) != digits.labels)[one.done].all()
    assert one.done.any()


def test_a_margin_without_early_stopping_is_done_where_it_is_not_positive():
    network, images = linear(0)
    labels = torch.zeros(3, dtype=torch.int64)
    objective = margin_objective(network, labels)  # never done, as the objectives of randomised networks

    def unstopped(pixels, index):
        return objective(pixels, index)._replace(done=torch.zeros(len(pixels), dtype=torch.bool))

    found = BoundaryStage("margin", PGD(20, restarts=2)).search(
        lambda _: unstopped, images, L2(50.0), keyed_generator(3)
    )
    assert found.done.all()
    assert (network(found.images).argmax(1) == 1).all()
