"""Heads on a frozen layer: accuracy, early stopping, reproducibility and frozen layers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from audit.adversary.label_attack import margin, margin_objective
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import Linf
from audit.errors import UnknownNameError, UsageError
from audit.random_keys import keyed_generator
from audit.training import heads
from audit.training.heads import (
    HeadFitSettings,
    HeadTraining,
    ValidationSet,
    fit_head,
    make_head,
    train_adversarial_head,
    train_standard_heads,
)


class _TwoFeatures(nn.Module):
    """A robust feature with 90 % accuracy, and a perfect feature that small perturbations flip."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.scale = nn.Parameter(torch.tensor([1.0, 20.0]))

    def forward(self, images):
        return self.norm((images.flatten(1) - 0.5) * self.scale)


def data(count, key=0):
    """Pixel 0 is 0.5 +- 0.2 by class, wrong for one image in ten; pixel 1 is 0.5 +- 0.02, always correct."""
    labels = torch.arange(count) % 2
    sign = 2.0 * labels - 1
    flips = torch.rand(count, generator=keyed_generator(key)) < 0.1
    images = torch.stack([0.5 + 0.2 * torch.where(flips, -sign, sign), 0.5 + 0.02 * sign], 1)
    return images.view(count, 1, 1, 2) + 0.005 * torch.randn(count, 1, 1, 2, generator=keyed_generator(key, 1)), labels


def accuracy(network, images, labels, eps=0.0):
    if eps:
        images = minimise(margin_objective(network, labels), images, Linf(eps), PGD(20, 0.2), keyed_generator(4)).images
    return float((margin(network(images), labels) > 0).float().mean())


@pytest.fixture(scope="module")
def trained():
    layer, (images, labels) = _TwoFeatures(), data(400)
    layer(images)  # sets the batch statistics
    layer.eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    heads = train_standard_heads(layer, images, labels, 2, HeadTraining())
    heads["alf"] = train_adversarial_head(heads["slf"], images, labels, Linf(0.05), HeadTraining())
    return layer, before, heads


def test_standard_heads_use_the_accurate_feature(trained):
    images, labels = data(300, key=7)
    assert accuracy(trained[2]["slf"], images, labels) > 0.98
    assert accuracy(trained[2]["mlp"], images, labels) > 0.98
    assert accuracy(trained[2]["slf"], images, labels, 0.05) < 0.5


def test_the_adversarial_head_uses_the_robust_feature(trained):
    images, labels = data(300, key=7)
    assert accuracy(trained[2]["alf"], images, labels, 0.05) > 0.8
    assert accuracy(trained[2]["alf"], images, labels, 0.05) > accuracy(trained[2]["slf"], images, labels, 0.05) + 0.3


def test_the_layer_stays_frozen(trained):
    layer, before, heads = trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert not layer.training
    assert not any(p.requires_grad for head in heads.values() for p in head.parameters())


def test_training_is_deterministic_given_the_seed(trained):
    layer, (images, labels) = trained[0], data(400)
    training = HeadTraining(epochs=2)
    start = train_standard_heads(layer, images, labels, 2, training)["slf"]
    one, two = (train_adversarial_head(start, images, labels, Linf(0.05), training) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.layers[0].weight, start.head.layers[0].weight)


def test_training_without_images_is_refused(trained):
    with pytest.raises(UsageError, match="a head cannot be trained on 0 images"):
        train_standard_heads(trained[0], torch.zeros(0, 1, 1, 2), torch.zeros(0, dtype=torch.int64), 2, HeadTraining())


FIT = HeadFitSettings(classes=2, epochs=12, batch_size=50, learning_rate=5e-2)


@pytest.fixture(scope="module")
def layer():
    found = _TwoFeatures()
    found(data(400)[0])
    return found.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_robust_head_has_higher_adversarial_accuracy(layer, kind):
    images, labels = data(300, key=7)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    standard, robust = (
        fit_head(layer, *data(400), replace(FIT, kind=kind, threat=threat)).last for threat in (None, Linf(0.05))
    )
    assert accuracy(standard, images, labels) > 0.98
    assert accuracy(robust, images, labels, 0.05) > max(0.8, accuracy(standard, images, labels, 0.05) + 0.3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert not any(part.training or p.requires_grad for part in robust.modules() for p in part.parameters())


def test_the_mlp_head_has_the_architecture_of_the_paper():
    head = make_head(64, HeadFitSettings(kind="mlp"))
    assert [type(part).__name__ for part in head] == ["Linear", "_Dropout", "BatchNorm1d", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in head.parameters()] == [(200, 64), (200,), (200,), (200,), (10, 200), (10,)]
    head.train()
    values = torch.ones(500, 64)
    dropped = head[1](values)
    assert 0.07 < float((dropped == 0).float().mean()) < 0.13
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(head.eval()[1](values), values)


def test_early_stopping_keeps_the_best_epoch_of_each_validation_set(layer, monkeypatch):
    """Two validation sets with different best epochs, both different from the last head."""
    accuracies = {"validation": [0.2, 0.6, 0.4, 0.6], "test": [0.1, 0.2, 0.3, 0.9]}
    scripts, snapshots = {name: iter(values) for name, values in accuracies.items()}, []

    def scripted(network, sample, _settings):
        snapshots.append({name: tensor.clone() for name, tensor in network.head.state_dict().items()})
        return next(scripts["validation" if len(sample.images) == 100 else "test"])

    monkeypatch.setattr(heads, "_adversarial_accuracy", scripted)
    validation = {
        "validation": ValidationSet(*data(100, 1), Linf(0.05)),
        "test": ValidationSet(*data(60, 2), Linf(0.05)),
    }
    found = fit_head(layer, *data(400), replace(FIT, epochs=4), validation)
    assert {name: (best.epoch, best.adversarial_accuracy) for name, best in found.best.items()} == {
        "validation": (1, 0.6),
        "test": (3, 0.9),
    }
    kept = found.best["validation"].network.head.state_dict()
    assert all(torch.equal(tensor, snapshots[2][name]) for name, tensor in kept.items())
    assert not torch.equal(kept["weight"], found.last.head.state_dict()["weight"])
    assert torch.equal(found.best["test"].network.head.weight, found.last.head.weight)


def test_early_stopping_measures_adversarial_accuracy(layer):
    sample = ValidationSet(*data(200, key=3), Linf(0.05))
    found = fit_head(layer, *data(400), replace(FIT, epochs=3), {"validation": sample})
    best = found.best["validation"]
    searched = minimise(
        margin_objective(best.network, sample.labels), sample.images, sample.threat, FIT.pgd, keyed_generator(0)
    )
    assert best.adversarial_accuracy == pytest.approx(1 - float(searched.done.float().mean()), abs=0.02)
    inverted = ValidationSet(sample.images, 1 - sample.labels, sample.threat)
    assert fit_head(layer, *data(400), replace(FIT, epochs=3), {"x": inverted}).best["x"].adversarial_accuracy < 0.1


def test_early_stopping_does_not_change_training(layer):
    validation = {"validation": ValidationSet(*data(50, 1), Linf(0.05))}
    for kind in ("linear", "mlp"):
        fit = replace(FIT, kind=kind, epochs=3, threat=Linf(0.05))
        one, two = (fit_head(layer, *data(400), fit, names).last.head for names in (validation, None))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_progress_receives_every_epoch_and_the_loss_falls(layer):
    received = []
    fit_head(layer, *data(400), FIT, progress=lambda *line: received.append(line))
    assert [epoch for epoch, _ in received] == list(range(12))
    assert received[-1][1] < received[0][1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": 1}, "head classes 1 must be at least 2"),
        ({"epochs": 0}, "head epochs 0 must be at least 1"),
        ({"batch_size": 1}, "head batch_size 1 must be at least 2"),
        ({"learning_rate": float("inf")}, "head learning_rate inf must be above 0 and finite"),
        ({"dropout": 1.0}, "head dropout 1.0 is outside"),
    ],
)
def test_illegal_head_settings_are_refused(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        HeadFitSettings(**changes)
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        HeadFitSettings(kind="linaer")


def test_training_on_one_image_is_refused(layer):
    with pytest.raises(UsageError, match="a head cannot be trained on 1 images"):
        fit_head(layer, *data(1), FIT)
