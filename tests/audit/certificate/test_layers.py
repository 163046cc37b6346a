"""Rows of certificates: what they bound, what heads achieve beside it, and what is flagged."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from audit.adversary.label_attack import TIERS as ATTACKS
from audit.adversary.threat import L2, Linf
from audit.certificate import layers as module
from audit.certificate.certificate import Certificate, CertificateSettings
from audit.certificate.collision_search import SearchEffort
from audit.certificate.layers import Case, CertificationSettings, Examples, certify_layers, kept_on_exhibits
from audit.errors import UnknownNameError
from audit.information.probes import ProbeTraining
from audit.random_keys import keyed_generator
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


def case(count=30, **changes):
    net = network()
    drawn = torch.rand(count + 60, 1, 6, 6, generator=keyed_generator(0))
    net[3].bias -= net(drawn).mean(0)  # so that classes are of about one size
    labels = net(drawn).argmax(1)
    examples = Examples(drawn[count:], labels[count:])
    given = {"network": net, "clean": drawn[:count], "labels": labels[:count], "classes": 3, "examples": examples}
    return Case(**(given | changes))


@pytest.fixture(scope="module")
def outcomes():
    told = []
    found = certify_layers(
        case(), ["1", "logits"], [Linf(0.03), Linf(0.1)], QUICK,
        lambda layer, threat, stage, met: told.append((layer, threat.eps, stage, met)),
    )  # fmt: skip
    return {(o.row.layer, o.row.eps): o for o in found}, told


def test_a_row_for_every_layer_and_radius(outcomes):
    found, told = outcomes
    assert list(found) == [("1", 0.03), ("1", 0.1), ("logits", 0.03), ("logits", 0.1)]
    for (layer, eps), (row, threat, certificate) in found.items():
        assert (threat, row.images, row.dimension) == (Linf(eps), 30, 3 if layer == "logits" else 20)
        assert row.certified_bound == certificate.bound.certified
        assert row.certified_bound <= row.certified_bound_randomised <= row.certified_bound_population
        assert row.certified_tier == "bit-identical at float32"
    assert {stage for _, _, stage, _ in told} >= {"hubs", "heads"}
    assert max(met for *_, stage, met in told if stage == "hubs") > 5


def test_achieved_stays_under_certified(outcomes):
    for row, _, _ in outcomes[0].values():
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
    for row, _, _ in outcomes[0].values():
        data = json.loads(json.dumps(row.to_dict(), allow_nan=False))
        assert data["delta_curve"][0]["bound"] <= data["certified_bound"]
        assert {"certified_bound_population", "best_head", "best_head_accuracy", "passes", "reason"} <= set(data)


def test_what_a_search_missed_is_carried_to_it(monkeypatch):
    """A search that fails at the larger radius and the later layer inherits what the others found."""
    original = module.certify

    def lazy(layer, clean, labels, threat, settings, watch):
        if threat.eps > 0.05 or layer.precise.layer == "logits":
            settings = replace(settings, effort=SearchEffort(hubs=0, neighbours=0))
        return original(layer, clean, labels, threat, settings, watch)

    monkeypatch.setattr(module, "certify", lazy)
    # the layer before the last is narrow, so that images meet there
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2), nn.Linear(2, 3))
    subject = case(network=net, labels=torch.arange(30) % 3, examples=None)
    rows = [o.row for o in certify_layers(subject, ["1", "logits"], [Linf(0.05), Linf(0.1)], QUICK)]
    assert rows[0].certified_bound < 1
    assert [row.certified_bound for row in rows] == [rows[0].certified_bound] * 4
    assert [row.carried_from for row in rows] == ["", "1 at 0.05", "1 at 0.05", "1 at 0.05"]


def test_a_head_above_the_bound_shows_a_weak_attack(monkeypatch):
    def blunt(network, images, labels, threat, attack, seed, original=module.measure_accuracy):
        return original(network, images, labels, Linf(0.0), attack, seed)

    monkeypatch.setattr(module, "measure_accuracy", blunt)
    (outcome,) = certify_layers(case(examples=None), ["logits"], [Linf(0.1)], QUICK)
    (flag,) = outcome.row.flags
    assert outcome.row.best_head_accuracy == 1
    assert flag.startswith("weak attack: own keeps 1.000 under ")
    assert f"no head keeps more than {outcome.row.certified_bound:.3f}" in flag


def test_a_false_certificate_is_contradicted_by_a_head(monkeypatch):
    def boastful(*arguments, original=module.certify):
        found = original(*arguments)
        return found._replace(bound=found.bound._replace(kept=0), meetings=found.meetings.kept(slice(0)))

    monkeypatch.setattr(module, "certify", boastful)
    (outcome,) = certify_layers(case(examples=None), ["logits"], [Linf(0.1)], QUICK)
    assert "contradicted: own keeps 30 images on the exhibits, of 0 possible" in outcome.row.flags


def test_kept_on_exhibits_counts_an_image_once_and_only_if_it_is_never_lost(outcomes):
    subject, certificate = case(), outcomes[0]["logits", 0.1].certificate
    assert isinstance(certificate, Certificate)
    assert kept_on_exhibits(subject.network, certificate.meetings, subject) <= certificate.bound.kept
    nothing = certificate.meetings.kept(torch.zeros(len(certificate.meetings.members), dtype=torch.bool))
    assert kept_on_exhibits(subject.network, nothing, subject) == 30


def test_a_headless_encoder_has_no_head_of_its_own():
    (outcome,) = certify_layers(case(headless=True), ["logits"], [Linf(0.1)], QUICK)
    assert set(outcome.row.heads) == {"slf", "mlp", "alf"}
    (bare,) = certify_layers(case(headless=True, examples=None), ["logits"], [Linf(0.1)], QUICK)
    assert (bare.row.best_head, bare.row.best_head_accuracy, bare.row.attack) == (None, None, "")
    assert bare.row.certified_bound == outcome.row.certified_bound


class _Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.side, self.head = nn.Linear(36, 2), nn.Linear(38, 3)

    def forward(self, images):
        return self.head(torch.cat([self.side(images.flatten(1)), images.flatten(1)], 1))


def test_a_head_that_sees_more_than_the_layer_is_none_on_it():
    (outcome,) = certify_layers(case(network=_Bypassed(), examples=None), ["side"], [Linf(0.1)], QUICK)
    assert outcome.row.heads == {}


def test_where_no_certificate_applies_the_reason_is_given_and_heads_are_measured():
    (outcome,) = certify_layers(case(examples=None), ["logits"], [L2(0.5)], QUICK)
    assert outcome.certificate is None
    assert outcome.row.certified_bound is outcome.row.certified_bound_population is None
    assert outcome.row.reason.startswith("not applicable: the search keeps every pixel in its own interval")
    assert outcome.row.best_head == "own"
    assert outcome.row.delta_curve == ()


def test_held_out_hubs_are_a_column_of_their_own():
    settings = replace(QUICK, held_out=True)
    (outcome,) = certify_layers(case(60, examples=None), ["logits"], [Linf(0.15)], settings)
    assert 0 < outcome.row.certified_bound_held_out < 1
    assert outcome.row.certified_bound_held_out != outcome.row.certified_bound_population


def test_an_unknown_layer_is_named():
    with pytest.raises(UnknownNameError, match="unknown layer 'logit'"):
        certify_layers(case(), ["logit"], [Linf(0.1)], QUICK)
