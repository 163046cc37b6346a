"""Meetings tried elsewhere: they count where a forward pass says so, and nowhere else."""

import torch

from audit.adversary.threat import Linf
from audit.certificate.certificate import CertificateSettings, certify
from audit.certificate.collision_search import Layer, SearchEffort
from audit.certificate.collisions import Meetings
from audit.certificate.equality import Standard, standing
from audit.certificate.transfer import at_layer, joined, strengthened
from audit.random_keys import keyed_generator

EXACT = Standard("bit-identical at float32", 0.0)
NOTHING = CertificateSettings(effort=SearchEffort(hubs=0, neighbours=0))


def linear(weight):
    return Layer(lambda x: x.flatten(1) @ weight.T, lambda x: x.flatten(1) @ weight.double().T)


def case(key=0):
    clean = 0.3 + 0.4 * torch.rand(20, 1, 3, 3, generator=keyed_generator(key))
    weight = torch.rand(2, 9, generator=keyed_generator(key, 1)) - 0.5
    return clean, torch.arange(20) % 4, weight


def test_what_meets_at_a_layer_meets_at_a_later_one_and_not_the_other_way_round():
    clean, labels, weight = case()
    early, late = linear(weight), linear(torch.tensor([[1.0, -0.5]]) @ weight)
    first = certify(early, clean, labels, Linf(0.1), CertificateSettings())
    second = certify(late, clean, labels, Linf(0.1), CertificateSettings())
    forwards, backwards = at_layer(late.precise, first.meetings), at_layer(early.precise, second.meetings)
    assert forwards.targets.shape[1] == 1
    assert len(forwards.members) > 5
    assert bool(standing(late, clean, forwards, Linf(0.1), EXACT).all())
    stood = standing(early, clean, backwards, Linf(0.1), EXACT)
    assert int(stood.sum()) < len(stood) / 2


def test_a_search_that_found_nothing_is_strengthened_by_one_that_did():
    clean, labels, weight = case()
    found = certify(linear(weight), clean, labels, Linf(0.1), CertificateSettings())
    nothing = certify(linear(weight), clean, labels, Linf(0.2), NOTHING)
    assert nothing.bound.kept == 20 > found.bound.kept
    better = strengthened(nothing, found.meetings, labels, NOTHING)
    assert better.bound.kept == found.bound.kept
    assert better.population == found.population
    assert (better.at_hubs, better.pairs) == (found.at_hubs, found.pairs)
    # the other way round nothing is new, and nothing changes
    assert strengthened(found, nothing.meetings, labels, NOTHING) is found


def test_joined_meetings_keep_their_targets():
    one = Meetings(torch.tensor([[1.0]]), torch.tensor([0, 1]), torch.tensor([0, 0]), torch.zeros(2, 1, 1, 1))
    two = Meetings(torch.tensor([[2.0], [3.0]]), torch.tensor([2]), torch.tensor([1]), torch.ones(1, 1, 1, 1))
    both = joined(one, two)
    assert both.targets[both.at].flatten().tolist() == [1.0, 1.0, 3.0]
    assert both.members.tolist() == [0, 1, 2]
    assert both.moved.flatten().tolist() == [0, 0, 1]


def test_one_image_astray_does_not_take_the_others_with_it():
    moved = torch.tensor([0.5, 0.5, 0.5, 0.9]).double().view(4, 1, 1, 1)
    meetings = Meetings(torch.zeros(1, 3), torch.arange(4), torch.zeros(4, dtype=torch.int64), moved)
    layer = Layer(lambda x: x.flatten(1), lambda x: x.flatten(1))
    stood = standing(layer, moved.float(), at_layer(layer.precise, meetings), Linf(0.1), EXACT)
    assert stood.tolist() == [True, True, True, False]


def test_no_meetings_are_none_anywhere():
    clean, labels, weight = case()
    none = certify(linear(weight), clean, labels, Linf(0.0), NOTHING).meetings
    moved = at_layer(lambda x: x.flatten(1)[:, :5], none)
    assert moved.targets.shape == (0, 5)
    assert standing(linear(weight), clean, moved, Linf(0.1), EXACT).tolist() == []
