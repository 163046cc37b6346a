"""The gate of pixel scales: networks normalised twice, not at all, or by another mean and deviation."""

import pytest
import torch
from torch import nn

from audit.run.gates.pixel_scales import pixel_scale
from model_zoo.model_types import Normalized

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
MNIST = (0.1307,), (0.3081,)
CENTRED = (0.5,), (0.5,)
OWN = (0.3, 0.3, 0.3), (0.1, 0.15, 0.2)


def normalised(images, mean, std):
    return (images - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


class Brightness(nn.Module):
    """Ten levels of brightness, told apart by a network that expects normalised images."""

    def __init__(self, channels, expects=None):
        super().__init__()
        levels = ((torch.arange(10) + 0.5) / 10).view(-1, 1, 1, 1).expand(-1, channels, 1, 1)
        self.levels = nn.Buffer((normalised(levels, *expects) if expects else levels).mean((1, 2, 3)))

    def forward(self, images):
        return -(images.mean((1, 2, 3))[:, None] - self.levels).square()


class NormalisesItself(nn.Module):
    """A network that a factory returns together with its normalisation, without tensors called mean and std."""

    def __init__(self, network, by):
        super().__init__()
        self.inner, self.by = network, by

    def forward(self, images):
        return self.inner(normalised(images, *self.by))


def levels(channels):
    labels = torch.arange(10).repeat(10)
    noise = torch.rand(100, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return (labels.view(-1, 1, 1, 1) + 0.3 + 0.4 * noise) / 10, labels


def itself(by, channels=3):
    return NormalisesItself(Brightness(channels, by), by)


CASES = {
    "ImageNet's in network and reference": (
        lambda: Normalized(itself(IMAGENET), *IMAGENET),
        lambda images: normalised(images, *IMAGENET),
        "more are correct without its normalisation by mean=0.485,0.456,0.406&std=0.229,0.224,0.225: "
        "the network normalises its images itself, leave mean and std out",
    ),
    "an unusual one in network and reference": (
        lambda: Normalized(itself(OWN), *OWN),
        lambda images: normalised(images, *OWN),
        "more are correct without its normalisation by mean=0.3,0.3,0.3&std=0.1,0.15,0.2: "
        "the network normalises its images itself, leave mean and std out",
    ),
    "none wanted": (
        lambda: Normalized(Brightness(3), *CIFAR10),
        lambda images: images,
        "more are correct without its normalisation by mean=0.4914,0.4822,0.4465&std=0.247,0.2435,0.2616: "
        "the network normalises its images itself, leave mean and std out",
    ),
    "CIFAR-10's twice in user code": (
        lambda: NormalisesItself(itself(CIFAR10), CIFAR10),
        lambda images: normalised(images, *CIFAR10),
        "more are correct with CIFAR-10's normalisation undone: the network normalises its images twice",
    ),
    "MNIST's twice in user code": (
        lambda: NormalisesItself(itself(MNIST, 1), MNIST),
        lambda images: normalised(images, *MNIST),
        "more are correct with MNIST's normalisation undone: the network normalises its images twice",
    ),
    "to -1 to 1 twice in user code": (
        lambda: NormalisesItself(itself(CENTRED, 1), CENTRED),
        lambda images: normalised(images, *CENTRED),
        "more are correct with a normalisation to -1 to 1 undone: the network normalises its images twice",
    ),
    "another one in the reference": (
        lambda: Normalized(Brightness(1, MNIST), *CENTRED),
        lambda images: normalised(images, *MNIST),
        "more are correct with MNIST's normalisation, mean=0.1307&std=0.3081, in place of its normalisation by "
        "mean=0.5&std=0.5",
    ),
    "left out": (
        lambda: Brightness(1, MNIST),
        lambda images: normalised(images, *MNIST),
        "more are correct with pixels of MNIST's normalisation: set the mean and std of its training",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gate_says_which_normalisation_fits(case):
    build, fitting, reason = CASES[case]
    network = build()
    inner = next(part for part in network.modules() if isinstance(part, Brightness))
    images, labels = levels(1 if "MNIST" in reason or "-1 to 1" in reason else 3)
    predictions = network(images).argmax(1)
    wrong = float((predictions == labels).float().mean())
    assert float((inner(fitting(images)).argmax(1) == labels).float().mean()) == 1.0
    assert wrong < 0.5
    check = pixel_scale(network, images, labels, predictions)
    assert check.passed is False
    assert check.figure == pytest.approx(1 - wrong)
    assert check.reason == reason


@pytest.mark.parametrize(
    "network",
    [
        Normalized(Brightness(3, IMAGENET), *IMAGENET),
        itself(CIFAR10),
        Brightness(3),
        Normalized(itself(OWN), (0,), (1,)),
    ],
)
def test_networks_that_are_normalised_once_pass(network):
    images, labels = levels(3)
    check = pixel_scale(network, images, labels, network(images).argmax(1))
    assert check.passed
    assert check.figure == 0
    assert check.reason == ""


class NeverRight(nn.Module):
    """Names the next of five levels of brightness; at every other scale it guesses the same class."""

    def forward(self, images):
        level = images.mean((1, 2, 3)) * 5
        known = (level - level.floor() - 0.5).abs() < 1e-3
        return nn.functional.one_hot(torch.where(known, level.long() + 1, 0) % 5, 5).float()


def test_guesses_at_another_scale_are_no_fit():
    labels = torch.arange(5).repeat(20)
    images = ((labels + 0.5) / 5).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    network = NeverRight()
    predictions = network(images).argmax(1)
    assert not bool((predictions == labels).any())
    assert int((network(images * 0.9).argmax(1) == labels).sum()) == 20  # more than 10 % more are correct
    check = pixel_scale(network, images, labels, predictions)
    assert check.passed
    assert check.figure == 0
