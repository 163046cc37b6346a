"""The paper's encoder: three strided convolutions, a hidden layer, 64 features, no classifier.

The functions below are factories for `file:` references, one for each size and width that the studies train, such as
`file:g.safetensors?arch=model_zoo.architectures.encoders:grey28_w16&num_classes=0&shape=1x28x28`. With classes they
put a linear head on the encoder, whose features then are the layer `penultimate`.
"""

from torch import Tensor, nn

from audit.errors import UsageError

FEATURES = 64
_SMALLEST = 8


class PaperEncoder(nn.Module):
    """Images (N, C, H, W) of at least 8 x 8 pixels in [0, 1] to features (N, `features`).

    Convolutions of 1, 2 and 4 times `width` channels halve the map each time; the hidden layer has 16 times `width`
    units. `width` 64 is the paper's: 4,096 and 1,024 units before the features on CIFAR-10, 2,304 and 1,024 on MNIST.
    Raises UsageError for smaller images and a width below 1.

    Source: Zhu, Zhang & Evans 2020, as their released code reads; Hjelm et al. 2019.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int = 64, features: int = FEATURES) -> None:
        super().__init__()
        channels, height, breadth = image_shape
        if min(height, breadth) < _SMALLEST:
            raise UsageError(f"images of {height} x {breadth} pixels are too small for this encoder: it needs 8 x 8")
        if width < 1 or features < 1:
            raise UsageError(f"encoder width {width!r} and features {features!r} must be at least 1")
        layers: list[nn.Module] = []
        for outputs in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        self.convolutions = nn.Sequential(*layers)
        flat = channels * (height // 8) * (breadth // 8)
        self.hidden = nn.Sequential(nn.Linear(flat, 16 * width), nn.BatchNorm1d(16 * width), nn.ReLU())
        self.features = nn.Linear(16 * width, features)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, D)."""
        features: Tensor = self.features(self.hidden(self.convolutions(images).flatten(1)))
        return features


def _network(shape: tuple[int, int, int], width: int, num_classes: int) -> nn.Module:
    encoder = PaperEncoder(shape, width)
    return nn.Sequential(encoder, nn.Linear(FEATURES, num_classes)) if num_classes else encoder


def grey8_w16(num_classes: int = 0) -> nn.Module:
    """Return an encoder of 8 x 8 grey images, a quarter of the paper's width."""
    return _network((1, 8, 8), 16, num_classes)


def grey28_w16(num_classes: int = 0) -> nn.Module:
    """Return an encoder of 28 x 28 grey images, a quarter of the paper's width."""
    return _network((1, 28, 28), 16, num_classes)


def grey28_w64(num_classes: int = 0) -> nn.Module:
    """Return an encoder of 28 x 28 grey images, as wide as the paper's."""
    return _network((1, 28, 28), 64, num_classes)


def colour32_w16(num_classes: int = 0) -> nn.Module:
    """Return an encoder of 32 x 32 colour images, a quarter of the paper's width."""
    return _network((3, 32, 32), 16, num_classes)


def colour32_w64(num_classes: int = 0) -> nn.Module:
    """Return an encoder of 32 x 32 colour images, as wide as the paper's."""
    return _network((3, 32, 32), 64, num_classes)


FACTORIES = {
    ((1, 8, 8), 16): "grey8_w16",
    ((1, 28, 28), 16): "grey28_w16",
    ((1, 28, 28), 64): "grey28_w64",
    ((3, 32, 32), 16): "colour32_w16",
    ((3, 32, 32), 64): "colour32_w64",
}
"""The name of the factory for an image shape and a width."""
