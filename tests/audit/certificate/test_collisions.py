"""The search for meetings, on layers where it is known who can meet."""

from itertools import combinations

import pytest
import torch
from torch import nn

from audit.adversary.threat import Linf
from audit.certificate.collision_search import Hub, Layer, Search, SearchEffort
from audit.certificate.collisions import candidate_pairs, choose_hub, find_hubs, join, meet_at, metric_of, pair_meetings
from audit.certificate.gauss_newton import Problem, box_step
from audit.errors import InvalidModelError
from audit.random_keys import keyed_generator

NEAR = 1e-9
EVERY_PAIR = SearchEffort(neighbours=1000)


def drawn(*shape, low=0.3, high=0.7, key=0):
    return low + (high - low) * torch.rand(*shape, generator=keyed_generator(key))


def linear(weight):
    """Return the layer x -> W x of flattened images."""
    return Layer(lambda images: images.flatten(1) @ weight.T, lambda images: images.flatten(1) @ weight.double().T)


def network(key=0):
    """Return the layer of a small ReLU network from 36 pixels to 4 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    return Layer.of(net.eval().requires_grad_(False))


def found_pairs(meetings):
    return {tuple(sorted(pair)) for pair in meetings.members.view(-1, 2).tolist()}


def test_box_step_is_the_box_constrained_least_squares_solution():
    from scipy.optimize import lsq_linear

    generator = keyed_generator(3)
    jacobian = torch.randn(6, 3, 20, generator=generator).double()
    residual = torch.randn(6, 3, generator=generator).double() * torch.tensor([1, 1, 1, 3, 3, 3.0])[:, None]
    low, high = -drawn(6, 20, low=0, high=0.5).double(), drawn(6, 20, low=0, high=0.5, key=1).double()
    damping = torch.full((6,), 1e-2).double()
    step = box_step(Problem(jacobian, residual, low, high, damping), rounds=40)
    for one in range(6):
        stacked = torch.cat([torch.eye(20).double() * damping[one].sqrt(), jacobian[one]])
        wanted = torch.cat([torch.zeros(20).double(), -residual[one]])
        bounds = (low[one].numpy(), high[one].numpy())
        best = lsq_linear(stacked.numpy(), wanted.numpy(), bounds=bounds, tol=1e-14).x
        assert torch.allclose(step[one], torch.from_numpy(best), atol=1e-6)
    assert bool(((step >= low) & (step <= high)).all())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_box_that_leaves_too_few_pixels_free_gives_a_step_all_the_same(kind):
    """Twenty features on two free pixels: nothing but the damping keeps the linear system from being singular."""
    jacobian = torch.randn(3, 20, 40, generator=keyed_generator(4)).to(kind)
    residual = torch.randn(3, 20, generator=keyed_generator(5)).to(kind)
    low, high = -torch.ones(3, 40, dtype=kind), torch.ones(3, 40, dtype=kind)
    low[:, 2:], high[:, 2:] = -1e-6, 1e-6
    step = box_step(Problem(jacobian, residual, low, high, torch.full((3,), 1e-8, dtype=kind)))
    assert bool(((step >= low) & (step <= high)).all())
    left = residual + (jacobian @ step[:, :, None])[:, :, 0]
    assert bool((left.norm(dim=1) < residual.norm(dim=1)).all())


@pytest.mark.parametrize("eps", [0.01, 0.02, 0.05])
def test_a_linear_layer_meets_exactly_where_its_intervals_do(eps):
    """Two features of disjoint pixels: a feature moves by at most eps |w|_1 on either side."""
    clean, labels = drawn(14, 1, 4, 4), torch.arange(14) % 3
    weight = torch.zeros(2, 16)
    weight[0, :8], weight[1, 8:] = drawn(8, low=-1, high=1, key=1), drawn(8, low=-1, high=1, key=2)
    search = Search(linear(weight), clean, Linf(eps), EVERY_PAIR)
    met = pair_meetings(search, labels, torch.arange(14), NEAR)
    values, reach = clean.flatten(1) @ weight.T, 2 * eps * weight.abs().sum(1)
    excess = {
        (i, j): float(((values[i] - values[j]).abs() / reach).max())
        for i, j in combinations(range(14), 2)
        if labels[i] != labels[j]
    }
    assert not [e for e in excess.values() if abs(e - 1) < 1e-4]  # no near ties
    meetable = {pair for pair, e in excess.items() if e < 1}
    assert 0 < len(meetable) < len(excess)
    assert found_pairs(met) == meetable


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.15])
def test_the_identity_meets_within_two_eps(eps):
    clean, labels = drawn(16, 1, 2, 2), torch.arange(16) % 2
    search = Search(Layer(lambda x: x.flatten(1), lambda x: x.flatten(1)), clean, Linf(eps), EVERY_PAIR)
    distance = torch.cdist(clean.flatten(1), clean.flatten(1), p=float("inf"))
    assert bool(((distance - 2 * eps).abs() > 1e-5).all())
    meetable = {(i, j) for i, j in combinations(range(16), 2) if labels[i] != labels[j] and distance[i, j] <= 2 * eps}
    assert meetable
    assert found_pairs(pair_meetings(search, labels, torch.arange(16), NEAR)) == meetable


def test_a_hub_of_a_linear_layer_is_reached_by_those_it_is_in_reach_of():
    clean, weight = drawn(40, 1, 3, 3), drawn(1, 9, low=-1, high=1, key=1)
    values, target = (clean.flatten(1) @ weight.T)[:, 0].double(), torch.tensor([0.1]).double()
    reach = 0.1 * float(weight.abs().sum())
    assert not bool((((values - target).abs() / reach - 1).abs() < 1e-4).any())
    search = Search(linear(weight), clean, Linf(0.1))
    met = meet_at(search, [Hub(target, torch.eye(1))], NEAR)
    assert set(met.members.tolist()) == set(((values - target).abs() <= reach).nonzero().flatten().tolist())
    assert 0 < len(met.members) < 40


def test_what_meets_is_legal_and_equal_to_the_last_digits():
    layer, clean, labels = network(), drawn(24, 1, 6, 6, low=0, high=1), torch.arange(24) % 4
    search = Search(layer, clean, Linf(0.1), SearchEffort(hubs=1, neighbours=4))
    _, met = find_hubs(search, NEAR, seed=0)
    left = torch.tensor([i for i in range(24) if i not in met.members])
    pairs = pair_meetings(search, labels, left, NEAR)
    assert len(met.members) >= 8
    assert len(pairs.members) > 0
    both = join([met, pairs], search)
    assert len(both.targets) == 1 + len(pairs.members) // 2
    apart = (layer.precise(both.moved) - both.targets[both.at]).norm(dim=1)
    assert float(apart.max()) <= 1e-11 * search.scale
    # strictly, in float64
    assert bool((Linf(0.1).distance(both.moved, clean[both.members].double()) <= 0.1).all())
    assert bool(((both.moved >= 0) & (both.moved <= 1)).all())
    # no image of a hub takes part in a pair, and no pair is of one class
    assert not set(met.members.tolist()) & set(pairs.members.tolist())
    assert all(labels[i] != labels[j] for i, j in found_pairs(pairs))


def test_an_image_finds_its_way_alone():
    """Who else is in the batch decides nothing here."""
    layer, clean = network(), drawn(12, 1, 6, 6, low=0, high=1)
    search = Search(layer, clean, Linf(0.08))
    hub = choose_hub(search, torch.arange(12), seed=0)
    together = meet_at(search, [hub], NEAR)
    alone = [
        len(meet_at(Search(layer, clean[i : i + 1], Linf(0.08), scale=search.scale), [hub], NEAR).members)
        for i in range(12)
    ]
    assert [i in together.members for i in range(12)] == [bool(one) for one in alone]
    assert 0 < sum(alone) < 12


@pytest.mark.parametrize("stiff", [1e-3, 1e-5])
def test_features_that_nearly_add_up_to_a_constant_meet_to_the_last_digits(stiff):
    """Whatever moves the sum at all must be asked to close its gap too, however little that is."""
    layer = network(2)
    mixed = (torch.eye(4) - (1 - stiff) * torch.full((4, 4), 0.25)) @ layer.working[-1].weight
    for net in layer:
        net[-1].weight.data = mixed.to(net[-1].weight)
    search = Search(layer, drawn(8, 1, 6, 6), Linf(0.1))
    pairs = torch.tensor([(i, j) for i in range(8) for j in range(i)])
    hub = Hub(search.encoded.mean(0).double(), metric_of(search.encoded))
    _, apart = search.meet(pairs, hub, 4)
    near = apart <= 1e-4 * search.scale
    assert int(near.sum()) > 5
    assert int((apart <= 1e-11 * search.scale).sum()) >= 0.9 * int(near.sum())


def test_small_memory_changes_no_meeting():
    layer, clean = network(), drawn(12, 1, 6, 6, low=0, high=1)
    found = [
        find_hubs(Search(layer, clean, Linf(0.1), SearchEffort(memory_mib=mib, hubs=1)), NEAR, seed=0)[1]
        for mib in (256, 0)
    ]
    assert torch.equal(found[0].members, found[1].members)


def test_a_constant_layer_meets_at_once():
    clean = drawn(10, 1, 3, 3)
    weight, bias = torch.zeros(2, 9), torch.tensor([0.3, -1.7])
    flat = Layer(lambda x: x.flatten(1) @ weight.T + bias, lambda x: x.flatten(1) @ weight.double().T + bias.double())
    _, met = find_hubs(Search(flat, clean, Linf(0.1)), NEAR, seed=0)
    assert met.members.tolist() == list(range(10))


def test_candidates_are_of_two_classes_and_nearest_first():
    features, labels = torch.tensor([[0.0], [1.0], [3.0], [3.5], [9.0]]), torch.tensor([0, 0, 1, 1, 0])
    pairs = candidate_pairs(features, labels, torch.tensor([0, 1, 2, 3, 4]), 1)
    assert pairs.tolist() == [[1, 2], [1, 3], [0, 2], [3, 4]]
    assert candidate_pairs(features, labels, torch.tensor([1, 4]), 5).shape == (0, 2)
    assert candidate_pairs(features, labels, torch.tensor([1]), 5).shape == (0, 2)


def test_the_metric_measures_in_standard_deviations():
    features = torch.randn(4000, 2, generator=keyed_generator(0)) * torch.tensor([1.0, 3.0])
    metric = metric_of(features)
    assert float(metric[0, 0] / metric[1, 1]) == pytest.approx(9, rel=0.15)
    assert metric_of(torch.ones(5, 3)).isfinite().all()


def test_a_layer_without_a_gradient_is_refused():
    cut = Layer(lambda x: x.detach().flatten(1)[:, :2], lambda x: x.detach().flatten(1)[:, :2])
    with pytest.raises(InvalidModelError, match="gives no gradient"):
        find_hubs(Search(cut, drawn(5, 1, 3, 3), Linf(0.1)), NEAR, seed=0)


def test_a_gradient_that_is_not_finite_is_refused():
    root = Layer(lambda x: (x - x).flatten(1)[:, :2].sqrt(), lambda x: (x - x).flatten(1)[:, :2].sqrt())
    with pytest.raises(InvalidModelError, match="not finite for 5 of 5"):
        find_hubs(Search(root, drawn(5, 1, 3, 3), Linf(0.1), SearchEffort(hubs=1)), NEAR, seed=0)
