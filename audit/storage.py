"""Canonical JSON, its digest, atomic writes, and memory in scratch files. Imports no torch."""

import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from weakref import WeakSet

from audit.errors import EnvironmentFault


def canonical_json(data: object) -> str:
    """Return the canonical JSON of data: sorted keys, no spaces, no NaN or infinity (ValueError).

    >>> canonical_json({"b": 0.1, "a": [1, None]})
    '{"a":[1,null],"b":0.1}'
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: object) -> str:
    """Return the sha256 of the canonical JSON of `data`, in hex."""
    return sha256(canonical_json(data).encode()).hexdigest()


def write_atomically(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write a file, or its parts, atomically (temporary file, fsync, rename): after a failure, an older one is kept.

    Raises EnvironmentFault if the folder is not writable or the disk is full.
    """
    whole = content.encode() if isinstance(content, str) else content
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.")
        with os.fdopen(handle, "wb") as file:
            file.writelines([whole] if isinstance(whole, bytes) else whole)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise EnvironmentFault(f"cannot write {path}: {error.strerror or error}") from error


_scratch_folder: ContextVar[Path | None] = ContextVar("folder of scratch files", default=None)
_mapped: WeakSet[mmap.mmap] = WeakSet()


@contextmanager
def scratch_in(folder: Path | None) -> Iterator[None]:
    """Put scratch files of the work inside into a folder if there is one, else into that of temporary files."""
    token = _scratch_folder.set(folder if folder is not None and folder.is_dir() else None)
    try:
        yield
    finally:
        _scratch_folder.reset(token)


def scratch_memory(size: int) -> mmap.mmap | None:
    """Return `size` bytes of a nameless file, which is freed with the last reference; None where there is no room.

    The system may write such memory to the disk and take it back, unlike other memory, so that it does not fill up.
    """
    with suppress(OSError), tempfile.TemporaryFile(dir=_scratch_folder.get()) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk must fail here, not kill the process later
        found = mmap.mmap(file.fileno(), size)
        _mapped.add(found)
        return found
    return None


def release_scratch() -> None:
    """Let go of the resident pages of scratch memory: its contents stay in the files and are mapped again when read."""
    for memory in list(_mapped):
        memory.madvise(mmap.MADV_DONTNEED)
