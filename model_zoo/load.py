"""Load a model by reference: `load_model("timm:resnet18")` returns a frozen network for images in [0, 1]."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from model_zoo.entries import ModelEntry, ModelRef, parse_ref
from model_zoo.model_types import ImageShape, LoadedModel, LocatedModel, Normalized, SourceSettings, check_outputs
from model_zoo.sources.files import locate_file
from model_zoo.sources.pretrained import (
    locate_bundled,
    locate_hub,
    locate_robustbench,
    locate_timm,
    locate_torchvision,
)

__all__ = ["LoadedModel", "Normalized", "SourceSettings", "build_skeleton", "identify", "load_model"]

_LOCATORS: dict[str, Callable[[ModelRef, SourceSettings], LocatedModel]] = {
    "timm": locate_timm,
    "torchvision": locate_torchvision,
    "robustbench": locate_robustbench,
    "hf-hub": locate_hub,
    "bundled": locate_bundled,
    "file": locate_file,
}


def load_model(ref: str, sources: SourceSettings | None = None) -> LoadedModel:
    """Load a model: in eval mode, parameters frozen, normalisation inside the network, on the CPU.

    Raises UsageError and its subclasses for an invalid reference, EnvironmentFault and CheckpointError for weights
    that are unavailable or unreadable, UnsafeError for files that would run code, IntegrityError for a hash mismatch,
    MismatchError where weights, architecture and classes do not fit, InvalidModelError for weights that are not finite.
    """
    located = _locate(ref, sources or SourceSettings())
    # Initial weights are drawn and then overwritten: leave the caller's random state unchanged.
    with torch.random.fork_rng(devices=[]):
        network = located.build()
    renames = located.copy_weights(network)
    if located.mean:
        network = Normalized(network, located.mean, located.std)
    network.eval().requires_grad_(False)
    if located.image_shape is not None and located.num_classes:
        check_outputs(network, located.num_classes, located.image_shape, located.entry.name)
    entry = replace(located.entry, renames=renames)
    return LoadedModel(network, located.num_classes, located.image_shape, entry)


def identify(ref: str, sources: SourceSettings | None = None) -> ModelEntry:
    """Return the entry of a model with the hash of its weights, without building the network; `renames` is empty.

    Raises the errors of `load_model` for references, files and hashes.
    """
    return _locate(ref, sources or SourceSettings()).entry


def build_skeleton(
    ref: str, sources: SourceSettings | None = None, device: str = "meta"
) -> tuple[nn.Module, ImageShape | None]:
    """Build the network of a model without reading its weights; return it in eval mode with its image shape.

    On the meta device it takes no memory: use it to find shapes and sizes. Raises the errors of `identify`, and
    whatever the network's constructor raises on the device.
    """
    located = _locate(ref, sources or SourceSettings())
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return located.build().eval(), located.image_shape


def _locate(ref: str, sources: SourceSettings) -> LocatedModel:
    parsed = parse_ref(ref)
    located = _LOCATORS[parsed.source](parsed, sources)
    return replace(located, entry=replace(located.entry, ref=ref))
