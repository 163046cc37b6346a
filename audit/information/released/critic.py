"""Critic of the paper's authors' released code, and the value computed from its scores.

Source: the released code of Zhu, Zhang & Evans 2020; Hjelm et al. 2019 (the critic's heads).
"""

from math import exp, log, sqrt

import torch
from torch import Tensor, nn

from audit.errors import UsageError
from audit.types import Features, Images


def reference_value(scores: Tensor, *, per_position: bool) -> Tensor:
    """Return the Donsker-Varadhan value () in nats of scores (P, N, N), [p, i, j] = T_p(x_i, z_j).

    The mean of one value per position (`ref-local`), or the value of the scores averaged over positions (`ref-mean`).
    Product pairs are all off-diagonal ones. As released, the diagonal is set to zero *before* the exponential, so
    that it adds N to the sum of exp T over the N (N - 1) product pairs, although their number is not changed.

    Source: Donsker & Varadhan 1983; the authors' released code, including this error.
    """
    pooled, masked = _pooled(scores, per_position=per_position)
    count = scores.shape[1]
    joint = pooled.diagonal(dim1=1, dim2=2).mean(1)
    product = masked.flatten(1).logsumexp(1) - log(count * (count - 1))
    return (joint - product).mean()


def reference_influence(scores: Tensor, *, per_position: bool) -> Tensor:
    """Return the influence (N,) of each image on `reference_value` to first order, up to a constant, in nats.

    Their standard deviation over sqrt(N) is the standard error of the value over images.

    Source: the delta method on a U-statistic of order two (Hoeffding 1948).
    """
    pooled, masked = _pooled(scores, per_position=per_position)
    count = scores.shape[1]
    weights = masked.flatten(1).softmax(1).view_as(masked) * _others(count, scores)
    return (pooled.diagonal(dim1=1, dim2=2) - count * (weights.sum(1) + weights.sum(2))).mean(0)


def reference_ceiling(largest_score: float, count: int) -> float:
    """Return the largest `reference_value` of `count` images in nats, for scores within +-`largest_score`.

    It is B + ln(N - 1) - ln(1 + (N - 1) exp(-B)), reached by scores B on the diagonal and -B off it. N alone does not
    limit it: the value grows like the scores on the diagonal (without the masking error, twice as fast).
    """
    joint_alone = largest_score + log(count - 1)
    return joint_alone - log(1 + (count - 1) * exp(-largest_score))


def _pooled(scores: Tensor, *, per_position: bool) -> tuple[Tensor, Tensor]:
    """Return the scores (P or 1, N, N), and the same with zeros on the diagonal, which is the masking error."""
    pooled = scores if per_position else scores.mean(0, keepdim=True)
    return pooled, pooled * _others(scores.shape[1], scores)


def _others(count: int, scores: Tensor) -> Tensor:
    return 1 - torch.eye(count, dtype=scores.dtype, device=scores.device)


class ReferenceCritic(nn.Module):
    """T_p(x, z) = <f_p(x), h(z)> without a temperature, f_p at each position p of two strided convolutions of x.

    A side of S pixels has S // 4 positions: 8 x 8 on CIFAR-10, 7 x 7 on MNIST. Images are standardised by the mean and
    deviation of each channel of the training images (in the released code, of the data set). Raises UsageError for
    images smaller than 8 x 8 pixels.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, images: Images, features: Features, width: int, generator: torch.Generator) -> None:
        super().__init__()
        if min(images.shape[-2:]) < 8:
            height, breadth = images.shape[-2:]
            raise UsageError(f"images of {height} x {breadth} pixels are too small for this critic: it needs 8 x 8")
        self.register_buffer("mean", images.mean((0, 2, 3), keepdim=True))
        self.register_buffer("deviation", images.std((0, 2, 3), keepdim=True).clamp_min(1e-6))
        self.convolutions = nn.Sequential(
            nn.Conv2d(images.shape[1], 64, 4, 2, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
        )
        # twice as fast on a CPU, and positions become rows without a copy
        self.convolutions.to(memory_format=torch.channels_last)
        self.of_image = _Head(128, width)
        self.of_feature = _Head(features.shape[1], width)
        _draw_weights(self, generator)
        self.of_image.draw_shortcut(generator)
        self.of_feature.draw_shortcut(generator)

    def view(self, images: Images) -> Tensor:
        """Return the embeddings (N, P, width) of images (N, C, H, W) at each position."""
        standardised = ((images - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)
        maps = self.convolutions(standardised).permute(0, 2, 3, 1)
        embeddings: Tensor = self.of_image(maps.reshape(-1, maps.shape[3])).view(len(images), -1, self.of_image.width)
        return embeddings

    def scores(self, view: Tensor, features: Features) -> Tensor:
        """Return scores (P, N, N) of embedded images (N, P, width) against features (N, D)."""
        return (view @ self.of_feature(features).T).transpose(0, 1)

    def forward(self, images: Images, features: Features) -> Tensor:
        """Return scores (P, N, N) of images (N, C, H, W) against features (N, D)."""
        return self.scores(self.view(images), features)

    def largest_score(self) -> float:
        """Return an upper bound on the magnitude of any score, from the layer norms."""
        return self.of_image.max_length() * self.of_feature.max_length()


class _Head(nn.Module):
    """Maps rows (M, D) to rows (M, width) by a hidden layer with batch norm, a linear shortcut, and a layer norm.

    Equal to the 1 x 1 convolutions of the released code.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Sequential(
            nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )
        self.shortcut = nn.Linear(inputs, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, rows: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.hidden(rows) + self.shortcut(rows))
        return normed

    def max_length(self) -> float:
        """Return an upper bound on the length of any output, which is sqrt(width) before the norm's scale and shift."""
        scale, shift = self.norm.weight.detach(), self.norm.bias.detach()
        return float(scale.abs().max()) * sqrt(self.width) + float(shift.norm())

    @torch.no_grad()
    def draw_shortcut(self, generator: torch.Generator) -> None:
        """Set the shortcut to the identity plus noise, if there are no more inputs than outputs."""
        inputs = self.shortcut.in_features
        if self.width >= inputs:
            self.shortcut.weight.copy_(0.02 * torch.rand(self.width, inputs, generator=generator) - 0.01)
            self.shortcut.weight.fill_diagonal_(1.0)


@torch.no_grad()
def _draw_weights(critic: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight from the default distribution of torch, with the given generator."""
    for part in critic.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            limit = 1 / sqrt(part.weight[0].numel())
            for weights in (part.weight, part.bias):
                if weights is not None:
                    weights.copy_((2 * torch.rand(weights.shape, generator=generator) - 1) * limit)
