"""Canonical JSON, its digest, and atomic writes. Imports no torch."""

import json
import os
import tempfile
from hashlib import sha256
from pathlib import Path

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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically (temporary file, fsync, rename): after a failure, an older file is unchanged.

    Raises EnvironmentFault if the folder is not writable or the disk is full.
    """
    payload = content.encode() if isinstance(content, str) else content
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise EnvironmentFault(f"cannot write {path}: {error.strerror or error}") from error
