"""Put named tensors into a network: every key and shape is compared before a single value is copied."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from audit.errors import InvalidModelError, MismatchError
from model_zoo.weights.containers import plain
from model_zoo.weights.layouts import Weights

PREFIXES = ("module.", "_orig_mod.", "model.")
_CONSTANTS = ("mu", "sigma", "mean", "std")
_MAX_CONSTANT = 16  # a normalisation has one number per channel; anything larger was learned
_MAX_STRIPS = 4
_COUNTER = "num_batches_tracked"
_ROOM = 10  # an optimiser's state and averages beside the weights take a few times their room
_SPARE = 64 << 20


@dataclass(frozen=True)
class _Fit:
    """One way of naming the checkpoint's tensors, and how it compares with the network."""

    tensors: dict[str, Tensor]
    strips: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected)

    @property
    def notes(self) -> tuple[str, ...]:
        counters = sum(name.endswith(_COUNTER) for name in self.kept)
        kept = [f"{name} is not in the checkpoint; the architecture's value is kept" for name in self.kept]
        kept = [note for note in kept if _COUNTER not in note]
        if counters:
            kept.append(f"{counters} {_COUNTER} are not in the checkpoint; they play no part in eval mode")
        ignored = (f"{name} of the checkpoint is not used by the architecture" for name in self.ignored)
        return (*self.strips, *kept, *ignored)


def most_bytes(network: nn.Module) -> int:
    """Return the size in bytes beyond which a file is no checkpoint of this network: ten times its weights, and 64 MB.

    A file is told from one that exhausts the machine before it is read.
    """
    state = network.state_dict().values()
    return _ROOM * sum(tensor.numel() * tensor.element_size() for tensor in state) + _SPARE


def fit_weights(network: nn.Module, weights: Weights, ignorable: str = "") -> tuple[str, ...]:
    """Copy a checkpoint's tensors into a network; return every unwrapping, renaming and omission in words.

    `ignorable` is a pattern of names that the checkpoint may hold in excess. Raises MismatchError for missing,
    unexpected or differently shaped tensors, InvalidModelError for weights that are not finite.
    """
    state = network.state_dict()
    fit = _best_fit(network, weights.tensors, ignorable)
    _check_names(fit, state)
    used = {name: tensor for name, tensor in fit.tensors.items() if name in state}
    _check_shapes(used, state)
    _check_finite(used, state)
    network.load_state_dict({**state, **used}, strict=True)
    return (*weights.notes, *fit.notes, *_dtype_notes(used, state))


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors with a prefix taken off the names that have it, and a note (none where none has it)."""
    carriers = [name for name in tensors if name.startswith(prefix) and name != prefix]
    renamed = {name.removeprefix(prefix) if name in carriers else name: tensors[name] for name in tensors}
    if not carriers or len(renamed) != len(tensors):
        return dict(tensors), ()
    example = f"{carriers[0]} -> {carriers[0].removeprefix(prefix)}"
    return renamed, (f"stripped {prefix!r} from {len(carriers)} of {len(tensors)} names ({example})",)


def _best_fit(network: nn.Module, tensors: dict[str, Tensor], ignorable: str) -> _Fit:
    """Strip known prefixes, one at a time, only as long as that brings the names no further from the network's."""
    best = _compare(network, tensors, (), ignorable)
    for _ in range(_MAX_STRIPS):
        options = []
        for prefix in PREFIXES:
            stripped, note = strip_prefix(best.tensors, prefix)
            if note:
                options.append(_compare(network, stripped, best.strips + note, ignorable))
        closest = min(options, key=lambda fit: fit.faults, default=best)
        # The names may only match once a second prefix is off, so one that changes nothing yet is taken off too.
        if best.faults == 0 or closest.faults > best.faults:
            break
        best = closest
    return best


def _compare(network: nn.Module, tensors: dict[str, Tensor], strips: tuple[str, ...], ignorable: str) -> _Fit:
    state = network.state_dict()
    absent = [name for name in state if name not in tensors]
    kept = _may_be_absent(network, absent)
    extra = [name for name in tensors if name not in state]
    ignored = [name for name in extra if ignorable and re.search(ignorable, name)]
    return _Fit(
        tensors=tensors,
        strips=strips,
        kept=tuple(kept),
        ignored=tuple(ignored),
        missing=tuple(name for name in absent if name not in kept),
        unexpected=tuple(sorted(name for name in extra if name not in ignored)),  # a file may list names in any order
    )


def _may_be_absent(network: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of counters and normalisation constants, which the architecture itself provides."""
    buffers = {name: buffer.numel() for name, buffer in network.named_buffers()}
    small = {name for name, count in buffers.items() if count <= _MAX_CONSTANT}
    lasts = {name: name.rpartition(".")[2] for name in names}
    return [n for n, last in lasts.items() if last == _COUNTER or (last in _CONSTANTS and n in small)]


def _check_names(fit: _Fit, state: Mapping[str, Tensor]) -> None:
    if not fit.faults:
        return
    matching = sum(name in state for name in fit.tensors)
    parts = [f"{matching} of the network's {len(state)} tensors are in the checkpoint"]
    if fit.missing:
        parts.append(f"missing: {_join(fit.missing)}")
    if fit.unexpected:
        parts.append(f"unknown to the network: {_join(fit.unexpected)}")
    raise MismatchError(f"checkpoint and architecture do not fit: {'; '.join(parts)}; is arch= the right one?")


def _check_shapes(tensors: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
    wrong = {name: tensor for name, tensor in tensors.items() if tensor.shape != state[name].shape}
    odd = [name for name, tensor in tensors.items() if not _same_kind(name, tensor, state[name])]
    if not wrong and not odd:
        return
    outputs = _output_counts(wrong, state)
    if outputs and not odd:
        sentence = f"the checkpoint has {outputs[0]} outputs, the network {outputs[1]}; is num_classes right?"
        raise MismatchError(sentence)
    faults = [f"{name} is {_shape(tensor)}, the network needs {_shape(state[name])}" for name, tensor in wrong.items()]
    faults += [f"{name} holds {_dtype(tensors[name])}, the network needs {_dtype(state[name])}" for name in odd]
    raise MismatchError(f"checkpoint and architecture do not fit: {_join(faults)}; is arch= the right one?")


def _same_kind(name: str, stored: Tensor, needed: Tensor) -> bool:
    """Whether values can be copied without changing their meaning; averaging makes counters fractional."""
    same = (stored.is_floating_point(), stored.is_complex()) == (needed.is_floating_point(), needed.is_complex())
    return same or name.endswith(_COUNTER)


def _output_counts(wrong: Mapping[str, Tensor], state: dict[str, Tensor]) -> tuple[int, int] | None:
    """Return the two class counts where the last layer's outputs are all that differs, else None."""
    layers = {name.rpartition(".")[0] for name in wrong}
    last = next((name for name in reversed(state) if state[name].ndim > 1), "")
    counts = {(tensor.shape[:1], state[name].shape[:1]) for name, tensor in wrong.items()}
    same_rest = all(tensor.shape[1:] == state[name].shape[1:] for name, tensor in wrong.items())
    if last not in wrong or len(layers) != 1 or len(counts) != 1 or not same_rest:
        return None
    stored, needed = counts.pop()
    return (int(stored[0]), int(needed[0])) if stored and needed else None


def _check_finite(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Count values that are not finite as the network will hold them: a large float64 is infinite in float32."""
    kinds = {name: state[name].dtype for name in tensors if not name.endswith(_COUNTER)}
    counts = {
        name: int((~torch.isfinite(tensors[name].to(kind))).sum())
        for name, kind in kinds.items()
        if kind.is_floating_point or kind.is_complex
    }
    bad = [f"{name} ({count} of {tensors[name].numel()})" for name, count in counts.items() if count]
    if bad:
        raise InvalidModelError(f"the checkpoint's weights are not finite: {_join(bad)}; no number can be given")


def _dtype_notes(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    pairs = {(_dtype(tensor), _dtype(state[name])) for name, tensor in tensors.items()}
    return tuple(f"converted {stored} to {needed}" for stored, needed in sorted(pairs) if stored != needed)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _join(items: Iterable[str], limit: int = 4) -> str:
    listed = [plain(item, 120) for item in items]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
