import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audit.errors import UnknownNameError, UsageError
from audit.information.critics import CRITICS, build_critic
from audit.information.settings import CriticShape
from audit.random_keys import keyed_generator


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(count=12, shape=(1, 8, 8), dimension=3):
    return torch.rand(count, *shape, generator=seeded()), torch.randn(count, dimension, generator=seeded(1))


def built(images, features, seed=0, **shape):
    """A critic whose output layers have weights of the usual size; those of a new critic are much smaller."""
    critic = build_critic(images, features, CriticShape(**shape), keyed_generator(seed))
    with torch.no_grad():
        for part in (critic.rest[-1],) if hasattr(critic, "rest") else (critic.of_image.embed, critic.of_image.skip):
            for weight in part.parameters():
                weight.mul_(100)
    return critic


@torch.no_grad()
def scores_of(critic, images, features):
    return critic.eval()(images, features)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5), (1, 3, 3), (1, 8, 8), (3, 32, 32), (3, 20, 7), (2, 40, 17)])
@pytest.mark.parametrize("dimension", [1, 40])
def test_every_pair_has_a_score(shape, dimension):
    images, features = pairs(6, shape, dimension)
    critic = built(images, features)
    for mode in (True, False):
        scores = critic.train(mode)(images, features)
        assert scores.shape == (6, 6)
        assert scores.isfinite().all()


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 5)])
def test_scores_do_not_depend_on_the_rest_of_the_batch(name, shape):
    images, features = pairs(shape=shape)
    critic = built(images, features, name=name)
    whole = scores_of(critic, images, features)
    torch.testing.assert_close(scores_of(critic, images[3:7], features[3:7]), whole[3:7, 3:7])
    assert len(whole.flatten().unique()) == whole.numel()


def test_weights_depend_on_the_given_generator_alone():
    images, features = pairs()
    before = torch.random.get_rng_state()
    first = built(images, features)
    drawn = [first.train()(images, features) for _ in range(2)]
    torch.rand(5)
    second = built(images, features)
    again = [second.train()(images, features) for _ in range(2)]
    torch.random.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not torch.equal(drawn[0], drawn[1])  # dropout masks differ
    assert not torch.equal(scores_of(first, images, features), scores_of(built(images, features, 1), images, features))
    built(images, features).train()(images, features)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_are_drawn_within_the_usual_limit():
    critic = built(*pairs())
    for part in critic.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            limit = 1 / math.sqrt(part.weight[0].numel())
            assert 0.9 * limit < float(part.weight.detach().abs().max()) <= limit
            assert float(part.bias.detach().abs().max()) <= limit


@pytest.mark.parametrize(("factor", "shift"), [(1000.0, 0.0), (1000.0, 5e4), (1e-6, 0.0), (-1.0, 0.0)])
def test_scale_and_shift_of_all_features_have_no_effect(factor, shift):
    images, features = pairs()
    wanted = scores_of(built(images, features * math.copysign(1, factor)), images, features * math.copysign(1, factor))
    changed = factor * features + shift
    torch.testing.assert_close(scores_of(built(images, changed), images, changed), wanted, rtol=0, atol=1e-3)


def test_scale_of_each_feature_has_no_effect():
    images, features = pairs()
    changed = features * torch.tensor([1e-3, 1.0, 1e3])
    wanted = scores_of(built(images, features), images, features)
    torch.testing.assert_close(scores_of(built(images, changed), images, changed), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_features_are_ignored(value):
    images, features = pairs()
    features[:, 1] = value
    critic = built(images, features)
    moved = features.clone()
    moved[:, 1] += torch.randn(len(moved), generator=seeded(5))
    assert torch.equal(scores_of(critic, images, moved), scores_of(critic, images, features))


def test_constant_images_give_finite_scores():
    images, features = pairs()
    grey = torch.full_like(images, 0.5)
    assert scores_of(built(grey, features), grey, features).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 4), (1, 4, 4), (1, 1, 5), (3, 8, 8)])
def test_scores_of_small_images_are_not_linear(shape):
    # a linear image branch estimated 1.1 of 2 nats of a one-pixel channel
    critic = built(*pairs(20, shape))
    low, high = torch.zeros(1, *shape), torch.rand(1, *shape, generator=seeded(7))
    one, two, half = (scores_of(critic, x, torch.zeros(1, 3)) for x in (low, high, (low + high) / 2))
    assert abs(float(half - (one + two) / 2)) > 1e-4


def test_large_images_are_averaged_down():
    images, features = pairs(8, (3, 32, 32))
    critic = built(images, features, view=16)
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
    torch.testing.assert_close(scores_of(critic, blurred, features), scores_of(critic, images, features))
    sharp = built(images, features, view=32)
    assert not torch.allclose(scores_of(sharp, blurred, features), scores_of(sharp, images, features))


def test_augmentation_in_training_only():
    images, features = pairs(8, (1, 8, 8))
    with torch.no_grad():
        still = built(images, features, dropout=0.0)
        assert torch.equal(still.train()(images, features), scores_of(still, images, features))
        flipping = built(images, features, dropout=0.0, flip=True)
        legal = [scores_of(flipping, x, features) for x in (images, images.flip(-1))]
        found = [flipping.train()(images, features) for _ in range(20)]
    which = [[torch.equal(scores, one) for one in legal] for scores in found]
    assert all(sum(row) == 1 for row in which)
    assert 0 < sum(row[0] for row in which) < 20


def test_views_of_sixteen_pixels_are_shifted_by_at_most_one():
    images, features = pairs(6, (1, 16, 16))
    critic = built(images, features, dropout=0.0)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    legal = [scores_of(critic, padded[..., i : i + 16, j : j + 16], features) for i in range(3) for j in range(3)]
    with torch.no_grad():
        found = [critic.train()(images, features) for _ in range(40)]
    used = {next(k for k, one in enumerate(legal) if torch.equal(scores, one)) for scores in found}
    assert len(used) >= 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "critic width 0 must be at least 1"),
        ({"embedding": -1}, "critic embedding -1 must be at least 1"),
        ({"channels": 0}, "critic channels 0 must be at least 1"),
        ({"view": 0}, "critic view 0 must be at least 1"),
        ({"dropout": 1.0}, r"critic dropout 1.0 is outside \[0, 1\)"),
        ({"dropout": -0.1}, r"critic dropout -0.1 is outside \[0, 1\)"),
        ({"dropout": float("nan")}, "critic dropout nan"),
    ],
)
def test_rejects_illegal_settings(change, message):
    with pytest.raises(UsageError, match=message):
        CriticShape(**change)


def test_unknown_critic_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown critic 'dotproduct'; did you mean 'dot-product'"):
        CriticShape(name="dotproduct")


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 5)])
def test_scores_of_a_new_critic_are_almost_equal(name, shape):
    images, features = pairs(50, shape, 40)
    fresh = build_critic(images, features, CriticShape(name=name), keyed_generator(0))
    assert 0 < float(scores_of(fresh, images, features).std()) < 0.05


def test_vectors_are_not_convolved():
    # entries of a vector have no order that a convolution could use
    images, features = pairs(12, (1, 1, 9))
    critic = built(images, features)
    assert not any(isinstance(part, nn.Conv2d) for part in critic.modules())
    with torch.no_grad():
        assert torch.equal(critic.train()(images, features), scores_of(critic, images, features))  # no augmentation
    assert any(isinstance(part, nn.Conv2d) for part in built(*pairs(12, (1, 3, 3))).modules())


def test_outliers_have_limited_scores():
    images, features = pairs()
    critic = built(images, features)
    near, far = (scores_of(critic, images, features * factor).abs().max() for factor in (10.0, 1e6))
    assert float(far) < 10 * float(near)


@pytest.mark.parametrize("at_once", [1, 30, 10**6])
def test_concatenated_critic_does_not_depend_on_its_block_size(at_once):
    images, features = pairs()
    critic = built(images, features, name="concatenated", dropout=0.0)
    wanted = critic(images, features)
    wanted.square().sum().backward()
    gradients = [weight.grad.clone() for weight in critic.parameters()]
    critic.zero_grad()
    with patch("audit.information.critics.PAIRS_AT_ONCE", at_once):
        found = critic(images, features)
        found.square().sum().backward()
        torch.testing.assert_close(scores_of(critic, images[:3], features), wanted[:3])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close([weight.grad for weight in critic.parameters()], gradients, rtol=1e-4, atol=1e-5)


def test_scores_of_the_concatenated_critic_are_not_additive():
    images, features = pairs()
    scores = scores_of(built(images, features, name="concatenated"), images, features)
    centred = scores - scores.mean(0) - scores.mean(1, keepdim=True) + scores.mean()
    assert float(centred.abs().max()) > 1e-4
