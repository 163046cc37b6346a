"""Laws of critic estimates: upper limits, invariances, determinism, and freedom from side effects."""

from math import log, sqrt

import pytest
import torch
from torch import nn

from audit.adversary.threat import THREATS, threat_model
from audit.information.critic_search.descent import estimate_vulnerability
from audit.information.critic_search.merging import Adversary
from audit.information.critic_training import estimate_mi, fit_critic
from audit.information.encoding import EncodedSplits, Splits, split_images
from audit.information.settings import CriticTraining, WorstCaseSearch
from audit.representation.layers import Representation
from audit.types import Encoded

NORMS = pytest.mark.parametrize("norm", sorted(THREATS))
EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}
SHORT = CriticTraining(steps=20, every=5, batch_size=32)
SEARCH = WorstCaseSearch(collapse_steps=3, rounds=3, critic_steps=1, repeats=1, relative_step=0.4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def channel(count=2000, seed=0, dimension=2):
    """Images that hold a Gaussian x, and x + noise of the same size: dimension * ln(2) / 2 nats."""
    draws = seeded(seed)
    x = torch.randn(count, dimension, generator=draws)
    paint = torch.linalg.qr(torch.randn(64, dimension, generator=seeded(99)))[0]
    images = torch.special.ndtr(x @ paint.T * sqrt(64 / dimension)).view(count, 1, 8, 8)
    return images, x + torch.randn(count, dimension, generator=draws)


def fitted(images, features, seed=0, training=None):
    count = len(images)
    cuts = (slice(0, count // 2), slice(count // 2, 7 * count // 10), slice(7 * count // 10, count))
    encoded = EncodedSplits(*(Encoded(features[cut], features.new_empty(len(features[cut]), 0)) for cut in cuts))
    return fit_critic(Splits(*(images[cut] for cut in cuts)), encoded, training or CriticTraining(), seed)[1]


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(1, 4, 3, stride=2)
            self.head = nn.Linear(36, 3)

    def forward(self, images):
        return 5 * self.head(self.convolution(images).tanh().flatten(1))


IMAGES = torch.rand(150, 1, 8, 8, generator=seeded()) * torch.rand(150, 1, 1, 1, generator=seeded(1))


def vulnerability(norm, eps, layer="logits", training=SHORT, seed=0):
    encoder = Representation(SmallNet().requires_grad_(False), layer)
    adversary = Adversary(threat_model(norm, eps), SEARCH)
    return estimate_vulnerability(encoder.encode, split_images(IMAGES, seed), training, adversary, seed)


@pytest.mark.parametrize("count", [100, 300, 1000])
def test_value_is_at_most_ln_of_the_held_out_images(count):
    images = channel(count)[0]
    found = fitted(images, images.flatten(1))  # a representation that keeps everything
    assert found.parts["critic"] <= found.ceiling == pytest.approx(log(count - 7 * count // 10))
    assert found.parts["critic"] > 0.8 * found.ceiling
    assert all(value <= log(count // 5 + 1) + 1e-5 for _, value in found.history)


@pytest.mark.parametrize("seed", range(3))
def test_value_is_at_most_the_truth_within_its_error(seed):
    for dimension in (1, 5):
        found = fitted(*channel(600, seed, dimension), seed)
        assert found.nats < dimension * log(2) / 2 + 3 * found.stderr


@pytest.mark.parametrize(("factor", "shift"), [(1000.0, 5000.0), (1e-3, 0.0), (1.0, 100.0)])
def test_units_of_the_features_have_no_effect(factor, shift):
    # rounding differences grow during training: mostly below .001, but .06 was measured (five features, truth 1.7,
    # standard error .04) when the best validation step changed
    images, features = channel()
    wanted, found = fitted(images, features), fitted(images, factor * features + shift)
    assert found.nats == pytest.approx(wanted.nats, abs=5e-3)


def test_units_without_rounding_give_identical_results():
    images, features = channel(300)
    assert fitted(images, 1024 * features) == fitted(images, features)


def test_units_of_single_features_have_no_effect():
    images, features = channel()
    wanted, found = fitted(images, features), fitted(images, features * torch.tensor([1e-3, 1e3]))
    assert found.nats == pytest.approx(wanted.nats, abs=5e-3)


def test_order_of_features_has_no_effect_beyond_the_error():
    # permuted features are multiplied by other initial weights, like another seed (measured: within .02; .07 in 5
    # dimensions at 1.7 nats)
    images, features = channel(dimension=3)
    wanted = fitted(images, features)
    for order in ([2, 0, 1], [2, 1, 0]):
        found = fitted(images, features[:, order])
        assert found.nats == pytest.approx(wanted.nats, abs=0.08)


def test_batch_size_and_seed_have_no_effect_beyond_the_error():
    # measured on a like channel: .77 to .82 for batches of 64 to 1,000, .77 to .81 over five seeds, error .05
    images, features = channel()
    values = [fitted(images, features, training=CriticTraining(batch_size=size)).nats for size in (64, 256)]
    values += [fitted(images, features, seed).nats for seed in (1,)]
    assert max(values) - min(values) < 0.12


@NORMS
@pytest.mark.parametrize("layer", ["logits", "convolution", "input"])
def test_worst_case_equals_normal_case_at_eps_0(norm, layer):
    found = vulnerability(norm, 0.0, layer)
    assert found.worst == found.normal
    assert (found.nats, found.passes) == (0.0, 75)
    assert found.adversarial.equal(split_images(IMAGES, 0).test)
    encoder = Representation(SmallNet().requires_grad_(False), layer)
    assert found.normal == estimate_mi(encoder.encode, split_images(IMAGES, 0), SHORT, 0)


@NORMS
@pytest.mark.parametrize("layer", ["logits", "penultimate"])
def test_worst_case_is_at_most_normal_and_images_are_legal(norm, layer):
    threat, clean = threat_model(norm, EPS[norm]), split_images(IMAGES, 0).test
    found = vulnerability(norm, EPS[norm], layer)
    assert found.worst.nats <= found.normal.nats + 2 * found.stderr
    assert found.worst.validated <= found.normal.validated  # by which it was chosen
    assert found.nats == found.normal.nats - found.worst.nats
    assert found.adversarial.shape == clean.shape
    assert float(threat.distance(found.adversarial, clean).max()) <= EPS[norm] + 1e-6
    assert 0 <= float(found.adversarial.min()) <= float(found.adversarial.max()) <= 1
    assert found.adversarial.equal(clean) == (found.worst == found.normal)


@NORMS
def test_results_depend_on_the_seed_alone(norm):
    first = vulnerability(norm, EPS[norm])
    torch.rand(7)
    second = vulnerability(norm, EPS[norm])
    assert (first.normal, first.worst, first.passes) == (second.normal, second.worst, second.passes)
    assert first.adversarial.equal(second.adversarial)
    assert vulnerability(norm, EPS[norm], seed=1).normal != first.normal


@NORMS
def test_estimates_have_no_side_effects(norm):
    network, images = SmallNet(), IMAGES.clone()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    encoder = Representation(network, "logits")
    before = torch.random.get_rng_state()
    splits = split_images(images, 0)
    kept = splits.map(torch.Tensor.clone)
    estimate_vulnerability(encoder.encode, splits, SHORT, Adversary(threat_model(norm, EPS[norm]), SEARCH), 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert images.equal(IMAGES)
    assert all(part.equal(copy) for part, copy in zip(splits, kept, strict=True))
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert all(value.equal(state[name]) for name, value in network.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
