"""Probes: minimum of the penalised loss, constant features, frozen parameters, and rejected settings."""

import pytest
import torch
import torch.nn.functional as F

from audit.errors import UsageError
from audit.information.probing.probes import Probe, fit_hidden, fit_linear
from audit.information.probing.settings import ProbeTraining
from audit.random_keys import Purpose, keyed_generator

QUICK = ProbeTraining(steps=60)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def gaussians(count=800, sigma=0.5, seed=0):
    labels = torch.arange(count) % 2
    return (2.0 * labels - 1)[:, None] + sigma * normal(count, 1, seed=seed), labels


def test_a_feature_of_rounding_errors_is_ignored():
    features, labels = gaussians(200)
    rounding = 0.1 * (1 + 2**-24 * (torch.arange(200) % 3))[:, None]
    probe = fit_linear(torch.cat([features, rounding], 1), labels, 2, QUICK)
    assert probe.deviation.isinf().tolist() == [False, True]
    assert probe(torch.tensor([[0.3, 5.0]])).equal(probe(torch.tensor([[0.3, -5.0]])))


def test_linear_probe_minimises_the_penalised_loss():
    features, labels = gaussians(300)
    probe = fit_linear(features, labels, 2, ProbeTraining(penalty=3.0))

    def loss(weights, bias):
        standard = (features - features.mean(0)) / features.std(0, correction=0)
        return F.cross_entropy(standard @ weights.T + bias, labels) + 3.0 / 600 * weights.square().sum()

    weights, bias = (each.clone().requires_grad_() for each in probe.layers[0].parameters())
    for slope in torch.autograd.grad(loss(weights, bias), (weights, bias)):
        assert float(slope.abs().max()) < 1e-4


def test_penalty_in_units_of_the_features_without_standardising():
    features, labels = gaussians(300)
    probe = fit_linear(10 * features, labels, 2, ProbeTraining(penalty=3.0), standardise=False)

    def loss(weights, bias):
        centred = 10 * (features - features.mean(0))
        return F.cross_entropy(centred @ weights.T + bias, labels) + 3.0 / 600 * weights.square().sum()

    weights, bias = (each.clone().requires_grad_() for each in probe.layers[0].parameters())
    for slope in torch.autograd.grad(loss(weights, bias), (weights, bias)):
        assert float(slope.abs().max()) < 1e-3


def test_hidden_layer_fits_a_product_of_features():
    features = normal(800, 2)
    labels = (features[:, 0] * features[:, 1] > 0).long()
    probes = (fit(features, labels, 2, ProbeTraining()) for fit in (fit_linear, fit_hidden))
    linear, hidden = (float((probe(features).argmax(1) == labels).float().mean()) for probe in probes)
    assert linear < 0.6
    assert hidden > 0.9


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


@pytest.mark.parametrize(("count", "width", "classes", "hidden"), [(60, 5, 3, 8), (7, 40, 2, 64), (90, 1, 12, 3)])
def test_the_hidden_probe_is_what_automatic_gradients_and_torchs_adamw_fit(count, width, classes, hidden):
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % classes
    features = torch.randn(count, width, generator=generator) * 7 + labels[:, None]
    training = ProbeTraining(hidden=hidden, steps=30)
    probe = Probe(features, classes, hidden, keyed_generator(0, Purpose.PROBE_WEIGHTS))
    optimiser = torch.optim.AdamW(probe.parameters(), 1e-2, weight_decay=0.1)
    for step in range(training.steps):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / training.steps)
        optimiser.zero_grad()
        F.cross_entropy(probe(features), labels).backward()
        optimiser.step()
    fitted = fit_hidden(features, labels, classes, training)
    for mine, torchs in zip(fitted.parameters(), probe.parameters(), strict=True):
        assert torch.allclose(mine, torchs, atol=2e-3)
        assert not mine.requires_grad
    assert torch.allclose(fitted(features), probe(features), atol=2e-2)
