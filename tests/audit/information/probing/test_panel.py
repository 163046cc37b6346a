"""Panel: closed forms, bounds, held-out labels, what each member alone can read, units, and calibration."""

from math import log

import pytest
import torch
import torch.nn.functional as F

from audit.calibration.closed_forms import two_points
from audit.information.floors import empirical_entropy
from audit.information.probing.members import MEMBERS, Readers
from audit.information.probing.panel import ALL_MEMBERS, Panel
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.types import Encoded

READERS = Readers(PanelSettings(trees=40), ProbeTraining(steps=60))
FITTED = [name for name in ALL_MEMBERS if name != "own"]
EVERY = pytest.mark.parametrize("member", FITTED)
BOTH = pytest.mark.parametrize("quick", [False, True])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def gaussians(count=800, sigma=0.5, seed=0):
    labels = torch.arange(count) % 2
    return (2.0 * labels - 1)[:, None] + sigma * normal(count, 1, seed=seed), labels


def read(features, labels, *members, log_probs=None, seed=0, **settings):
    own = features.new_empty(len(features), 0) if log_probs is None else log_probs
    return Panel(READERS, members or ALL_MEMBERS, **settings).read(Encoded(features, own), labels, seed)


@EVERY
@BOTH
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_two_gaussians_match_their_closed_form(member, quick, sigma):
    found = read(*gaussians(1500, sigma), member, quick=quick)
    truth = two_points(sigma, 0.0).normal
    assert truth - 0.09 < found.nats < truth + 0.06
    assert found.stderr == pytest.approx(0.01, abs=0.008)


@EVERY
@BOTH
def test_held_out_labels_are_not_used(member, quick):
    # 60 features fit 200 random labels on the training samples
    features, labels = normal(200, 60), torch.randint(0, 2, (200,), generator=seeded(7))
    assert read(features, labels, member, quick=quick).nats < 0.03


@BOTH
def test_the_largest_value_counts_and_is_never_negative(quick):
    found = read(*gaussians(600), quick=quick)
    assert found.nats == max(found.parts.values()) == found.parts[found.member]
    assert set(found.parts) == set(FITTED)
    independent = read(normal(300, 2), torch.arange(300) % 3, quick=quick)
    assert 0 <= independent.nats < 0.02
    # a temperature fitted on the samples it is evaluated on finds at least zero, one fitted on others does not
    assert (min(independent.parts.values()) < 0) != quick


def test_value_is_at_most_the_entropy_of_the_labels():
    labels = torch.cat([torch.zeros(180), torch.ones(60), 5 * torch.ones(60)]).long()  # classes 2 to 4 never occur
    found = read(20 * F.one_hot(labels).float() + 0.01 * normal(300, 6), labels)
    assert 0.95 * empirical_entropy(labels) < found.nats <= empirical_entropy(labels)
    assert found.accuracy.value == 1


@EVERY
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
def test_constant_features_have_no_information(member, constant):
    assert read(torch.full((300, 4), constant), torch.arange(300) % 3, member).nats < 0.01


@EVERY
def test_one_class_has_no_information(member):
    found = read(normal(60, 3), torch.full((60,), 7), member)
    assert found.nats == 0
    assert found.accuracy.value == 1


@EVERY
@pytest.mark.parametrize(("factor", "shift"), [(1024.0, 0.0), (2.0**-20, 0.0), (1.0, 50.0)])
def test_units_of_the_features_have_no_effect(member, factor, shift):
    features, labels = gaussians()
    first = read(features, labels, member)
    assert read(factor * features + shift, labels, member).nats == pytest.approx(first.nats, abs=5e-3)


@EVERY
def test_a_large_unit_of_one_feature_does_not_hide_another(member):
    features, labels = gaussians()
    both = torch.cat([features, normal(800, 1, seed=3)], 1)
    found = read(both * torch.tensor([1.0, 1e9]), labels, member)
    assert found.nats == pytest.approx(read(both, labels, member).nats, abs=5e-3)
    assert found.nats > 0.3


def test_trees_read_what_neighbours_and_probes_do_not():
    # classes alternate over narrow intervals of one pixel among six
    labels, tooth = (torch.arange(1200) % 6) % 2, torch.arange(1200) % 6
    values = torch.rand(1200, 6, generator=seeded())
    values[:, 0] = 0.05 + 0.15 * (tooth + 0.5 + 0.1 * (values[:, 0] - 0.5))
    found = read(values, labels)
    assert max(found.parts[name] for name in ("linear", "hidden", "neighbours")) < 0.45
    assert min(found.parts[name] for name in ("boosted", "forest")) > 0.6


def test_hidden_layer_neighbours_and_trees_read_a_product():
    features = normal(800, 2)
    found = read(features, (features[:, 0] * features[:, 1] > 0).long())
    assert found.parts["linear"] < 0.02
    assert min(found.parts[name] for name in ("hidden", "neighbours", "forest")) > 0.4


@BOTH
def test_own_output_is_read_where_features_tell_nothing(quick):
    labels = torch.arange(400) % 2
    sure = torch.where(torch.rand(400, generator=seeded(5)) < 0.8, labels, 1 - labels)
    own = (10.0 * F.one_hot(sure, 3)).log_softmax(1)  # over-confident, and of one class more
    found = read(normal(400, 2), labels, log_probs=own, quick=quick)
    right = float((sure == labels).float().mean())
    truth = log(2) + right * log(right) + (1 - right) * log(1 - right)
    assert found.member == "own"
    assert found.nats == pytest.approx(truth, abs=0.02)
    assert found.accuracy.value == pytest.approx(right)


@BOTH
def test_a_vote_that_points_away_from_the_label_is_read(quick):
    # in pairs of opposite labels, the nearest neighbour of every sample has the other label
    place = torch.arange(400) // 2
    labels = torch.arange(400) % 2
    features = torch.stack([(place * 0.618) % 1, (place * 0.414) % 1], 1) + 1e-4 * labels[:, None]
    found = read(features, labels, "neighbours", quick=quick)
    assert found.parts["neighbours"] > 0.02


def test_differences_under_the_grain_of_the_clean_features_are_not_read():
    labels = torch.arange(300) % 2
    features = 1e-5 * (2.0 * labels[:, None] - 1) + 0 * normal(300, 1)
    assert read(features, labels).nats > 0.6
    assert read(features, labels, unit=torch.ones(1)).nats < 0.01


def test_more_features_than_samples():
    labels = torch.arange(240) % 3
    directions = normal(3, 600, seed=2)
    found = read(normal(240, 600) + 2 * directions[labels], labels)
    assert found.parts["linear"] > 0.8
    assert all(value == value for value in found.parts.values())


@EVERY
def test_seed_determines_the_folds_and_nothing_global(member):
    features, labels = gaussians(200, 1.0)
    before = torch.random.get_rng_state()
    first = read(features, labels, member)
    assert read(features, labels, member) == first
    assert read(features, labels, member, seed=1) != first
    assert torch.random.get_rng_state().equal(before)


def test_every_member_is_a_member_of_the_default_panel():
    assert tuple(MEMBERS) == ALL_MEMBERS


@pytest.mark.parametrize(("enough", "asked"), [(0.0, 1), (0.2, 1), (10.0, None)])
def test_members_are_asked_until_one_reads_enough(enough, asked):
    features, labels = gaussians(200)
    panel, encoded = Panel(READERS, FITTED, quick=True), Encoded(features, features[:, :0])
    whole, found = panel.read(encoded, labels, 0), panel.read(encoded, labels, 0, enough)
    assert list(found.parts.items()) == list(whole.parts.items())[:asked]


def test_a_reading_is_compared_with_one_of_nothing():
    features, labels = torch.zeros(200, 3), torch.arange(200) % 2
    found = Panel(READERS, FITTED, quick=True).read(Encoded(features, features[:, :0]), labels, 0, enough=0.0)
    assert found.parts
    assert 0 <= found.nats < 0.001
