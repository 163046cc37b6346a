"""Locate pretrained models of timm, the Hugging Face hub, torchvision, RobustBench and this package."""

import re
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from audit.errors import EnvironmentFault
from model_zoo import catalogue, libraries
from model_zoo.architectures import build
from model_zoo.catalogue import pretrained_entry
from model_zoo.entries import ModelEntry, ModelRef, PretrainedFacts
from model_zoo.model_types import LocatedModel, SourceSettings
from model_zoo.sources.downloads import Download, fetch
from model_zoo.sources.hub import build_within_limit, config_facts, hub_file, read_config
from model_zoo.untrusted import verify_sha256
from model_zoo.weights import key_rules
from model_zoo.weights.checkpoints import copy_weights, read_weights
from model_zoo.weights.matching import max_checkpoint_bytes

_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
_DRIVE_LINK = "https://drive.google.com/file/d/"


def locate_timm(ref: ModelRef, sources: SourceSettings) -> LocatedModel:
    """Locate the safetensors of a timm model; raises UnknownNameError, EnvironmentFault, IntegrityError."""
    facts = libraries.timm_facts(ref.target)
    folder = sources.cache / "timm"
    local = folder / f"{facts.name}.safetensors"
    if (folder / f"{ref.target}.safetensors").exists():
        local = folder / f"{ref.target}.safetensors"
    if not facts.hub_repo and not local.exists():
        message = f"timm's {facts.name} has no safetensors on the hub; convert its weights and put them at {local}"
        raise EnvironmentFault(message)
    path, pinned = hub_file(facts.hub_repo, facts.hub_file, local, offline=sources.offline)
    entry = pretrained_entry(f"timm:{ref.target}", facts)
    return _locate_with_timm(facts, replace(entry, weights_sha256=verify_sha256(path), pinned=pinned), path, {})


def locate_hub(ref: ModelRef, sources: SourceSettings) -> LocatedModel:
    """Locate config.json and model.safetensors of a hub repository in timm's layout.

    Raises EnvironmentFault, UsageError for another layout, UnsafeError for a configuration with options that read
    files, UnknownNameError for an unknown architecture.
    """
    folder = sources.cache / "hf-hub" / ref.target
    config_path, _ = hub_file(ref.target, "config.json", folder / "config.json", offline=sources.offline)
    config = read_config(config_path, ref.target)
    facts = config_facts(config, ref.target)
    path, pinned = hub_file(ref.target, "model.safetensors", folder / "model.safetensors", offline=sources.offline)
    entry = replace(
        pretrained_entry(f"hf-hub:{ref.target}", facts),
        dataset="",
        training="unknown",
        reference=ref.target,
        weights_sha256=verify_sha256(path),
        pinned=pinned,
    )
    located = _locate_with_timm(facts, entry, path, config.get("model_args", {}))
    return replace(located, build=lambda: build_within_limit(located.build, path))


def _locate_with_timm(
    facts: PretrainedFacts, entry: ModelEntry, path: Path, arguments: Mapping[str, Any]
) -> LocatedModel:
    merged = {**arguments, "num_classes": facts.num_classes}
    return LocatedModel(
        entry=entry,
        build=lambda: libraries.timm_build(facts.name, merged),
        copy_weights=lambda network: key_rules.copy_timm_weights(
            network, read_weights(path, max_bytes=max_checkpoint_bytes(network))
        ),
        num_classes=facts.num_classes,
        image_shape=facts.image_shape,
        mean=facts.mean,
        std=facts.std,
        preprocessing=facts.preprocessing,
        class_names=facts.class_names,
    )


def locate_torchvision(ref: ModelRef, sources: SourceSettings) -> LocatedModel:
    """Locate torchvision weights, whose file name contains a prefix of their sha256.

    Raises UnknownNameError, EnvironmentFault, CheckpointError, IntegrityError.
    """
    arch, _, wanted = ref.target.partition("/")
    weights_name, facts = libraries.torchvision_facts(arch, wanted)
    download = _download_named_by_hash(facts.url)
    target = sources.cache / "torchvision" / facts.url.rpartition("/")[2]
    path = fetch(download, target, offline=sources.offline)
    entry = pretrained_entry(f"torchvision:{arch}/{weights_name}", facts)
    return LocatedModel(
        entry=replace(entry, weights_sha256=verify_sha256(path, download.sha256), pinned=bool(download.sha256)),
        build=lambda: libraries.torchvision_build(arch, facts.num_classes, facts.image_shape[1], pretrained=True),
        copy_weights=lambda network: key_rules.copy_torchvision_weights(network, path),
        num_classes=facts.num_classes,
        image_shape=facts.image_shape,
        mean=facts.mean,
        std=facts.std,
        preprocessing=facts.preprocessing,
        class_names=facts.class_names,
    )


def _download_named_by_hash(url: str) -> Download:
    """Return the download of a URL whose file name ends in a prefix of its sha256 (`resnet18-f37072fd.pth`)."""
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return Download(url=url, sha256=digits[1] if digits else "")


def locate_robustbench(ref: ModelRef, sources: SourceSettings) -> LocatedModel:
    """Locate the files of a RobustBench entry in `model_dir`, else in the cache, else download them.

    Raises UnknownNameError, EnvironmentFault, CheckpointError, IntegrityError.
    """
    dataset, threat, name = ref.target.split("/")
    row = catalogue.robustbench_row(dataset, threat, name)
    paths = _robustbench_files(row, sources)
    hashes = [verify_sha256(path) for path in paths]
    # The hash of an ensemble is the sha256 of the concatenated hashes of its files.
    digest = hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()
    return LocatedModel(
        entry=replace(row.entry, weights_sha256=digest),
        build=lambda: libraries.robustbench_build(dataset, threat, name),
        copy_weights=lambda network: key_rules.copy_robustbench_weights(network, name, paths),
        num_classes=row.num_classes,
        image_shape=row.image_shape,
        preprocessing=libraries.robustbench_preprocessing(dataset, threat, name),
    )


def _robustbench_files(row: catalogue.RobustBenchRow, sources: SourceSettings) -> list[Path]:
    below = Path(row.dataset) / row.threat
    own = key_rules.robustbench_files((sources.model_dir or Path("models")) / below, row.id, row.parts)
    cached = key_rules.robustbench_files(sources.cache / "robustbench" / below, row.id, row.parts)
    for paths in (own, cached):
        if all(path.exists() for path in paths):
            return paths
    if sources.offline:
        message = f"{row.entry.ref} is not on this machine and offline mode does not fetch it; put its weights at "
        raise EnvironmentFault(message + " and ".join(str(path) for path in own))
    pairs = zip(_robustbench_downloads(row), cached, strict=True)
    return [fetch(download, path) for download, path in pairs]


def _robustbench_downloads(row: catalogue.RobustBenchRow) -> list[Download]:
    if ids := libraries.robustbench_drive_ids(row.dataset, row.threat, row.id):
        return [Download(url=_DRIVE + drive, link=f"{_DRIVE_LINK}{drive}/view") for drive in ids]
    registered = libraries.robustbench_timm_name(row.dataset, row.threat, row.id)
    if registered:
        return [_download_named_by_hash(libraries.timm_facts(registered).url)]
    # The remaining entries are standard networks with torchvision's first ImageNet weights.
    return [_download_named_by_hash(libraries.torchvision_facts("resnet50", "IMAGENET1K_V1")[1].url)]


def locate_bundled(ref: ModelRef, _: SourceSettings) -> LocatedModel:
    """Read the card of a bundled model and verify the hash of its weights.

    Raises UnknownNameError, EnvironmentFault for missing weights, IntegrityError for another hash than the card's.
    """
    card = catalogue.read_card(ref.target)
    path = catalogue.BUNDLED / f"{ref.target}.safetensors"
    entry = catalogue.bundled_entry(ref.target)
    return LocatedModel(
        entry=replace(entry, weights_sha256=verify_sha256(path, card["sha256"]), pinned=True),
        build=lambda: build(card["architecture"], card["arguments"]),
        copy_weights=lambda network: copy_weights(network, read_weights(path, max_bytes=max_checkpoint_bytes(network))),
        num_classes=card["num_classes"],
        image_shape=tuple(card["image_shape"]),
    )
