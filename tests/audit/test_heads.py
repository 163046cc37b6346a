"""Heads on a frozen layer: what they learn, what they leave alone, and what they cannot exceed."""

import pytest
import torch
from torch import nn

from audit.attacks import margin, margin_objective
from audit.errors import UsageError
from audit.heads import HeadTraining, train_adversarial, train_standard
from audit.pgd import PGD, minimise
from audit.threat import Linf
from audit.types import keyed_generator


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
