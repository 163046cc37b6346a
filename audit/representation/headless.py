"""Networks without a classifier: their features are their output, and they have no logits."""

from torch import Tensor, nn

from audit.errors import UsageError
from audit.types import Images

OUTPUT = "output"
"""The layer that is a network's output: the features of an encoder, the logits of a classifier."""


class Headless(nn.Module):
    """A network without a classifier: images (N, C, H, W) -> features (N, ...).

    `output` and `penultimate` name its features; it has no layer `logits`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Images) -> Tensor:
        """Return the features (N, ...) of images (N, C, H, W)."""
        features: Tensor = self.network(images)
        return features


def resolved_layer(model: nn.Module, layer: str) -> str:
    """Return the name by which a copy of a model has a layer; raises UsageError for the logits of an encoder.

    >>> resolved_layer(Headless(nn.Flatten()), "penultimate")
    'output'
    """
    if not isinstance(model, Headless):
        return layer
    path = layer.strip().partition("#")[0]
    if path == "logits":
        raise UsageError(f"layer {layer!r} does not exist: the network has no classifier; its features are {OUTPUT!r}")
    return layer.replace("penultimate", OUTPUT, 1) if path == "penultimate" else layer
