"""Collisions transferred to other layers and radii count only where a forward pass confirms them."""

import torch

from audit.adversary.threat import Linf
from audit.certificate.certificate import certify
from audit.certificate.collision_search import SearchEffort
from audit.certificate.collisions import Collisions, concatenate
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import EqualityCriterion
from audit.certificate.settings import CertificateSettings
from audit.certificate.transfer import strengthen, transfer_to_layer
from audit.certificate.validity import valid_rows
from audit.random_keys import keyed_generator

EXACT = EqualityCriterion("bit-identical at float32", 0.0)
NOTHING = CertificateSettings(effort=SearchEffort(hubs=0, neighbours=0))


def linear(weight):
    return DualPrecisionLayer(lambda x: x.flatten(1) @ weight.T, lambda x: x.flatten(1) @ weight.double().T)


def case(key=0):
    clean = 0.3 + 0.4 * torch.rand(20, 1, 3, 3, generator=keyed_generator(key))
    weight = torch.rand(2, 9, generator=keyed_generator(key, 1)) - 0.5
    return clean, torch.arange(20) % 4, weight


def test_collisions_transfer_to_later_layers_and_not_to_earlier_ones():
    clean, labels, weight = case()
    early, late = linear(weight), linear(torch.tensor([[1.0, -0.5]]) @ weight)
    first = certify(early, clean, labels, Linf(0.1), CertificateSettings())
    second = certify(late, clean, labels, Linf(0.1), CertificateSettings())
    forwards, backwards = (
        transfer_to_layer(late.precise, first.collisions),
        transfer_to_layer(early.precise, second.collisions),
    )
    assert forwards.targets.shape[1] == 1
    assert len(forwards.members) > 5
    assert bool(valid_rows(late, clean, forwards, Linf(0.1), EXACT).all())
    valid = valid_rows(early, clean, backwards, Linf(0.1), EXACT)
    assert int(valid.sum()) < len(valid) / 2


def test_a_certificate_without_collisions_is_strengthened_by_others():
    clean, labels, weight = case()
    found = certify(linear(weight), clean, labels, Linf(0.1), CertificateSettings())
    nothing = certify(linear(weight), clean, labels, Linf(0.2), NOTHING)
    assert nothing.bound.kept == 20 > found.bound.kept
    better = strengthen(nothing, found.collisions, labels, NOTHING)
    assert better.bound.kept == found.bound.kept
    assert better.population == found.population
    assert (better.at_hubs, better.pairs) == (found.at_hubs, found.pairs)
    # no collisions add nothing
    assert strengthen(found, nothing.collisions, labels, NOTHING) is found


def test_concatenated_collisions_keep_their_targets():
    one = Collisions(torch.tensor([[1.0]]), torch.tensor([0, 1]), torch.tensor([0, 0]), torch.zeros(2, 1, 1, 1))
    two = Collisions(torch.tensor([[2.0], [3.0]]), torch.tensor([2]), torch.tensor([1]), torch.ones(1, 1, 1, 1))
    both = concatenate([one, two])
    assert both.targets[both.at].flatten().tolist() == [1.0, 1.0, 3.0]
    assert both.members.tolist() == [0, 1, 2]
    assert both.moved.flatten().tolist() == [0, 0, 1]


def test_an_outlier_does_not_invalidate_the_other_images_of_its_target():
    moved = torch.tensor([0.5, 0.5, 0.5, 0.9]).double().view(4, 1, 1, 1)
    collisions = Collisions(torch.zeros(1, 3), torch.arange(4), torch.zeros(4, dtype=torch.int64), moved)
    layer = DualPrecisionLayer(lambda x: x.flatten(1), lambda x: x.flatten(1))
    valid = valid_rows(layer, moved.float(), transfer_to_layer(layer.precise, collisions), Linf(0.1), EXACT)
    assert valid.tolist() == [True, True, True, False]


def test_an_empty_set_of_collisions_transfers():
    clean, labels, weight = case()
    none = certify(linear(weight), clean, labels, Linf(0.0), NOTHING).collisions
    moved = transfer_to_layer(lambda x: x.flatten(1)[:, :5], none)
    assert moved.targets.shape == (0, 5)
    assert valid_rows(linear(weight), clean, moved, Linf(0.1), EXACT).tolist() == []
