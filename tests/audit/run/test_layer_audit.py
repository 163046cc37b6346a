"""Complete audits of an `nn.Module`, trained in a second on scikit-learn's digits."""

from dataclasses import dataclass, fields, replace
from math import log

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import L1, L2, Linf
from audit.config.settings import AuditSettings
from audit.errors import InvalidModelError, MismatchError, UsageError
from audit.information.estimator import COLD_START, Estimator, EstimatorInputs, MIEstimate, Vulnerability
from audit.information.floors import InformationFloors
from audit.information.mine import Mine
from audit.information.sandwich import Sandwich
from audit.information.settings import CriticTraining, WorstCaseSearch
from audit.records import AuditRecord, RecordStore
from audit.representation.layers import Representation
from audit.run import layer_audit as measurement
from audit.run.assembly import _curve, over_seeds
from audit.run.network_audit import audit_network
from audit.run.upkeep.verification import check_record
from audit.theory import information_floor
from reports.tables.columns import CERTIFICATE, HEADS, LEDGER

QUICK = AuditSettings(
    estimator=Mine(
        CriticTraining(steps=40, every=10),
        WorstCaseSearch(collapse_steps=4, rounds=4, critic_steps=1, relative_step=0.5),
    ),
    attack=two_losses(PGD(3, 0.5)),
    seeds=(0, 1),
)


def digits(classes=10):
    pixels, labels = load_digits(n_class=classes, return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return images[order], torch.tensor(labels)[order]


def trained(classes=10):
    images, labels = digits(classes)
    draws = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, classes),
        )  # fmt: skip
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(100):
        chosen = torch.randint(len(labels) - 200, (64,), generator=draws)
        optimiser.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimiser.step()
    optimiser.zero_grad()
    return network


@pytest.fixture(scope="module")
def network():
    return trained()


@pytest.fixture(scope="module")
def held_out():
    images, labels = digits()
    return images[-200:], labels[-200:]


@pytest.fixture(scope="module")
def record(network, held_out):
    network.train()
    before = torch.random.get_rng_state()
    record = audit_network(network, *held_out, "logits", Linf(0.1), QUICK)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not network.training
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    return record


PROBES = ("worst_probe_accuracy", "worst_probe_accuracy_low", "worst_probe_accuracy_high")


def check(record, threat, layer, images=200, classes=10):
    """Check what holds for every record."""
    missing = {f.name for f in fields(record) if getattr(record, f.name) in (None, "")} - {"reason"}
    # no certificate was requested, a critic is no classifier, and the network has one of its own
    assert missing == {*CERTIFICATE, *LEDGER, *PROBES, *HEADS} | (missing & {"floor_nats"})
    assert record.valid
    assert (record.norm, record.eps, record.layer) == (threat.norm, threat.eps, layer)
    assert (record.images, record.num_classes) == (images, classes)
    assert record.critic_images == images - int(0.7 * images)
    for name in ("natural_accuracy", "adversarial_accuracy"):
        value, low, high = (getattr(record, name + end) for end in ("", "_low", "_high"))
        assert 0 <= low <= value <= high <= 1
    assert record.adversarial_accuracy <= record.natural_accuracy
    assert record.adversarial_gap == record.natural_accuracy - record.adversarial_accuracy
    assert 1 / classes <= record.adversarial_accuracy_bound <= 1
    assert record.adversarial_risk_bound == 1 - record.adversarial_accuracy_bound
    assert 1 / classes <= record.fano_accuracy_bound <= 1
    assert (record.quantity, record.ranks) == ("I(X; g(X))", True)
    assert record.rv == pytest.approx(record.normal_nats - record.worst_nats, abs=1e-9)
    assert record.normal_nats <= record.ceiling_nats == pytest.approx(log(record.critic_images))
    assert all(getattr(record, name) > 0 for name in ("normal_nats_se", "worst_nats_se", "rv_se"))
    assert record.seconds > 0
    assert record.passes > 0


def test_a_complete_record(record):
    check(record, Linf(0.1), "logits")
    assert (record.model, record.family, record.source, record.dataset) == (
        "Sequential",
        "Sequential",
        "python",
        "python",
    )
    assert (record.estimator, record.attack, record.seeds) == ("mine-infonce", "ce-3+margin-3", 2)
    assert record.dimension == 10
    assert record.natural_accuracy > 0.8
    assert record.adversarial_gap > 0.2
    assert log(10) >= record.floor_nats > 2
    assert record.rv > 0
    assert not record.contradicted
    rows, curves = record.details["per_seed"], record.details["curves"]
    assert [row["seed"] for row in rows] == [curve["seed"] for curve in curves] == [0, 1]
    assert record.normal_nats == pytest.approx(sum(row["normal_nats"] for row in rows) / 2)
    assert record.rv == pytest.approx(sum(row["rv"] for row in rows) / 2)
    assert curves[0]["normal"]["validation"][0][0] == 0
    assert 0 < record.details["worst_floor_nats"] <= record.worst_nats + 1e-6


def test_a_record_round_trips_through_the_store(record, tmp_path):
    store = RecordStore(tmp_path)
    store.write(record)
    assert store.read(record.cell_id) == record


def test_accuracies_equal_those_of_the_attack_alone(record, network, held_out):
    found = measure_accuracy(network, *held_out, Linf(0.1), QUICK.attack, 0)
    assert record.natural_accuracy == found.natural.value
    assert record.adversarial_accuracy == found.adversarial.value


def test_audits_are_deterministic(record, network, held_out):
    again = audit_network(network, *held_out, "logits", Linf(0.1), QUICK)
    assert replace(again, seconds=record.seconds) == record


def test_the_cell_id_depends_on_everything_that_decides_numbers(network, held_out, monkeypatch):
    # only ids matter: a planted result replaces the measurements
    monkeypatch.setattr(measurement.LayerAudit, "under", lambda *_: planted(1.0, 0.5))
    images, labels = held_out
    one = replace(QUICK, seeds=(0,))
    other = trained()
    with torch.no_grad():
        other[-1].bias[0] += 1e-3

    threat = Linf(0.1)

    def name(network=network, images=images, labels=labels, layer="logits", threat=threat, settings=one):
        return audit_network(network, images, labels, layer, threat, settings).cell_id

    names = [
        name(), name(network=other), name(images=1 - images), name(labels=labels.flip(0)), name(layer="penultimate"),
        name(threat=Linf(0.2)), name(threat=L2(0.1)), name(settings=replace(one, seeds=(1,))),
        name(settings=replace(one, reduce="mean")),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert name() == names[0]


@pytest.mark.parametrize(
    ("layer", "reduce", "threat", "dimension"),
    [
        ("input", "flatten", L1(2.0), 64),
        ("penultimate", "flatten", L2(0.6), 256),
        ("logits", "flatten", L1(2.0), 10),
        ("logits", "flatten", L2(0.6), 10),
        ("2", "mean", Linf(0.1), 16),
        ("0", "mean", L2(0.6), 8),
        ("2", "flatten", L1(2.0), 256),
    ],
)
def test_other_layers_and_norms(network, held_out, layer, reduce, threat, dimension):
    frozen = trained().requires_grad_(False)
    record = audit_network(frozen, *held_out, layer, threat, replace(QUICK, reduce=reduce, seeds=(0,)))
    check(record, threat, layer)
    assert record.dimension == dimension
    assert record.worst_nats <= record.normal_nats + 2 * record.rv_se
    assert reduce == "mean" or record.floor_nats > 2  # the output passes through each of these layers


@pytest.mark.parametrize("layer", ["input", "0"])
def test_averaged_features_have_no_floor(held_out, layer):
    frozen = trained().requires_grad_(False)
    record = audit_network(frozen, *held_out, layer, Linf(0.1), replace(QUICK, reduce="mean", seeds=(0,)))
    assert record.floor_nats is None


def test_threat_models_share_the_normal_case(record, network, held_out):
    layer = measurement.LayerAudit(network, *held_out, "logits", QUICK)
    found = [layer.under(threat) for threat in (Linf(0.05), Linf(0.1))]
    assert found[0].per_seed[1].normal is found[1].per_seed[1].normal
    rows = record.details["per_seed"]
    assert [run.normal.nats for run in found[1].per_seed] == [row["normal_nats"] for row in rows]
    assert [run.worst.nats for run in found[1].per_seed] == [row["worst_nats"] for row in rows]


def test_an_inner_layer_of_a_network_that_is_not_frozen(network, held_out):
    assert all(p.requires_grad for p in network.parameters())
    audit_network(network, *held_out, "2", Linf(0.1), replace(QUICK, reduce="mean", seeds=(0,)))


def test_radius_zero_changes_nothing(network, held_out):
    record = audit_network(network, *held_out, "logits", Linf(0.0), QUICK)
    assert record.worst_nats == record.normal_nats
    assert (record.rv, record.adversarial_gap) == (0, 0)
    assert record.adversarial_accuracy == record.natural_accuracy


def test_two_classes():
    images, labels = digits(2)
    record = audit_network(trained(2), images[-200:], labels[-200:], "logits", Linf(0.3), QUICK)
    check(record, Linf(0.3), "logits", classes=2)
    assert record.natural_accuracy > 0.9
    assert log(2) >= record.floor_nats > 0.5


LN_60 = log(60)


def planted(normal, worst, floors=None, ceiling=LN_60, flags=()):
    def said(nats):
        return MIEstimate(nats, 0.01, 60, ceiling, nats, history=((0, 0.0),), flags=flags)

    run = Vulnerability(said(normal), said(worst), torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), 1.0)
    return measurement.LayerResult((run,), floors, 10)


def test_a_ceiling_of_ln_k_is_not_flagged_as_saturation(network, held_out, monkeypatch):
    monkeypatch.setattr(measurement.LayerAudit, "under", lambda *_: planted(2.3, 2.0, ceiling=log(10)))
    record = audit_network(network, *held_out, "logits", Linf(0.001), replace(QUICK, seeds=(0,)))
    assert not any(flag.startswith("saturated") for flag in record.flags)


@pytest.mark.parametrize(
    ("layer", "flag"),
    [
        (
            planted(1.0, 0.5, InformationFloors(2.2, 0.1)),
            "contradicted: normal_nats 1.00 is below its measured floor 2.20",
        ),
        (
            planted(2.3, 0.5, InformationFloors(2.2, 2.0)),
            "contradicted: worst_nats 0.50 is below its measured floor 2.00",
        ),
        (planted(2.3, 2.5), "contradicted: worst_nats 2.50 is above normal_nats 2.30"),
        # at zero nats exact Fano leaves the largest class: 26 of the 200 images
        (planted(2.3, 0.0), "contradicted: the bound 0.130 is below the measured adversarial accuracy's"),
        (planted(3.95, 2.0), "few_images: normal_nats 3.95 is at its ceiling"),
        (planted(4.08, 4.04), "saturated: worst_nats 4.04 is within 0.1 of its ceiling"),
        (planted(2.3, -0.5), "negative: worst_nats -0.50 is below zero"),
        (planted(2.3, 2.0, flags=("not_converged: x",)), "not_converged: x"),
    ],
)
def test_planted_faults_are_flagged(network, held_out, monkeypatch, layer, flag):
    monkeypatch.setattr(measurement.LayerAudit, "under", lambda *_: layer)
    record = audit_network(network, *held_out, "logits", Linf(0.001), replace(QUICK, seeds=(0,)))
    assert sum(found.startswith(flag) for found in record.flags) == 1
    assert record.contradicted == any(found.startswith("contradicted") for found in record.flags)
    assert record.contradicted or not flag.startswith("contradicted")


def test_an_accuracy_between_the_two_bounds_contradicts_the_tighter_one(network, held_out, monkeypatch):
    found = measure_accuracy(network, *held_out, Linf(0.001), QUICK.attack, 0)
    nats = information_floor(found.adversarial.low - 0.01, found.largest_share)
    monkeypatch.setattr(measurement.LayerAudit, "under", lambda *_: planted(2.3, nats))
    record = audit_network(network, *held_out, "logits", Linf(0.001), replace(QUICK, seeds=(0,)))
    assert record.fano_accuracy_bound < record.adversarial_accuracy_low < record.adversarial_accuracy_bound
    assert record.contradicted


@dataclass(frozen=True)
class Told(Estimator):
    """Constant estimator: 0.5 nats, and 0.4 on the first 20 images in the worst case."""

    quantity = "I(nothing)"
    ranks = False
    name = "told"

    def normal(self, inputs, seed):
        return MIEstimate(0.5, 0.01, 20, 3.0, 0.5)

    def vulnerability(self, inputs, threat, seed, warm_start=COLD_START):
        worst = MIEstimate(0.4, 0.01, 20, 3.0, 0.4)
        return Vulnerability(warm_start.normal, worst, inputs.images[:20], torch.arange(20), 20.0)


class ToldOfLabels(Told):
    floor_kind = "labels"


class ToldOfNoise(Told):
    bounds_heads = False
    floor_kind = "smoothed"

    def noisy(self, clean, features, generator):
        return features + 1000 * torch.randn(features.shape, generator=generator)


def test_estimator_properties_choose_floors_and_bounds(network, held_out):
    def audited(estimator, layer="logits"):
        return audit_network(network, *held_out, layer, Linf(0.0), replace(QUICK, estimator=estimator))

    answers, labels, noise = (audited(estimator()) for estimator in (Told, ToldOfLabels, ToldOfNoise))
    assert (answers.estimator, answers.quantity, answers.ranks) == ("told", "I(nothing)", False)
    assert 0.5 < labels.floor_nats < answers.floor_nats <= log(10)
    assert answers.contradicted
    assert labels.contradicted
    # predictions from logits under large noise prove almost nothing, and nothing about layers before the logits
    assert noise.floor_nats < 0.1
    assert noise.adversarial_accuracy_bound is noise.fano_accuracy_bound is noise.adversarial_risk_bound is None
    assert not noise.contradicted
    assert audited(ToldOfNoise(), "input").floor_nats is None


def test_the_worst_case_floor_uses_its_own_images(network, held_out):
    images, _ = held_out
    which = torch.tensor([7, 3, 50, 90, 120, 11])
    run = Vulnerability(*[MIEstimate(0.0, 0.01, 6, 1.0, 0.0)] * 2, images[which], which, 1.0)
    settings = replace(QUICK, estimator=ToldOfLabels())
    subject = EstimatorInputs(None, images, network(images).argmax(1))
    assert measurement.measured_floors(network, subject, (run,), settings).worst > 0.2  # all six are correct
    answers = subject.labels
    astray = run._replace(indices=torch.stack([(answers != answers[i]).nonzero()[0, 0] for i in which]))
    assert measurement.measured_floors(network, subject, (astray,), settings).worst == 0


def test_seeds_share_images_so_that_more_of_them_do_not_lower_the_sampling_error():
    assert over_seeds([1.0, 1.0], [0.2, 0.2]) == (1.0, pytest.approx(0.2))
    assert over_seeds([0.0, 2.0], [0.1, 0.1]) == (1.0, pytest.approx(1.01**0.5))
    assert over_seeds([3.0], [0.1]) == (3.0, pytest.approx(0.1))


def test_curve_values_that_are_not_finite_become_none():
    assert _curve(((0, 0.5), (10, float("nan")), (20, float("-inf")))) == [[0, 0.5], [10, None], [20, None]]


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_that_are_refused(seeds):
    with pytest.raises(UsageError, match="must be at least one, each named once"):
        AuditSettings(seeds=seeds)


X, Y = torch.rand(100, 1, 8, 8), torch.arange(100) % 10
FLAT = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize(
    ("network", "images", "labels", "error", "message"),
    [
        (FLAT, 2 * X, Y, UsageError, r"images range from .* to .*, not within \[0, 1\]: put the normalisation inside"),
        (FLAT, X - 0.5, Y, UsageError, r"not within \[0, 1\]"),
        (FLAT, X * torch.nan, Y, UsageError, r"images range from nan to nan, not within \[0, 1\]"),
        (FLAT, (255 * X).to(torch.uint8), Y, MismatchError, "images are uint8 of the shape"),
        (FLAT, X[:, 0], Y, MismatchError, r"images are float32 of the shape \(100, 8, 8\), not floats of the shape"),
        (FLAT, X[:0], Y[:0], MismatchError, r"images are float32 of the shape \(0, 1, 8, 8\)"),
        (FLAT, X, Y[:50], MismatchError, "100 images, but 50 labels"),
        (FLAT, X, Y.float(), MismatchError, "labels are float32"),
        (
            FLAT,
            X,
            Y[:, None],
            MismatchError,
            r"labels are int64 of the shape \(100, 1\), not int64 of the shape \(N,\)",
        ),
        (FLAT, X, Y + 1, MismatchError, "labels range from 1 to 10, but the network has 10 outputs"),
        (FLAT, X, Y - 1, MismatchError, "labels range from -1 to 8, but the network has 10 outputs"),
        (nn.Identity(), X, Y, MismatchError, "the network does not return logits of the shape"),
        (nn.Sequential(FLAT, nn.Flatten(0)), X, Y, MismatchError, "the network does not return logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), X, 0 * Y, MismatchError, "for two or more classes"),
        (FLAT, X[:30], Y[:30], UsageError, "30 images are too few"),
        (nn.Sequential(FLAT, nn.Threshold(1e9, torch.nan)), X, Y, InvalidModelError, "not finite for 100 of 100"),
    ],
)
def test_input_that_is_refused(network, images, labels, error, message):
    with pytest.raises(error, match=message):
        audit_network(network, images, labels, "logits", Linf(0.1), QUICK)


def test_a_record_round_trips_through_a_dict(record):
    assert AuditRecord.from_dict(record.to_dict()) == record


def test_a_worst_case_search_that_fails_its_checks_is_flagged(network, held_out):
    settings = replace(QUICK, estimator=Sandwich(steps=2, start_steps=2, draws=1), seeds=(0,))
    found = audit_network(network, *held_out, "logits", Linf(0.1), settings)
    ours = [check for check in found.checks if check["name"].startswith("worst case: ")]
    assert [check["id"] for check in ours] == [
        "worst_case_gradient",
        "worst_case_zero_gradient",
        "worst_case_slope",
        "worst_case_more_steps",
        "worst_case_wider_ball",
    ]
    assert all(check["passed"] for check in ours[:3])
    assert not found.untrusted
    assert sum(check["passes"] for check in ours) <= 20 * 19

    class Flat(nn.Module):
        def forward(self, images):
            return network((images * 16).round() / 16 + 0 * images) + 0 * images.flatten(1).sum(1, keepdim=True)

    layer = measurement.LayerAudit(Flat(), *held_out, "logits", settings)
    failed = [check for check in layer.under(Linf(0.1)).checks if check.level == "trust" and check.passed is False]
    assert {check.id for check in failed} >= {"worst_case_zero_gradient", "worst_case_slope"}
    masked = audit_network(Flat(), *held_out, "logits", Linf(0.1), settings)
    assert any(flag.startswith("untrusted_search: the worst-case search failed ") for flag in masked.flags)
    assert masked.untrusted
    still = measurement.LayerAudit(network, *held_out, "logits", settings)
    assert still.under(Linf(0.0)).checks == ()


def test_estimators_and_layers_without_an_objective(network, held_out):
    subject = EstimatorInputs(measurement.Representation(network, "logits").encode, *held_out)
    assert QUICK.estimator.objective(subject) is None
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(flat[1].weight)
    assert Sandwich().objective(EstimatorInputs(measurement.Representation(flat, "logits").encode, *held_out)) is None


def test_the_attack_version_depends_on_the_norm(network, held_out):
    asking = replace(
        QUICK, attack=replace(QUICK.attack, queries=5), estimator=Sandwich(steps=2, start_steps=2, draws=1)
    )
    names = {t.norm: audit_network(network, *held_out, "logits", t, asking) for t in (Linf(0.1), L2(0.5))}
    assert names["linf"].attack.endswith("+square-5")
    assert "differences-5" in names["l2"].attack.split("+")
    versions = {norm: record.details["identity"]["settings"]["attack"]["version"] for norm, record in names.items()}
    assert versions["linf"] == asking.attack.version != versions["l2"]


class Normed(torch.nn.Module):
    """A network with a batch norm to fold."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4 * 36, 10)
        self.norm.running_mean.add_(0.3)

    def forward(self, images):
        return self.head(self.norm(self.convolution(images)).relu().flatten(1))


@pytest.mark.parametrize(("layer", "copied"), [("logits", True), ("penultimate", True), ("convolution", False)])
def test_searches_use_the_fused_copy_and_estimates_the_network(held_out, layer, copied):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Normed().eval()
    asked = []
    network.norm.register_forward_hook(lambda _module, inputs, _output: asked.append(inputs[0].requires_grad))
    subject = measurement.LayerAudit(network, *held_out, layer, QUICK).inputs
    leaf = subject.images[:8].clone().requires_grad_()
    subject.encoder(leaf)  # compares the copy with the network, gradients included
    asked.clear()
    moving = subject.encoder(leaf).features
    assert any(asked) != copied
    with torch.no_grad():
        reading = subject.encoder(subject.images[:8]).features
    assert torch.allclose(moving.detach(), reading, atol=1e-5)
    assert reading.equal(Representation(network, layer)(subject.images[:8]).detach())


def test_audits_and_cells_share_the_rule_of_identity(record):
    assert check_record(record) == []
    assert record.details["identity"]["network"] == "python"
    assert record.details["data_sha256"] == record.details["identity"]["data_sha256"]
