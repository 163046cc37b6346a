"""Find the state dict inside a checkpoint: nested in mappings or lists, or mixed with metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from audit.errors import CheckpointError, UsageError
from model_zoo.untrusted import printable
from model_zoo.weights.contents import Weights
from model_zoo.weights.rivals import AVERAGED_KEYS, STATE_KEYS, find_rival, tensors_in

_MAX_DEPTH = 8
_EXTRA_STATE = "_extra_state"
# left by load_state_dict(assign=True): it would replace the tensors of a network by those of the file, of any kind
_ASSIGN = "assign_to_params_buffers"


def find_state_dict(
    contents: object, origin: str, within: Sequence[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors and the notes of `find_weights`; raises its errors."""
    found = find_weights(contents, "", origin, within)
    return found.tensors, found.notes


def find_weights(
    contents: object, digest: str, origin: str, within: Sequence[str] = (), *, averaged: bool = True
) -> Weights:
    """Return the state dict inside the contents of a checkpoint, and a note for every level that was unwrapped.

    `within` lists keys to descend into first. Averaged weights are taken where the format's own loader takes them,
    unless `averaged` is False: then the raw ones are, without a look at other weights beside them. Raises
    CheckpointError (not_a_checkpoint) where no state dict is found, and UsageError where two fit equally well.
    """
    notes: list[str] = []
    for key in within:
        if not isinstance(contents, Mapping) or key not in contents:
            raise CheckpointError("not_a_checkpoint", f"{origin} has no entry {key!r}; {describe(contents)}")
        contents = contents[key]
        notes.append(f"took the entry {key!r}")
    for _ in range(_MAX_DEPTH):
        # A usual key takes precedence: some files store scalars as tensors beside the state dict.
        if isinstance(contents, Mapping) and _usual_key(contents, averaged=averaged) is None and tensors_in(contents):
            return _keep_tensors(contents, digest, origin, notes)
        contents = _step_into(contents, origin, notes, averaged=averaged)
    raise CheckpointError("not_a_checkpoint", f"{origin} nests its weights more than {_MAX_DEPTH} levels deep")


def choose_weights(contents: object, digest: str, origin: str, key: str) -> Weights:
    """Return the weights that `key=` names in a checkpoint.

    `key` is an entry (`model_ema`), entries joined by dots (`ema.module`), a prefix of the names in the state dict
    (`teacher`), an entry followed by a prefix, or `.` for the names without a prefix. Raises CheckpointError
    (not_a_checkpoint) where there is no such entry or prefix.
    """
    found, rest = _descend(contents, key.strip("."))
    weights = find_weights(found, digest, origin, averaged=not key.strip(".") or not rest)
    taken = key.strip(".").removesuffix(rest).strip(".")
    notes = ((f"took the entry {taken!r}",) if taken else ()) + weights.notes
    prefix = None if taken and not rest else f"{rest}." if rest else ""
    if prefix and not any(name.startswith(prefix) for name in weights.tensors):
        message = f"{origin} has no entry {key!r} and no names that start with {prefix!r}; {describe(found)}"
        raise CheckpointError("not_a_checkpoint", message)
    return replace(weights, notes=notes, prefix=prefix)


def _descend(contents: object, key: str) -> tuple[object, str]:
    """Follow a dotted path of entries as far as it goes; return what it leads to, and the rest of the path."""
    parts = key.split(".") if key else []
    for count in range(len(parts), 0, -1):
        head = ".".join(parts[:count])
        if isinstance(contents, Mapping) and isinstance(contents.get(head), Mapping | list | tuple):
            return _descend(contents[head], ".".join(parts[count:]))
    return contents, key


def _step_into(contents: object, origin: str, notes: list[str], *, averaged: bool) -> object:
    if isinstance(contents, list | tuple) and len(contents) == 1:
        notes.append("unwrapped a list of one")
        return contents[0]
    if isinstance(contents, Mapping):
        key = _state_key(contents, averaged=averaged)
        if key is not None:
            if averaged and key not in AVERAGED_KEYS:
                _check_no_rival(contents, key, origin)
            rest = sorted(_label(other) for other in contents if other != key)
            notes.append(_unwrapping_note(contents, key) + (f", ignored {join(rest)}" if rest else ""))
            return contents[key]
    message = f"{origin} holds no state dict (a mapping from names to tensors): {describe(contents)}"
    raise CheckpointError("not_a_checkpoint", message)


def _unwrapping_note(contents: Mapping[object, object], key: object) -> str:
    raw = _usual_key(contents, averaged=False)
    if key in AVERAGED_KEYS and raw is not None:
        return f"unwrapped {_label(key)!r}, the averaged weights (key={raw} takes the raw ones)"
    return f"unwrapped {_label(key)!r}"


def _check_no_rival(contents: Mapping[object, object], key: object, origin: str) -> None:
    """Raise UsageError where another entry holds different weights with the same names, averaged ones for example."""
    if rival := find_rival(contents, key):
        message = f"{origin} holds two sets of weights with the same names, {_label(key)!r} and {rival!r}"
        raise UsageError(f"{message}; choose with key={_label(key)} or key={rival}")


def _usual_key(contents: Mapping[object, object], *, averaged: bool) -> str | None:
    keys = (*AVERAGED_KEYS, *STATE_KEYS) if averaged else STATE_KEYS
    nested = (key for key in keys if isinstance(contents.get(key), Mapping | list | tuple) and contents[key])
    return next(nested, None)


def _state_key(contents: Mapping[object, object], *, averaged: bool) -> object | None:
    """Return the key of the weights: a usual one, else the only key whose value is a mapping with tensors."""
    if usual := _usual_key(contents, averaged=averaged):
        return usual
    candidates = [key for key, value in contents.items() if isinstance(value, Mapping) and tensors_in(value)]
    return candidates[0] if len(candidates) == 1 else None


def _keep_tensors(contents: Mapping[object, object], digest: str, origin: str, notes: list[str]) -> Weights:
    tensors = tensors_in(contents)
    extra = {str(key): value for key, value in contents.items() if _is_extra_state(key, value)}
    other = sorted(_label(key) for key in contents if key not in tensors and key not in extra)
    if other:
        notes.append(f"ignored entries that are not tensors: {join(other)}")
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.is_quantized or tensor.is_sparse or str(tensor.layout) != "torch.strided":
            kind = "has no data" if tensor.is_meta else "is sparse or quantised"
            message = f"{origin}: tensor {_label(key)!r} {kind}; save a plain state dict of dense tensors"
            raise CheckpointError("not_a_checkpoint", message)
    named = {_name(key): tensor.detach() for key, tensor in tensors.items()}
    return Weights(named, digest, tuple(notes), _metadata(contents), extra)


def _is_extra_state(key: object, value: object) -> bool:
    return isinstance(key, str) and key.rpartition(".")[2] == _EXTRA_STATE and not isinstance(value, Tensor)


def _metadata(contents: Mapping[object, object]) -> dict[str, dict[str, object]] | None:
    """Return the versions of modules that torch stores as an attribute of a state dict, None where there are none."""
    found = getattr(contents, "_metadata", None)
    if not isinstance(found, Mapping):
        return None
    return {
        key: {name: item for name, item in value.items() if name != _ASSIGN}
        for key, value in found.items()
        if isinstance(key, str) and isinstance(value, Mapping)
    }


def describe(contents: object) -> str:
    """Return what the contents of a checkpoint are, as the end of a message."""
    if isinstance(contents, Mapping):
        return f"it is a mapping with the keys {join([_label(key) for key in contents]) or '(none)'}"
    if isinstance(contents, list | tuple):
        return f"it is a list of {len(contents)}; save one state dict to a file"
    return f"it is a {type(contents).__name__}"


def _name(key: object) -> str:
    """Return the name of a tensor as stored; a key that is not a string gets a label."""
    return key if isinstance(key, str) else _label(key)


def _label(key: object) -> str:
    """Return a printable label of a key, which may be of any type."""
    return printable(key, 60) if isinstance(key, str | int | float) else f"a key of the type {type(key).__name__}"


def join(names: Sequence[str], limit: int = 6) -> str:
    """Return the first names of a list and the number of the others."""
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
