"""Read weights files of unknown origin without executing code from them.

Formats are tried in a fixed order: safetensors, then torch's restricted unpickler with two additional metadata types
(argparse.Namespace and numpy scalars); anything else is refused, and no option enables full unpickling. The opcodes of
a pickle are scanned first: a pickle that imports any other global is not opened.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from audit.errors import CheckpointError, EnvironmentFault, UnsafeError
from model_zoo.untrusted import MAX_FILE_BYTES, check_file, printable
from model_zoo.weights.contents import Weights
from model_zoo.weights.formats import EXPORT_ADVICE, check_safetensors, detect_format, read_zip_pickles, truncated
from model_zoo.weights.matching import copy_weights
from model_zoo.weights.pickles import ALLOWED, check_tuple_nesting, scan_pickles
from model_zoo.weights.shards import is_index, read_shards
from model_zoo.weights.state_dicts import choose_weights, find_weights
from model_zoo.weights.versions import with_versions

__all__ = ["Weights", "copy_weights", "read_contents", "read_weights", "write_safetensors"]

_SLACK = 1_000_000
_HEAD = 2048
_OLDEST_TORCH = (2, 10)  # earlier restricted unpicklers have known vulnerabilities


def read_weights(
    path: Path,
    within: Sequence[str] = (),
    max_bytes: int = MAX_FILE_BYTES,
    *,
    key: str = "",
    averaged: bool = True,
) -> Weights:
    """Return the tensors of a weights file on the CPU, with the sha256 of the file and notes on unwrapped levels.

    `within` lists keys to descend into first; `key` is the user's choice of an entry or a prefix (`choose_weights`);
    averaged weights are taken where the format's own loader takes them, unless `averaged` is False. A file of more
    than `max_bytes` bytes is not read. Raises CheckpointError (empty, truncated, html, not_a_checkpoint), UnsafeError
    (code, compressed archives, tensors larger than the file, resource exhaustion), UsageError (two sets of weights
    that fit equally well) and EnvironmentFault (no such file).
    """
    contents, digest = read_contents(path, max_bytes)
    if key:
        return choose_weights(contents, digest, str(path), key)
    return find_weights(contents, digest, str(path), within, averaged=averaged)


def read_contents(path: Path, max_bytes: int = MAX_FILE_BYTES) -> tuple[object, str]:
    """Return the complete contents of a weights file and the sha256 of its bytes; errors of `read_weights`.

    Of weights in several files, `path` is the index.
    """
    if is_index(path) and path.exists():
        return read_shards(path, max_bytes, read_contents)
    data = _read_bytes(path, max_bytes)
    kind = detect_format(data, str(path))
    contents = _parse_safetensors(data, str(path)) if kind == "safetensors" else _unpickle(data, kind, str(path))
    _check_tensor_sizes(contents, len(data), str(path))
    # Hash the bytes that were parsed: the file at `path` may have changed since.
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


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    if not path.exists():
        beside = sorted(printable(other.name) for other in path.parent.glob("*") if other.is_file())[:6]
        hint = f"; {path.parent} holds {', '.join(beside)}" if beside else ""
        raise EnvironmentFault(f"weights file {path} does not exist{hint}")
    size = check_file(path, max_bytes)
    try:
        with path.open("rb") as file:
            # Check the head first, so that a file of another format is not read whole.
            _check_head(file.read(_HEAD), size, path)
            file.seek(0)
            return file.read(size)
    except OSError as error:
        raise EnvironmentFault(f"cannot read weights file {path}: {error.strerror or error}") from error


def _check_head(head: bytes, size: int, path: Path) -> None:
    """Raise the errors of `detect_format`; a short pickle of protocol 0 or 1, which has no magic, is scanned first."""
    try:
        detect_format(head, str(path))
    except CheckpointError as error:
        if error.kind == "not_a_checkpoint" and size <= _HEAD:
            _refuse_unmarked_pickle(head, str(path))
        raise


def _refuse_unmarked_pickle(data: bytes, origin: str) -> None:
    found = scan_pickles(data, origin)
    if found.whole and found.unsafe_names:
        raise _import_error(found.unsafe_names, origin)


def _parse_safetensors(data: bytes, origin: str) -> dict[str, Tensor]:
    check_safetensors(data, origin)
    try:
        return with_versions(safetensors.torch.load(data), data)
    except Exception as error:  # errors of safetensors and of torch
        message = f"{origin} is not a valid safetensors file ({_first_line(error)}); fetch it again"
        raise CheckpointError("not_a_checkpoint", message) from error


def _unpickle(data: bytes, kind: str, origin: str) -> object:
    """Read a torch.save file with the restricted unpickler and convert its errors."""
    for pickled in read_zip_pickles(data, origin) if kind == "zip" else [data]:
        _check_pickle(pickled, origin)
    _check_version(origin)
    with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings about the file, which the user cannot act on
        try:
            contents: object = torch.load(BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises a dozen types for damaged or refused files
            raise _unpickling_error(origin, error) from error
    return contents


def _check_pickle(pickled: bytes, origin: str) -> None:
    found = scan_pickles(pickled, origin)
    if found.unsafe_names:
        raise _import_error(found.unsafe_names, origin)
    if not found.whole:
        raise truncated(origin, "its pickle ends too early")
    check_tuple_nesting(found, origin)


def _import_error(found: Sequence[str], origin: str) -> UnsafeError:
    names = ", ".join(map(printable, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return UnsafeError(f"{origin} is a pickle that would import {names}, so it is not opened; {EXPORT_ADVICE}")


def _check_version(origin: str) -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _OLDEST_TORCH:
        message = f"{origin} is a pickle, and torch {torch.__version__} reads pickles less safely than 2.10 does"
        raise EnvironmentFault(f"{message}; upgrade torch, or convert the file to safetensors elsewhere")


def _unpickling_error(origin: str, error: Exception) -> CheckpointError:
    reason = _first_line(error)
    damaged = r"EOF|truncated|corrupted|PytorchStreamReader|ran out|storage has wrong|hasRecord"
    if isinstance(error, EOFError) or re.search(damaged, str(error)):
        return truncated(origin, reason or "it ends too early")
    message = f"{origin} does not hold tensors that torch's restricted reader accepts ({reason}); {EXPORT_ADVICE}"
    return CheckpointError("not_a_checkpoint", message)


def _check_tensor_sizes(contents: object, size: int, origin: str) -> None:
    """Raise UnsafeError for a tensor whose shape needs more bytes than the file has (zero strides)."""
    stack, seen = [contents], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue  # containers may be cyclic
        seen.add(id(item))
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
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], 160).rstrip(".")
