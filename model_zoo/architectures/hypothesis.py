"""Networks of "Guess First": scores of (image, label hypothesis) pairs, and baselines with the same trunk.

Source: Zhu, An & Niu 2020, "Guess First to Enable Better Compression and Adversarial Robustness".
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audit.errors import UnknownNameError, UsageError

ENTRIES = ("flatten", "fc1", "fc2")
"""After which layer the hypothesis enters: the flattened map, or the first or second fully connected layer."""

PAIRS_AT_ONCE = 2**16
"""How many (image, hypothesis) pairs are held in memory at once: 128 MiB in the widest layer."""

_WIDTHS = (512, 256, 128)
_CACHED_PAIRS = 2560  # in inference on the CPU: beyond, the widest layer is too large for the cache
_WORTH_FUSING = 64  # pairs: below, oneDNN spends more on preparing weights than it saves


class ConditionedLinear(nn.Module):
    """A linear layer on features with a one-hot hypothesis behind them: W [x, e_y] + b, with W (D', D + K).

    By linearity that is W_x x + b, once an image, plus the column of W that belongs to y. W is kept as `of_image`,
    its first D columns and b, and `of_hypothesis` (K, D'), its last K columns transposed.
    """

    def __init__(self, inputs: int, num_classes: int, outputs: int) -> None:
        super().__init__()
        limit = (inputs + num_classes) ** -0.5
        self.of_image = nn.Linear(inputs, outputs)
        self.of_hypothesis = nn.Parameter(torch.empty(num_classes, outputs).uniform_(-limit, limit))

    def forward(self, features: Tensor, hypotheses: Tensor) -> Tensor:
        """Return (N, H, D') of features (N, D) under hypotheses (N, H), or (H,) for every image."""
        shared: Tensor = self.of_image(features)
        return shared[:, None] + self.of_hypothesis[hypotheses]


class Dense(nn.Module):
    """A linear layer and a ReLU; its output, which hooks read, is the activation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Return activations (..., D') of features (..., D)."""
        return F.relu_(self.linear(features))


class ConditionedDense(nn.Module):
    """A conditioned linear layer and a ReLU."""

    def __init__(self, inputs: int, num_classes: int, outputs: int) -> None:
        super().__init__()
        self.linear = ConditionedLinear(inputs, num_classes, outputs)

    def forward(self, features: Tensor, hypotheses: Tensor) -> Tensor:
        """Return activations (N, H, D') of features (N, D) under hypotheses (N, H) or (H,)."""
        return F.relu_(self.linear(features, hypotheses))


class Frozen(nn.Module):
    """A backbone that stays as it is, in eval mode, and gives flat features; gradients still reach the images."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Frozen":  # noqa: ARG002
        """Stay in eval mode: training must not move a frozen backbone's batch statistics."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, D) of images (N, C, H, W)."""
        features: Tensor = self.backbone(images).flatten(1)
        return features


class HypothesisNet(nn.Module):
    """T(x, y) for every label hypothesis y: two convolutions, then dense layers on the map and the one-hot hypothesis.

    The scores are logits, so it is an ordinary classifier. What stands before the hypothesis' entry is computed once
    an image. Layers `fc1`, `fc2`, `fc3` hold their activations under every hypothesis, (N, K, D), or (N, D) before the
    entry. `front` replaces the convolutions by any backbone, which is frozen. `fused` says whether inference on the CPU
    may run the layers of pairs through oneDNN. Raises UnknownNameError for an unknown entry.

    Source: Zhu, An & Niu 2020, section 4.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        entry: str = "flatten",
        front: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if entry not in ENTRIES:
            raise UnknownNameError("entry of the hypothesis", entry, ENTRIES)
        self.num_classes = num_classes
        self.fused = True
        self.front = convolutions(image_shape[0]) if front is None else Frozen(front)
        widths = (flat_width(self.front, image_shape), *_WIDTHS)
        layers: list[Dense | ConditionedDense] = [
            ConditionedDense(inputs, num_classes, outputs) if name == entry else Dense(inputs, outputs)
            for name, inputs, outputs in zip(ENTRIES, widths, _WIDTHS, strict=False)
        ]
        self.fc1, self.fc2, self.fc3 = layers
        self.out = nn.Linear(_WIDTHS[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W) under all K hypotheses."""
        return self.all_scores(self.front(images))

    def scores(self, images: Tensor, hypotheses: Tensor) -> Tensor:
        """Return scores (N, H) of images (N, C, H, W), each under its own hypotheses (N, H)."""
        return self._pairs(self.front(images), hypotheses)

    def representation(self, flat: Tensor, hypotheses: Tensor) -> Tensor:
        """Return the second layer's activations (N, H, D) of flat features (N, F) under hypotheses (N, H)."""
        return self.activations(flat, hypotheses)[1]

    def activations(self, flat: Tensor, hypotheses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `fc1`, `fc2` and `fc3` make of flat features (N, F) under hypotheses (N, H) or (H,).

        Each is (N, H, D), or (N, D) where the hypothesis has not entered yet.
        """
        first = _apply(self.fc1, flat, hypotheses)
        second = _apply(self.fc2, first, hypotheses)
        return first, second, _apply(self.fc3, second, hypotheses)

    def all_scores(self, flat: Tensor) -> Tensor:
        """Return scores (N, K) of flat features (N, F), in parts of at most `PAIRS_AT_ONCE` pairs.

        Where gradients are asked for, each part is computed again on the way back. A layer that is hooked sees all
        pairs in one call: who reads it holds them in memory anyhow.
        """
        everything = torch.arange(self.num_classes, device=flat.device)
        small = flat.device.type == "cpu" and not torch.is_grad_enabled()
        most = min(PAIRS_AT_ONCE, max(_CACHED_PAIRS, self.num_classes)) if small else PAIRS_AT_ONCE
        if len(flat) * self.num_classes <= most or self._hooked():
            return self._pairs(flat, everything)
        rows = flat.split(max(1, most // self.num_classes))
        return torch.cat([self._row(row, everything.split(most)) for row in rows])

    def _row(self, flat: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        if not torch.is_grad_enabled():
            return torch.cat([self._pairs(flat, part) for part in parts], 1)
        return torch.cat([checkpoint(self._pairs, flat, part, use_reentrant=False) for part in parts], 1)

    def _pairs(self, flat: Tensor, hypotheses: Tensor) -> Tensor:
        enough = len(flat) * hypotheses.shape[-1] >= _WORTH_FUSING
        fused = enough and self.fused and _may_fuse(flat) and not self._hooked()
        last = self._fused(flat, hypotheses) if fused else self.activations(flat, hypotheses)[2]
        scores: Tensor = self.out(last)
        return scores.squeeze(-1)

    def _fused(self, flat: Tensor, hypotheses: Tensor) -> Tensor:
        """What `activations` gives last; layers of pairs (N, H, D) are one oneDNN call each, ReLU included.

        Measured beside the BLAS that torch brings: twice as fast on an AMD processor.
        """
        value = flat
        for layer in (self.fc1, self.fc2, self.fc3):
            if isinstance(layer, Dense) and value.dim() == 3:
                weight, bias = layer.linear.weight, layer.linear.bias
                value = torch.ops.mkldnn._linear_pointwise(value, weight, bias, "relu", [], "")
            else:
                value = _apply(layer, value, hypotheses)
        return value

    def _hooked(self) -> bool:
        parts = [part for layer in (self.fc1, self.fc2, self.fc3, self.out) for part in layer.modules()]
        return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


class Hypothesised(nn.Module):
    """A network whose layers `fc1`, `fc2`, `fc3` can be read under one hypothesis, (N, D): a chosen or the predicted.

    Its output is the network's scores (N, K) as ever: one hypothesis' representation does not decide them. Raises
    UsageError for a hypothesis that is no class of the network.
    """

    def __init__(self, network: HypothesisNet, hypothesis: int | Literal["predicted"] = "predicted") -> None:
        super().__init__()
        if hypothesis != "predicted" and hypothesis not in range(network.num_classes):
            last = network.num_classes - 1
            raise UsageError(f"hypothesis {hypothesis!r} is no class: legal are 0 to {last}, and 'predicted'")
        self.network = network
        self.hypothesis = hypothesis
        self.fc1, self.fc2, self.fc3 = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W); the layers see activations under the hypothesis on the way."""
        flat = self.network.front(images)
        scores = self.network.all_scores(flat)
        predicted = scores.argmax(1)
        chosen = predicted if self.hypothesis == "predicted" else torch.full_like(predicted, self.hypothesis)
        reached = self.network.activations(flat, chosen[:, None])
        for layer, activation in zip((self.fc1, self.fc2, self.fc3), reached, strict=True):
            layer(activation.flatten(1))
        return scores


class PlainCNN(nn.Module):
    """The same trunk without a hypothesis: two convolutions, three dense layers, a logit a class."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.front = convolutions(image_shape[0])
        first, second, third = _WIDTHS
        self.fc1 = Dense(flat_width(self.front, image_shape), first)
        self.fc2, self.fc3 = Dense(first, second), Dense(second, third)
        self.out = nn.Linear(third, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W)."""
        logits: Tensor = self.out(self.fc3(self.fc2(self.fc1(self.front(images)))))
        return logits


class Sampled(NamedTuple):
    """Logits (N, K) through a drawn representation, and its mean divergence from the prior () in nats."""

    logits: Tensor
    kl_nats: Tensor


class VIB(nn.Module):
    """The trunk with a stochastic second dense layer: a diagonal Gaussian held near the standard normal.

    `forward` uses the Gaussian's mean, in eval and in training mode alike, so the classifier is deterministic;
    training draws through `sample`. The paper's authors average over draws instead.

    Source: Alemi, Fischer, Dillon & Murphy 2017, section 4 (softplus(s - 5) as the standard deviation: appendix A).
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.front = convolutions(image_shape[0])
        first, second, third = _WIDTHS
        self.fc1 = Dense(flat_width(self.front, image_shape), first)
        self.mean, self.spread = nn.Linear(first, second), nn.Linear(first, second)
        self.fc3 = Dense(second, third)
        self.out = nn.Linear(third, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W) at the mean of the representation."""
        logits: Tensor = self.out(self.fc3(self.mean(self.fc1(self.front(images)))))
        return logits

    def sample(self, images: Tensor, generator: torch.Generator) -> Sampled:
        """Return logits of one draw for each image, reparameterised, and the divergence from the prior."""
        hidden = self.fc1(self.front(images))
        mean, deviation = self.mean(hidden), F.softplus(self.spread(hidden) - 5)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        kl = (mean.square() + deviation.square() - 1).sum(1) / 2 - deviation.log().sum(1)
        return Sampled(self.out(self.fc3(mean + deviation * noise)), kl.mean())


class LeNet(nn.Module):
    """Two 5x5 convolutions with max pooling and three dense layers; padded, so that images of 8 pixels fit.

    Source: LeCun et al. 1998, with ReLU and max pooling.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(image_shape[0], 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.hidden = nn.Sequential(Dense(flat_width(self.front, image_shape), 120), Dense(120, 84))
        self.out = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W)."""
        logits: Tensor = self.out(self.hidden(self.front(images)))
        return logits


def convolutions(channels: int) -> nn.Sequential:
    """Return the common trunk: 32 and 64 filters, 4x4, stride 2, padded by 1, batch norm and ReLU, then flattened."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.Flatten(),
    )  # fmt: skip


@torch.no_grad()
def flat_width(front: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return how many features a front gives for one image (C, H, W)."""
    was_training = front.training
    width = int(front.eval()(torch.zeros(1, *image_shape)).shape[1])
    front.train(was_training)
    return width


def _may_fuse(flat: Tensor) -> bool:
    plain = flat.device.type == "cpu" and flat.dtype == torch.float32 and not torch.is_grad_enabled()
    ready = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return plain and ready and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _apply(layer: nn.Module, features: Tensor, hypotheses: Tensor) -> Tensor:
    result: Tensor = layer(features, hypotheses) if isinstance(layer, ConditionedDense) else layer(features)
    return result
