"""How the files of timm, torchvision and RobustBench map onto their architectures: naming rules, in our words."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from audit.errors import MismatchError
from model_zoo import libraries
from model_zoo.weights.checkpoints import Weights, fit_weights, read_contents, read_weights
from model_zoo.weights.fitting import most_bytes, strip_prefix
from model_zoo.weights.layouts import unwrap

# Training-time modules that some RobustBench files hold and the published architectures leave out, and
# normalisation constants that the architectures bring themselves.
IGNORABLE = r"(^|\.)model_preact_hl1\.|(^|\.)scores$|(^|\.)normalizer?\.(new_)?(mean|std)$"
_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def fit_timm(network: nn.Module, weights: Weights, ignorable: str = "") -> tuple[str, ...]:
    """Fit weights, asking timm's own rules for its older files only where the names as stored do not fit.

    Errors as in `fit_weights`.
    """
    try:
        return fit_weights(network, weights, ignorable)
    except MismatchError:
        filtered = libraries.timm_filtered(network, weights.tensors)
        if filtered is None:
            raise
    note = f"renamed or resized by timm's filter for {type(network).__name__} checkpoints"
    return fit_weights(network, Weights(filtered, weights.sha256, (*weights.notes, note)), ignorable)


def fit_torchvision(network: nn.Module, path: Path) -> tuple[str, ...]:
    """Fit torchvision's weights, joining the layer names of its old DenseNet files (`norm.1` -> `norm1`)."""
    weights = read_weights(path, most=most_bytes(network))
    renamed = {_DENSENET.sub(r"\1\2.", name): tensor for name, tensor in weights.tensors.items()}
    changed = len(set(renamed) - set(weights.tensors))
    note = (f"joined the layer numbers of {changed} DenseNet names (norm.1 -> norm1)",) if changed else ()
    return fit_weights(network, Weights(renamed, weights.sha256, (*weights.notes, *note)))


def robustbench_files(folder: Path, name: str, parts: int) -> list[Path]:
    """Return where robustbench keeps the files of an entry below `<model_dir>/<dataset>/<threat>`."""
    if parts == 1:
        return [folder / f"{name}.pt"]
    return [folder / f"{name}.pt_m{part}.pt" for part in range(parts)]


def fit_robustbench(network: nn.Module, name: str, paths: Sequence[Path]) -> tuple[str, ...]:
    """Read the file, or the files of an ensemble, into a RobustBench network; return the renames.

    Errors as in `read_weights` and `fit_weights`.
    """
    if len(paths) == 1:
        last = "Kireev2021Effectiveness" in name or name == "Andriushchenko2020Understanding"
        return _fit_member(network, read_weights(paths[0], ("last",) if last else (), most_bytes(network)))
    notes: list[str] = []
    for part, path in enumerate(paths):
        for member, weights in _members(network, name, part, path):
            notes += [f"_m{part}: {note}" for note in _fit_member(member, weights)]
    return tuple(notes)


def _fit_member(network: nn.Module, weights: Weights) -> tuple[str, ...]:
    """Fit one file; a network that is a normalisation before a classifier is filled from inside."""
    notes, tensors = weights.notes, weights.tensors
    for prefix in ("module.", "model."):
        tensors, stripped = strip_prefix(tensors, prefix)
        notes += stripped
    inner = getattr(network, "model", None)
    inside = isinstance(inner, nn.Module) and all(name.startswith("model.") for name, _ in network.named_parameters())
    if inside and isinstance(inner, nn.Module):
        network, notes = inner, (*notes, "filled the part named 'model', as robustbench does")
    return fit_timm(network, Weights(tensors, weights.sha256, notes), IGNORABLE)


def _members(network: nn.Module, name: str, part: int, path: Path) -> list[tuple[nn.Module, Weights]]:
    """Return the sub-networks that one file of an ensemble belongs to, with their weights."""
    most = most_bytes(network)
    if name.startswith("Bai2024MixedNUTS"):
        return [(_child(network, "std_model" if part == 0 else "rob_model"), read_weights(path, most=most))]
    if not name.startswith("Bai2023Improving"):
        return [(_child(network, f"models.{part}"), read_weights(path, most=most))]
    if part < 2:
        return [(_child(network, f"comp_model.models.{part}"), read_weights(path, most=most))]
    contents, digest = read_contents(path, most)
    pairs = []
    for child, key in (("policy_net", "model"), ("bn", "bn")):
        tensors, notes = unwrap(contents, str(path), (key,))
        pairs.append((_child(network, f"comp_model.{child}"), Weights(tensors, digest, notes)))
    return pairs


def _child(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        message = f"robustbench's network has no part {path!r}; this version knows robustbench 1.1.1"
        raise MismatchError(message) from error
