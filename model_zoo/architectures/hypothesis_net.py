"""The network of "Guess First": scores of (image, label hypothesis) pairs.

Source: Zhu, An & Niu 2020, "Guess First to Enable Better Compression and Adversarial Robustness".
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audit.errors import UnknownNameError, UsageError

HYPOTHESIS_ENTRIES = ("flatten", "fc1", "fc2")
"""The layer after which the hypothesis enters: the flattened map, or the first or second fully connected layer."""

MAX_PAIRS = 2**16
"""The largest number of (image, hypothesis) pairs in memory: 128 MiB in the widest layer."""

WIDTHS = (512, 256, 128)
_MAX_CACHED_PAIRS = 2560  # for inference on the CPU: beyond it the widest layer exceeds the processor cache
_MIN_FUSED_PAIRS = 64  # below it oneDNN spends more time on preparing weights than it saves


class ConditionedLinear(nn.Module):
    """A linear layer on features concatenated with a one-hot hypothesis: W [x, e_y] + b, with W (D', D + K).

    W [x, e_y] + b = (W_x x + b) + W_y, so the first term is computed once per image. `of_image` holds W_x, the first D
    columns of W, and b; `of_hypothesis` (K, D') holds the last K columns, transposed.
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


class LinearReLU(nn.Module):
    """A linear layer and a ReLU in one module, so that a hook reads the activation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Return activations (..., D') of features (..., D)."""
        return F.relu_(self.linear(features))


class ConditionedLinearReLU(nn.Module):
    """A conditioned linear layer and a ReLU."""

    def __init__(self, inputs: int, num_classes: int, outputs: int) -> None:
        super().__init__()
        self.linear = ConditionedLinear(inputs, num_classes, outputs)

    def forward(self, features: Tensor, hypotheses: Tensor) -> Tensor:
        """Return activations (N, H, D') of features (N, D) under hypotheses (N, H) or (H,)."""
        return F.relu_(self.linear(features, hypotheses))


class FrozenBackbone(nn.Module):
    """A frozen backbone in eval mode with flattened features; gradients reach the images, not the parameters."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenBackbone":  # noqa: ARG002
        """Stay in eval mode, so that training does not update the batch statistics of the backbone."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, D) of images (N, C, H, W)."""
        features: Tensor = self.backbone(images).flatten(1)
        return features


class HypothesisNet(nn.Module):
    """T(x, y) for every label hypothesis y: two convolutions, then dense layers on the map and the one-hot hypothesis.

    The scores are logits, so the network is an ordinary classifier. Layers before the entry of the hypothesis are
    computed once per image. Layers `fc1`, `fc2`, `fc3` output activations under every hypothesis, (N, K, D), or (N, D)
    before the entry. `front` replaces the convolutions by a backbone, which is frozen. `fused` allows inference on the
    CPU to run the layers of pairs in oneDNN. Raises UnknownNameError for an unknown entry.

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
        if entry not in HYPOTHESIS_ENTRIES:
            raise UnknownNameError("entry of the hypothesis", entry, HYPOTHESIS_ENTRIES)
        self.num_classes = num_classes
        self.fused = True
        self.front = convolutions(image_shape[0]) if front is None else FrozenBackbone(front)
        widths = (output_width(self.front, image_shape), *WIDTHS)
        layers: list[LinearReLU | ConditionedLinearReLU] = [
            ConditionedLinearReLU(inputs, num_classes, outputs) if name == entry else LinearReLU(inputs, outputs)
            for name, inputs, outputs in zip(HYPOTHESIS_ENTRIES, widths, WIDTHS, strict=False)
        ]
        self.fc1, self.fc2, self.fc3 = layers
        self.out = nn.Linear(WIDTHS[-1], 1)

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
        """Return the activations of `fc1`, `fc2` and `fc3` for flat features (N, F) under hypotheses (N, H) or (H,).

        Each is (N, H, D), or (N, D) before the entry of the hypothesis.
        """
        first = _apply_layer(self.fc1, flat, hypotheses)
        second = _apply_layer(self.fc2, first, hypotheses)
        return first, second, _apply_layer(self.fc3, second, hypotheses)

    def all_scores(self, flat: Tensor) -> Tensor:
        """Return scores (N, K) of flat features (N, F), in chunks of at max_pairs `MAX_PAIRS` pairs.

        With gradients, each chunk is recomputed in the backward pass (checkpointing). With hooks, all pairs are
        computed in one call, because the reader of the hook holds all activations in memory.
        """
        all_classes = torch.arange(self.num_classes, device=flat.device)
        small = flat.device.type == "cpu" and not torch.is_grad_enabled()
        max_pairs = min(MAX_PAIRS, max(_MAX_CACHED_PAIRS, self.num_classes)) if small else MAX_PAIRS
        if len(flat) * self.num_classes <= max_pairs or self._has_hooks():
            return self._pairs(flat, all_classes)
        rows = flat.split(max(1, max_pairs // self.num_classes))
        return torch.cat([self._chunked_scores(row, all_classes.split(max_pairs)) for row in rows])

    def _chunked_scores(self, flat: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        if not torch.is_grad_enabled():
            return torch.cat([self._pairs(flat, part) for part in parts], 1)
        return torch.cat([checkpoint(self._pairs, flat, part, use_reentrant=False) for part in parts], 1)

    def _pairs(self, flat: Tensor, hypotheses: Tensor) -> Tensor:
        many_pairs = len(flat) * hypotheses.shape[-1] >= _MIN_FUSED_PAIRS
        fused = many_pairs and self.fused and _can_fuse(flat) and not self._has_hooks()
        last = self._fused(flat, hypotheses) if fused else self.activations(flat, hypotheses)[2]
        scores: Tensor = self.out(last)
        return scores.squeeze(-1)

    def _fused(self, flat: Tensor, hypotheses: Tensor) -> Tensor:
        """Return the last of `activations`, with one oneDNN call including the ReLU for each layer of pairs (N, H, D).

        On an AMD processor this is twice as fast as torch's BLAS.
        """
        value = flat
        for layer in (self.fc1, self.fc2, self.fc3):
            if isinstance(layer, LinearReLU) and value.dim() == 3:
                weight, bias = layer.linear.weight, layer.linear.bias
                value = torch.ops.mkldnn._linear_pointwise(value, weight, bias, "relu", [], "")
            else:
                value = _apply_layer(layer, value, hypotheses)
        return value

    def _has_hooks(self) -> bool:
        parts = [part for layer in (self.fc1, self.fc2, self.fc3, self.out) for part in layer.modules()]
        return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


class SingleHypothesisView(nn.Module):
    """A HypothesisNet whose layers `fc1`, `fc2`, `fc3` output activations (N, D) under one hypothesis.

    `hypothesis` is a class, or "predicted" for the predicted class of each image. The output is still the scores (N, K)
    of the network, which depend on all hypotheses. Raises UsageError for a hypothesis that is not a class.
    """

    def __init__(self, network: HypothesisNet, hypothesis: int | Literal["predicted"] = "predicted") -> None:
        super().__init__()
        if hypothesis != "predicted" and hypothesis not in range(network.num_classes):
            last = network.num_classes - 1
            raise UsageError(f"hypothesis {hypothesis!r} is not a class; legal are 0 to {last}, and 'predicted'")
        self.network = network
        self.hypothesis = hypothesis
        self.fc1, self.fc2, self.fc3 = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W), passing activations under the hypothesis through the layers."""
        flat = self.network.front(images)
        scores = self.network.all_scores(flat)
        predicted = scores.argmax(1)
        chosen = predicted if self.hypothesis == "predicted" else torch.full_like(predicted, self.hypothesis)
        activations = self.network.activations(flat, chosen[:, None])
        for layer, activation in zip((self.fc1, self.fc2, self.fc3), activations, strict=True):
            layer(activation.flatten(1))
        return scores


def convolutions(channels: int) -> nn.Sequential:
    """Return the common trunk: two 4x4 convolutions (32 and 64 filters, stride 2, padding 1), batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.Flatten(),
    )


@torch.no_grad()
def output_width(front: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the number of features of a front for one image (C, H, W)."""
    was_training = front.training
    width = int(front.eval()(torch.zeros(1, *image_shape)).shape[1])
    front.train(was_training)
    return width


def _can_fuse(flat: Tensor) -> bool:
    plain = flat.device.type == "cpu" and flat.dtype == torch.float32 and not torch.is_grad_enabled()
    ready = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return plain and ready and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _apply_layer(layer: nn.Module, features: Tensor, hypotheses: Tensor) -> Tensor:
    result: Tensor = layer(features, hypotheses) if isinstance(layer, ConditionedLinearReLU) else layer(features)
    return result
