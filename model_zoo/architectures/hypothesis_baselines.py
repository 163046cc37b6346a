"""Baselines of "Guess First": the plain CNN and the VIB with the trunk of `HypothesisNet`, and LeNet.

Source: Zhu, An & Niu 2020, "Guess First to Enable Better Compression and Adversarial Robustness".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.architectures.hypothesis_net import WIDTHS, LinearReLU, convolutions, output_width


class PlainCNN(nn.Module):
    """A CNN without a hypothesis: two convolutions, three dense layers, one logit per class."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.front = convolutions(image_shape[0])
        first, second, third = WIDTHS
        self.fc1 = LinearReLU(output_width(self.front, image_shape), first)
        self.fc2, self.fc3 = LinearReLU(first, second), LinearReLU(second, third)
        self.out = nn.Linear(third, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W)."""
        logits: Tensor = self.out(self.fc3(self.fc2(self.fc1(self.front(images)))))
        return logits


class VIBSample(NamedTuple):
    """Logits (N, K) of one sample of the representation, and its mean KL divergence () from the prior in nats."""

    logits: Tensor
    kl_nats: Tensor


class VIB(nn.Module):
    """The variational information bottleneck: the second dense layer is a diagonal Gaussian near N(0, I).

    `forward` uses the mean of the Gaussian in both eval and training mode, so the classifier is deterministic;
    training uses `sample`. The authors of "Guess First" average over samples instead.

    Source: Alemi, Fischer, Dillon & Murphy 2017, section 4 (softplus(s - 5) as the standard deviation: appendix A).
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.front = convolutions(image_shape[0])
        first, second, third = WIDTHS
        self.fc1 = LinearReLU(output_width(self.front, image_shape), first)
        self.mean, self.spread = nn.Linear(first, second), nn.Linear(first, second)
        self.fc3 = LinearReLU(second, third)
        self.out = nn.Linear(third, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W) at the mean of the representation."""
        logits: Tensor = self.out(self.fc3(self.mean(self.fc1(self.front(images)))))
        return logits

    def sample(self, images: Tensor, generator: torch.Generator) -> VIBSample:
        """Return logits of one reparameterised sample per image, and the mean KL divergence from the prior."""
        hidden = self.fc1(self.front(images))
        mean, deviation = self.mean(hidden), F.softplus(self.spread(hidden) - 5)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        kl = (mean.square() + deviation.square() - 1).sum(1) / 2 - deviation.log().sum(1)
        return VIBSample(self.out(self.fc3(mean + deviation * noise)), kl.mean())


class LeNet(nn.Module):
    """Two 5x5 convolutions with max pooling and three dense layers, padded so that 8 x 8 images fit.

    Source: LeCun et al. 1998, with ReLU and max pooling.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(image_shape[0], 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(LinearReLU(output_width(self.front, image_shape), 120), LinearReLU(120, 84))
        self.out = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W)."""
        logits: Tensor = self.out(self.hidden(self.front(images)))
        return logits
