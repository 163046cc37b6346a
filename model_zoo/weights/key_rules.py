"""Map the parameter names in timm, torchvision and RobustBench files onto their architectures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from audit.errors import MismatchError
from model_zoo import libraries
from model_zoo.weights.checkpoints import Weights, copy_weights, read_contents, read_weights
from model_zoo.weights.matching import max_checkpoint_bytes
from model_zoo.weights.renaming import strip_prefix
from model_zoo.weights.shards import INDEX, is_shard
from model_zoo.weights.state_dicts import find_weights

# Training-time modules that some RobustBench files hold and the published architectures omit, and normalisation
# constants that the architectures define themselves.
IGNORABLE = r"(^|\.)model_preact_hl1\.|(^|\.)scores$|(^|\.)normalizer?\.(new_)?(mean|std)$"
_MOBILENET = re.compile(r"(.*features\.\d+\.conv\.)(\d+)\.(?=\D)")
_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def copy_timm_weights(network: nn.Module, weights: Weights, ignorable: str = "") -> tuple[str, ...]:
    """Copy weights into a timm network; apply timm's checkpoint filter only where the stored names do not match.

    Raises the errors of `copy_weights`.
    """
    try:
        return copy_weights(network, weights, ignorable)
    except MismatchError:
        for prefix in (weights.prefix or "", "module.", "_orig_mod."):  # as timm's own reader does first
            weights = strip_prefix(weights, prefix) if prefix else weights
        filtered = libraries.apply_timm_filter(network, weights.tensors)
        if filtered is None:
            raise
    notes = (*weights.notes, f"renamed or resized by timm's filter for {type(network).__name__} checkpoints")
    return copy_weights(network, replace(weights, tensors=filtered, notes=notes, prefix=None), ignorable)


def copy_torchvision_weights(network: nn.Module, path: Path) -> tuple[str, ...]:
    """Copy torchvision weights into a network, renaming the layers of old DenseNet files (`norm.1` -> `norm1`)."""
    return _copy_torchvision(network, read_weights(path, max_bytes=max_checkpoint_bytes(network)))


def copy_file_weights(network: nn.Module, path: Path, library: str, key: str = "") -> tuple[str, ...]:
    """Copy the weights of a file into an architecture of a library, by the rules that the library has for its own.

    `library` is the source of the architecture, such as "timm"; `key` the user's choice of an entry or a prefix.
    Raises the errors of `read_weights` and `copy_weights`.
    """
    weights = read_weights(path, max_bytes=max_checkpoint_bytes(network), key=key)
    rules = {"timm": copy_timm_weights, "torchvision": _copy_torchvision}
    try:
        return rules.get(library, copy_weights)(network, weights)
    except MismatchError as error:
        if is_shard(path):
            advice = f"give the index beside it (file:{path.parent}/...{INDEX})"
            raise MismatchError(f"{path} is one of several files of weights; {advice}") from error
        raise


def _copy_torchvision(network: nn.Module, weights: Weights) -> tuple[str, ...]:
    renamed = {_DENSENET.sub(r"\1\2.", name): tensor for name, tensor in weights.tensors.items()}
    changed = len(set(renamed) - set(weights.tensors))
    notes = [f"joined the layer numbers of {changed} DenseNet names (norm.1 -> norm1)"] if changed else []
    blocks = _numbered_blocks(renamed)
    if blocks and type(network).__name__ == "MobileNetV2":
        notes.append(f"grouped the layers of {len(blocks)} MobileNetV2 blocks (conv.0, conv.1 -> conv.0.0, conv.0.1)")
        renamed = {_MOBILENET.sub(partial(_grouped, blocks), name): tensor for name, tensor in renamed.items()}
    return copy_weights(network, replace(weights, tensors=renamed, notes=(*weights.notes, *notes)))


def _numbered_blocks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the last layer number of every block that has numbers 0, 1, 3, 4, as in the first MobileNetV2."""
    numbers: dict[str, set[int]] = {}
    for name in tensors:
        if found := _MOBILENET.match(name):
            numbers.setdefault(found[1], set()).add(int(found[2]))
    return {block: max(each) for block, each in numbers.items() if {0, 1, 3, 4} <= each}


def _grouped(blocks: Mapping[str, int], found: re.Match[str]) -> str:
    """Return the present name of a layer: a convolution, its batch norm and ReLU6 are a group, but for the last two."""
    block, number = found[1], int(found[2])
    if block not in blocks:
        return found[0]
    group, place = divmod(number, 3)
    last = blocks[block] // 3
    return f"{block}{group}.{place}." if group < last else f"{block}{group + place}."


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
        return _copy_member(
            network, read_weights(paths[0], ("last",) if last else (), max_checkpoint_bytes(network), averaged=False)
        )
    notes: list[str] = []
    for part, path in enumerate(paths):
        for member, weights in _ensemble_members(network, name, part, path):
            notes += [f"_m{part}: {note}" for note in _copy_member(member, weights)]
    return tuple(notes)


def _copy_member(network: nn.Module, weights: Weights) -> tuple[str, ...]:
    """Copy one file; for a normalisation layer around a classifier, copy into the classifier."""
    for prefix in ("module.", "model."):
        weights = strip_prefix(weights, prefix)
    inner = getattr(network, "model", None)
    inside = isinstance(inner, nn.Module) and all(name.startswith("model.") for name, _ in network.named_parameters())
    if inside and isinstance(inner, nn.Module):
        note = "filled the part named 'model', as robustbench does"
        network, weights = inner, replace(weights, notes=(*weights.notes, note))
    return copy_timm_weights(network, weights, IGNORABLE)


def _ensemble_members(network: nn.Module, name: str, part: int, path: Path) -> list[tuple[nn.Module, Weights]]:
    """Return the sub-networks that one file of an ensemble holds, each with its weights."""
    max_bytes = max_checkpoint_bytes(network)
    if name.startswith("Bai2024MixedNUTS"):
        return [
            (
                _submodule(network, "std_model" if part == 0 else "rob_model"),
                read_weights(path, max_bytes=max_bytes, averaged=False),
            )
        ]
    if not name.startswith("Bai2023Improving"):
        return [(_submodule(network, f"models.{part}"), read_weights(path, max_bytes=max_bytes, averaged=False))]
    if part < 2:
        return [
            (_submodule(network, f"comp_model.models.{part}"), read_weights(path, max_bytes=max_bytes, averaged=False))
        ]
    contents, digest = read_contents(path, max_bytes)
    pairs = []
    for child, key in (("policy_net", "model"), ("bn", "bn")):
        weights = find_weights(contents, digest, str(path), (key,), averaged=False)
        pairs.append((_submodule(network, f"comp_model.{child}"), weights))
    return pairs


def _submodule(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        message = f"robustbench's network has no part {path!r}; this version knows robustbench 1.1.1"
        raise MismatchError(message) from error
