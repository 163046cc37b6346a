"""Tensors of a checkpoint that the network has no place for: which may be left out, and by which rule."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

_MAX_CONSTANT = 16
_COUNTER = re.compile(
    r"(^|_)(n_averaged|num_updates|updates|global_step|step|epoch|iteration|decay|num_batches_tracked)$"
)
_TRAINING = re.compile(
    r"(^|_)(criterion|criterions|loss|losses|lossfn|loss_fn|loss_func|metrics?|acc|accuracy|auroc|auc|f1|ece"
    r"|confusion_matrix|confmat)(_|$)"
)
_NORMALISER = re.compile(r"(^|[._])(normali[sz]er?|norm|preprocess\w*|transform)?[._]?(new_)?(mean|std|mu|sigma)$")


def sort_leftovers(
    network: nn.Module, tensors: Mapping[str, Tensor], unexpected: Iterable[str], ignorable: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a note for every unexpected tensor that may be left out, and the names of the others, sorted.

    What lies inside the modules of the network may not: a network with more layers computes something else.
    """
    notes, others = [], []
    averaged = {"ema_" + name.replace(".", "_") for name in network.state_dict()}
    for name in sorted(set(unexpected)):
        rule = _rule(network, name, tensors.get(name), averaged) if name in tensors else ""
        if ignorable and re.search(ignorable, name):
            notes.append(f"{name} of the checkpoint is not used by the architecture")
        elif rule:
            notes.append(f"{name} of the checkpoint is not used: {rule}")
        else:
            others.append(name)
    return tuple(notes), tuple(others)


def _rule(network: nn.Module, name: str, tensor: Tensor | None, averaged: set[str]) -> str:
    """Return why a tensor may be left out, '' where it may not."""
    first, _, rest = name.partition(".")
    if tensor is None:
        return ""
    if _is_computed(network, name, tensor):
        return "the network computes this buffer itself"
    if first in dict(network.named_children()):
        return ""
    if name in averaged:
        return "a copy of the weights that mmcv swaps with them before saving"
    if tensor.numel() == 1 and (_COUNTER.search(name) or not tensor.is_floating_point()):
        return "a counter"
    if rest and _TRAINING.search(first):
        return "part of a training criterion or metric"
    if tensor.numel() <= _MAX_CONSTANT and _NORMALISER.search(name):
        return "a constant of a normalisation outside the network; mean= and std= put it inside"
    return ""


def _is_computed(network: nn.Module, name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is a buffer that the network leaves out of its own state dicts, with the same values."""
    own = dict(network.named_buffers()).get(name)
    return own is not None and own.shape == tensor.shape and bool((own == tensor.to(own.dtype)).all())
