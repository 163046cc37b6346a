"""Files and text of unknown origin: size limits, sha256 hashes, and a printable form. Imports no torch."""

import re
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG

from audit.errors import EnvironmentFault, IntegrityError, UnsafeError

MAX_FILE_BYTES = 32 << 30  # larger than the weights of any single model
_CHUNK = 1 << 20
_MAX_COMPRESSION = 100  # data compress by more only where they are all but empty


def check_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> int:
    """Return the size of a regular file in bytes.

    Raises EnvironmentFault for a folder, pipe, device or unreadable path, and UnsafeError for a file of more than
    `max_bytes`: a sparse file takes no room on the disk and still fills the memory.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror or error}") from error
    if not S_ISREG(status.st_mode):
        message = f"cannot read {path}: it is not a file but a folder, a pipe or a device"
        raise EnvironmentFault(message + _weights_in(path))
    if status.st_size > max_bytes:
        raise UnsafeError(f"{path} has {status.st_size} bytes, more than the limit of {max_bytes}; it is not read")
    return status.st_size


def _weights_in(folder: Path) -> str:
    """Return advice to name a weights file in a folder, '' where there is none."""
    ends = (".index.json", ".safetensors", ".pth", ".pt", ".bin")
    found = [file.name for end in ends for file in sorted(folder.glob(f"*{end}"))] if folder.is_dir() else []
    return f"; name a file in it, such as {printable(found[0])}" if found else ""


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hex; raises EnvironmentFault where it cannot be read, errors of `check_file`."""
    check_file(path)
    digest = sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def verify_sha256(path: Path, expected: str = "") -> str:
    """Return the sha256 of a file after comparing it with the published and with the first-seen hash.

    `expected` may be a prefix of the published hash; the first-seen hash is read from `<path>.sha256` where that file
    exists. Raises IntegrityError where either differs.
    """
    found = file_sha256(path)
    first_seen_file = path.with_name(f"{path.name}.sha256")
    first_seen = _read_first_seen(first_seen_file) if first_seen_file.is_file() else ""
    for name, wanted in (("published", expected.lower()), ("first seen", first_seen)):
        if wanted and not found.startswith(wanted):
            message = f"{path} has sha256 {found}, not the {name} {wanted}; delete it and fetch it again"
            raise IntegrityError(message)
    return found


def _read_first_seen(path: Path) -> str:
    with path.open(errors="replace") as file:
        found = re.match(r"[0-9a-f]{64}\b", file.read(80))
    return found[0] if found else ""


def printable(text: object, max_length: int = 80) -> str:
    """Return text from a file as one short line without line breaks and terminal control codes.

    >>> printable("a\\x1b[2J\\n")
    'a?[2J?'
    """
    shown = "".join(letter if letter.isprintable() else "?" for letter in str(text)[: max_length + 1])
    return shown if len(shown) <= max_length else f"{shown[:max_length]}..."


def reason(error: Exception) -> str:
    """Return the first line of an error as printable text, or its type where it has no text."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], 160).rstrip(".")


def check_unpacked_size(unpacked: int, path: Path, harmless: int) -> None:
    """Raise UnsafeError for a file that unpacks to more than a hundred times its size and `harmless` bytes."""
    size = check_file(path)
    if unpacked > max(_MAX_COMPRESSION * size, harmless):
        message = f"{path} has {size} bytes and unpacks to {unpacked}"
        raise UnsafeError(f"{message}, more than {_MAX_COMPRESSION} times as many; it is not read")
