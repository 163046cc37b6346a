"""The encoder of the paper: three strided convolutions, a hidden layer, and 64 features."""

from torch import Tensor, nn

from audit.errors import UsageError

FEATURES = 64
_SMALLEST = 8


class PaperEncoder(nn.Module):
    """Map images (N, C, H, W) in [0, 1] of at least 8 x 8 pixels to features (N, `features`).

    Convolutions of `width`, 2 `width` and 4 `width` channels have stride 2; the hidden layer has 16 `width` units. The
    paper has `width` 64: 4,096 and 1,024 units before the features on CIFAR-10, 2,304 and 1,024 on MNIST. Raises
    UsageError for smaller images and for a width below 1.

    Source: Zhu, Zhang & Evans 2020, released code; Hjelm et al. 2019.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int = 64, features: int = FEATURES) -> None:
        super().__init__()
        channels, height, breadth = image_shape
        if min(height, breadth) < _SMALLEST:
            raise UsageError(f"images of {height} x {breadth} pixels are too small for this encoder, which needs 8 x 8")
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


def paper_encoder(image_shape: tuple[int, int, int], width: int = 64, num_classes: int = 0) -> nn.Module:
    """Return an encoder, with a linear head where `num_classes` > 0; layer `penultimate` is then the features."""
    encoder = PaperEncoder(image_shape, width)
    return nn.Sequential(encoder, nn.Linear(FEATURES, num_classes)) if num_classes else encoder
