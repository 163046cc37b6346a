"""Versions of modules in the header of a safetensors file, where torch stores them as an attribute of a state dict."""

import json
import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model_zoo.weights.rehearsal import StateDict

_ENTRY = "module_versions"


def versions_header(metadata: Mapping[str, Mapping[str, object]] | None, prefix: str = "") -> dict[str, str] | None:
    """Return header metadata of safetensors with the versions of the modules below a prefix, None where there are none.

    Values that JSON does not hold are left out.
    """
    if metadata is None:
        return None
    below = {path: value for path, value in metadata.items() if f"{path}.".startswith(prefix)}
    short = {"" if f"{path}." == prefix else path.removeprefix(prefix): value for path, value in below.items()}
    kept = {path: {str(key): item for key, item in value.items() if _is_json(item)} for path, value in short.items()}
    # readers of other libraries want the format beside any other entry
    return {"format": "pt", _ENTRY: json.dumps(kept)}


def with_versions(tensors: Mapping[str, Tensor], data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file with the versions in its header, as torch's own files give them.

    `data` are the bytes of a file that `check_safetensors` accepts. Entries of another form are ignored.
    """
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length]).get("__metadata__")
    found = _parse(header.get(_ENTRY)) if isinstance(header, Mapping) else None
    if found is None:
        return dict(tensors)
    state = StateDict(tensors)
    state._metadata = found
    return state


def _parse(text: object) -> dict[str, dict[str, object]] | None:
    try:
        found: Any = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):  # written by something else
        return None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        return None
    return found


def _is_json(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False
