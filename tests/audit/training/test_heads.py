"""Heads on a frozen layer: what they learn, what they leave alone, and what they cannot exceed."""

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
from audit.training.heads import HeadFit, HeadTraining, Watched, fit_head, make_head, train_adversarial, train_standard


class _TwoFeatures(nn.Module):
    """One pixel that tells the class a little and barely moves, and one that tells it all and is easily moved."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.scale = nn.Parameter(torch.tensor([1.0, 20.0]))

    def forward(self, images):
        return self.norm((images.flatten(1) - 0.5) * self.scale)


def data(count, key=0):
    """Pixel 0 is 0.5 +- 0.2 by class, wrong for one image in ten; pixel 1 is 0.5 +- 0.02, always right."""
    labels = torch.arange(count) % 2
    sign = 2.0 * labels - 1
    flips = torch.rand(count, generator=keyed_generator(key)) < 0.1
    images = torch.stack([0.5 + 0.2 * torch.where(flips, -sign, sign), 0.5 + 0.02 * sign], 1)
    return images.view(count, 1, 1, 2) + 0.005 * torch.randn(count, 1, 1, 2, generator=keyed_generator(key, 1)), labels


def share(network, images, labels, eps=0.0):
    if eps:
        images = minimise(margin_objective(network, labels), images, Linf(eps), PGD(20, 0.2), keyed_generator(4)).images
    return float((margin(network(images), labels) > 0).float().mean())


@pytest.fixture(scope="module")
def trained():
    layer, (images, labels) = _TwoFeatures(), data(400)
    layer(images)  # sets the batch norm's statistics
    layer.eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    heads = train_standard(layer, images, labels, 2, HeadTraining())
    heads["alf"] = train_adversarial(heads["slf"], images, labels, Linf(0.05), HeadTraining())
    return layer, before, heads


def test_standard_heads_take_what_tells_the_class(trained):
    images, labels = data(300, key=7)
    assert share(trained[2]["slf"], images, labels) > 0.98
    assert share(trained[2]["mlp"], images, labels) > 0.98
    assert share(trained[2]["slf"], images, labels, 0.05) < 0.5


def test_the_adversarial_head_takes_what_cannot_be_moved(trained):
    images, labels = data(300, key=7)
    assert share(trained[2]["alf"], images, labels, 0.05) > 0.8
    assert share(trained[2]["alf"], images, labels, 0.05) > share(trained[2]["slf"], images, labels, 0.05) + 0.3


def test_the_layer_stays_as_it_is(trained):
    layer, before, heads = trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert not layer.training
    assert not any(p.requires_grad for head in heads.values() for p in head.parameters())


def test_the_same_seed_trains_the_same_head(trained):
    layer, (images, labels) = trained[0], data(400)
    training = HeadTraining(epochs=2)
    start = train_standard(layer, images, labels, 2, training)["slf"]
    one, two = (train_adversarial(start, images, labels, Linf(0.05), training) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.layers[0].weight, start.head.layers[0].weight)


def test_no_images_train_no_head(trained):
    with pytest.raises(UsageError, match="0 images train no head"):
        train_standard(trained[0], torch.zeros(0, 1, 1, 2), torch.zeros(0, dtype=torch.int64), 2, HeadTraining())


FIT = HeadFit(classes=2, epochs=12, batch_size=50, learning_rate=5e-2)


@pytest.fixture(scope="module")
def layer():
    found = _TwoFeatures()
    found(data(400)[0])
    return found.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_robust_head_keeps_what_a_standard_one_loses(layer, kind):
    images, labels = data(300, key=7)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    standard, robust = (
        fit_head(layer, *data(400), replace(FIT, kind=kind, threat=threat)).last for threat in (None, Linf(0.05))
    )
    assert share(standard, images, labels) > 0.98
    assert share(robust, images, labels, 0.05) > max(0.8, share(standard, images, labels, 0.05) + 0.3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert not any(part.training or p.requires_grad for part in robust.modules() for p in part.parameters())


def test_the_mlp_head_is_the_papers():
    head = make_head(64, HeadFit(kind="mlp"))
    assert [type(part).__name__ for part in head] == ["Linear", "_Dropout", "BatchNorm1d", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in head.parameters()] == [(200, 64), (200,), (200,), (200,), (10, 200), (10,)]
    head.train()
    values = torch.ones(500, 64)
    dropped = head[1](values)
    assert 0.07 < float((dropped == 0).float().mean()) < 0.13
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(head.eval()[1](values), values)


def test_early_stopping_keeps_the_epoch_that_was_best_on_what_it_watched(layer, monkeypatch):
    """Two samples that disagree on when to stop: each name gets its own epoch, the last head is another one."""
    shares = {"validation": [0.2, 0.6, 0.4, 0.6], "test": [0.1, 0.2, 0.3, 0.9]}
    read, heads_seen = {name: iter(values) for name, values in shares.items()}, []

    def scripted(network, sample, fit):
        heads_seen.append({name: tensor.clone() for name, tensor in network.head.state_dict().items()})
        return next(read["validation" if len(sample.images) == 100 else "test"])

    monkeypatch.setattr(heads, "_adversarial", scripted)
    watched = {"validation": Watched(*data(100, 1), Linf(0.05)), "test": Watched(*data(60, 2), Linf(0.05))}
    found = fit_head(layer, *data(400), replace(FIT, epochs=4), watched)
    assert {name: (best.epoch, best.adversarial) for name, best in found.best.items()} == {
        "validation": (1, 0.6),
        "test": (3, 0.9),
    }
    kept = found.best["validation"].network.head.state_dict()
    assert all(torch.equal(tensor, heads_seen[2][name]) for name, tensor in kept.items())
    assert not torch.equal(kept["weight"], found.last.head.state_dict()["weight"])
    assert torch.equal(found.best["test"].network.head.weight, found.last.head.weight)


def test_what_early_stopping_reads_is_adversarial_accuracy_on_the_sample_it_is_given(layer):
    sample = Watched(*data(200, key=3), Linf(0.05))
    found = fit_head(layer, *data(400), replace(FIT, epochs=3), {"validation": sample})
    best = found.best["validation"]
    searched = minimise(
        margin_objective(best.network, sample.labels), sample.images, sample.threat, FIT.pgd, keyed_generator(0)
    )
    assert best.adversarial == pytest.approx(1 - float(searched.done.float().mean()), abs=0.02)
    inverted = Watched(sample.images, 1 - sample.labels, sample.threat)
    assert fit_head(layer, *data(400), replace(FIT, epochs=3), {"x": inverted}).best["x"].adversarial < 0.1


def test_watching_changes_nothing_of_what_is_learned(layer):
    watched = {"validation": Watched(*data(50, 1), Linf(0.05))}
    for kind in ("linear", "mlp"):
        fit = replace(FIT, kind=kind, epochs=3, threat=Linf(0.05))
        one, two = (fit_head(layer, *data(400), fit, names).last.head for names in (watched, None))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_progress_hears_every_epoch_and_the_loss_falls(layer):
    heard = []
    fit_head(layer, *data(400), FIT, progress=lambda *line: heard.append(line))
    assert [epoch for epoch, _ in heard] == list(range(12))
    assert heard[-1][1] < heard[0][1]


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
def test_head_settings_that_mean_nothing_are_refused(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        HeadFit(**changes)
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        HeadFit(kind="linaer")


def test_one_image_fits_no_head(layer):
    with pytest.raises(UsageError, match="1 images train no head"):
        fit_head(layer, *data(1), FIT)
