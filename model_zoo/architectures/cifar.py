"""ResNet, DenseNet and VGG for CIFAR: torchvision constructors with stems that keep the 32 x 32 resolution.

No weights are read from torchvision.
"""

from torch import Tensor, nn

_VGG16_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max pooling


def cifar_resnet(image_shape: tuple[int, int, int], num_classes: int, depth: int = 18) -> nn.Module:
    """Return a ResNet (depth 18, 34, 50, 101 or 152) whose stem is a 3x3 convolution without pooling.

    Raises UnknownNameError for another depth. Source: He et al. 2016; the stem as usual for CIFAR.
    """
    from model_zoo.libraries import torchvision_build

    network = torchvision_build(f"resnet{depth}", num_classes, None)
    network.conv1, network.maxpool = _stem(image_shape[0]), nn.Identity()
    return network


def cifar_densenet(image_shape: tuple[int, int, int], num_classes: int, depth: int = 121) -> nn.Module:
    """Return a DenseNet (depth 121, 169 or 201) whose stem is a 3x3 convolution without pooling.

    Raises UnknownNameError for another depth. Source: Huang et al. 2017; the stem as usual for CIFAR.
    """
    from model_zoo.libraries import torchvision_build

    network = torchvision_build(f"densenet{depth}", num_classes, None)
    features = network.get_submodule("features")
    features.conv0, features.pool0 = _stem(image_shape[0]), nn.Identity()
    return network


class CifarVGG(nn.Module):
    """VGG-16 with batch norm for images of at least 32 x 32 pixels: 13 convolutions and one linear layer.

    Source: Simonyan & Zisserman 2015, configuration D; the single linear layer as usual for CIFAR.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        layers, channels = list[nn.Module](), image_shape[0]
        for outputs in _VGG16_CHANNELS:
            if outputs:
                layers += [_conv(channels, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K)."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def _stem(channels: int) -> nn.Conv2d:
    return _conv(channels, 64)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # as in torchvision
    return layer
