"""Four families of small classifiers for images of 8 to 32 pixels, scaled from the networks of Figure 1.

Source: Zhu, Zhang & Evans 2020, Figure 1.
"""

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class BaselineH(nn.Module):
    """Three strided convolutions and two linear layers, then the classifier.

    Source: the encoder of Hjelm et al. 2019 as used by Zhu, Zhang & Evans 2020, all widths scaled by `width`/64.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, width: int = 16, features: int = 64
    ) -> None:
        super().__init__()
        channels, height, _ = image_shape
        self.convolutions = nn.Sequential(
            _conv(channels, width, 4, 2, 1), _conv(width, 2 * width, 4, 2, 1), _conv(2 * width, 4 * width, 4, 2, 1)
        )
        flat = 4 * width * (height // 8) ** 2
        self.hidden = nn.Sequential(nn.Linear(flat, 8 * width, bias=False), nn.BatchNorm1d(8 * width), nn.ReLU())
        self.features = nn.Linear(8 * width, features)
        self.classifier = nn.Sequential(nn.ReLU(), nn.Linear(features, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K)."""
        logits: Tensor = self.classifier(self.features(self.hidden(self.convolutions(images).flatten(1))))
        return logits


class VGG(nn.Module):
    """Two pairs of 3x3 convolutions, each followed by max pooling, and one hidden linear layer.

    Source: Simonyan & Zisserman 2015, with batch normalisation.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        channels, height, _ = image_shape
        self.stages = nn.Sequential(
            _conv(channels, width, 3, 1, 1),
            _conv(width, width, 3, 1, 1),
            nn.MaxPool2d(2),
            _conv(width, 2 * width, 3, 1, 1),
            _conv(2 * width, 2 * width, 3, 1, 1),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Sequential(nn.Linear(2 * width * (height // 4) ** 2, 4 * width), nn.ReLU())
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K)."""
        logits: Tensor = self.classifier(self.hidden(self.stages(images).flatten(1)))
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, 3, stride, 1),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(self.body(maps) + self.shortcut(maps))


class ResNet(nn.Module):
    """A stem and three stages of `depth` residual blocks, the last two with stride 2, and global average pooling.

    Source: He et al. 2016.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 16, depth: int = 1) -> None:
        super().__init__()
        self.stem = _conv(image_shape[0], width, 3, 1, 1)
        stages = ((width, width, 1), (width, 2 * width, 2), (2 * width, 3 * width, 2))
        self.blocks = nn.Sequential(
            *(
                _ResidualBlock(inputs if block == 0 else outputs, outputs, stride if block == 0 else 1)
                for inputs, outputs, stride in stages
                for block in range(depth)
            )
        )
        self.classifier = nn.Linear(3 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K)."""
        logits: Tensor = self.classifier(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, growth, 3, 1, 1, bias=False))

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([maps, self.body(maps)], 1)


class DenseNet(nn.Module):
    """Two dense blocks of three layers with a compressing transition, and global average pooling.

    Source: Huang et al. 2017.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 16, growth: int = 12) -> None:
        super().__init__()
        wide = width + 3 * growth
        self.stem = nn.Conv2d(image_shape[0], width, 3, 1, 1, bias=False)
        self.first = nn.Sequential(*(_DenseLayer(width + i * growth, growth) for i in range(3)))
        self.transition = nn.Sequential(_conv(wide, wide // 2, 1, 1, 0), nn.AvgPool2d(2))
        self.second = nn.Sequential(*(_DenseLayer(wide // 2 + i * growth, growth) for i in range(3)))
        last = wide // 2 + 3 * growth
        self.norm = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU())
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K)."""
        maps = self.norm(self.second(self.transition(self.first(self.stem(images)))))
        logits: Tensor = self.classifier(maps.mean((2, 3)))
        return logits
