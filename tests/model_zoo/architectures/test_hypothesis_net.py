"""Hypothesis networks: conditioned layers equal plain concatenation, in chunks or at once, with or without hooks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audit.errors import UnknownNameError, UsageError
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation, layer_names
from model_zoo.architectures import build
from model_zoo.architectures import hypothesis_net as nets
from model_zoo.architectures.hypothesis_baselines import VIB, PlainCNN
from model_zoo.architectures.hypothesis_net import HYPOTHESIS_ENTRIES, HypothesisNet, LinearReLU, SingleHypothesisView

SHAPE = (1, 8, 8)
ENTRY = pytest.mark.parametrize("entry", HYPOTHESIS_ENTRIES)


def made(entry="flatten", classes=10, shape=SHAPE, front=None):
    """Return a network in eval mode with seeded weights and non-initial batch statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = HypothesisNet(shape, classes, entry, front)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-0.2, 0.2)
                part.running_var.uniform_(0.5, 1.5)
    return network.eval()


def drawn(count, shape=SHAPE, seed=1):
    return torch.rand(count, *shape, generator=keyed_generator(seed))


def concatenated(network, images, hypothesis):
    """Return scores (N,) of one hypothesis with an explicitly concatenated one-hot vector, layer by layer."""
    value = network.front(images)
    for layer in (network.fc1, network.fc2, network.fc3):
        if isinstance(layer, LinearReLU):
            value = F.relu(F.linear(value, layer.linear.weight, layer.linear.bias))
        else:
            one_hot = F.one_hot(torch.full((len(value),), hypothesis), network.num_classes).to(value)
            part = layer.linear
            weight = torch.cat([part.of_image.weight, part.of_hypothesis.T], 1)
            value = F.relu(F.linear(torch.cat([value, one_hot], 1), weight, part.of_image.bias))
    return network.out(value).squeeze(1)


@ENTRY
@torch.no_grad()
def test_conditioned_scores_equal_plain_concatenation(entry):
    network, images = made(entry), drawn(12)
    naive = torch.stack([concatenated(network, images, y) for y in range(10)], 1)
    assert float(naive.std()) > 1e-3
    torch.testing.assert_close(network(images), naive, atol=1e-5, rtol=1e-5)
    with torch.enable_grad():
        torch.testing.assert_close(network(images), naive, atol=1e-5, rtol=1e-5)
    chosen = torch.randint(10, (12, 3), generator=keyed_generator(2))
    torch.testing.assert_close(network.scores(images, chosen), naive.gather(1, chosen), atol=1e-5, rtol=1e-5)


@ENTRY
def test_chunked_scores_and_gradients_equal_the_unchunked_ones(entry, monkeypatch):
    network, images = made(entry).double(), drawn(7).double().requires_grad_()
    whole = network(images)
    gradient = torch.autograd.grad(whole.square().sum(), images)[0]
    weights = torch.autograd.grad(network(images).square().sum(), list(network.parameters()))
    for most in (30, 4):  # three images at a time; fewer pairs than the hypotheses of one image
        monkeypatch.setattr(nets, "MAX_PAIRS", most)
        parts = network(images)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), images)[0], gradient)
        again = torch.autograd.grad(network(images).square().sum(), list(network.parameters()))
        for one, other in zip(again, weights, strict=True):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            torch.testing.assert_close(network(images), whole)


def test_a_thousand_hypotheses_respect_the_limit_of_pairs(monkeypatch):
    monkeypatch.setattr(nets, "MAX_PAIRS", 3000)
    network, held = made(classes=1000), []
    seen = network._pairs
    monkeypatch.setattr(network, "_pairs", lambda flat, y: held.append(len(flat) * y.shape[-1]) or seen(flat, y))
    images = drawn(5).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        scores = network(images)
    assert scores.shape == (5, 1000)
    assert max(held) <= 3000
    assert sum(held) == 5000
    assert max(kept) < 5 * 1000 * 128  # no activation of all pairs is stored for the backward pass
    scores.sum().backward()
    with torch.no_grad():
        held.clear()
        network(images)
    assert max(held) <= 3000
    assert sum(held) == 5000


@ENTRY
@torch.no_grad()
def test_hooked_layers_output_all_hypotheses_in_one_call(entry, monkeypatch):
    network, images = made(entry), drawn(80)
    entered = HYPOTHESIS_ENTRIES.index(entry)
    first, second, _ = network.activations(network.front(images), torch.arange(10))
    for position, (layer, found) in enumerate((("fc1", first), ("fc2", second))):
        read = Representation(network, layer)(images)
        width = found.shape[-1]
        assert read.shape == (80, width if position < entered else 10 * width)
        torch.testing.assert_close(read, found.flatten(1))
        assert not network._has_hooks()
    assert Representation(network, "penultimate")(images).shape == (80, 10 * 128)
    torch.testing.assert_close(Representation(network, "logits")(images), network(images))


@torch.no_grad()
def test_layers_under_a_fixed_or_the_predicted_hypothesis():
    network, images = made(), drawn(9)
    scores, flat = network(images), network.front(images)
    for hypothesis, chosen in ((7, torch.full((9,), 7)), ("predicted", scores.argmax(1))):
        seen = SingleHypothesisView(network, hypothesis)
        assert "fc2" in layer_names(seen)
        assert "network.fc2" in layer_names(seen)
        expected = network.representation(flat, chosen[:, None]).flatten(1)
        torch.testing.assert_close(Representation(seen, "fc2")(images), expected)
        torch.testing.assert_close(seen(images), scores)
        assert not Representation(seen, "fc2").determines_logits(images)
    assert Representation(network, "fc2").determines_logits(images)
    with pytest.raises(UsageError, match="hypothesis 10 is not a class; legal are 0 to 9"):
        SingleHypothesisView(network, 10)


@torch.no_grad()
def test_the_fused_path_equals_the_plain_path():
    network, images = made(), drawn(50)
    fused = network(images)
    network.fused = False
    torch.testing.assert_close(fused, network(images), atol=1e-5, rtol=1e-5)


def test_a_backbone_as_front_is_frozen():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AvgPool2d(2))
    network = made(front=backbone)
    before = copy.deepcopy(backbone.state_dict())
    images = drawn(6).requires_grad_()
    network.train()(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in backbone.parameters())
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert network(images).shape == (6, 10)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ["hypothesis-net", "plain-cnn", "vib", "lenet"])
@torch.no_grad()
def test_all_networks_accept_digits_mnist_and_cifar_shapes(name, shape):
    network = build(name, {"image_shape": shape, "num_classes": 7}).eval()
    assert network(drawn(3, shape)).shape == (3, 7)


def test_trunks_match_the_paper():
    widths = [(1, 32, 4, 2), (32, 64, 4, 2)]
    for network in (made(shape=(1, 28, 28)), PlainCNN((1, 28, 28), 10), VIB((1, 28, 28), 10)):
        convs = [part for part in network.front.modules() if isinstance(part, nn.Conv2d)]
        assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == widths
    shapes = [tuple(part.weight.shape) for part in made(shape=(1, 28, 28)).modules() if isinstance(part, nn.Linear)]
    assert shapes == [(512, 3136), (256, 512), (128, 256), (1, 128)]


def test_an_unknown_entry_is_refused():
    with pytest.raises(UnknownNameError, match="unknown entry of the hypothesis 'fc3'; did you mean 'fc"):
        HypothesisNet(SHAPE, 10, entry="fc3")


def test_vib_samples_with_its_generator_and_predicts_with_the_mean():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = VIB(SHAPE, 10).eval()
    images = drawn(400)
    one, same, other = (network.sample(images, keyed_generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.logits, same.logits)
    assert not torch.equal(one.logits, other.logits)
    assert torch.equal(network(images), network(images))
    hidden = network.fc1(network.front(images))
    gaussian = torch.distributions.Normal(network.mean(hidden), F.softplus(network.spread(hidden) - 5))
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(gaussian, prior).sum(1).mean()
    torch.testing.assert_close(one.kl_nats, expected)
