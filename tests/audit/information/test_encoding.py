"""Encoding in batches, seeded splits, and the entropy terms of predicted classes."""

from math import log

import pytest
import torch
from torch import nn

from audit.errors import InvalidModelError, UsageError
from audit.information.critic_training import estimate_mi
from audit.information.encoding import Division, EncodedSplits, encode, label_surprise, split_images
from audit.information.settings import CriticTraining
from audit.representation.layers import Representation
from audit.types import Encoded


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_splits_are_disjoint_complete_and_seeded():
    images = torch.arange(100.0).view(100, 1, 1, 1)
    parts = split_images(images, 3)
    assert [len(part) for part in parts] == [50, 20, 30]
    assert sorted(torch.cat(parts).flatten().tolist()) == list(range(100))
    assert torch.equal(split_images(images, 3).test, parts.test)
    assert not torch.equal(split_images(images, 4).test, parts.test)
    assert [len(part) for part in split_images(images, 0, train=0.2, validation=0.1)] == [20, 10, 70]
    assert parts.map(lambda part: part + 1).test.equal(parts.test + 1)


@pytest.mark.parametrize(
    ("count", "shares"),
    [(0, {}), (48, {}), (100, {"train": 0.05}), (100, {"train": 0.85}), (100, {"validation": 0.05})],
)
def test_rejects_too_few_images(count, shares):
    with pytest.raises(UsageError, match=f"{count} images are too few: .* 50 in all"):
        split_images(torch.zeros(count, 1, 2, 2), 0, **shares)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rejects_features_that_are_not_finite(bad):
    def encoder(images):
        features = images.flatten(1).clone()
        features[features[:, 0] > 0.9, 0] = bad
        return Encoded(features, features.new_empty(len(features), 0))

    images = torch.linspace(0, 1, 100).view(100, 1, 1, 1)
    with pytest.raises(InvalidModelError, match="the representation is not finite for 10 of 100 images"):
        encode(encoder, images, 7)
    with pytest.raises(InvalidModelError, match="the representation is not finite"):
        estimate_mi(encoder, split_images(images, 0), CriticTraining(steps=1), 0)


def test_batch_size_has_no_effect_and_no_graph_is_kept():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images = torch.rand(20, 1, 2, 2, generator=seeded())
    whole, parts = (encode(Representation(network, "logits").encode, images, size) for size in (20, 7))
    torch.testing.assert_close(whole.features, parts.features)
    torch.testing.assert_close(whole.log_probs, whole.features.log_softmax(1))
    assert not whole.features.requires_grad


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_division_permutes_the_images_and_is_undone(number):
    images = split_images(torch.arange(60.0).view(60, 1, 1, 1), 3)
    division = Division.draw(images, 7, number)
    again = division.of(images)
    assert [len(part) for part in again] == [len(part) for part in images] == [30, 12, 18]
    assert sorted(torch.cat([*again]).flatten().tolist()) == list(range(60))
    assert torch.equal(again.test, images.test) is (number == 0)
    assert all(map(torch.equal, division.undone(again), images))
    assert all(map(torch.equal, Division.draw(images, 7, number).of(images), again))
    encoded = EncodedSplits(*(Encoded(part.flatten(1), -part.flatten(1)) for part in images))
    for part, divided in zip(again, division.encoded(encoded), strict=True):
        assert torch.equal(divided.features, part.flatten(1))
        assert torch.equal(divided.log_probs, -part.flatten(1))


def test_mean_of_label_surprise_is_the_entropy_of_predictions():
    log_probs = torch.eye(4)[torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])].log_softmax(1)
    assert float(label_surprise(log_probs).mean()) == pytest.approx(1.75 * log(2))
    assert label_surprise(log_probs)[-1] == pytest.approx(3 * log(2))
    assert label_surprise(log_probs[:4]).tolist() == [0, 0, 0, 0]
    assert label_surprise(torch.empty(5, 0)).tolist() == [0] * 5
