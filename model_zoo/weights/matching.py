"""Copy named tensors into a network, after comparing every key and shape."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from audit.errors import InvalidModelError, MismatchError
from model_zoo.untrusted import printable
from model_zoo.weights.state_dicts import Weights

PREFIXES = ("module.", "_orig_mod.", "model.")
_CONSTANTS = ("mu", "sigma", "mean", "std")
_MAX_CONSTANT = 16  # normalisation constants have one value per channel; larger buffers were learned
_MAX_STRIPS = 4
_COUNTER = "num_batches_tracked"
_SIZE_FACTOR = 10  # optimiser state and averaged weights take a few times the size of the weights
_SIZE_MARGIN = 64 << 20


@dataclass(frozen=True)
class _NameMatch:
    """The tensors of a checkpoint under one renaming, compared with the names in the network."""

    tensors: dict[str, Tensor]
    strips: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def mismatches(self) -> int:
        return len(self.missing) + len(self.unexpected)

    @property
    def notes(self) -> tuple[str, ...]:
        counters = sum(name.endswith(_COUNTER) for name in self.kept)
        kept = [f"{name} is not in the checkpoint; the architecture's value is kept" for name in self.kept]
        kept = [note for note in kept if _COUNTER not in note]
        if counters:
            kept.append(f"{counters} {_COUNTER} are not in the checkpoint; they are unused in eval mode")
        ignored = (f"{name} of the checkpoint is not used by the architecture" for name in self.ignored)
        return (*self.strips, *kept, *ignored)


def max_checkpoint_bytes(network: nn.Module) -> int:
    """Return the size limit in bytes of a checkpoint of this network: ten times its weights plus 64 MB.

    The limit keeps oversized files from being read.
    """
    state = network.state_dict().values()
    return _SIZE_FACTOR * sum(tensor.numel() * tensor.element_size() for tensor in state) + _SIZE_MARGIN


def copy_weights(network: nn.Module, weights: Weights, ignorable: str = "") -> tuple[str, ...]:
    """Copy the tensors of a checkpoint into a network; return a note for every unwrapping, renaming and omission.

    `ignorable` is a regular expression of names that may be unexpected. Raises MismatchError for missing, unexpected
    or differently shaped tensors, and InvalidModelError for weights that are not finite.
    """
    state = network.state_dict()
    match = _best_match(network, weights.tensors, ignorable)
    _check_names(match, state)
    used = {name: tensor for name, tensor in match.tensors.items() if name in state}
    _check_shapes(used, state)
    _check_finite(used, state)
    network.load_state_dict({**state, **used}, strict=True)
    return (*weights.notes, *match.notes, *_dtype_notes(used, state))


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip a prefix from the names that have it; return the tensors and a note, () where nothing changed."""
    carriers = [name for name in tensors if name.startswith(prefix) and name != prefix]
    renamed = {name.removeprefix(prefix) if name in carriers else name: tensors[name] for name in tensors}
    if not carriers or len(renamed) != len(tensors):
        return dict(tensors), ()
    example = f"{carriers[0]} -> {carriers[0].removeprefix(prefix)}"
    return renamed, (f"stripped {prefix!r} from {len(carriers)} of {len(tensors)} names ({example})",)


def _best_match(network: nn.Module, tensors: dict[str, Tensor], ignorable: str) -> _NameMatch:
    """Strip known prefixes, one at a time, as long as the number of mismatched names does not rise."""
    best = _compare(network, tensors, (), ignorable)
    for _ in range(_MAX_STRIPS):
        options = []
        for prefix in PREFIXES:
            stripped, note = strip_prefix(best.tensors, prefix)
            if note:
                options.append(_compare(network, stripped, best.strips + note, ignorable))
        closest = min(options, key=lambda match: match.mismatches, default=best)
        # Names may match only without a second prefix, so a strip that leaves the count unchanged is kept.
        if best.mismatches == 0 or closest.mismatches > best.mismatches:
            break
        best = closest
    return best


def _compare(network: nn.Module, tensors: dict[str, Tensor], strips: tuple[str, ...], ignorable: str) -> _NameMatch:
    state = network.state_dict()
    absent = [name for name in state if name not in tensors]
    kept = _may_be_absent(network, absent)
    extra = [name for name in tensors if name not in state]
    ignored = [name for name in extra if ignorable and re.search(ignorable, name)]
    return _NameMatch(
        tensors=tensors,
        strips=strips,
        kept=tuple(kept),
        ignored=tuple(ignored),
        missing=tuple(name for name in absent if name not in kept),
        unexpected=tuple(sorted(name for name in extra if name not in ignored)),  # independent of the order in the file
    )


def _may_be_absent(network: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of counters and normalisation constants, which the architecture provides."""
    buffers = {name: buffer.numel() for name, buffer in network.named_buffers()}
    small = {name for name, count in buffers.items() if count <= _MAX_CONSTANT}
    lasts = {name: name.rpartition(".")[2] for name in names}
    return [n for n, last in lasts.items() if last == _COUNTER or (last in _CONSTANTS and n in small)]


def _check_names(match: _NameMatch, state: Mapping[str, Tensor]) -> None:
    if not match.mismatches:
        return
    matching = sum(name in state for name in match.tensors)
    parts = [f"{matching} of the network's {len(state)} tensors are in the checkpoint"]
    if match.missing:
        parts.append(f"missing: {_join(match.missing)}")
    if match.unexpected:
        parts.append(f"unknown to the network: {_join(match.unexpected)}")
    raise MismatchError(f"checkpoint and architecture do not fit: {'; '.join(parts)}; is arch= the right one?")


def _check_shapes(tensors: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
    wrong = {name: tensor for name, tensor in tensors.items() if tensor.shape != state[name].shape}
    odd = [name for name, tensor in tensors.items() if not _compatible_dtype(name, tensor, state[name])]
    if not wrong and not odd:
        return
    outputs = _output_counts(wrong, state)
    if outputs and not odd:
        sentence = f"the checkpoint has {outputs[0]} outputs, the network {outputs[1]}; is num_classes right?"
        raise MismatchError(sentence)
    mismatches = [
        f"{name} is {_shape(tensor)}, the network needs {_shape(state[name])}" for name, tensor in wrong.items()
    ]
    mismatches += [f"{name} holds {_dtype(tensors[name])}, the network needs {_dtype(state[name])}" for name in odd]
    raise MismatchError(f"checkpoint and architecture do not fit: {_join(mismatches)}; is arch= the right one?")


def _compatible_dtype(name: str, stored: Tensor, needed: Tensor) -> bool:
    """Return whether the dtypes are compatible; counters may be fractional after weight averaging."""
    same = (stored.is_floating_point(), stored.is_complex()) == (needed.is_floating_point(), needed.is_complex())
    return same or name.endswith(_COUNTER)


def _output_counts(wrong: Mapping[str, Tensor], state: dict[str, Tensor]) -> tuple[int, int] | None:
    """Return both class counts where only the number of outputs of the last layer differs, else None."""
    layers = {name.rpartition(".")[0] for name in wrong}
    last = next((name for name in reversed(state) if state[name].ndim > 1), "")
    counts = {(tensor.shape[:1], state[name].shape[:1]) for name, tensor in wrong.items()}
    same_rest = all(tensor.shape[1:] == state[name].shape[1:] for name, tensor in wrong.items())
    if last not in wrong or len(layers) != 1 or len(counts) != 1 or not same_rest:
        return None
    stored, needed = counts.pop()
    return (int(stored[0]), int(needed[0])) if stored and needed else None


def _check_finite(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise InvalidModelError for values that are not finite in the dtype of the network (float64 may overflow)."""
    kinds = {name: state[name].dtype for name in tensors if not name.endswith(_COUNTER)}
    counts = {
        name: int((~torch.isfinite(tensors[name].to(kind))).sum())
        for name, kind in kinds.items()
        if kind.is_floating_point or kind.is_complex
    }
    bad = [f"{name} ({count} of {tensors[name].numel()})" for name, count in counts.items() if count]
    if bad:
        raise InvalidModelError(f"the checkpoint's weights are not finite: {_join(bad)}; the model cannot be audited")


def _dtype_notes(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    pairs = {(_dtype(tensor), _dtype(state[name])) for name, tensor in tensors.items()}
    return tuple(f"converted {stored} to {needed}" for stored, needed in sorted(pairs) if stored != needed)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _join(items: Iterable[str], limit: int = 4) -> str:
    listed = [printable(item, 120) for item in items]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
