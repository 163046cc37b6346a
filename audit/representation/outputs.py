"""What modules return: tensors, tuples, dictionaries, data classes; select, copy and change one tensor of them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from audit.errors import UsageError

Index = int | str
"""The number of a value in a tuple, or its name in a dictionary or a data class."""


def parts_of(output: object) -> dict[Index, Any] | None:
    """Return the values of an output by number, or by name in dictionaries and data classes; None for a single value.

    >>> parts_of({"logits": 1.0}), parts_of(("a", "b")), parts_of(3)
    ({'logits': 1.0}, {0: 'a', 1: 'b'}, None)
    """
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if is_dataclass(output) and not isinstance(output, type):
        return {each.name: getattr(output, each.name) for each in fields(output)}
    return None


def copied(output: object) -> object:
    """Return an output whose tensors are copies, so that a later operation in place does not change them."""
    if isinstance(output, Tensor):
        return output.clone()
    parts = parts_of(output)
    if parts is None:
        return output
    kept = {name: copied(value) for name, value in parts.items()}
    return tuple(kept.values()) if isinstance(output, tuple | list) else kept


def select_tensor(output: object, layer: str, index: Index | None) -> Tensor:
    """Return the tensor at `index` of a layer's output; raises UsageError if that does not select one."""
    if isinstance(output, Tensor):
        if index is not None:
            raise UsageError(f"layer {layer!r} returns one tensor: leave out #{index}")
        return output
    parts = parts_of(output)
    if parts is None:
        raise UsageError(f"layer {layer!r} returns a {type(output).__name__}, not a tensor")
    tensors = [name for name, part in parts.items() if isinstance(part, Tensor)]
    if index is None:
        if len(parts) == 1 and tensors and isinstance(tensors[0], str):
            return parts[tensors[0]]
        known = f" ({', '.join(map(str, tensors))})" if tensors and isinstance(tensors[0], str) else ""
        first = (tensors or [0])[0]
        raise UsageError(f"layer {layer!r} returns {len(parts)} values{known}: select one, such as {layer}#{first}")
    place = index + len(parts) if isinstance(index, int) and index < 0 else index
    if isinstance(parts.get(place), Tensor):
        selected: Tensor = parts[place]
        return selected
    raise UsageError(f"layer {layer!r}: output {index} is not a tensor; tensors are at {tensors}")


def with_changed(output: object, index: Index | None, change: Callable[[Tensor], Tensor]) -> object:
    """Return an output in which the tensor at `index` is changed; an output without such a tensor as it is."""
    if isinstance(output, Tensor):
        return change(output)
    parts = parts_of(output)
    if parts is not None and index is None and len(parts) == 1:
        index = next(iter(parts))
    if parts is None or index is None:
        return output
    place = index + len(parts) if isinstance(index, int) and index < 0 else index
    changed = change(parts[place])
    if isinstance(output, tuple):
        values = tuple(changed if number == place else value for number, value in parts.items())
        return type(output)(*values) if hasattr(output, "_fields") else values
    result: Any = copy.copy(output)
    if isinstance(output, list | Mapping):
        result[place] = changed
    else:
        setattr(result, str(place), changed)
    return result
