"""Find the state dict inside a checkpoint: nested in mappings or lists, or mixed with metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from audit.errors import CheckpointError
from model_zoo.untrusted import printable

# Tried in this order; none of them holds an optimiser state or averaged weights.
STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "classifier",
    "module",
)
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Weights:
    """The named tensors of a checkpoint, the sha256 of its file, and a note for every unwrapping."""

    tensors: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...] = ()


def find_state_dict(
    contents: object, origin: str, within: Sequence[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the state dict inside the contents of a checkpoint, and a note for every level that was unwrapped.

    `within` lists keys to descend into first. Raises CheckpointError (not_a_checkpoint) where no state dict is found.
    """
    notes: list[str] = []
    for key in within:
        if not isinstance(contents, Mapping) or key not in contents:
            raise CheckpointError("not_a_checkpoint", f"{origin} has no entry {key!r}; {_describe(contents)}")
        contents = contents[key]
        notes.append(f"took the entry {key!r}")
    for _ in range(_MAX_DEPTH):
        # A usual key takes precedence: some files store scalars as tensors beside the state dict.
        if isinstance(contents, Mapping) and _usual_key(contents) is None and _tensors(contents):
            return _keep_tensors(contents, origin, notes), tuple(notes)
        contents = _step_into(contents, origin, notes)
    raise CheckpointError("not_a_checkpoint", f"{origin} nests its weights more than {_MAX_DEPTH} levels deep")


def _tensors(contents: Mapping[object, object]) -> dict[object, Tensor]:
    return {key: value for key, value in contents.items() if isinstance(value, Tensor)}


def _step_into(contents: object, origin: str, notes: list[str]) -> object:
    if isinstance(contents, list | tuple) and len(contents) == 1:
        notes.append("unwrapped a list of one")
        return contents[0]
    if isinstance(contents, Mapping):
        key = _state_key(contents)
        if key is not None:
            rest = sorted(_label(other) for other in contents if other != key)
            notes.append(f"unwrapped {_label(key)!r}" + (f", ignored {_join(rest)}" if rest else ""))
            return contents[key]
    message = f"{origin} holds no state dict (a mapping from names to tensors): {_describe(contents)}"
    raise CheckpointError("not_a_checkpoint", message)


def _usual_key(contents: Mapping[object, object]) -> str | None:
    nested = (key for key in STATE_KEYS if isinstance(contents.get(key), Mapping | list | tuple) and contents[key])
    return next(nested, None)


def _state_key(contents: Mapping[object, object]) -> object | None:
    """Return the key of the weights: a usual one, else the only key whose value is a mapping with tensors."""
    if usual := _usual_key(contents):
        return usual
    candidates = [key for key, value in contents.items() if isinstance(value, Mapping) and _tensors(value)]
    return candidates[0] if len(candidates) == 1 else None


def _keep_tensors(contents: Mapping[object, object], origin: str, notes: list[str]) -> dict[str, Tensor]:
    tensors = _tensors(contents)
    other = sorted(_label(key) for key, value in contents.items() if not isinstance(value, Tensor))
    if other:
        notes.append(f"ignored entries that are not tensors: {_join(other)}")
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.is_quantized or tensor.is_sparse or str(tensor.layout) != "torch.strided":
            kind = "has no data" if tensor.is_meta else "is sparse or quantised"
            message = f"{origin}: tensor {_label(key)!r} {kind}; save a plain state dict of dense tensors"
            raise CheckpointError("not_a_checkpoint", message)
    return {_name(key): tensor.detach() for key, tensor in tensors.items()}


def _describe(contents: object) -> str:
    if isinstance(contents, Mapping):
        return f"it is a mapping with the keys {_join([_label(key) for key in contents]) or '(none)'}"
    if isinstance(contents, list | tuple):
        return f"it is a list of {len(contents)}; save one state dict to a file"
    return f"it is a {type(contents).__name__}"


def _name(key: object) -> str:
    """Return the name of a tensor as stored; a key that is not a string gets a label."""
    return key if isinstance(key, str) else _label(key)


def _label(key: object) -> str:
    """Return a printable label of a key, which may be of any type."""
    return printable(key, 60) if isinstance(key, str | int | float) else f"a key of the type {type(key).__name__}"


def _join(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
