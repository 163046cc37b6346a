"""Load a model by reference: `load_model("timm:resnet18")` returns a frozen network for images in [0, 1]."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from audit.errors import AuditError, MismatchError
from audit.types import standard_torch_state
from model_zoo.adapters import find_form, plain_network, with_scores
from model_zoo.entries import ModelEntry, ModelRef, parse_ref
from model_zoo.model_types import ImageShape, LoadedModel, LocatedModel, Normalized, SourceSettings, check_outputs
from model_zoo.relative import model_beside
from model_zoo.sources.files import locate_file
from model_zoo.sources.open_clip_towers import locate_open_clip
from model_zoo.sources.pretrained import (
    locate_bundled,
    locate_hub,
    locate_robustbench,
    locate_timm,
    locate_torchvision,
)
from model_zoo.sources.transformers_towers import locate_transformers

__all__ = ["LoadedModel", "Normalized", "SourceSettings", "build_skeleton", "identify", "load_model"]

_LOCATORS: dict[str, Callable[[ModelRef, SourceSettings], LocatedModel]] = {
    "timm": locate_timm,
    "torchvision": locate_torchvision,
    "robustbench": locate_robustbench,
    "hf-hub": locate_hub,
    "open_clip": locate_open_clip,
    "transformers": locate_transformers,
    "bundled": locate_bundled,
    "file": locate_file,
}


@standard_torch_state()
def load_model(ref: str, sources: SourceSettings | None = None) -> LoadedModel:
    """Load a model: in eval mode, parameters frozen, normalisation inside the network, on the CPU.

    Raises UsageError and its subclasses for an invalid reference, EnvironmentFault and CheckpointError for weights
    that are unavailable or unreadable, UnsafeError for files that would run code, IntegrityError for a hash mismatch,
    MismatchError where weights, architecture and classes do not fit, InvalidModelError for weights that are not finite.
    """
    located = _locate(ref, sources or SourceSettings())
    # Initial weights are drawn and then overwritten: leave the caller's random state unchanged.
    with torch.random.fork_rng(devices=[]):
        network, renames = _fill(located)
        network.eval().requires_grad_(False)
        form = find_form(network, located.num_classes, located.image_shape, located.entry.name)
    renames += form.notes if form else ()
    network = with_scores(network, form, located.mean, located.std).eval()
    if located.image_shape is not None and located.num_classes:
        check_outputs(network, located.num_classes, located.image_shape, located.entry.name)
    entry = replace(located.entry, renames=renames)
    facts = located.preprocessing, located.class_names
    return LoadedModel(network, located.num_classes, located.image_shape, entry, *facts)


def _fill(located: LocatedModel) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a network and copy its weights; for two classes, the weights may be those of a network with one output."""
    network, notes = plain_network(located.build(), located.image_shape)
    try:
        return network, notes + located.copy_weights(network)
    except MismatchError:
        if located.build_single is None:
            raise
        network, notes = plain_network(located.build_single(), located.image_shape)
        try:
            return network, notes + located.copy_weights(network)
        except AuditError:
            pass
        raise


def identify(ref: str, sources: SourceSettings | None = None) -> ModelEntry:
    """Return the entry of a model with the hash of its weights, without building the network; `renames` is empty.

    Raises the errors of `load_model` for references, files and hashes.
    """
    return locate(ref, sources).entry


def locate(ref: str, sources: SourceSettings | None = None) -> LocatedModel:
    """Return a model whose files exist and are hashed, with its preprocessing and outputs, without its network.

    Raises the errors of `load_model` for references, files and hashes.
    """
    return _locate(ref, sources or SourceSettings())


def build_skeleton(
    ref: str, sources: SourceSettings | None = None, device: str = "meta"
) -> tuple[nn.Module, ImageShape | None]:
    """Build the network of a model without reading its weights; return it in eval mode with its image shape.

    On the meta device it takes no memory: use it to find shapes and sizes. Raises the errors of `identify`, and
    whatever the network's constructor raises on the device.
    """
    located = _locate(ref, sources or SourceSettings())
    with torch.random.fork_rng(devices=[]), torch.device(device):
        network = plain_network(located.build(), located.image_shape)[0].eval()
        form = find_form(network, located.num_classes, located.image_shape, located.entry.name)
        return with_scores(network, form, (), ()).eval(), located.image_shape


def _locate(ref: str, sources: SourceSettings) -> LocatedModel:
    parsed = parse_ref(ref)
    found = model_beside(parsed, sources.base)
    located = _LOCATORS[parsed.source](found, sources)
    entry = replace(located.entry, ref=ref)
    if entry.architecture == found.options.get("arch"):  # as it is written: a folder decides no number
        entry = replace(entry, architecture=parsed.options["arch"])
    return replace(located, entry=entry)
