"""Copy the tensors of a checkpoint into a network, after comparing names, shapes, kinds and values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from audit.errors import InvalidModelError, MismatchError
from model_zoo.untrusted import printable
from model_zoo.weights.contents import Renamed, Weights
from model_zoo.weights.leftovers import sort_leftovers
from model_zoo.weights.rehearsal import Rehearsal, load, named_tensors, rehearse
from model_zoo.weights.renaming import renamings, stripped
from model_zoo.weights.reparametrised import fold

_CONSTANTS = ("mu", "sigma", "mean", "std")
_MAX_CONSTANT = 16  # normalisation constants have one value per channel; larger buffers were learned
_MAX_STRIPS = 4
_COUNTER = "num_batches_tracked"
_SIZE_FACTOR = 10  # optimiser state and averaged weights take a few times the size of the weights
_SIZE_MARGIN = 64 << 20


@dataclass(frozen=True)
class _NameMatch:
    """A checkpoint under one renaming, and what the network's own loading code would do with it."""

    renamed: Renamed
    rehearsal: Rehearsal
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def mismatches(self) -> int:
        return len(self.missing) + len(self.unexpected)

    @property
    def fits(self) -> bool:
        return not self.mismatches and not self.rehearsal.error

    @property
    def notes(self) -> tuple[str, ...]:
        counters = sum(name.endswith(_COUNTER) for name in self.kept)
        kept = [f"{name} is not in the checkpoint; the architecture's value is kept" for name in self.kept]
        kept = [note for note in kept if _COUNTER not in note]
        if counters:
            kept.append(f"{counters} {_COUNTER} are not in the checkpoint; they are unused in eval mode")
        left = self.renamed.left
        outside = (f"{len(left)} tensors outside {self.renamed.prefix!r} are not used: {_join(left)}",) if left else ()
        return (*self.renamed.notes, *kept, *self.ignored, *outside)


def max_checkpoint_bytes(network: nn.Module) -> int:
    """Return the size limit in bytes of a checkpoint of this network: ten times its weights plus 64 MB.

    The limit keeps oversized files from being read.
    """
    state = named_tensors(network).values()
    return _SIZE_FACTOR * sum(tensor.numel() * tensor.element_size() for tensor in state) + _SIZE_MARGIN


def copy_weights(network: nn.Module, weights: Weights, ignorable: str = "") -> tuple[str, ...]:
    """Copy the tensors of a checkpoint into a network; return a note for every unwrapping, renaming and omission.

    The network loads them by its own code (`load_state_dict` with its hooks and versions) under the one renaming that
    fits. `ignorable` is a regular expression of names that may be unexpected. Raises MismatchError for missing,
    unexpected or differently shaped tensors and where two renamings fit, and InvalidModelError for weights that are
    not finite.
    """
    match = _match(network, weights, ignorable)
    state = named_tensors(network)
    # once more, because a network may have changed itself to fit the file
    filled = rehearse(network, match.renamed).filled
    used = {name: tensor for name, tensor in filled.items() if name in state}
    _check_kinds(used, state)
    _check_finite(used, state)
    if error := load(network, match.renamed):
        raise MismatchError(f"checkpoint and architecture do not fit: {error}; is arch= the right one?")
    return (*weights.notes, *match.notes, *_dtype_notes(used, state))


def _match(network: nn.Module, weights: Weights, ignorable: str) -> _NameMatch:
    """Return the only renaming under which the checkpoint fits the network; raises MismatchError."""
    best = None
    if weights.prefix is None:
        best = _strip_prefixes(network, weights, ignorable)
        if best.fits:
            return best
    found = [_compare(network, renamed, ignorable) for renamed in renamings(weights, list(network.state_dict()))]
    fitting: list[_NameMatch] = []
    for match in _with_copies_beside(found):
        chosen = weights.prefix in (None, match.renamed.prefix)
        if chosen and not any(_same_weights(match, other) for other in fitting):
            fitting.append(match)
    if len(fitting) > 1:
        names = " and ".join(repr(match.renamed.prefix or ".") for match in fitting)
        message = f"the checkpoint holds weights of this network under {len(fitting)} prefixes, {names}"
        raise MismatchError(f"{message}; choose one with key={fitting[0].renamed.prefix or '.'}")
    if fitting:
        return fitting[0]
    tried = ([best] if best else []) + [match for match in found if weights.prefix in (None, match.renamed.prefix)]
    raise _mismatch(min(tried, key=lambda match: match.mismatches), named_tensors(network))


def _strip_prefixes(network: nn.Module, weights: Weights, ignorable: str) -> _NameMatch:
    """Strip known prefixes, one at a time, as long as the number of mismatched names does not rise."""
    best = _compare(network, Renamed(weights.tensors, weights.metadata, weights.extra), ignorable)
    for _ in range(_MAX_STRIPS):
        options = [_compare(network, renamed, ignorable) for renamed in stripped(best.renamed)]
        closest = min(options, key=lambda match: match.mismatches, default=best)
        # Names may match only without a second prefix, so a strip that leaves the count unchanged is kept.
        if best.mismatches == 0 or closest.mismatches > best.mismatches:
            break
        best = closest
    return best


def _with_copies_beside(found: Sequence[_NameMatch]) -> list[_NameMatch]:
    """Return the renamings that fit, also those beside whose tensors lies nothing but a copy under another prefix."""
    prefixes = tuple(match.renamed.prefix for match in found if match.fits and match.renamed.prefix)
    fitting = []
    for match in found:
        copies = prefixes and all(f"{match.renamed.prefix}{name}".startswith(prefixes) for name in match.unexpected)
        if match.fits or (copies and not match.missing and not match.rehearsal.error):
            fitting.append(match)
    return fitting


def _compare(network: nn.Module, renamed: Renamed, ignorable: str) -> _NameMatch:
    state = named_tensors(network)
    renamed = fold(renamed, state)
    rehearsal = rehearse(network, renamed)
    if rehearsal.error and renamed.metadata is None:
        # a file without versions, such as safetensors: assume those of this library
        own = {path: dict(value) for path, value in getattr(network.state_dict(), "_metadata", {}).items()}
        assumed = replace(renamed, metadata=own)
        if not (second := rehearse(network, assumed)).error:
            renamed, rehearsal = assumed, second
    kept = _may_be_absent(network, [name for name in state if name not in renamed.tensors])
    kept = [name for name in kept if name not in rehearsal.filled or name.endswith(_COUNTER)]
    ignored, unexpected = sort_leftovers(network, renamed.tensors, rehearsal.unexpected, ignorable)
    return _NameMatch(
        renamed=renamed,
        rehearsal=rehearsal,
        kept=tuple(kept),
        ignored=ignored,
        missing=tuple(name for name in rehearsal.missing if name not in kept),
        unexpected=unexpected,
    )


def _may_be_absent(network: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of counters and normalisation constants, which the architecture provides."""
    buffers = {name: buffer.numel() for name, buffer in network.named_buffers()}
    small = {name for name, count in buffers.items() if count <= _MAX_CONSTANT}
    lasts = {name: name.rpartition(".")[2] for name in names}
    return [n for n, last in lasts.items() if last == _COUNTER or (last in _CONSTANTS and n in small)]


def _same_weights(one: _NameMatch, other: _NameMatch) -> bool:
    """Return whether two renamings give a network the same values, such as two names of one set of tensors."""
    mine, theirs = one.rehearsal.filled, other.rehearsal.filled
    return mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine)


def _equal(one: Tensor, other: Tensor) -> bool:
    same_kind = one.shape == other.shape and one.dtype == other.dtype
    return one is other or (same_kind and bool(torch.equal(one, other)))


def _mismatch(match: _NameMatch, state: Mapping[str, Tensor]) -> MismatchError:
    """Return the MismatchError of the renaming that comes closest."""
    if match.mismatches:
        matching = sum(name in state for name in match.renamed.tensors)
        parts = [f"{matching} of the network's {len(state)} tensors are in the checkpoint"]
        if match.missing:
            parts.append(f"missing: {_join(match.missing)}")
        if match.unexpected:
            parts.append(f"unknown to the network: {_join(match.unexpected)}")
        return MismatchError(f"checkpoint and architecture do not fit: {'; '.join(parts)}; is arch= the right one?")
    tensors = match.renamed.tensors
    wrong = {n: t for n, t in tensors.items() if n in state and t.shape != state[n].shape}
    if outputs := _output_counts(wrong, state):
        sentence = f"the checkpoint has {outputs[0]} outputs, the network {outputs[1]}; is num_classes right?"
        return MismatchError(sentence)
    mismatches = [f"{n} is {_shape(tensor)}, the network needs {_shape(state[n])}" for n, tensor in wrong.items()]
    reasons = _join(mismatches) or match.rehearsal.error
    return MismatchError(f"checkpoint and architecture do not fit: {reasons}; is arch= the right one?")


def _check_kinds(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    odd = [name for name, tensor in tensors.items() if not _compatible_dtype(name, tensor, state[name])]
    if odd:
        mismatches = [f"{n} holds {_dtype(tensors[n])}, the network needs {_dtype(state[n])}" for n in odd]
        raise MismatchError(f"checkpoint and architecture do not fit: {_join(mismatches)}; is arch= the right one?")


def _compatible_dtype(name: str, stored: Tensor, needed: Tensor) -> bool:
    """Return whether the dtypes are compatible; counters may be fractional after weight averaging."""
    same = (stored.is_floating_point(), stored.is_complex()) == (needed.is_floating_point(), needed.is_complex())
    return same or name.endswith(_COUNTER)


def _output_counts(wrong: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return both class counts where only the number of outputs of the last layer differs, else None."""
    layers = {name.rpartition(".")[0] for name in wrong}
    last = next((name for name in reversed(list(state)) if state[name].ndim > 1), "")
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
