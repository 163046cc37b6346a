"""Architectures of the papers that no library provides, by name; each maps images to logits."""

from collections.abc import Callable
from typing import Any

from torch import nn

from audit.errors import MismatchError, UnknownNameError
from model_zoo.architectures.cifar import CifarVGG, cifar_densenet, cifar_resnet
from model_zoo.architectures.hypothesis_baselines import VIB, LeNet, PlainCNN
from model_zoo.architectures.hypothesis_net import HypothesisNet
from model_zoo.architectures.paper_encoder import paper_encoder
from model_zoo.architectures.small_classifiers import VGG, BaselineH, DenseNet, ResNet

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "baseline-h": BaselineH,
    "vgg": VGG,
    "resnet": ResNet,
    "densenet": DenseNet,
    "hypothesis-net": HypothesisNet,
    "plain-cnn": PlainCNN,
    "vib": VIB,
    "lenet": LeNet,
    "cifar-resnet": cifar_resnet,
    "cifar-densenet": cifar_densenet,
    "cifar-vgg": CifarVGG,
    "paper-encoder": paper_encoder,
}


def build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Return an architecture with random weights; raises UnknownNameError, or MismatchError for invalid arguments."""
    if name not in ARCHITECTURES:
        raise UnknownNameError("architecture", name, ARCHITECTURES)
    try:
        return ARCHITECTURES[name](**arguments)
    except TypeError as error:
        raise MismatchError(f"architecture {name!r} does not take these arguments: {error}") from error
