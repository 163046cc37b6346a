"""The few architectures no package has, by name. Each takes keyword arguments and maps images to logits."""

from collections.abc import Callable
from typing import Any

from torch import nn

from audit.errors import MismatchError, UnknownNameError
from model_zoo.architectures.cifar import CifarVGG, cifar_densenet, cifar_resnet
from model_zoo.architectures.digits import VGG, BaselineH, DenseNet, ResNet
from model_zoo.architectures.encoders import paper_network
from model_zoo.architectures.hypothesis import VIB, HypothesisNet, LeNet, PlainCNN

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
    "paper-encoder": paper_network,
}


def build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Return a freshly initialised network; raises UnknownNameError or MismatchError for unfit arguments."""
    if name not in ARCHITECTURES:
        raise UnknownNameError("architecture", name, ARCHITECTURES)
    try:
        return ARCHITECTURES[name](**arguments)
    except TypeError as error:
        raise MismatchError(f"architecture {name!r} does not take these arguments: {error}") from error
