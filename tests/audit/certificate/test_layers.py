"""Certificates of several layers and radii, with measured heads and flags."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from audit.adversary.label_attack import TIERS as ATTACKS
from audit.adversary.threat import L2, Linf
from audit.certificate import layers as module
from audit.certificate.collision_search import SearchEffort
from audit.certificate.contradictions import correct_on_witnesses
from audit.certificate.layers import (
    CertificationInputs,
    CertificationSettings,
    HeadTrainingData,
    certify_layers,
)
from audit.certificate.results import Certificate
from audit.certificate.settings import CertificateSettings
from audit.errors import UnknownNameError, UsageError
from audit.information.probing.settings import ProbeTraining
from audit.random_keys import keyed_generator
from audit.representation.headless import Headless
from audit.training.heads import HeadTraining

EFFORT = SearchEffort(hubs=1, neighbours=4)
QUICK = CertificationSettings(
    CertificateSettings(effort=EFFORT, seconds=5),
    ATTACKS["smoke"],
    HeadTraining(ProbeTraining(steps=30), epochs=1),
)


def network(key=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 3)).requires_grad_(False)


def inputs(count=30, **changes):
    net = network()
    drawn = torch.rand(count + 60, 1, 6, 6, generator=keyed_generator(0))
    net[3].bias -= net(drawn).mean(0)  # balances the classes
    labels = net(drawn).argmax(1)
    data = HeadTrainingData(drawn[count:], labels[count:])
    given = {"network": net, "clean": drawn[:count], "labels": labels[:count], "classes": 3, "training_data": data}
    return CertificationInputs(**(given | changes))


@pytest.fixture(scope="module")
def outcomes():
    reports = []
    found = certify_layers(
        inputs(),
        ["1", "logits"],
        [Linf(0.03), Linf(0.1)],
        QUICK,
        lambda layer, threat, stage, collided: reports.append((layer, threat.eps, stage, collided)),
    )
    return {(o.row.layer, o.row.eps): o for o in found}, reports


def test_a_row_for_every_layer_and_radius(outcomes):
    found, reports = outcomes
    assert list(found) == [("1", 0.03), ("1", 0.1), ("logits", 0.03), ("logits", 0.1)]
    for (layer, eps), (row, threat, certificate, _) in found.items():
        assert (threat, row.images, row.dimension) == (Linf(eps), 30, 3 if layer == "logits" else 20)
        assert row.certified_bound == certificate.bound.certified
        assert row.certified_bound <= row.certified_bound_randomised <= row.certified_bound_population
        assert row.certified_tier == "bit-identical at float32"
    assert {stage for _, _, stage, _ in reports} >= {"hubs", "heads"}
    assert max(collided for *_, stage, collided in reports if stage == "hubs") > 5


def test_measured_heads_stay_below_the_bound(outcomes):
    for row, *_ in outcomes[0].values():
        assert set(row.heads) == {"own", "slf", "mlp", "alf"}
        assert row.best_head_accuracy == max(row.heads.values()) == row.heads[row.best_head]
        assert row.best_head_accuracy <= row.certified_bound
        assert row.flags == ()
    assert outcomes[0]["logits", 0.1].row.certified_bound < 0.6


def test_bounds_fall_with_eps_and_along_the_layers(outcomes):
    bound = {place: outcome.row.certified_bound for place, outcome in outcomes[0].items()}
    assert bound["1", 0.03] >= bound["1", 0.1] >= bound["logits", 0.1]
    assert bound["logits", 0.03] >= bound["logits", 0.1]


def test_rows_are_plain_json(outcomes):
    for row, *_ in outcomes[0].values():
        data = json.loads(json.dumps(row.to_dict(), allow_nan=False))
        assert data["delta_curve"][0]["bound"] <= data["certified_bound"]
        assert {"certified_bound_population", "best_head", "best_head_accuracy", "passes", "reason"} <= set(data)


def test_collisions_transfer_to_larger_radii_and_later_layers(monkeypatch):
    """A search that fails at the larger radius and the later layer gets the collisions of the others."""
    original = module.certify

    def lazy(layer, clean, labels, threat, settings, on_progress):
        if threat.eps > 0.05 or layer.precise.layer == "logits":
            settings = replace(settings, effort=SearchEffort(hubs=0, neighbours=0))
        return original(layer, clean, labels, threat, settings, on_progress)

    monkeypatch.setattr(module, "certify", lazy)
    # the layer before the last is narrow, so that images collide there
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2), nn.Linear(2, 3))
    subject = inputs(network=net, labels=torch.arange(30) % 3, training_data=None)
    rows = [o.row for o in certify_layers(subject, ["1", "logits"], [Linf(0.05), Linf(0.1)], QUICK)]
    assert rows[0].certified_bound < 1
    assert [row.certified_bound for row in rows] == [rows[0].certified_bound] * 4
    assert [row.carried_from for row in rows] == ["", "1 at 0.05", "1 at 0.05", "1 at 0.05"]


def test_a_head_above_the_bound_shows_a_weak_attack(monkeypatch):
    def without_perturbation(network, images, labels, threat, attack, seed, original=module.measure_accuracy):
        return original(network, images, labels, Linf(0.0), attack, seed)

    monkeypatch.setattr(module, "measure_accuracy", without_perturbation)
    (outcome,) = certify_layers(inputs(training_data=None), ["logits"], [Linf(0.1)], QUICK)
    (flag,) = outcome.row.flags
    assert outcome.row.best_head_accuracy == 1
    assert flag.startswith("weak_attack: own has adversarial accuracy 1.000 under ")
    assert f"above the certified upper bound {outcome.row.certified_bound:.3f}" in flag


def test_a_head_contradicts_a_false_certificate(monkeypatch):
    def false_bound(*arguments, original=module.certify):
        found = original(*arguments)
        return found._replace(bound=found.bound._replace(kept=0), collisions=found.collisions.select(slice(0)))

    monkeypatch.setattr(module, "certify", false_bound)
    (outcome,) = certify_layers(inputs(training_data=None), ["logits"], [Linf(0.1)], QUICK)
    assert (
        "contradicted: own classifies 30 images correctly on all collision witnesses, above the certified upper bound 0"
        in (outcome.row.flags)
    )


def test_correct_on_witnesses_counts_images_that_are_correct_everywhere(outcomes):
    subject, certificate = inputs(), outcomes[0]["logits", 0.1].certificate
    assert isinstance(certificate, Certificate)
    assert (
        correct_on_witnesses(subject.network, certificate.collisions, (subject.clean, subject.labels))
        <= certificate.bound.kept
    )
    nothing = certificate.collisions.select(torch.zeros(len(certificate.collisions.members), dtype=torch.bool))
    assert correct_on_witnesses(subject.network, nothing, (subject.clean, subject.labels)) == 30


def test_a_headless_encoder_has_no_head_of_its_own():
    (outcome,) = certify_layers(inputs(headless=True), ["logits"], [Linf(0.1)], QUICK)
    assert set(outcome.row.heads) == {"slf", "mlp", "alf"}
    (bare,) = certify_layers(inputs(headless=True, training_data=None), ["logits"], [Linf(0.1)], QUICK)
    assert (bare.row.best_head, bare.row.best_head_accuracy, bare.row.attack) == (None, None, "")
    assert bare.row.certified_bound == outcome.row.certified_bound


def test_the_output_of_an_encoder_is_certified_and_proved_as_the_same_layer_of_a_classifier():
    subject = inputs()
    encoder = replace(subject, network=Headless(subject.network[:2]).eval(), headless=True)
    tier = replace(QUICK, certificate=replace(QUICK.certificate, tier="proved"), measured=())
    for settings in (replace(QUICK, measured=()), tier):
        (whole,) = certify_layers(subject, ["1"], [Linf(0.1)], settings)
        bounds = [certify_layers(encoder, [layer], [Linf(0.1)], settings)[0].row for layer in ("output", "penultimate")]
        assert [row.certified_bound for row in bounds] == [whole.row.certified_bound] * 2
        assert (whole.row.certified_bound, whole.row.reason) != (None, "")
    with pytest.raises(UsageError, match="layer 'logits' does not exist"):
        certify_layers(encoder, ["logits"], [Linf(0.1)], QUICK)


class _Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.side, self.head = nn.Linear(36, 2), nn.Linear(38, 3)

    def forward(self, images):
        return self.head(torch.cat([self.side(images.flatten(1)), images.flatten(1)], 1))


def test_a_head_that_bypasses_the_layer_is_not_measured():
    (outcome,) = certify_layers(inputs(network=_Bypassed(), training_data=None), ["side"], [Linf(0.1)], QUICK)
    assert outcome.row.heads == {}


class _Wide(nn.Module):
    """A layer with more features than pixels."""

    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(36, 40), nn.Linear(40, 3)

    def forward(self, images):
        return self.head(torch.relu(self.wide(images.flatten(1))))


def test_without_a_certificate_the_reason_is_given_and_heads_are_measured():
    (outcome,) = certify_layers(inputs(network=_Wide(), training_data=None), ["wide"], [L2(0.5)], QUICK)
    assert outcome.certificate is None
    assert outcome.row.certified_bound is outcome.row.certified_bound_population is None
    assert outcome.row.reason.startswith("not applicable: the layer has 40 features but the image only 36 pixels")
    assert outcome.row.best_head == "own"
    assert outcome.row.delta_curve == ()


def test_the_held_out_bound_has_its_own_column():
    settings = replace(QUICK, held_out=True)
    (outcome,) = certify_layers(inputs(60, training_data=None), ["logits"], [Linf(0.15)], settings)
    assert 0 < outcome.row.certified_bound_held_out < 1
    assert outcome.row.certified_bound_held_out != outcome.row.certified_bound_population


def test_an_unknown_layer_is_named():
    with pytest.raises(UnknownNameError, match="unknown layer 'logit'"):
        certify_layers(inputs(), ["logit"], [Linf(0.1)], QUICK)
