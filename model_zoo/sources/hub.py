"""Download data files (never code) of Hugging Face hub repositories, and read their configuration.

A configuration is untrusted: its numbers must be plausible for an image classifier, and its network must not be much
larger than the weights beside it.
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
from model_zoo.images.preprocessing import from_crop_fraction
from model_zoo.model_types import ImageShape
from model_zoo.untrusted import check_file, file_sha256, printable

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Options through which a configuration would make timm read other files.
_RESERVED = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_MAX_CONFIG = 1_000_000
_MAX_CLASSES, _MAX_CHANNELS, _MAX_SIDE = 100_000, 16, 2048
_SIZE_FACTOR = 4  # buffers and initial values beside the weights
_SIZE_MARGIN = 64 << 20


def hub_file(repo: str, filename: str, local: Path, *, offline: bool) -> tuple[Path, bool]:
    """Return a file of a repository, and whether its sha256 was compared with the one that the hub states.

    A file at `local` takes precedence. Raises EnvironmentFault where the file is unavailable, IntegrityError for
    another hash than the hub's.
    """
    if local.exists():
        check_file(local)
        return local, False
    # Imported here because the import is slow and other sources do not need it.
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(repo, filename, local_files_only=offline))
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        how = "offline mode does not fetch it" if offline else f"the hub does not provide it ({type(error).__name__})"
        message = f"{filename} of {repo} is not on this machine and {how}; put the file at {local}"
        raise EnvironmentFault(message) from error
    return path, _verify_cache_name(path)


def _verify_cache_name(path: Path) -> bool:
    """Compare the hash of a cached file with its name, which is the sha256 for large files in the hub's cache."""
    stated = path.resolve().name
    if not _SHA256.fullmatch(stated):
        return False
    found = file_sha256(path)
    if found != stated:
        raise IntegrityError(f"{path} has sha256 {found}, the hub states {stated}; delete it and fetch it again")
    return True


def read_config(path: Path, repo: str) -> dict[str, Any]:
    """Return the config.json of a repository.

    Raises UsageError for another layout than timm's, UnsafeError for options that read files and for more than 1 MB.
    """
    check_file(path, _MAX_CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        reserved = sorted(set(config.get("model_args", {})) & set(_RESERVED))
        named = isinstance(config["architecture"], str)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        message = f"config.json of {repo} is not in timm's layout (architecture, num_classes, pretrained_cfg)"
        raise UsageError(f"{message}; only such repositories are supported") from error
    if reserved or not named:
        what = ", ".join(reserved) or "an architecture that is not a name"
        raise UnsafeError(f"config.json of {repo} sets {what}, through which timm would read other files; refused")
    return dict(config)


def config_facts(config: Mapping[str, Any], repo: str) -> PretrainedFacts:
    """Return the metadata in a configuration; raises UsageError for values of a wrong type or implausible size."""
    base = libraries.timm_facts(config["architecture"])
    try:
        merged = {**config, **config.get("pretrained_cfg", {})}
        facts = replace(
            base,
            name=config["architecture"],
            num_classes=int(config.get("num_classes", merged.get("num_classes", base.num_classes))),
            image_shape=_shape(merged.get("input_size", base.image_shape)),
            mean=tuple(float(value) for value in merged.get("mean", base.mean)),
            std=tuple(float(value) for value in merged.get("std", base.std)),
            licence=printable(merged.get("license", "")),
            class_names=_class_names(merged.get("label_names")),
        )
        _check_plausible(facts, repo)
        return replace(facts, preprocessing=from_crop_fraction(facts.image_shape, merged))
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"config.json of {repo} holds a value of the wrong kind: {printable(error)}") from error


def _class_names(names: Any) -> tuple[str, ...]:
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _shape(values: Any) -> ImageShape:
    channels, height, width = values
    return int(channels), int(height), int(width)


def _check_plausible(facts: PretrainedFacts, repo: str) -> None:
    channels, *sides = facts.image_shape
    legal = {
        "num_classes": facts.num_classes in range(_MAX_CLASSES + 1),
        "input_size": 1 <= channels <= _MAX_CHANNELS and all(1 <= side <= _MAX_SIDE for side in sides),
        "mean": len(facts.mean) in (1, channels) and all(map(isfinite, facts.mean)),
        "std": len(facts.std) == len(facts.mean) and all(value > 0 and isfinite(value) for value in facts.std),
    }
    wrong = [name for name, right in legal.items() if not right]
    if wrong:
        raise UsageError(f"config.json of {repo} sets {', '.join(wrong)} to values that no image classifier has")


def build_within_limit(build: Callable[[], nn.Module], weights: Path) -> nn.Module:
    """Build the network of an untrusted configuration within a memory limit given by the size of its weights.

    Raises UnsafeError, before the memory is allocated, for more than four times their size plus 64 MB.
    """
    with _AllocationLimit(_SIZE_FACTOR * check_file(weights) + _SIZE_MARGIN):
        return build()


class _AllocationLimit(TorchDispatchMode):
    """Count the bytes that new tensors need, before they are allocated."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = max_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # the first argument of empty, zeros, ones, full and rand is the shape; those of arange are numbers
        shape = args[0] if args and isinstance(args[0], list | tuple) else args[:1]
        if shape and all(isinstance(side, int) for side in shape):
            self.left -= 4 * prod(shape)
            if self.left < 0:
                raise UnsafeError("the configuration specifies a network far larger than its weights; it is not built")
        return func(*args, **(kwargs or {}))
