"""The paper's encoder: three strided convolutions, a hidden layer, 64 features, no classifier."""

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


def paper_network(image_shape: tuple[int, int, int], width: int = 64, num_classes: int = 0) -> nn.Module:
    """Return an encoder, or with classes an encoder under a linear head: its layer `penultimate` is the encoder's."""
    encoder = PaperEncoder(image_shape, width)
    return nn.Sequential(encoder, nn.Linear(FEATURES, num_classes)) if num_classes else encoder
