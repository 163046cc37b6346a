"""Read weights files of unknown origin without running anything in them.

The order is fixed: safetensors, then torch's restricted unpickler with two more kinds of values allowed
(argparse.Namespace and numpy scalars, which real checkpoints hold beside their tensors), then refusal. There is
no option that unpickles. A pickle's opcodes are read first: one that names anything else is not opened.
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
from model_zoo.sources.downloads import MOST_BYTES, check_file
from model_zoo.weights.containers import (
    EXPORT_ADVICE,
    check_safetensors,
    check_zip,
    plain,
    sniff,
    truncated,
)
from model_zoo.weights.fitting import fit_weights
from model_zoo.weights.layouts import Weights, unwrap
from model_zoo.weights.pickles import ALLOWED, check_shape, scan

__all__ = ["Weights", "fit_weights", "read_contents", "read_weights", "write_safetensors"]

_SLACK = 1_000_000
_HEAD = 2048
_OLDEST_TORCH = (2, 10)  # the restricted readers before it have known holes


def read_weights(path: Path, within: Sequence[str] = (), most: int = MOST_BYTES) -> Weights:
    """Return the tensors of a weights file on the CPU, its sha256, and what was unwrapped to reach them.

    `within` names keys to step into first; a file of more than `most` bytes is not read. Raises CheckpointError
    (empty, truncated, html, not_a_checkpoint), UnsafeError (code, compressed archives, tensors larger than the file,
    anything that would exhaust the machine), EnvironmentFault (no such file).
    """
    contents, digest = read_contents(path, most)
    tensors, notes = unwrap(contents, str(path), within)
    return Weights(tensors, digest, notes)


def read_contents(path: Path, most: int = MOST_BYTES) -> tuple[object, str]:
    """Return everything a weights file holds, and the sha256 of its bytes; errors as in `read_weights`."""
    data = _read_bytes(path, most)
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


def _read_bytes(path: Path, most: int) -> bytes:
    if not path.exists():
        beside = sorted(plain(other.name) for other in path.parent.glob("*") if other.is_file())[:6]
        hint = f"; {path.parent} holds {', '.join(beside)}" if beside else ""
        raise EnvironmentFault(f"weights file {path} does not exist{hint}")
    size = check_file(path, most)
    try:
        with path.open("rb") as file:
            # A look at the beginning first: what is no weights file is not read to its end.
            _check_head(file.read(_HEAD), size, path)
            file.seek(0)
            return file.read(size)
    except OSError as error:
        raise EnvironmentFault(f"cannot read weights file {path}: {error.strerror or error}") from error


def _check_head(head: bytes, size: int, path: Path) -> None:
    """Raise what `sniff` does; a short file of the first pickle protocols, which have no mark, is named for it."""
    try:
        sniff(head, str(path))
    except CheckpointError as error:
        if error.kind == "not_a_checkpoint" and size <= _HEAD:
            _refuse_unmarked(head, str(path))
        raise


def _refuse_unmarked(data: bytes, origin: str) -> None:
    found = scan(data, origin)
    if found.whole and found.offending:
        raise _would_import(found.offending, origin)


def _parse_safetensors(data: bytes, origin: str) -> dict[str, Tensor]:
    check_safetensors(data, origin)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # of its own kinds and torch's
        message = f"{origin} is not a valid safetensors file ({_first_line(error)}); fetch it again"
        raise CheckpointError("not_a_checkpoint", message) from error


def _unpickle(data: bytes, kind: str, origin: str) -> object:
    """Read a torch.save file with the restricted unpickler, and turn its refusals into sentences."""
    for pickled in check_zip(data, origin) if kind == "zip" else [data]:
        _check_pickle(pickled, origin)
    _check_version(origin)
    with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the age of the file, which the user cannot change
        try:
            contents: object = torch.load(BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:  # torch's readers raise a dozen kinds for damaged or refused files
            raise _refusal(origin, error) from error
    return contents


def _check_pickle(pickled: bytes, origin: str) -> None:
    found = scan(pickled, origin)
    if found.offending:
        raise _would_import(found.offending, origin)
    if not found.whole:
        raise truncated(origin, "its pickle ends too early")
    check_shape(found, origin)


def _would_import(found: Sequence[str], origin: str) -> UnsafeError:
    names = ", ".join(map(plain, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return UnsafeError(f"{origin} is a pickle that would import {names}, so it is not opened; {EXPORT_ADVICE}")


def _check_version(origin: str) -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _OLDEST_TORCH:
        message = f"{origin} is a pickle, and torch {torch.__version__} reads those less safely than 2.10 does"
        raise EnvironmentFault(f"{message}; upgrade torch, or convert the file to safetensors elsewhere")


def _refusal(origin: str, error: Exception) -> CheckpointError:
    reason = _first_line(error)
    damaged = r"EOF|truncated|corrupted|PytorchStreamReader|ran out|storage has wrong|hasRecord"
    if isinstance(error, EOFError) or re.search(damaged, str(error)):
        return truncated(origin, reason or "it ends too early")
    message = f"{origin} does not hold tensors that torch's restricted reader accepts ({reason}); {EXPORT_ADVICE}"
    return CheckpointError("not_a_checkpoint", message)


def _check_claims(contents: object, size: int, origin: str) -> None:
    """Raise UnsafeError for a tensor whose shape needs more bytes than the whole file has (strides of zero)."""
    stack, seen = [contents], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue  # containers may hold one another, or themselves
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
    return plain((str(error).strip().splitlines() or [type(error).__name__])[0], 160).rstrip(".")
