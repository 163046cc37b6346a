"""Fused copies: equal outputs and verdicts, or the network itself."""

import pytest
import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.fused import fused_copy
from audit.adversary.label_attack import AUDIT, LabelAttack, Stage, two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf, threat_model
from audit.random_keys import keyed_generator


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(2)])

    def forward(self, x):
        return (x + self.norms[1](self.second(self.norms[0](self.first(x)).relu()))).relu()


def residual(classes=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            Block(6),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, classes),
        )
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                part.weight.data.uniform_(0.5, 2)
                part.bias.data.normal_()
        network.eval()
        with torch.no_grad():  # predictions that differ between images and can be attacked
            network[-1].weight.mul_(10)
            network[-1].bias.copy_(network[-1].bias - network(images()).mean(0))
    return network


def images(count=40):
    return torch.rand(count, 1, 8, 8, generator=keyed_generator(3))


def norms(network):
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def test_batch_norms_are_folded_and_the_outputs_are_the_same():
    network = residual()
    copy = fused_copy(network, images())
    assert (norms(network), norms(copy)) == (3, 0)
    assert torch.allclose(copy(images()), network(images()), atol=1e-5)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in copy.parameters())


class Scaled(nn.Module):
    def __init__(self, inner, shape=(1, 3, 1, 1)):
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.rand(shape, generator=keyed_generator(5)))
        self.register_buffer("std", 0.1 + torch.rand(shape, generator=keyed_generator(6)))

    def forward(self, x):
        return self.inner((x - self.mean) / self.std)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "side"),
    [
        (4, 2, 1, 8),
        (3, 2, 1, 8),
        (4, 2, 0, 8),
        (3, 2, 0, 8),
        (7, 2, 3, 12),
        (2, 2, 0, 8),
        (1, 2, 0, 8),
        (5, 4, 2, 12),
        (4, 4, 0, 8),
        ((3, 4), 2, (1, 0), 8),
        (3, 2, 2, 8),
        (2, 3, 1, 9),
    ],
)
def test_a_stride_on_pixels_is_undone_and_the_outputs_and_gradients_are_the_same(
    channels, kernel, stride, padding, side
):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(channels, 6, kernel, stride, padding), nn.ReLU(), nn.Flatten()).eval()
    pixels = torch.rand(5, channels, side, side, generator=keyed_generator(3)).requires_grad_()
    copy = fused_copy(network, pixels.detach())
    assert not any(isinstance(part, nn.Conv2d) for part in copy.modules())
    ours, theirs = copy(pixels), network(pixels)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weights = torch.randn(theirs.shape, generator=keyed_generator(4))
    (found,), (wanted,) = (torch.autograd.grad(out, pixels, weights) for out in (ours, theirs))
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 4, 3, 2, 1),
        nn.Conv2d(3, 6, 3, 2, 1, groups=3),
        nn.Conv2d(3, 4, 3, 2, 1, dilation=2),
        nn.Conv2d(3, 4, 3, 2, 1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, (1, 2), 1),
        nn.Conv2d(3, 4, 3, 3, 1),
    ],
)
def test_other_strides_are_unchanged(conv):
    network = nn.Sequential(conv, nn.Flatten()).eval()
    pixels = torch.rand(3, conv.in_channels, 8, 8, generator=keyed_generator(3))
    assert fused_copy(network, pixels) is network


class Twice(nn.Module):
    """One convolution applied to scaled pixels and then to its own output: folding would scale both."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(self.conv(x)).flatten(1)


def divisions(network):
    return sum("truediv" in str(node.target) for node in network.graph.nodes)


def test_pixel_scales_are_folded_and_the_outputs_are_the_same():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Scaled(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten())).eval()
    clean = torch.rand(20, 3, 8, 8, generator=keyed_generator(3))
    before = network.inner[0].weight.clone()
    copy = fused_copy(network, clean)
    assert copy is not network
    assert divisions(copy) == 0
    assert torch.allclose(copy(clean), network(clean), atol=1e-5)
    assert torch.equal(network.inner[0].weight, before)


@pytest.mark.parametrize(
    ("inner", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), (1, 3, 1, 1)),
        (nn.Conv2d(3, 3, 3, groups=3), (1, 3, 1, 1)),
        (nn.Conv2d(3, 3, 3), (1, 3, 8, 8)),
        (Twice(nn.Conv2d(3, 3, 3)), (1, 3, 1, 1)),
    ],
    ids=["no convolution", "groups", "a scale a pixel", "a shared convolution"],
)
def test_scales_that_cannot_be_folded_are_unchanged(inner, shape):
    network = Scaled(inner, shape).eval()
    assert fused_copy(network, torch.rand(20, 3, 8, 8, generator=keyed_generator(3))) is network


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = residual()

    def forward(self, x):
        return self.inner(x) if x.mean() > 0.5 else self.inner(1 - x)


GENERATOR = torch.Generator().manual_seed(0)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = residual()

    def forward(self, x):
        return self.inner(x + 0.1 * torch.randn(x.shape, generator=GENERATOR))


class BatchSizeDependent(nn.Module):
    """A traced copy would be right for a batch of sixteen images and wrong for a single one."""

    def __init__(self):
        super().__init__()
        self.inner = residual()

    def forward(self, x):
        return self.inner(x) * (2.0 if len(x) == 1 else 1.0)


@pytest.mark.parametrize("kind", [Branching, Noisy, BatchSizeDependent])
def test_networks_that_cannot_be_traced_are_returned_themselves(kind):
    network = kind().eval()
    assert fused_copy(network, images()) is network


def test_networks_in_training_mode_or_with_nothing_to_fold_are_returned_themselves():
    assert fused_copy(network := residual().train(), images()) is network
    assert fused_copy(network := nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), images()) is network


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_fused_copy_gives_the_same_verdicts(norm):
    network, clean = residual(), images(60)
    labels = network(clean).argmax(1)
    threat = threat_model(norm, {"linf": 0.02, "l2": 0.1, "l1": 0.8}[norm])
    stages = AUDIT.stages
    fast, plain = (
        measure_accuracy(network, clean, labels, threat, LabelAttack(stages, fast=f), 0) for f in (True, False)
    )
    assert 0 < int(plain.robust.sum()) < 60
    assert torch.equal(fast.robust, plain.robust)
    assert fast.passes == plain.passes


def test_the_network_itself_is_searched_if_the_copy_is_wrong(monkeypatch):
    """A copy that misclassifies every image must not stop a search."""
    network, clean = residual(), images(30)
    labels = network(clean).argmax(1)

    class WrongCopy(nn.Module):
        def forward(self, x):
            return -network(x)

    monkeypatch.setattr("audit.adversary.staged.images.fused_copy", lambda _network, _images: WrongCopy())
    found = measure_accuracy(network, clean, labels, Linf(0.05), two_losses(PGD(10)), 0)
    monkeypatch.undo()
    wanted = measure_accuracy(
        network, clean, labels, Linf(0.05), LabelAttack((Stage("margin", PGD(10)),), fast=False), 0
    )
    assert int(found.robust.sum()) <= int(wanted.robust.sum()) < 30


class RoundedStraightThrough(torch.autograd.Function):
    """Pixels rounded to 8 bits; the gradient passes as if they were not."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 255) / 255

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class ScaledGradient(torch.autograd.Function):
    """The identity, with a tenth of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return 0.1 * gradient


class BinaryActivation(torch.autograd.Function):
    """Signs, with the gradient of a clamp."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class WithFunction(nn.Module):
    """A small network with batch norm, and a function of its own on the pixels or behind the convolution."""

    def __init__(self, function, behind):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 64, 3)
        self.function, self.behind = function, behind

    def forward(self, x):
        x = x if self.behind else self.function.apply(x)
        x = self.norm(self.conv(x))
        return self.head((self.function.apply(x) if self.behind else x).flatten(1))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("function", [RoundedStraightThrough, ScaledGradient, BinaryActivation])
def test_a_copy_that_loses_the_gradient_is_not_used(function, behind):
    network = WithFunction(function, behind).eval().requires_grad_(False)
    images = torch.rand(20, 3, 8, 8, generator=keyed_generator(9))
    used = fused_copy(network, images)
    gradients = []
    for each in (network, used):
        pixels = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(each(pixels)[:, 0].sum(), pixels)[0])
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_network_without_functions_of_its_own_is_still_fused():
    class Identity:
        @staticmethod
        def apply(x):
            return x

    network = WithFunction(Identity, False).eval().requires_grad_(False)
    assert fused_copy(network, torch.rand(20, 3, 8, 8, generator=keyed_generator(9))) is not network
