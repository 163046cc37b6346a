"""Models by reference: `load_model("timm:resnet18")` gives a frozen network that takes images in [0, 1]."""

from collections.abc import Callable
from dataclasses import replace

import torch

from model_zoo.entries import ModelEntry, ModelRef, parse_ref
from model_zoo.prepared import LoadedModel, Normalized, Prepared, SourceSettings, check_outputs
from model_zoo.sources.files import prepare_file
from model_zoo.sources.references import (
    prepare_bundled,
    prepare_hub,
    prepare_robustbench,
    prepare_timm,
    prepare_torchvision,
)

__all__ = ["LoadedModel", "Normalized", "SourceSettings", "identify", "load_model"]

_PREPARERS: dict[str, Callable[[ModelRef, SourceSettings], Prepared]] = {
    "timm": prepare_timm,
    "torchvision": prepare_torchvision,
    "robustbench": prepare_robustbench,
    "hf-hub": prepare_hub,
    "bundled": prepare_bundled,
    "file": prepare_file,
}


def load_model(ref: str, sources: SourceSettings | None = None) -> LoadedModel:
    """Return the model a reference names: eval mode, no gradients to parameters, normalisation inside, on the CPU.

    Raises UsageError and its kinds for a reference that is wrong, EnvironmentFault and CheckpointError for weights
    that cannot be had or read, UnsafeError for what would run code, IntegrityError for another hash than promised,
    MismatchError where weights, architecture and classes do not fit, InvalidModelError for weights not finite.
    """
    prepared = _prepare(ref, sources or SourceSettings())
    # Random initial values are overwritten by the weights; drawing them must not move the caller's random state.
    with torch.random.fork_rng(devices=[]):
        network = prepared.build()
    renames = prepared.fit(network)
    if prepared.mean:
        network = Normalized(network, prepared.mean, prepared.std)
    network.eval().requires_grad_(False)
    if prepared.image_shape is not None and prepared.num_classes:
        check_outputs(network, prepared.num_classes, prepared.image_shape, prepared.entry.name)
    entry = replace(prepared.entry, renames=renames)
    return LoadedModel(network, prepared.num_classes, prepared.image_shape, entry)


def identify(ref: str, sources: SourceSettings | None = None) -> ModelEntry:
    """Return a model's entry with the hash of its weights, without building the network; `renames` stays empty.

    Raises what `load_model` raises for references, files and hashes.
    """
    return _prepare(ref, sources or SourceSettings()).entry


def _prepare(ref: str, sources: SourceSettings) -> Prepared:
    parsed = parse_ref(ref)
    prepared = _PREPARERS[parsed.source](parsed, sources)
    return replace(prepared, entry=replace(prepared.entry, ref=ref))
