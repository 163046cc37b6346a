"""Architectures of the third-party checkpoints that the tests load, for `file:` references to name."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut that subsamples and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(images)))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        if self.extra:
            half = self.extra // 2
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, half, self.extra - half))
        return torch.relu(self.bn2(self.conv2(inner)) + shortcut)


class _CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Block(outputs, outputs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(inputs, outputs, stride), *rest)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        return self.linear(maps.mean((2, 3)))


def resnet20(num_classes: int = 10) -> nn.Module:
    return _CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> nn.Module:
    return _CifarResNet(9, num_classes)


class _PlainBlock(nn.Module):
    """A residual block without batch norm; a 1x1 convolution where the shortcut changes shape."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride))

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(images))) + self.shortcut(images))


class _ResNet2B(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(_PlainBlock(8, 16, 2), _PlainBlock(16, 16, 1))
        self.linear1 = nn.Linear(1024, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer1(torch.relu(self.conv1(images))).flatten(1)
        return self.linear2(torch.relu(self.linear1(features)))


def resnet2b() -> nn.Module:
    return _ResNet2B()


def _convolutional(channels: int, padding: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Two strided 4x4 convolutions, then linear layers of the given widths (the first is the flattened one)."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 4, 2, padding), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 4, 2, padding), nn.ReLU(), nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn_a() -> nn.Module:
    return _convolutional(3, 1, (2048, 100, 10))


def marabou_medium() -> nn.Module:
    return _convolutional(3, 0, (1152, 128, 64, 10))


def mnist_cnn_a() -> nn.Module:
    return _convolutional(1, 1, (1568, 100, 10))


def mnist_conv_small() -> nn.Module:
    return _convolutional(1, 0, (800, 100, 10))


class SamePadConv(nn.Conv2d):
    """A convolution padded as TensorFlow's `SAME`: the odd row and column of zeros come last."""

    def forward(self, images: Tensor) -> Tensor:
        before_after = []
        for axis in (3, 2):
            kernel, stride = self.kernel_size[axis - 2], self.stride[axis - 2]
            missing = max((-(-images.shape[axis] // stride) - 1) * stride + kernel - images.shape[axis], 0)
            before_after += [missing // 2, missing - missing // 2]
        return super().forward(nn.functional.pad(images, before_after))


def _lite_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class LiteBlock(nn.Module):
    """An inverted residual block of EfficientNet-Lite: no squeeze and excitation, ReLU6."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands, self.skips = expansion != 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv = nn.Conv2d(channels, inner, 1, bias=False)
            self._bn0 = _lite_norm(inner)
        self._depthwise_conv = SamePadConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _lite_norm(inner)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = _lite_norm(out)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = nn.functional.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return inner + x if self.skips else inner


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with the tensor names of efficientnet_lite_pytorch (Tan & Le 2019)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        stages = [(1, 16, 1, 3, 1), (2, 24, 6, 3, 2), (2, 40, 6, 5, 2), (3, 80, 6, 3, 2), (3, 112, 6, 5, 1)]
        stages += [(4, 192, 6, 5, 2), (1, 320, 6, 3, 1)]
        self._conv_stem = SamePadConv(3, 32, 3, 2, bias=False)
        self._bn0 = _lite_norm(32)
        blocks, channels = [], 32
        for repeats, out, expansion, kernel, stride in stages:
            for number in range(repeats):
                blocks.append(LiteBlock(channels, out, expansion, kernel, 1 if number else stride))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = _lite_norm(1280)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            features = block(features)
        features = nn.functional.relu6(self._bn1(self._conv_head(features)))
        return self._fc(features.mean((2, 3)))


def efficientnet_lite0(num_classes: int) -> nn.Module:
    return EfficientNetLite0(num_classes)
