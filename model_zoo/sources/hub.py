"""Fetch single data files (never code) of Hugging Face hub repositories, and read their configuration.

A configuration is a stranger's word on what to build: its numbers are held to what images and classifiers have, and
the network it asks for to the size of the weights beside it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from audit.errors import EnvironmentFault, IntegrityError, UnsafeError, UsageError
from model_zoo import libraries
from model_zoo.entries import PretrainedFacts
from model_zoo.prepared import ImageShape
from model_zoo.sources.downloads import check_file, file_sha256
from model_zoo.weights.containers import plain

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Options through which a repository's configuration would make timm read files of its own choice.
_RESERVED = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_MOST_CONFIG = 1_000_000
_MOST_CLASSES, _MOST_CHANNELS, _MOST_SIDE = 100_000, 16, 2048
_ROOM = 4  # buffers and initial values beside the weights
_SPARE = 64 << 20


def hub_file(repo: str, filename: str, local: Path, *, offline: bool) -> tuple[Path, bool]:
    """Return a repository's file and whether its sha256 was compared with the one the hub states.

    A file at `local` is taken first. Raises EnvironmentFault where the file cannot be had, IntegrityError where
    it is not what the hub states.
    """
    if local.exists():
        check_file(local)
        return local, False
    # Imported here because it takes a good part of a second that other sources do not need.
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(repo, filename, local_files_only=offline))
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        how = "offline mode does not fetch it" if offline else f"the hub does not give it ({type(error).__name__})"
        message = f"{filename} of {repo} is not on this machine and {how}; put the file at {local}"
        raise EnvironmentFault(message) from error
    return path, _stated_hash_holds(path)


def _stated_hash_holds(path: Path) -> bool:
    """Compare a cached file with its name: the hub's cache calls large files by their sha256."""
    stated = path.resolve().name
    if not _SHA256.fullmatch(stated):
        return False
    found = file_sha256(path)
    if found != stated:
        raise IntegrityError(f"{path} has sha256 {found}, the hub states {stated}; delete it and fetch it again")
    return True


def read_config(path: Path, repo: str) -> dict[str, Any]:
    """Return a repository's config.json.

    Raises UsageError for one that is not in timm's layout, UnsafeError for one with options that read files, or of
    more than 1 MB.
    """
    check_file(path, _MOST_CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        reserved = sorted(set(config.get("model_args", {})) & set(_RESERVED))
        named = isinstance(config["architecture"], str)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        message = f"config.json of {repo} is not in timm's layout (architecture, num_classes, pretrained_cfg)"
        raise UsageError(f"{message}; only such repositories can be read") from error
    if reserved or not named:
        what = ", ".join(reserved) or "an architecture that is not a name"
        raise UnsafeError(f"config.json of {repo} sets {what}, through which timm would read other files; refused")
    return dict(config)


def config_facts(config: Mapping[str, Any], repo: str) -> PretrainedFacts:
    """Return what a configuration says; raises UsageError for values of the wrong kind or of no possible size."""
    base = libraries.timm_facts(config["architecture"])
    try:
        told = {**config, **config.get("pretrained_cfg", {})}
        facts = replace(
            base,
            name=config["architecture"],
            num_classes=int(config.get("num_classes", told.get("num_classes", base.num_classes))),
            image_shape=_shape(told.get("input_size", base.image_shape)),
            mean=tuple(float(value) for value in told.get("mean", base.mean)),
            std=tuple(float(value) for value in told.get("std", base.std)),
            licence=plain(told.get("license", "")),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"config.json of {repo} holds a value of the wrong kind: {plain(error)}") from error
    _check_facts(facts, repo)
    return facts


def _shape(values: Any) -> ImageShape:
    channels, height, width = values
    return int(channels), int(height), int(width)


def _check_facts(facts: PretrainedFacts, repo: str) -> None:
    channels, *sides = facts.image_shape
    legal = {
        "num_classes": facts.num_classes in range(_MOST_CLASSES + 1),
        "input_size": 1 <= channels <= _MOST_CHANNELS and all(1 <= side <= _MOST_SIDE for side in sides),
        "mean": len(facts.mean) in (1, channels) and all(map(isfinite, facts.mean)),
        "std": len(facts.std) == len(facts.mean) and all(value > 0 and isfinite(value) for value in facts.std),
    }
    wrong = [name for name, right in legal.items() if not right]
    if wrong:
        raise UsageError(f"config.json of {repo} sets {', '.join(wrong)} to what no image classifier has")


def build_within(build: Callable[[], nn.Module], weights: Path) -> nn.Module:
    """Return the network of a stranger's configuration, which must not be larger than the weights made for it.

    Raises UnsafeError, before the memory is taken, for one that asks for more than four times their size.
    """
    with _Budget(_ROOM * check_file(weights) + _SPARE):
        return build()


class _Budget(TorchDispatchMode):
    """Counts the room that new tensors ask for before they get it."""

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # empty, zeros, ones, full and rand take the shape first; arange takes numbers
        asked = args[0] if args and isinstance(args[0], list | tuple) else args[:1]
        if asked and all(isinstance(side, int) for side in asked):
            self.left -= 4 * prod(asked)
            if self.left < 0:
                raise UnsafeError("the configuration asks for a network far larger than its weights; it is not built")
        return func(*args, **(kwargs or {}))
