"""Read weights files of unknown origin without running anything in them.

The order is fixed: safetensors, then torch's restricted unpickler with two more kinds of values allowed
(argparse.Namespace and numpy scalars, which real checkpoints hold beside their tensors), then refusal. There is
no option that unpickles.
"""

import argparse
import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from audit.errors import CheckpointError, EnvironmentFault, UnsafeError
from model_zoo.containers import (
    EXPORT_ADVICE,
    check_safetensors,
    check_zip,
    pickled_globals,
    sniff,
    truncated,
)
from model_zoo.fitting import fit_weights
from model_zoo.layouts import Weights, unwrap

__all__ = ["Weights", "fit_weights", "read_contents", "read_weights", "write_safetensors"]

_SCALAR_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # the name before numpy 2
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in _SCALAR_TYPES),
]
# What a plain state dict's pickle names; anything else in a refused legacy file is worth showing.
_HARMLESS = re.compile(
    r"torch\.(\w+Storage|_utils\._rebuild_\w+|Size|device|b?float\d*|u?int\d*|nn\.parameter\.Parameter)"
    r"|collections\.OrderedDict|_codecs\.encode|argparse\.Namespace|numpy\.dtype|numpy\._?core\.multiarray\.scalar"
)
_SLACK = 1_000_000
# What torch raises for damaged or refused files, in its readers of either format.
_UNREADABLE: tuple[type[Exception], ...] = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
_UNREADABLE += (OSError, OverflowError, AssertionError, struct.error)


def read_weights(path: Path, within: Sequence[str] = ()) -> Weights:
    """Return the tensors of a weights file on the CPU, its sha256, and what was unwrapped to reach them.

    `within` names keys to step into first. Raises CheckpointError (empty, truncated, html, not_a_checkpoint),
    UnsafeError (code, compressed archives, tensors larger than the file), EnvironmentFault (no such file).
    """
    contents, digest = read_contents(path)
    tensors, notes = unwrap(contents, str(path), within)
    return Weights(tensors, digest, notes)


def read_contents(path: Path) -> tuple[object, str]:
    """Return everything a weights file holds, and the sha256 of its bytes; errors as in `read_weights`."""
    data = _read_bytes(path)
    kind = sniff(data, str(path))
    contents = _parse_safetensors(data, str(path)) if kind == "safetensors" else _unpickle(data, kind, str(path))
    _check_claims(contents, len(data), str(path))
    # The hash is of the very bytes that were parsed, not of what the path holds a moment later.
    return contents, sha256(data).hexdigest()


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write named tensors as safetensors and return the sha256 of the file.

    Raises EnvironmentFault where the file cannot be written.
    """
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}: {error.strerror or error}") from error
    return sha256(data).hexdigest()


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        beside = sorted(other.name for other in path.parent.glob("*") if other.is_file())[:6]
        hint = f"; {path.parent} holds {', '.join(beside)}" if beside else ""
        raise EnvironmentFault(f"weights file {path} does not exist{hint}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(f"cannot read weights file {path}: {error.strerror or error}") from error


def _parse_safetensors(data: bytes, origin: str) -> dict[str, Tensor]:
    check_safetensors(data, origin)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        message = f"{origin} is not a valid safetensors file ({_first_line(error)}); fetch it again"
        raise CheckpointError("not_a_checkpoint", message) from error


def _unpickle(data: bytes, kind: str, origin: str) -> object:
    """Read a torch.save file with the restricted unpickler, and turn its refusals into sentences."""
    if kind == "zip":
        check_zip(data, origin)
    with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the age of the file, which the user cannot change
        try:
            contents: object = torch.load(BytesIO(data), weights_only=True, map_location="cpu")
        except _UNREADABLE as error:
            raise _refusal(data, kind, origin, error) from error
    return contents


def _refusal(data: bytes, kind: str, origin: str, error: Exception) -> CheckpointError | UnsafeError:
    try:
        found = _offending_globals(data, kind)
    except ValueError:
        return truncated(origin, "its pickle ends too early")
    except RuntimeError:
        return truncated(origin, _first_line(error))
    if found:
        names = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        message = f"{origin} is a pickle that would import {names}, so it is not opened; {EXPORT_ADVICE}"
        return UnsafeError(message)
    reason = _first_line(error)
    if isinstance(error, EOFError) or re.search(r"EOF|truncated|corrupted|PytorchStreamReader|ran out", str(error)):
        return truncated(origin, reason or "it ends too early")
    message = f"{origin} does not hold tensors that torch's restricted reader accepts ({reason}); {EXPORT_ADVICE}"
    return CheckpointError("not_a_checkpoint", message)


def _offending_globals(data: bytes, kind: str) -> list[str]:
    if kind == "zip":
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(BytesIO(data)))
    return sorted(name for name in pickled_globals(data) if not _HARMLESS.fullmatch(name))


def _check_claims(contents: object, size: int, origin: str) -> None:
    """Raise UnsafeError for a tensor whose shape needs more bytes than the whole file has (strides of zero)."""
    stack = [contents]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            claimed = item.numel() * item.element_size()
            if claimed > size + _SLACK:
                shape = "x".join(map(str, item.shape))
                message = f"{origin} has {size} bytes, but a tensor of shape {shape} in it claims {claimed} bytes"
                raise UnsafeError(message)
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
