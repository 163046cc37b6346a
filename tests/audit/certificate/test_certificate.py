"""Certificates of layers whose best head is known, and layers that cannot be certified."""

from itertools import combinations

import pytest
import torch
from torch import nn

from audit.adversary.threat import L1, L2, THREATS, Linf
from audit.certificate.certificate import bound_at_frozen_hubs, certify, certify_held_out, freeze_hubs
from audit.certificate.collision_search import SearchEffort
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import EQUALITY_TIERS, EqualityCriterion, features_equal, noise_floor
from audit.certificate.layers import CertificationInputs, CertificationSettings, certify_layers
from audit.certificate.population import held_out_limit, sample_limit
from audit.certificate.results import Certificate, NotApplicable
from audit.certificate.settings import CertificateSettings
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.random_keys import keyed_generator

PAIRS_ONLY = CertificateSettings(effort=SearchEffort(hubs=0, neighbours=1000))


def drawn(*shape, low=0.3, high=0.7, key=0):
    return low + (high - low) * torch.rand(*shape, generator=keyed_generator(key))


def linear(weight, bias=0.0):
    return DualPrecisionLayer(
        lambda x: x.flatten(1) @ weight.T + bias, lambda x: x.flatten(1) @ weight.double().T + bias
    )


def classifier(key=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 4))
    return net.eval().requires_grad_(False)


def network(key=0):
    return DualPrecisionLayer.of(classifier(key))


def best_of_all(labels, edges):
    choices = [c for k in range(len(labels) + 1) for c in combinations(range(len(labels)), k)]
    return max(len(c) for c in choices if not any(i in c and j in c for i, j in edges))


@pytest.fixture(scope="module")
def found():
    clean, labels = drawn(40, 1, 6, 6, low=0, high=1), torch.arange(40) % 4
    layer = network()
    return layer, clean, labels, certify(layer, clean, labels, Linf(0.08), CertificateSettings())


@pytest.mark.parametrize("eps", [0.002, 0.01, 0.03])
def test_two_classes_on_a_linear_layer_against_enumeration(eps):
    clean, labels, weight = drawn(11, 1, 3, 3), torch.arange(11) % 2, drawn(1, 9, low=-1, high=1, key=1)
    values, reach = (clean.flatten(1) @ weight.T)[:, 0], 2 * eps * float(weight.abs().sum())
    edges = [
        (i, j) for i, j in combinations(range(11), 2) if labels[i] != labels[j] and abs(values[i] - values[j]) <= reach
    ]
    certificate = certify(linear(weight), clean, labels, Linf(eps), PAIRS_ONLY)
    assert edges
    assert certificate.bound.kept == best_of_all(labels, edges)
    assert certificate.bound.kind == "matching"
    with_hubs = certify(linear(weight), clean, labels, Linf(eps), CertificateSettings())
    assert with_hubs.bound.kept >= certificate.bound.kept  # there are no other collisions


@pytest.mark.parametrize("threat", [L2(0.02), L2(0.1), L1(0.05), L1(0.2)])
def test_balls_of_other_norms_on_a_linear_layer_against_the_dual_norm(threat):
    """Features of two images meet where their distance is at most eps times twice the dual norm of the weights."""
    clean, labels, weight = drawn(11, 1, 3, 3), torch.arange(11) % 2, drawn(1, 9, low=-1, high=1, key=1)
    dual = weight.norm() if threat.norm == "l2" else weight.abs().max()
    values, reach = (clean.flatten(1) @ weight.T)[:, 0], 2 * threat.eps * float(dual)
    gaps = {(i, j): float((values[i] - values[j]).abs()) for i, j in combinations(range(11), 2) if (i - j) % 2}
    certificate = certify(linear(weight), clean, labels, threat, PAIRS_ONLY)
    found = {tuple(sorted(pair)) for pair in certificate.collisions.members.view(-1, 2).tolist()}
    assert found <= {pair for pair, gap in gaps.items() if gap <= reach * (1 + 1e-6)}
    assert found >= {pair for pair, gap in gaps.items() if gap <= 0.9 * reach}
    assert found
    distance = threat.distance(certificate.collisions.moved, clean[certificate.collisions.members].double())
    assert bool((distance <= threat.eps).all())


@pytest.mark.parametrize("tier", ["proved", "bit-identical at float32"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_bounds_in_other_norms_fall_with_eps_and_hold_at_every_tier(norm, tier):
    clean, labels = drawn(16, 1, 6, 6, low=0, high=1), torch.arange(16) % 4
    radii = {"l2": (0.05, 0.3, 0.6), "l1": (0.1, 0.8, 2.4)}[norm]
    settings = CertificationSettings(CertificateSettings(tier, SearchEffort(neighbours=4)), measured=())
    given = CertificationInputs(classifier(), clean, labels, 4)
    results = certify_layers(given, ["logits"], [THREATS[norm](eps) for eps in radii], settings)
    bounds = [result.certificate.bound.kept for result in results]
    assert bounds[0] >= bounds[1] >= bounds[2]
    assert bounds[2] < 10


def test_a_constant_layer_is_bounded_by_the_largest_class():
    labels = torch.tensor([0] * 4 + [1] * 7 + [2] * 5)
    layer = linear(torch.zeros(2, 9), 0.7)
    certificate = certify(layer, drawn(16, 1, 3, 3), labels, Linf(0.01), CertificateSettings())
    assert certificate.bound.certified == 7 / 16
    assert certificate.at_hubs == (16,)
    assert certificate.population == sample_limit(7, 16, 0.95)


def test_the_bound_does_not_grow_with_eps():
    clean, labels, weight = drawn(16, 1, 3, 3), torch.arange(16) % 3, drawn(1, 9, low=-1, high=1, key=1)
    kept = [
        certify(linear(weight), clean, labels, Linf(eps), PAIRS_ONLY).bound.kept for eps in (0, 0.003, 0.01, 0.03, 0.1)
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 16
    assert kept[-1] < 8


def test_no_head_exceeds_the_bound_on_the_witnesses(found):
    """Constant, random and memorising heads, on the clean images and the witnesses of the certificate."""
    layer, clean, labels, certificate = found
    at, members = certificate.collisions.at, certificate.collisions.members
    features = torch.cat([layer.precise(clean.double()), layer.precise(certificate.collisions.moved)])
    owners, rounded = torch.cat([torch.arange(40), members]), features.float()
    generator = keyed_generator(5)
    predictions = [torch.full((len(owners),), k) for k in range(4)]
    predictions += [(rounded @ torch.randn(4, 4, generator=generator)).argmax(1) for _ in range(20)]
    # a memorising head: every feature vector gets the label of the first image that has it
    _, which = rounded.unique(dim=0, return_inverse=True)
    first = torch.full((int(which.max()) + 1,), 40).scatter_reduce(0, which, owners, "amin")
    predictions.append(labels[first[which]])
    kept = []
    for predicted in predictions:
        wrong = torch.zeros(40, dtype=torch.bool)
        wrong[owners[predicted != labels[owners]]] = True
        kept.append(40 - int(wrong.sum()))
    assert certificate.bound.kept < 40
    assert max(kept) <= certificate.bound.kept
    assert kept[-1] >= certificate.bound.kept / 2
    assert len(certificate.collisions.targets) == len(certificate.at_hubs) + certificate.pairs
    assert int(at.max()) + 1 == len(certificate.collisions.targets)


def test_a_fitted_head_stays_below_the_bound(found):
    """A linear head fitted to the clean features, on every clean image and every witness in float32."""
    layer, clean, labels, certificate = found
    pad = nn.functional.pad
    head = torch.linalg.lstsq(pad(layer.working(clean), (0, 1), value=1.0), nn.functional.one_hot(labels, 4).float())
    moved = torch.cat([clean.double(), certificate.collisions.moved]).float()
    owners = torch.cat([torch.arange(40), certificate.collisions.members])
    predicted = (pad(layer.working(moved), (0, 1), value=1.0) @ head.solution).argmax(1)
    assert 40 - len(owners[predicted != labels[owners]].unique()) <= certificate.bound.kept


def test_more_effort_never_loosens_the_bound():
    clean, labels, layer = drawn(24, 1, 6, 6, low=0, high=1), torch.arange(24) % 4, network()
    kept = [
        certify(layer, clean, labels, Linf(0.05), CertificateSettings(effort=effort)).bound.kept
        for effort in (SearchEffort(hubs=0, neighbours=0), SearchEffort(hubs=1, neighbours=0), SearchEffort(hubs=1))
    ]
    assert kept[0] == 24 > kept[1] >= kept[2]


def test_collisions_hold_at_every_tier(found):
    layer, clean, labels, certificate = found
    assert certificate.bound.kept < 30
    for tier in EQUALITY_TIERS[1:]:  # the first needs a proof: see proof/test_root.py
        other = certify(layer, clean, labels, Linf(0.08), CertificateSettings(tier=tier))
        assert isinstance(other, Certificate)
        targets = other.collisions.targets[other.collisions.at]
        criterion = EqualityCriterion(tier, other.noise)
        assert bool(features_equal(layer.precise(other.collisions.moved), targets, criterion).all())


def test_features_beyond_the_tolerance_of_a_tier_differ():
    target = drawn(1, 5).double()
    for tier, miss, within in [
        ("bit-identical at float32", 1e-6, 1e-10),
        ("bit-identical at float16", 1e-2, 1e-10),
        ("bit-identical at bfloat16", 1e-1, 1e-10),
        ("below noise floor", 0.6e-6, 0.4e-6),
    ]:
        nudge = torch.zeros(1, 5).double()
        nudge[0, 3] = 1
        criterion = EqualityCriterion(tier, noise=1e-6)
        assert not bool(features_equal(target + miss * nudge, target, criterion)), tier
        assert bool(features_equal(target + within * nudge, target, criterion)), tier
    # infinities from an overflow are not equal
    assert not bool(features_equal(1e6 * target, 1e6 * target, EqualityCriterion("bit-identical at float16", 0.0)))


def test_images_outside_their_ball_are_not_valid_collisions(monkeypatch):
    clean, labels = drawn(12, 1, 3, 3), torch.arange(12) % 3
    layer = linear(torch.zeros(1, 9), 0.5)
    from audit.certificate import certificate as module

    def outside(search, tolerance, seed, original=module.find_hubs):
        hubs, collisions = original(search, tolerance, seed)
        collisions.moved[4] += 0.02
        return hubs, collisions

    monkeypatch.setattr(module, "find_hubs", outside)
    found = certify(layer, clean, labels, Linf(0.01), CertificateSettings())
    assert found.at_hubs == (11,)
    assert 4 not in found.collisions.members


def test_the_noise_floor_measures_the_effect_of_the_batch_size():
    def batch_dependent(images):
        return images.flatten(1) + 1e-3 * (len(images) > 1)

    assert noise_floor(batch_dependent, drawn(8, 1, 2, 2)) == pytest.approx(2e-3, rel=1e-3)
    assert noise_floor(lambda x: x.flatten(1), drawn(8, 1, 2, 2)) == 0


def test_held_out_hubs_give_a_population_bound():
    clean, labels, layer = drawn(60, 1, 6, 6, low=0, high=1), torch.arange(60) % 4, network()
    held = certify_held_out(layer, clean, labels, Linf(0.15), CertificateSettings(confidence=0.9))
    assert len(held.images) == held.bound.images == 30
    assert held.bound.kept < 20
    assert held.population == held_out_limit(held.bound.kept, 30, 0.9)
    assert held.bound.certified < held.population < 1


def test_images_used_to_choose_the_hubs_are_refused():
    clean, labels, layer = drawn(12, 1, 6, 6), torch.arange(12) % 3, network()
    settings = CertificateSettings()
    frozen = freeze_hubs(layer, clean, torch.arange(6), Linf(0.1), settings)
    assert frozen.chosen_on == frozenset(range(6))
    with pytest.raises(UsageError, match="the hubs were chosen on image 5 and 1 of the 7 given images"):
        bound_at_frozen_hubs(layer, frozen, (clean, labels, torch.arange(5, 12)), Linf(0.1), settings)


def test_frozen_hubs_do_not_depend_on_the_other_images():
    clean, layer = drawn(12, 1, 6, 6), network()
    other = clean.clone()
    other[6:] = drawn(6, 1, 6, 6, key=9)
    one, two = (
        freeze_hubs(layer, images, torch.arange(6), Linf(0.1), CertificateSettings()) for images in (clean, other)
    )
    assert (one.scale, one.noise, len(one.hubs)) == (two.scale, two.noise, len(two.hubs))
    assert all(torch.equal(a.target, b.target) for a, b in zip(one.hubs, two.hubs, strict=True))


class _Random(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :2] + 1e-5 * torch.rand(len(images), 2)


class _OtherImages(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :2] - images.flatten(1)[:, :2].mean(0)


@pytest.mark.parametrize(
    ("layer", "threat", "reason"),
    [
        (linear(torch.ones(10, 9)), L2(0.1), "10 features but the image only 9 pixels"),
        (linear(torch.ones(10, 9)), Linf(0.1), "10 features but the image only 9 pixels"),
        (DualPrecisionLayer.of(_Random()), Linf(0.1), "features are random"),
        (DualPrecisionLayer.of(_OtherImages()), L1(0.1), "depend on the other images"),
    ],
)
@pytest.mark.parametrize("function", [certify, certify_held_out])
def test_inapplicable_layers_get_a_reason(function, layer, threat, reason):
    result = function(layer, drawn(6, 1, 3, 3), torch.arange(6) % 2, threat, CertificateSettings())
    assert isinstance(result, NotApplicable)
    assert reason in result.reason


def test_a_held_out_bound_needs_two_images():
    result = certify_held_out(linear(torch.ones(1, 9)), drawn(1, 1, 3, 3), torch.tensor([0]), Linf(0.1), PAIRS_ONLY)
    assert "at least two images" in result.reason
    alone = certify(linear(torch.ones(1, 9)), drawn(1, 1, 3, 3), torch.tensor([0]), Linf(0.1), CertificateSettings())
    assert alone.bound.certified == 1


def test_inputs_that_do_not_fit_are_refused():
    clean, layer = drawn(6, 1, 3, 3), linear(torch.ones(1, 9))
    with pytest.raises(UsageError, match="6 images with 5 labels"):
        certify(layer, clean, torch.arange(5), Linf(0.1), PAIRS_ONLY)
    with pytest.raises(UsageError, match="another network"):
        certify(
            layer._replace(precise=lambda x: 1.1 * x.flatten(1).sum(1, True)),
            clean,
            torch.arange(6),
            Linf(0.1),
            PAIRS_ONLY,
        )
    with pytest.raises(InvalidModelError, match="not finite for 6 of 6"):
        certify(linear(torch.full((1, 9), float("nan"))), clean, torch.arange(6), Linf(0.1), PAIRS_ONLY)
    with pytest.raises(UnknownNameError, match=r"unknown tier 'bit-identical'.*did you mean"):
        CertificateSettings(tier="bit-identical")
    with pytest.raises(UsageError, match=r"confidence 95.0 is not between 0 and 1"):
        CertificateSettings(confidence=95.0)


def test_a_layer_whose_jacobian_costs_more_than_the_limit_is_not_tried_and_says_what_it_costs():
    calls = []

    def features(images):
        calls.append(images.requires_grad)
        return images.flatten(1) @ weight.to(images).T

    weight = drawn(19, 36, low=-1.0, high=1.0)
    clean, labels = drawn(4, 1, 6, 6), torch.arange(4) % 2
    layer = DualPrecisionLayer(features, features)
    for run in (certify, certify_held_out):
        found = run(layer, clean, labels, Linf(0.1), CertificateSettings(jacobian_passes=9.0))
        assert isinstance(found, NotApplicable)
        assert found.reason.startswith("a single Jacobian of its 19 features costs 10 passes an image")
        assert "more than the limit of 9, which --pair-passes inf lifts" in found.reason
    assert not any(calls)  # no gradient was asked for
    assert isinstance(certify(layer, clean, labels, Linf(0.1), CertificateSettings(jacobian_passes=10.0)), Certificate)
