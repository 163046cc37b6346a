"""Cross-fitted label information of probes, and its invariance to the units of the features."""

from math import log

import pytest
import torch
import torch.nn.functional as F

from audit.calibration.closed_forms import two_points
from audit.errors import UsageError
from audit.information.probing import probes
from audit.information.floors import empirical_entropy
from audit.information.probing.probes import FITS, fit_hidden, fit_linear, label_terms
from audit.information.probing.settings import ProbeTraining

KINDS = pytest.mark.parametrize("kind", sorted(FITS))
QUICK = ProbeTraining(steps=60)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def read(features, labels, kind="linear", training=QUICK, seed=0):
    return float(label_terms(features, labels, seed, training, kind).mean())


def gaussians(count=800, sigma=0.5, seed=0):
    labels = torch.arange(count) % 2
    return (2.0 * labels - 1)[:, None] + sigma * normal(count, 1, seed=seed), labels


@KINDS
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_two_gaussians_match_their_closed_form(kind, sigma):
    found = read(*gaussians(1500, sigma), kind)
    assert found == pytest.approx(two_points(sigma, 0.0).normal, abs=0.06)


@KINDS
def test_held_out_labels_are_not_used(kind):
    # 190 features fit 200 random labels: on the training samples the value is near ln 2
    features, labels = normal(200, 190), torch.randint(0, 2, (200,), generator=seeded(7))
    probe = FITS[kind](features, labels, 2, ProbeTraining(penalty=0.01))
    on_training_samples = log(2) - float(F.cross_entropy(probe(features), labels))
    assert on_training_samples > 0.6
    assert read(features, labels, kind) < 0


@KINDS
def test_every_sample_is_held_out_once(kind, monkeypatch):
    features, labels, fitted = torch.arange(23.0)[:, None], torch.arange(23) % 2, []
    fit = FITS[kind]

    def watched(kept, *others):
        fitted.append(set(kept[:, 0].int().tolist()))
        return fit(kept, *others)

    monkeypatch.setitem(probes.FITS, kind, watched)
    label_terms(features, labels, 0, ProbeTraining(folds=4, steps=5), kind)
    held_out = [set(range(23)) - kept for kept in fitted]
    assert len(held_out) == 4
    assert sorted(number for fold in held_out for number in fold) == list(range(23))


@KINDS
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
def test_constant_features_have_no_information(kind, constant):
    found = read(torch.full((300, 4), constant), torch.arange(300) % 3, kind)
    assert -0.02 < found <= 0.01


@KINDS
def test_one_class_has_no_information(kind):
    assert read(normal(60, 3), torch.full((60,), 7), kind) == 0


@KINDS
def test_value_is_at_most_the_entropy_of_the_labels(kind):
    labels = torch.cat([torch.zeros(180), torch.ones(60), 5 * torch.ones(60)]).long()  # classes 2 to 4 never occur
    features = 20 * F.one_hot(labels).float() + 0.01 * normal(300, 6)
    found = read(features, labels, kind)
    assert 0.9 * empirical_entropy(labels) < found <= empirical_entropy(labels)


@KINDS
@pytest.mark.parametrize(("factor", "shift"), [(1000.0, 5.0), (1e-4, 0.0), (1.0, 50.0)])
def test_units_of_the_features_have_no_effect(kind, factor, shift):
    features, labels = gaussians()
    assert read(factor * features + shift, labels, kind) == pytest.approx(read(features, labels, kind), abs=1e-3)


@KINDS
def test_a_large_unit_of_one_feature_does_not_hide_another(kind):
    # with one tolerance for all features, the smaller one counted as constant: -.003 instead of .34
    features, labels = gaussians()
    both = torch.cat([features, normal(800, 1, seed=3)], 1)
    found = read(both * torch.tensor([1.0, 1e9]), labels, kind)
    assert found == pytest.approx(read(both, labels, kind), abs=1e-3)
    assert found > 0.3


def test_a_feature_of_rounding_errors_is_ignored():
    features, labels = gaussians(200)
    rounding = 0.1 * (1 + 2**-24 * (torch.arange(200) % 3))[:, None]
    probe = fit_linear(torch.cat([features, rounding], 1), labels, 2, QUICK)
    assert probe.deviation.isinf().tolist() == [False, True]
    assert probe(torch.tensor([[0.3, 5.0]])).equal(probe(torch.tensor([[0.3, -5.0]])))


@KINDS
def test_log_loss_of_one_sample_is_limited(kind):
    features, labels = gaussians(200, 0.01)
    features[0] = 1e12
    found = label_terms(features, labels, 0, QUICK, kind)
    assert found.isfinite().all()
    assert float(found.min()) >= log(2) - log(1e6) - 1e-5


def test_linear_probe_minimises_the_penalised_loss():
    features, labels = gaussians(300)
    probe = fit_linear(features, labels, 2, ProbeTraining(penalty=3.0))

    def loss(weights, bias):
        standard = (features - features.mean(0)) / features.std(0, correction=0)
        return F.cross_entropy(standard @ weights.T + bias, labels) + 3.0 / 600 * weights.square().sum()

    weights, bias = (each.clone().requires_grad_() for each in probe.layers[0].parameters())
    for slope in torch.autograd.grad(loss(weights, bias), (weights, bias)):
        assert float(slope.abs().max()) < 1e-4


@KINDS
def test_seed_determines_the_folds_only(kind):
    features, labels = gaussians(100, 1.0)
    before = torch.random.get_rng_state()
    first = label_terms(features, labels, 0, QUICK, kind)
    assert label_terms(features, labels, 0, QUICK, kind).equal(first)
    assert not label_terms(features, labels, 1, QUICK, kind).equal(first)
    assert torch.random.get_rng_state().equal(before)


def test_hidden_layer_fits_a_product_of_features():
    features = normal(800, 2)
    labels = (features[:, 0] * features[:, 1] > 0).long()
    assert read(features, labels, "linear") < 0.02
    assert read(features, labels, "hidden", ProbeTraining()) > 0.4


def test_probes_are_frozen_but_differentiable():
    features, labels = gaussians(100)
    for probe in (fit_linear(features, labels, 2, QUICK), fit_hidden(features, labels, 2, QUICK)):
        leaf = features.clone().requires_grad_()
        (slope,) = torch.autograd.grad(probe(leaf).sum(0)[0], leaf)
        assert slope.abs().sum() > 0
        assert not any(parameter.requires_grad for parameter in probe.parameters())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"folds": 1}, "probe training folds 1 must be at least 2"),
        ({"penalty": -1.0}, "probe training penalty -1.0 must be at least 0 and finite"),
        ({"hidden": 0}, "probe training hidden 0 must be at least 1"),
        ({"steps": 0}, "probe training steps 0 must be at least 1"),
    ],
)
def test_rejects_illegal_settings(setting, message):
    with pytest.raises(UsageError, match=message):
        ProbeTraining(**setting)
