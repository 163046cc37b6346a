"""Weights stored under another parametrisation than the network's: weight norm, spectral norm, pruning masks."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model_zoo.weights.contents import Renamed

_Forms = tuple[tuple[str, ...], ...]
# The names of the parts of a tensor: those of torch.nn.utils.parametrizations, and those of the older torch.nn.utils.
_WEIGHT_NORM = (
    ("parametrizations.{}.original0", "parametrizations.{}.original1"),
    ("{}_g", "{}_v"),
)
_SPECTRAL_NORM = (
    ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v"),
    ("{}_orig", "{}_u", "{}_v"),
)
_PRUNING = (("{}_orig", "{}_mask"),)


def fold(renamed: Renamed, state: Mapping[str, Tensor]) -> Renamed:
    """Return a checkpoint with parametrised tensors under the names that the network `state` has for them.

    Where the network has the plain tensor, it gets the value that the parts stand for: `g v / |v|` for weight norm,
    the masked tensor for pruning, the tensor over its largest singular value for spectral norm.
    """
    tensors, moved = dict(renamed.tensors), []
    families: list[tuple[_Forms, Callable[..., Tensor]]] = [
        (_WEIGHT_NORM, _weight_normed),
        (_SPECTRAL_NORM, _spectrally_normed),
        (_PRUNING, _pruned),
    ]
    for forms, value in families:
        for owner, name, form in _parametrised(renamed.tensors, forms):
            stored = [owner + part.format(name) for part in form]
            wanted = [[owner + part.format(name) for part in other] for other in forms]
            target = next((names for names in wanted if names[0] in state), None)
            if target == stored or (target is None and owner + name not in state):
                continue
            parts = [tensors[part] for part in stored]
            try:
                new = dict(zip(target, parts, strict=True)) if target else {owner + name: value(*parts)}
            except (RuntimeError, IndexError):
                continue  # parts of shapes that do not go together; the comparison of names reports them
            for part in stored:
                del tensors[part]
            tensors |= new
            moved.append(f"{', '.join(stored)} -> {', '.join(new)}")
    if not moved:
        return renamed
    note = f"converted {len(moved)} parametrised tensors to the form of the network ({moved[0]})"
    return replace(renamed, tensors=tensors, notes=(*renamed.notes, note))


def _parametrised(tensors: Mapping[str, Tensor], forms: _Forms) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield the path of the owner, the name and the form of every tensor whose parts are all there."""
    for form in forms:
        name_of = re.escape(form[0]).replace(re.escape("{}"), r"(\w+)")
        pattern = re.compile(rf"((?:.*\.)?){name_of}")
        for found in filter(None, map(pattern.fullmatch, tensors)):
            owner, name = found.groups()
            if all(owner + part.format(name) in tensors for part in form):
                yield owner, name, form


def _weight_normed(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Return `g v / |v|`, the norm taken over the dimensions in which the magnitude has one value.

    Source: Salimans and Kingma, Weight Normalization, 2016, equation 2.
    """
    dims = [dim for dim in range(direction.dim()) if magnitude.dim() == 0 or magnitude.shape[dim] == 1]
    return magnitude * direction / torch.linalg.vector_norm(direction, dim=dims, keepdim=True)


def _spectrally_normed(tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the tensor over `u' W v`, as torch's spectral norm does in eval mode.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018, algorithm 1.
    """
    matrix = tensor if tensor.shape[0] == left.numel() else tensor.transpose(0, 1)
    return tensor / torch.dot(left, matrix.reshape(left.numel(), -1) @ right)


def _pruned(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the tensor with the pruned values set to zero."""
    return tensor * mask.to(tensor.dtype)
