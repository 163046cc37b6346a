"""A law of every rewrite of a network: outputs and input gradients are the network's own, or the rewrite is not used.

Right values are those of complete forward passes and of `backward`, with the same random numbers.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from audit.adversary.fused import fused_copy
from audit.adversary.label_attack import margin, margin_objective
from audit.adversary.passes import input_gradient, values_and_gradient
from audit.adversary.threat import L2
from audit.information.feature_merging import Candidate, FeatureDescent
from audit.representation.layers import Representation
from audit.types import Encoded

LAYER = "body"
IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(24) % 4


class Base(nn.Module):
    """A strided convolution with batch norm behind scaled pixels, `body`, then a head: all that is rewritten occurs."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.first, self.norm = nn.Conv2d(3, 6, 4, stride=2, padding=1), nn.BatchNorm2d(6)
            self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.head = nn.Linear(96, 4)
            for norm in (self.norm, self.body[1]):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1))

    def before(self, images):
        return self.norm(self.first((images - self.mean) / self.std)).relu()

    def forward(self, images):
        return self.head(self.body(self.before(images)).flatten(1))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels):
        return (pixels * 255).round() / 255

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class CustomAutograd(Base):
    def before(self, images):
        return super().before(_StraightThrough.apply(images))


class Autocast(Base):
    def before(self, images):
        with torch.autocast("cpu", torch.bfloat16):
            maps = super().before(images)
        return maps.float()


class Hooks(Base):
    """Forward hooks that change outputs, and a backward hook that changes a gradient."""

    def __init__(self):
        super().__init__()
        self.first.register_forward_hook(lambda _m, _i, output: output * 1.5)
        self.body.register_forward_pre_hook(lambda _m, args: (args[0] + 0.1,))
        self.norm.register_full_backward_hook(lambda _m, gradients, _o: (0.5 * gradients[0],))
        self.register_forward_hook(lambda _m, _i, output: output - 1)


class WeightNorm(Base):
    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.first)
        parametrizations.weight_norm(self.body[0])


class SpectralNorm(Base):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            parametrizations.spectral_norm(self.first)
            parametrizations.spectral_norm(self.head)


class DropoutLeftOn(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def before(self, images):
        return self.drop(super().before(images))

    def train(self, mode=True):
        super().train(mode)
        self.drop.training = True
        return self


class Resizing(Base):
    def before(self, images):
        return super().before(nn.functional.interpolate(images, size=(8, 8), mode="bilinear"))

    def forward(self, images):
        return super().forward(nn.functional.interpolate(images, scale_factor=1.5, mode="bicubic").clamp(0, 1))


class Checkpointing(Base):
    """The part before the tapped layer is computed again in the backward pass, by a reentrant checkpoint."""

    def before(self, images):
        return checkpoint(super().before, images, use_reentrant=True)


class InPlaceInput(Base):
    def before(self, images):
        return super().before(images.sub_(0.1).mul_(0.9))


class ChannelsLast(Base):
    def __init__(self):
        super().__init__()
        self.to(memory_format=torch.channels_last)

    def before(self, images):
        return super().before(images.contiguous(memory_format=torch.channels_last))


class SkipAround(Base):
    def forward(self, images):
        maps = self.before(images)
        return self.head((maps + self.body(maps)).flatten(1))


class DataParallel(nn.DataParallel):
    def __init__(self):
        super().__init__(Base())


NETWORKS = [
    CustomAutograd, Autocast, Hooks, WeightNorm, SpectralNorm, DropoutLeftOn, Resizing, Checkpointing, InPlaceInput,
    DataParallel, ChannelsLast, SkipAround, Base,
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of checkpoints


@pytest.fixture(params=NETWORKS, ids=lambda kind: kind.__name__)
def network(request):
    return request.param().eval().requires_grad_(False)


def layer_of(network):
    return f"module.{LAYER}" if isinstance(network, nn.DataParallel) else LAYER


def complete(network, weights, layer=None):
    """Logits or a layer's output (N, D) of a complete pass, and the gradient of its weighted sum, by `backward`."""
    seen, pixels = [], IMAGES.clone().requires_grad_()
    torch.manual_seed(0)
    if layer is None:
        values = network(pixels.clone())
    else:
        handle = network.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
        network(pixels.clone())
        handle.remove()
        (values,) = seen
    values = values.flatten(1).float()
    (values * weights(values)).sum().backward()
    return values.detach(), pixels.grad


def ramp(values):
    return torch.linspace(-1, 2, values.numel()).view_as(values)


def assert_the_same(ours, theirs):
    spread = (theirs[0] - theirs[0].mean(0)).abs().max()
    assert (ours[0] - theirs[0]).abs().max() <= 1e-4 * spread
    length = theirs[1].flatten(1).norm(dim=1)
    assert length.min() > 0
    assert ((ours[1] - theirs[1]).flatten(1).norm(dim=1) <= 1e-4 * length).all()


def test_fused_copies(network):
    theirs, searched = complete(network, ramp), fused_copy(network, IMAGES)
    if type(network) in (DropoutLeftOn, CustomAutograd, Hooks, Autocast):
        assert searched is network
    if type(network) is Base:
        assert searched is not network
    assert_the_same(complete(searched, ramp), theirs)


def test_features_at_an_early_exit(network):
    layer = layer_of(network)
    theirs, representation = complete(network, ramp, layer), Representation(network, layer)
    for _ in range(3):
        pixels = IMAGES.clone().requires_grad_()
        torch.manual_seed(0)
        features = representation(pixels)
        assert_the_same((features.detach(), input_gradient(features, pixels, ramp(features))), theirs)


def test_gradients_of_label_objectives(network):
    def weights(logits):
        others = logits.scatter(1, LABELS[:, None], -torch.inf).argmax(1)
        return nn.functional.one_hot(LABELS, 4) - nn.functional.one_hot(others, 4)

    theirs, pixels = complete(network, weights), IMAGES.clone().requires_grad_()
    torch.manual_seed(0)
    value = margin_objective(network, LABELS)(pixels, torch.arange(24)).value
    torch.testing.assert_close(value.detach(), margin(theirs[0], LABELS))
    gradient = input_gradient(value.sum(), pixels)
    torch.testing.assert_close(gradient, theirs[1], rtol=1e-4, atol=1e-6)


def test_gradients_through_features_of_the_step_before(network):
    """A step of the worst-case search: the direction is set for the features, and carried back to the pixels."""
    layer = layer_of(network)
    representation = Representation(network, layer)

    def encoder(images):
        torch.manual_seed(0)
        return Encoded(representation(images), images.new_empty(len(images), 0))

    theirs = complete(network, ramp, layer)
    descent = FeatureDescent(encoder, IMAGES, L2(1.0), relative_step=0.01, batch_size=24)
    for _ in range(2):
        reached = descent.run(ramp, Candidate(IMAGES, theirs[0]), 1)
        step = 0.01 * theirs[1] / theirs[1].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        torch.testing.assert_close(reached.images, (IMAGES - step).clamp(0, 1), rtol=0, atol=2e-5)
        torch.testing.assert_close(reached.features, theirs[0], rtol=1e-4, atol=1e-5)


def test_values_and_gradients_equal_those_of_backward(network):
    def weights(values):
        return torch.arange(values[0].numel(), dtype=values.dtype).cos().expand_as(values)

    torch.manual_seed(0)
    assert_the_same(values_and_gradient(network, IMAGES), complete(network, weights))


class Unfinished(Base):
    """A pass that sets what only its end resets; after an early exit the next pass would see it."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.depth, self.cache = kind, 0, None

    def before(self, images):
        if self.kind == "depth":
            images, self.depth = images * (1 + self.depth), self.depth + 1
        if self.kind == "cache" and self.cache is not None:
            images = self.cache
        self.cache = images.flip(0)
        return super().before(images)

    def forward(self, images):
        logits = super().forward(images)
        self.depth, self.cache = 0, None
        return logits


@pytest.mark.parametrize("kind", ["depth", "cache", "neither"])
def test_networks_that_an_early_exit_would_change_are_run_to_their_end(kind):
    network, ends = Unfinished(kind).eval().requires_grad_(False), []
    theirs, representation = complete(network, ramp, LAYER), Representation(network, LAYER)
    representation(IMAGES)  # finds the layer, in a complete pass
    handle = network.head.register_forward_hook(lambda module, _i, _o: ends.append(module is network.head))
    for _ in range(3):
        pixels = IMAGES.clone().requires_grad_()
        features = representation(pixels)
        assert_the_same((features.detach(), input_gradient(features, pixels, ramp(features))), theirs)
    handle.remove()
    assert sum(ends) == (0 if kind == "neither" else 3)  # but for copies that were tried


def test_networks_that_cannot_be_copied_are_run_to_their_end():
    class Uncopied(Base):
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    network = Uncopied().eval().requires_grad_(False)
    with pytest.raises(TypeError):
        copy.deepcopy(network)
    assert fused_copy(network, IMAGES) is network
    theirs, representation = complete(network, ramp, LAYER), Representation(network, LAYER)
    for _ in range(2):
        pixels = IMAGES.clone().requires_grad_()
        features = representation(pixels)
        assert_the_same((features.detach(), input_gradient(features, pixels, ramp(features))), theirs)
