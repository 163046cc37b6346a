"""Map the parameter names in timm, torchvision and RobustBench files onto their architectures."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from audit.errors import MismatchError
from model_zoo import libraries
from model_zoo.weights.checkpoints import Weights, copy_weights, read_contents, read_weights
from model_zoo.weights.matching import max_checkpoint_bytes, strip_prefix
from model_zoo.weights.state_dicts import find_state_dict

# Training-time modules that some RobustBench files hold and the published architectures omit, and normalisation
# constants that the architectures define themselves.
IGNORABLE = r"(^|\.)model_preact_hl1\.|(^|\.)scores$|(^|\.)normalizer?\.(new_)?(mean|std)$"
_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def copy_timm_weights(network: nn.Module, weights: Weights, ignorable: str = "") -> tuple[str, ...]:
    """Copy weights into a timm network; apply timm's checkpoint filter only where the stored names do not match.

    Raises the errors of `copy_weights`.
    """
    try:
        return copy_weights(network, weights, ignorable)
    except MismatchError:
        filtered = libraries.apply_timm_filter(network, weights.tensors)
        if filtered is None:
            raise
    note = f"renamed or resized by timm's filter for {type(network).__name__} checkpoints"
    return copy_weights(network, Weights(filtered, weights.sha256, (*weights.notes, note)), ignorable)


def copy_torchvision_weights(network: nn.Module, path: Path) -> tuple[str, ...]:
    """Copy torchvision weights into a network, renaming the layers of old DenseNet files (`norm.1` -> `norm1`)."""
    weights = read_weights(path, max_bytes=max_checkpoint_bytes(network))
    renamed = {_DENSENET.sub(r"\1\2.", name): tensor for name, tensor in weights.tensors.items()}
    changed = len(set(renamed) - set(weights.tensors))
    note = (f"joined the layer numbers of {changed} DenseNet names (norm.1 -> norm1)",) if changed else ()
    return copy_weights(network, Weights(renamed, weights.sha256, (*weights.notes, *note)))


def robustbench_files(folder: Path, name: str, parts: int) -> list[Path]:
    """Return the paths of an entry's files in robustbench's layout below `<model_dir>/<dataset>/<threat>`."""
    if parts == 1:
        return [folder / f"{name}.pt"]
    return [folder / f"{name}.pt_m{part}.pt" for part in range(parts)]


def copy_robustbench_weights(network: nn.Module, name: str, paths: Sequence[Path]) -> tuple[str, ...]:
    """Read the file, or the files of an ensemble, into a RobustBench network; return the notes on renames.

    Raises the errors of `read_weights` and `copy_weights`.
    """
    if len(paths) == 1:
        last = "Kireev2021Effectiveness" in name or name == "Andriushchenko2020Understanding"
        return _copy_member(network, read_weights(paths[0], ("last",) if last else (), max_checkpoint_bytes(network)))
    notes: list[str] = []
    for part, path in enumerate(paths):
        for member, weights in _ensemble_members(network, name, part, path):
            notes += [f"_m{part}: {note}" for note in _copy_member(member, weights)]
    return tuple(notes)


def _copy_member(network: nn.Module, weights: Weights) -> tuple[str, ...]:
    """Copy one file; for a normalisation layer around a classifier, copy into the classifier."""
    notes, tensors = weights.notes, weights.tensors
    for prefix in ("module.", "model."):
        tensors, stripped = strip_prefix(tensors, prefix)
        notes += stripped
    inner = getattr(network, "model", None)
    inside = isinstance(inner, nn.Module) and all(name.startswith("model.") for name, _ in network.named_parameters())
    if inside and isinstance(inner, nn.Module):
        network, notes = inner, (*notes, "filled the part named 'model', as robustbench does")
    return copy_timm_weights(network, Weights(tensors, weights.sha256, notes), IGNORABLE)


def _ensemble_members(network: nn.Module, name: str, part: int, path: Path) -> list[tuple[nn.Module, Weights]]:
    """Return the sub-networks that one file of an ensemble holds, each with its weights."""
    max_bytes = max_checkpoint_bytes(network)
    if name.startswith("Bai2024MixedNUTS"):
        return [
            (_submodule(network, "std_model" if part == 0 else "rob_model"), read_weights(path, max_bytes=max_bytes))
        ]
    if not name.startswith("Bai2023Improving"):
        return [(_submodule(network, f"models.{part}"), read_weights(path, max_bytes=max_bytes))]
    if part < 2:
        return [(_submodule(network, f"comp_model.models.{part}"), read_weights(path, max_bytes=max_bytes))]
    contents, digest = read_contents(path, max_bytes)
    pairs = []
    for child, key in (("policy_net", "model"), ("bn", "bn")):
        tensors, notes = find_state_dict(contents, str(path), (key,))
        pairs.append((_submodule(network, f"comp_model.{child}"), Weights(tensors, digest, notes)))
    return pairs


def _submodule(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        message = f"robustbench's network has no part {path!r}; this version knows robustbench 1.1.1"
        raise MismatchError(message) from error
