"""The search for collisions, on layers where the possible collisions are known."""

from itertools import combinations
from math import inf

import pytest
import torch
from torch import nn

from audit.adversary.threat import Linf
from audit.certificate.collision_search import CollisionSearch, HubTarget, SearchEffort
from audit.certificate.collisions import concatenate
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.gauss_newton import BoxProblem, box_step
from audit.certificate.hubs_and_pairs import (
    candidate_pairs,
    choose_hub,
    collide_at_hubs,
    find_hubs,
    find_pairs,
    inverse_covariance,
)
from audit.errors import InvalidModelError
from audit.random_keys import keyed_generator

TOLERANCE = 1e-9
EVERY_PAIR = SearchEffort(neighbours=1000)


def drawn(*shape, low=0.3, high=0.7, key=0):
    return low + (high - low) * torch.rand(*shape, generator=keyed_generator(key))


def linear(weight):
    """Return the layer x -> W x of flattened images."""
    return DualPrecisionLayer(
        lambda images: images.flatten(1) @ weight.T, lambda images: images.flatten(1) @ weight.double().T
    )


def network(key=0):
    """Return the layer of a small ReLU network from 36 pixels to 4 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    return DualPrecisionLayer.of(net.eval().requires_grad_(False))


def found_pairs(collisions):
    return {tuple(sorted(pair)) for pair in collisions.members.view(-1, 2).tolist()}


def test_box_step_is_the_box_constrained_least_squares_solution():
    from scipy.optimize import lsq_linear

    generator = keyed_generator(3)
    jacobian = torch.randn(6, 3, 20, generator=generator).double()
    residual = torch.randn(6, 3, generator=generator).double() * torch.tensor([1, 1, 1, 3, 3, 3.0])[:, None]
    low, high = -drawn(6, 20, low=0, high=0.5).double(), drawn(6, 20, low=0, high=0.5, key=1).double()
    damping = torch.full((6,), 1e-2).double()
    step = box_step(BoxProblem(jacobian, residual, low, high, damping), rounds=40)
    for one in range(6):
        stacked = torch.cat([torch.eye(20).double() * damping[one].sqrt(), jacobian[one]])
        wanted = torch.cat([torch.zeros(20).double(), -residual[one]])
        bounds = (low[one].numpy(), high[one].numpy())
        best = lsq_linear(stacked.numpy(), wanted.numpy(), bounds=bounds, tol=1e-14).x
        assert torch.allclose(step[one], torch.from_numpy(best), atol=1e-6)
    assert bool(((step >= low) & (step <= high)).all())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_box_with_few_free_pixels_still_gives_a_descent_step(kind):
    """Twenty features on two free pixels: only the damping keeps the linear system from being singular."""
    jacobian = torch.randn(3, 20, 40, generator=keyed_generator(4)).to(kind)
    residual = torch.randn(3, 20, generator=keyed_generator(5)).to(kind)
    low, high = -torch.ones(3, 40, dtype=kind), torch.ones(3, 40, dtype=kind)
    low[:, 2:], high[:, 2:] = -1e-6, 1e-6
    step = box_step(BoxProblem(jacobian, residual, low, high, torch.full((3,), 1e-8, dtype=kind)))
    assert bool(((step >= low) & (step <= high)).all())
    left = residual + (jacobian @ step[:, :, None])[:, :, 0]
    assert bool((left.norm(dim=1) < residual.norm(dim=1)).all())


@pytest.mark.parametrize("eps", [0.01, 0.02, 0.05])
def test_images_of_a_linear_layer_collide_exactly_if_their_feature_intervals_overlap(eps):
    """Two features of disjoint pixels: a feature moves by at most eps |w|_1 on either side."""
    clean, labels = drawn(14, 1, 4, 4), torch.arange(14) % 3
    weight = torch.zeros(2, 16)
    weight[0, :8], weight[1, 8:] = drawn(8, low=-1, high=1, key=1), drawn(8, low=-1, high=1, key=2)
    search = CollisionSearch(linear(weight), clean, Linf(eps), EVERY_PAIR)
    at_hub = find_pairs(search, labels, torch.arange(14), TOLERANCE)
    values, reach = clean.flatten(1) @ weight.T, 2 * eps * weight.abs().sum(1)
    excess = {
        (i, j): float(((values[i] - values[j]).abs() / reach).max())
        for i, j in combinations(range(14), 2)
        if labels[i] != labels[j]
    }
    assert not [e for e in excess.values() if abs(e - 1) < 1e-4]  # no near ties
    possible = {pair for pair, e in excess.items() if e < 1}
    assert 0 < len(possible) < len(excess)
    assert found_pairs(at_hub) == possible


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.15])
def test_images_of_the_identity_collide_within_two_eps(eps):
    clean, labels = drawn(16, 1, 2, 2), torch.arange(16) % 2
    search = CollisionSearch(
        DualPrecisionLayer(lambda x: x.flatten(1), lambda x: x.flatten(1)), clean, Linf(eps), EVERY_PAIR
    )
    distance = torch.cdist(clean.flatten(1), clean.flatten(1), p=float("inf"))
    assert bool(((distance - 2 * eps).abs() > 1e-5).all())
    possible = {(i, j) for i, j in combinations(range(16), 2) if labels[i] != labels[j] and distance[i, j] <= 2 * eps}
    assert possible
    assert found_pairs(find_pairs(search, labels, torch.arange(16), TOLERANCE)) == possible


def test_a_hub_of_a_linear_layer_is_reached_by_all_images_within_reach():
    clean, weight = drawn(40, 1, 3, 3), drawn(1, 9, low=-1, high=1, key=1)
    values, target = (clean.flatten(1) @ weight.T)[:, 0].double(), torch.tensor([0.1]).double()
    reach = 0.1 * float(weight.abs().sum())
    assert not bool((((values - target).abs() / reach - 1).abs() < 1e-4).any())
    search = CollisionSearch(linear(weight), clean, Linf(0.1))
    at_hub = collide_at_hubs(search, [HubTarget(target, torch.eye(1))], TOLERANCE)
    assert set(at_hub.members.tolist()) == set(((values - target).abs() <= reach).nonzero().flatten().tolist())
    assert 0 < len(at_hub.members) < 40


def test_collisions_are_inside_their_balls_and_equal_to_the_last_digits():
    layer, clean, labels = network(), drawn(24, 1, 6, 6, low=0, high=1), torch.arange(24) % 4
    search = CollisionSearch(layer, clean, Linf(0.1), SearchEffort(hubs=1, neighbours=4))
    _, at_hub = find_hubs(search, TOLERANCE, seed=0)
    left = torch.tensor([i for i in range(24) if i not in at_hub.members])
    pairs = find_pairs(search, labels, left, TOLERANCE)
    assert len(at_hub.members) >= 8
    assert len(pairs.members) > 0
    both = concatenate([at_hub, pairs])
    assert len(both.targets) == 1 + len(pairs.members) // 2
    distance = (layer.precise(both.moved) - both.targets[both.at]).norm(dim=1)
    assert float(distance.max()) <= 1e-11 * search.scale
    # strictly, in float64
    assert bool((Linf(0.1).distance(both.moved, clean[both.members].double()) <= 0.1).all())
    assert bool(((both.moved >= 0) & (both.moved <= 1)).all())
    # no image is both at the hub and in a pair, and no pair is of one class
    assert not set(at_hub.members.tolist()) & set(pairs.members.tolist())
    assert all(labels[i] != labels[j] for i, j in found_pairs(pairs))


def test_the_search_of_an_image_does_not_depend_on_its_batch():
    layer, clean = network(), drawn(12, 1, 6, 6, low=0, high=1)
    search = CollisionSearch(layer, clean, Linf(0.08))
    hub = choose_hub(search, torch.arange(12), seed=0)
    together = collide_at_hubs(search, [hub], TOLERANCE)
    alone = [
        len(
            collide_at_hubs(
                CollisionSearch(layer, clean[i : i + 1], Linf(0.08), reference_scale=search.scale), [hub], TOLERANCE
            ).members
        )
        for i in range(12)
    ]
    assert [i in together.members for i in range(12)] == [bool(one) for one in alone]
    assert 0 < sum(alone) < 12


@pytest.mark.parametrize("stiff", [1e-3, 1e-5])
def test_features_with_a_nearly_constant_sum_collide_to_the_last_digits(stiff):
    """The residual of the sum has to be closed too, although pixels hardly change it."""
    layer = network(2)
    mixed = (torch.eye(4) - (1 - stiff) * torch.full((4, 4), 0.25)) @ layer.working[-1].weight
    for net in layer:
        net[-1].weight.data = mixed.to(net[-1].weight)
    search = CollisionSearch(layer, drawn(8, 1, 6, 6), Linf(0.1))
    pairs = torch.tensor([(i, j) for i in range(8) for j in range(i)])
    hub = HubTarget(search.encoded.mean(0).double(), inverse_covariance(search.encoded))
    _, distance = search.collide(pairs, hub, 4)
    near = distance <= 1e-4 * search.scale
    assert int(near.sum()) > 5
    assert int((distance <= 1e-11 * search.scale).sum()) >= 0.9 * int(near.sum())


def test_the_memory_limit_changes_no_collision():
    layer, clean = network(), drawn(12, 1, 6, 6, low=0, high=1)
    found = [
        find_hubs(CollisionSearch(layer, clean, Linf(0.1), SearchEffort(memory_mib=mib, hubs=1)), TOLERANCE, seed=0)[1]
        for mib in (256, 0)
    ]
    assert torch.equal(found[0].members, found[1].members)


def test_all_images_of_a_constant_layer_collide():
    clean = drawn(10, 1, 3, 3)
    weight, bias = torch.zeros(2, 9), torch.tensor([0.3, -1.7])
    flat = DualPrecisionLayer(
        lambda x: x.flatten(1) @ weight.T + bias, lambda x: x.flatten(1) @ weight.double().T + bias.double()
    )
    _, at_hub = find_hubs(CollisionSearch(flat, clean, Linf(0.1)), TOLERANCE, seed=0)
    assert at_hub.members.tolist() == list(range(10))


def test_candidate_pairs_have_two_classes_and_are_ordered_by_distance():
    features, labels = torch.tensor([[0.0], [1.0], [3.0], [3.5], [9.0]]), torch.tensor([0, 0, 1, 1, 0])
    pairs = candidate_pairs(features, labels, torch.tensor([0, 1, 2, 3, 4]), 1)
    assert pairs.tolist() == [[1, 2], [1, 3], [0, 2], [3, 4]]
    assert candidate_pairs(features, labels, torch.tensor([1, 4]), 5).shape == (0, 2)
    assert candidate_pairs(features, labels, torch.tensor([1]), 5).shape == (0, 2)


def test_the_inverse_covariance_measures_in_standard_deviations():
    features = torch.randn(4000, 2, generator=keyed_generator(0)) * torch.tensor([1.0, 3.0])
    metric = inverse_covariance(features)
    assert float(metric[0, 0] / metric[1, 1]) == pytest.approx(9, rel=0.15)
    assert inverse_covariance(torch.ones(5, 3)).isfinite().all()


def test_a_layer_without_a_gradient_is_refused():
    cut = DualPrecisionLayer(lambda x: x.detach().flatten(1)[:, :2], lambda x: x.detach().flatten(1)[:, :2])
    with pytest.raises(InvalidModelError, match="gives no gradient"):
        find_hubs(CollisionSearch(cut, drawn(5, 1, 3, 3), Linf(0.1)), TOLERANCE, seed=0)


def test_a_gradient_that_is_not_finite_is_refused():
    root = DualPrecisionLayer(lambda x: (x - x).flatten(1)[:, :2].sqrt(), lambda x: (x - x).flatten(1)[:, :2].sqrt())
    with pytest.raises(InvalidModelError, match="not finite for 5 of 5"):
        find_hubs(CollisionSearch(root, drawn(5, 1, 3, 3), Linf(0.1), SearchEffort(hubs=1)), TOLERANCE, seed=0)


def test_a_budget_of_passes_tries_the_nearest_pairs_of_new_images_first():
    layer = linear(torch.eye(9))
    clean, labels = drawn(40, 1, 3, 3), torch.arange(40) % 2
    found = {}
    for passes in (3.0, 1e6, inf):
        effort = SearchEffort(pair_passes=passes, neighbours=20)
        search = CollisionSearch(layer, clean, Linf(0.15), effort)
        collisions = find_pairs(search, labels, torch.arange(40), TOLERANCE)
        found[passes] = found_pairs(collisions), search.log.passes
    assert found[3.0][0] < found[1e6][0] <= found[inf][0]
    assert found[3.0][1] < found[1e6][1]
    touched = [image for pair in found[3.0][0] for image in pair]
    assert len(set(touched)) == len(touched)  # disjoint pairs


def test_a_hub_that_no_probe_reaches_is_given_up():
    """Images of one half are near each other, the others far from everything: a probe of the latter reaches nothing."""
    layer = linear(torch.eye(9))
    clean = drawn(60, 1, 3, 3)
    passes = {}
    for probe in (0, 8):
        search = CollisionSearch(layer, clean, Linf(0.02), SearchEffort(probe=probe))
        hubs, collisions = find_hubs(search, TOLERANCE, 0)
        assert (hubs, len(collisions.members)) == ((), 0)
        passes[probe] = search.log.passes
    assert passes[8] < passes[0]


@pytest.mark.parametrize("probe", [8, 12])
def test_a_probe_does_not_change_a_hub_that_is_reached(probe):
    layer = linear(drawn(2, 9, low=-1, high=1, key=3))
    clean, members = drawn(60, 1, 3, 3), []
    for given in (0, probe):
        search = CollisionSearch(layer, clean, Linf(0.2), SearchEffort(probe=given, hubs=1))
        collisions = find_hubs(search, TOLERANCE, 0)[1]
        members.append(collisions.members)
        reached = search.features(collisions.moved, layer.precise)
        assert bool(((reached - collisions.targets[0]).norm(dim=1) <= TOLERANCE).all())
    assert torch.equal(*members)
    assert len(members[0]) > 30
